"""What each ingredient of DAPO is worth, added one at a time (arXiv 2503.14476, table 1), in the tiny world.

    python benchmarks/dapo_ladder.py --seeds 0 1 2

For each seed: pretraining and a short SFT, then GRPO from the same start with 0 to 5 of the ingredients, in the paper's order.
All are measured by the verifier on held-out prompts. Writes dapo_ladder.json, .md and .png beside this file, whatever comes out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.evaluation.statistics import bootstrap_mean
from posttrain.pipeline import Pipeline
from posttrain.pipeline.runner import run_pipeline
from posttrain.stages import grpo, sft
from posttrain.stages.grpo import ALGORITHMS, GRPOConfig
from recipes.begin import at, base_model, compare
from recipes.r1 import R1, TINY_R1

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 16  # short enough that some responses are cut off, which two of the ingredients are about


def ladder() -> dict[str, GRPOConfig]:
    """GRPO as DAPO's authors start from it (without KL), and one ingredient more at each rung."""
    config = replace(
        TINY_R1.grpo,
        objective=replace(ALGORITHMS["grpo"], kl="none"),
        num_epochs=2,  # ratios leave 1, so that clipping has something to do
        sampling=replace(TINY_R1.grpo.sampling, max_new_tokens=MAX_NEW_TOKENS),
    )
    rungs = {"GRPO": config}
    config = rungs["+ overlong filtering"] = replace(config, mask_truncated=True)
    config = rungs["+ clip-higher"] = replace(config, objective=replace(config.objective, clip_high=0.28))
    config = rungs["+ soft punishment"] = replace(config, overlong_cache=MAX_NEW_TOKENS // 4)
    config = rungs["+ token-level loss"] = replace(config, objective=replace(config.objective, normalisation="token_mean"))
    rungs["+ dynamic sampling"] = replace(config, sampling_rounds=4)
    return rungs


def build(recipe: R1) -> Pipeline:
    pipeline = Pipeline("dapo_ladder", recipe.output_dir, seed=recipe.seed)
    base = base_model(pipeline, recipe)
    start = pipeline.stage("sft", sft.train, replace(recipe.sft, model=base))
    models = {"SFT": start}
    for number, (name, config) in enumerate(ladder().items()):
        models[name] = pipeline.stage(f"rung_{number}", grpo.train, replace(config, policy=at(config.policy, start)))
    evaluation = replace(recipe.evaluation, text=replace(recipe.evaluation.text, path=""), samples_per_prompt=4)
    compare(pipeline, evaluation, models, like=base)
    return pipeline


def run_seed(seed: int, output_dir: Path) -> dict[str, Any]:
    """{model: {"gold_score", "finished", "response_length", "tokens"}} of one seed."""
    recipe = replace(TINY_R1, seed=seed, output_dir=str(output_dir / f"seed_{seed}"))
    run_pipeline(build(recipe))
    folder = Path(recipe.output_dir)
    gold = json.loads((folder / "evaluation" / "results.json").read_text())["gold_score"]
    metrics = json.loads((folder / "evaluation" / "stage.json").read_text())["metrics"]
    stages = {"SFT": "sft"} | {name: f"rung_{number}" for number, name in enumerate(ladder())}
    return {
        name: {
            "gold_score": gold[name]["mean"],
            "finished": metrics[f"{name}/finished"],
            "response_length": metrics[f"{name}/response_length"],
            "tokens": json.loads((folder / stage / "stage.json").read_text())["tokens"],
        }
        for name, stage in stages.items()
    }


def summarise(seeds: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per rung: means over seeds, and the step from the rung before with a 95 % interval over seeds."""
    rows: list[dict[str, Any]] = []
    names = list(next(iter(seeds.values())))
    for before, name in zip([names[0], *names], names):
        golds = [result[name]["gold_score"] for result in seeds.values()]
        steps = [result[name]["gold_score"] - result[before]["gold_score"] for result in seeds.values()]
        interval = bootstrap_mean(steps, seed=0)
        means = {key: sum(result[name][key] for result in seeds.values()) / len(seeds) for key in ("finished", "response_length", "tokens")}
        rows.append({"model": name, "gold_scores": golds, "gold_score": sum(golds) / len(golds), **means})
        rows[-1] |= {"step": interval.mean, "steps": steps, "step_ci95": [interval.low, interval.high]}
    return rows


def write(rows: list[dict[str, Any]], seeds: list[int]) -> None:
    (HERE / "dapo_ladder.json").write_text(json.dumps({"seeds": seeds, "models": rows}, indent=2) + "\n")
    lines = ["| Model | Gold score | Step from the row above, per seed | Finished | Length | Tokens |", "|---|---|---|---|---|---|"]
    for row in rows:
        steps = f"{row['step']:+.3f} ({', '.join(f'{step:+.3f}' for step in row['steps'])})" if row is not rows[0] else ""
        lines.append(
            f"| {row['model']} | {row['gold_score']:.3f} | {steps} | {row['finished']:.0%} "
            f"| {row['response_length']:.1f} | {row['tokens'] / 1000:.0f}k |"
        )
    (HERE / "dapo_ladder.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    places = range(len(rows))
    axes.barh(places, [row["gold_score"] for row in rows], color="#7aa6c2")
    for place, row in zip(places, rows):
        axes.plot(row["gold_scores"], [place] * len(row["gold_scores"]), "o", color="#1f3b57", markersize=4)
    axes.set_yticks(places, [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("gold score on held-out prompts: mean, and each seed")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "dapo_ladder.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/dapo_ladder"))
    arguments = parser.parse_args()
    results = {seed: run_seed(seed, arguments.output_dir) for seed in arguments.seeds}
    write(summarise(results), arguments.seeds)


if __name__ == "__main__":
    main()
