"""Cost against work: does a step stay linear in its tokens, and does ZeRO divide what its paper says it divides?

    python benchmarks/scaling.py
    python benchmarks/scaling.py --quick --json FILE      # FILE, a table .md and a picture .png beside it

One thing at a time grows: tokens in a step, the length of all rows, of one row among short ones, responses per prompt, samples
per prompt, layers, vocabulary. Each point is a process of its own. What every further token costs in memory is compared with
`posttrain.costs.activations`, which has no term in rows x longest row and none in tokens x vocabulary; it counts tensors, and what
is measured is resident memory, with what the allocator holds back. Then the same model is
trained by 1, 2 and 4 CPU processes under ZeRO 0 to 3, and what each rank holds after the last backward of its second step is
compared with `posttrain.costs.trained_memory` and with the paper's formula (arXiv 1910.02054, section 5) in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes
from pace import GIB, Side, alternate

from posttrain import costs

HERE = Path(__file__).parent
WORDS = "the cat sat on a mat and saw one more cat there"


def text(tokens: int, seed: int) -> str:
    """About so many tokens: words of a small vocabulary in a fixed disorder."""
    words = WORDS.split()
    return " ".join(words[(seed * 7 + i * i) % len(words)] for i in range(tokens))


def demonstration(tokens: int, seed: int) -> dict[str, Any]:
    half = tokens // 2
    return {"messages": [shapes.turn("user", text(half, seed)), shapes.turn("assistant", text(half, seed + 1))]}


def comparison(prompt: int, response: int, count: int, seed: int) -> dict[str, Any]:
    return {"prompt": text(prompt, seed), "responses": [text(response, seed + k) for k in range(count)]}


def sweeps(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Points of each sweep: a stage, its rows, and the shape of its model. Sweeps share their first point."""
    base, layers, vocabulary = (4, 2, 8192) if quick else (8, 4, 49152)
    grow = (1, 4) if quick else (1, 2, 4, 8)
    short = [demonstration(128, seed) for seed in range(base)]

    def sft(rows: list[dict[str, Any]], **shape: Any) -> dict[str, Any]:
        return {"stage": "sft", "data": rows, "layers": layers, "vocab_size": vocabulary, **shape}

    def many(count: int, **shape: Any) -> dict[str, Any]:
        return sft([demonstration(128, seed) for seed in range(base * count)], **shape)

    def compared(responses: int) -> dict[str, Any]:
        rows = [comparison(128, 64, responses, seed) for seed in range(base)]
        return {**sft(rows), "stage": "reward_model"}

    def sampled(group: int) -> dict[str, Any]:
        asked = [{"prompt": text(64, seed)} for seed in range(2)]
        return {**sft(asked), "stage": "grpo", "group": group, "new_tokens": 16 if quick else 64}

    return {
        "rows": [many(k) for k in grow],
        "rows, 4 x the vocabulary": [many(k, vocab_size=4 * vocabulary) for k in (grow[0], grow[-1])],
        "length of all rows": [sft([demonstration(128 * k, seed) for seed in range(base)]) for k in grow],
        "one long row beside short ones": [sft(short), sft([*short, demonstration(128 * 2 * grow[-1], 99)])],
        "responses per prompt (K)": [compared(k) for k in ((2, 8) if quick else (2, 4, 8))],
        "samples per prompt (G)": [sampled(k) for k in ((4, 16) if quick else (4, 8, 16))],
        "layers": [sft(short, layers=layers * k) for k in grow[:3]],
        "vocabulary": [sft(short, vocab_size=vocabulary * k) for k in (grow[0], 4)],
    }


def measure(point: dict[str, Any], work: Path, threads: int, steps: int) -> dict[str, Any]:
    """Time and memory of one point, in a process of its own."""
    shape = {key: point[key] for key in ("layers", "vocab_size")}
    name = "_".join(f"{key}{value}" for key, value in shape.items())
    model = shapes.model_folder(work / name, texts=[WORDS], **shape)
    rows = shapes.write(work / "rows.jsonl", point["data"])
    job = {"stage": point["stage"], "rows": rows, "count": len(point["data"]), "model": str(model), "work": str(work)}
    job |= {key: point[key] for key in ("group", "new_tokens") if key in point}
    side = Side("ours", f"side_ours:{point['stage']}", job, threads)
    alternate([side], 1, steps)
    tokens = side.steps[-1]["tokens"]
    updated = tokens - len(point["data"]) * point.get("group", 0) * point.get("new_tokens", 0)  # what was sampled is counted twice
    formula = costs.activations(model_shape(model), updated, costs.FP32)
    found = {"stage": point["stage"], "tokens": tokens, **shape, "rows": len(point["data"]), "formula_bytes": formula}
    return {**found, **side.summary(1, tokens)}


def model_shape(model: Path) -> costs.Shape:
    shape = costs.shape_of(json.loads((model / "config.json").read_text()))
    assert shape is not None
    return shape


def growth(points: list[dict[str, Any]], of: str) -> float:
    """How a cost per token changes from the first point to the last: 1 is linear, above it grows faster than the tokens."""
    return (points[-1][of] / points[-1]["tokens"]) / (points[0][of] / points[0]["tokens"])


def per_token(points: list[dict[str, Any]], of: str) -> float:
    """Bytes that every further token costs, 0 where the tokens didn't grow."""
    first, last = points[0], points[-1]
    more = last["tokens"] - first["tokens"]
    return (last[of] - first[of]) / more if more > 0.1 * first["tokens"] else 0.0


# --- ZeRO


def zero_points(model: Path, rows: str, work: Path, sizes: tuple[int, ...], levels: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every level on every number of processes, through the launcher and its files."""
    found = []
    for level in levels:
        file = HERE.parent / "accelerate_configs" / (f"cpu_zero{level}.yaml" if level else "cpu_ddp.yaml")
        for ranks in sizes:
            if level and ranks == 1:
                continue  # DeepSpeed on a CPU begins at two
            out = work / f"zero{level}_{ranks}.json"
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(ranks)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
            command = [*launch, __file__, "--rank-of", str(model), rows, str(out)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if not out.exists():
                raise SystemExit(f"ZeRO-{level} on {ranks} processes ended without a result:\n{done.stderr[-2000:]}")
            said = json.loads(out.read_text())
            found.append({"zero": level, "ranks": ranks, **said, **zero_formulas(said["parameters"], level, ranks)})
            print(f"ZeRO-{level}, {ranks} processes: {said['held_bytes'] / GIB:.2f} GiB a rank", flush=True)
    return found


def zero_formulas(parameters: int, level: int, ranks: int) -> dict[str, float]:
    """Bytes per rank in fp32: the paper's 4 for weights, 4 for gradients and 8 for Adam's moments, and what the engine holds
    where it is counted, when the last backward is done."""
    parts = costs.trained_memory(parameters, costs.FP32, costs.Sharding(level=level, ranks=ranks))
    gone = ("weights made whole", *(("reduce bucket",) if level in (0, 2) else ()))
    paper = costs.per_rank(4.0 * parameters, 4.0 * parameters, 8.0 * parameters, level, ranks)
    return {"paper_bytes": paper, "formula_bytes": sum(size for name, size in parts.items() if name not in gone)}


def one_rank(model: str, rows: str, out: Path) -> None:
    """What a rank holds before it makes its second step, in a process that the launcher started."""
    from posttrain.config import ModelConfig, OptimizerConfig
    from posttrain.data.chat import Chat
    from posttrain.data.tokenized import demonstration_trees
    from posttrain.engine import Engine
    from posttrain.estimates import count_parameters
    from posttrain.models.loading import load_causal_lm

    engine = Engine()
    engine.seed(0)
    chat = Chat.load(model, "auto", revision="")
    trees, _ = demonstration_trees(
        shapes.read(Path(rows)), chat, 8192, max_dropped_fraction=0.0, cache=out.parent / "cache", world=engine.world
    )
    policy = engine.train(load_causal_lm(ModelConfig(path=model), chat.tokenizer, seed=0), OptimizerConfig(lr=1e-6), 10, name="policy")
    held = 0
    for _ in range(2):
        batch = engine.pack(trees, 1 << 20)
        with engine.update(policy) as update:
            for micro in batch.micro_batches():
                update.backward(policy.nll(micro), over=batch.num_tokens)
            held = held_bytes()  # gradients are there, activations are gone
    everyone = engine.world.gather(held, "asking for memory")
    if engine.world.is_main:
        out.write_text(json.dumps({"parameters": count_parameters(model), "held_bytes": max(everyone)}))


def held_bytes() -> int:
    """Bytes of every tensor storage that is alive: weights, masters, gradients, optimizer states, buckets."""
    import gc

    import torch

    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]  # Python knows them when it is asked
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}.values())


# --- what is shown


def table(results: dict[str, Any]) -> str:
    heads = ["What grows", "tokens", "layers", "vocabulary", "time per token", "FLOPs per token", "KiB per further token", "formula"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, points in results["sweeps"].items():
        ends = [f"{points[0][key]:,} to {points[-1][key]:,}" for key in ("tokens", "layers", "vocab_size")]
        cells = [first if (first := end.split(" to ")[0]) == end.split(" to ")[1] else end for end in ends]
        cells += [f"{growth(points, cost):.2f} x" for cost in ("seconds_per_step", "flops_per_step")]
        measured, formula = per_token(points, "peak_bytes_above_model"), per_token(points, "formula_bytes")
        cells += [f"{measured / 1024:.0f}", f"{formula / 1024:.0f}"] if formula else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    heads = ["ZeRO", "processes", "MiB per rank", "formula", "measured over formula", "the paper's formula"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for p in results["zero"]:
        held, formula, paper = (p[name] / 2**20 for name in ("held_bytes", "formula_bytes", "paper_bytes"))
        lines.append(f"| {p['zero']} | {p['ranks']} | {held:.0f} | {formula:.0f} | {held / formula:.2f} | {paper:.0f} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds and bytes over tokens, and what ZeRO leaves on a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, points in results["sweeps"].items():
        if not per_token(points, "formula_bytes"):
            continue
        tokens = [point["tokens"] for point in points]
        axes[0].plot(tokens, [point["seconds_per_step"] for point in points], "o-", markersize=3, label=name)
        above = [(point["peak_bytes_above_model"] - points[0]["peak_bytes_above_model"]) / 2**20 for point in points]
        line = axes[1].plot(tokens, above, "o-", markersize=3)[0]
        said = [(point["formula_bytes"] - points[0]["formula_bytes"]) / 2**20 for point in points]
        axes[1].plot(tokens, said, ":", color=line.get_color())
    for axis, title in zip(axes, ("seconds per step over its tokens", "memory over tokens, MiB above the first (dotted: formula)")):
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=6, frameon=False)
    places = range(len(results["zero"]))
    axes[2].bar(places, [p["held_bytes"] / 2**20 for p in results["zero"]], color="#3b6fb6", label="measured")
    axes[2].plot(places, [p["formula_bytes"] / 2**20 for p in results["zero"]], "_", markersize=16, color="#d08a3e", label="formula")
    axes[2].plot(places, [p["paper_bytes"] / 2**20 for p in results["zero"]], "x", markersize=5, color="#444", label="the paper's")
    axes[2].set_xticks(places, [f"ZeRO-{p['zero']}\n{p['ranks']}" for p in results["zero"]], fontsize=6)
    axes[2].set_title("MiB held by a rank, by level and processes", fontsize=9)
    axes[2].legend(fontsize=6, frameon=False)
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller points, two processes at most")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", nargs=3, default=(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        model, rows, out = args.rank_of
        return one_rank(model, rows, Path(out))
    results: dict[str, Any] = {"sweeps": {}, "threads": args.threads, "quick": args.quick}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        known: dict[str, dict[str, Any]] = {}
        for name, points in sweeps(args.quick).items():
            for point in points:
                key = json.dumps(point, sort_keys=True)
                known[key] = known.get(key) or measure(point, work, args.threads, 2 if args.quick else args.steps)
                results["sweeps"].setdefault(name, []).append(known[key])
        model = shapes.model_folder(work / "zero", 2 if args.quick else 6, [WORDS], **({"vocab_size": 8192} if args.quick else {}))
        rows = shapes.write(work / "zero.jsonl", [demonstration(64, seed) for seed in range(8)])
        results["zero"] = zero_points(model, rows, work, (2,) if args.quick else (1, 2, 4), (0, 1, 2, 3))
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        args.json.with_suffix(".md").write_text(table(results) + "\n")
        draw(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
