"""posttrain against TRL, and against a plain padded loop: time, memory and FLOPs of one optimizer step.

    python benchmarks/compare_trl.py                     # 6 layers; --layers 30 for the size of SmolLM2-135M
    python benchmarks/compare_trl.py --quick             # 2 layers, few rows and steps: minutes
    python benchmarks/compare_trl.py --json FILE

The same machine, weights (random, SmolLM2's shape), rows (GSM8K), dtype (fp32) and optimizer. Every side has a process of
its own; they take turns step by step. Ratios are of medians over the steps after warm-up, `speed_min` of minima; memory is
the peak above imports, weights, gradients and AdamW's moments; FLOPs are counted by torch over one step more.
For SFT, TRL's padded and packed paths both run, and the faster one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import shapes
from pace import GIB, Side, alternate, ratios

HERE = Path(__file__).parent
GROUP = 8


def jobs(data: Path, work: Path, rows: int, quick: bool) -> dict[str, dict[str, Any]]:
    """What is compared: for each stage its rows, and how many of them make a step."""
    few = 2 if quick else max(1, rows // 4)
    made = {
        "sft": (shapes.demonstrations(data, rows), {"count": rows}),
        "dpo": (shapes.comparisons(data, few, 2), {"count": few}),
        "reward_model": (shapes.comparisons(data, few, 2), {"count": few}),
        # their six pairs of long rows would not fit in 24 GB of memory otherwise
        "reward_model_k4": (shapes.comparisons(data, max(1, few // 2), 4), {"count": max(1, few // 2)}),
        "grpo": (shapes.prompts(data, 2), {"count": 2, "group": GROUP, "new_tokens": 32 if quick else 128}),
    }
    return {name: {"stage": name, "rows": shapes.write(work / f"{name}.jsonl", rows), **sizes} for name, (rows, sizes) in made.items()}


def real_tokens(job: dict[str, Any]) -> int:
    """Tokens of a step's rows as they are, every dialogue written out, without padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    total = 0
    for row in shapes.read(Path(job["rows"])):
        dialogues = [row["messages"]] if "messages" in row else [dialogue(row["prompt"], text) for text in row.get("responses", [])]
        total += sum(len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in dialogues)
        if "group" in job:
            asked = tokenizer.apply_chat_template([shapes.turn("user", row["prompt"])], add_generation_prompt=True, return_dict=False)
            total += job["group"] * (len(asked) + job["new_tokens"])
    return total


def dialogue(prompt: str, response: str) -> list[dict[str, str]]:
    return [shapes.turn("user", prompt), shapes.turn("assistant", response)]


def compare(name: str, job: dict[str, Any], warmup: int, steps: int, threads: int) -> dict[str, Any]:
    """One stage on all sides."""
    function = name.removesuffix("_k4")
    sides = {"ours": f"side_ours:{function}", "trl": f"side_trl:{function}", "padded": f"side_padded:{function}"}
    if function == "sft":
        sides["trl_packed"] = "side_trl:sft_packed"
    started = {side: Side(side, where, job, threads) for side, where in sides.items()}
    alternate(list(started.values()), warmup, steps)
    found = {side: process.summary(warmup, job["tokens"]) for side, process in started.items()}
    trl = min((found[side] for side in found if side.startswith("trl")), key=lambda numbers: numbers["seconds_per_step"])
    return {
        "vs_trl": ratios(found["ours"], trl),
        "vs_padded": ratios(found["ours"], found["padded"]),
        "raw": found,
        "tokens_per_step": job["tokens"],
        "rows_per_step": job["count"],
    }


def table(results: dict[str, Any]) -> str:
    """The ratios as a markdown table."""
    head = (
        "| Stage | Against | Speed (medians) | Speed (minima) | Memory | FLOPs | s/step: ours, theirs | Peak GiB above the model |\n"
        + "|---" * 8
        + "|"
    )
    lines = [head]
    for name, found in results.items():
        for other, label in (("trl", "TRL"), ("padded", "padded loop")):
            ratio, raw = found[f"vs_{other}"], found["raw"]
            theirs = min((raw[side] for side in raw if side.startswith(other)), key=lambda numbers: numbers["seconds_per_step"])
            ours = raw["ours"]
            cells = [
                name,
                label,
                f"{ratio['speed']:.2f} x",
                f"{ratio['speed_min']:.2f} x",
                f"{ratio['memory']:.2f} x",
                f"{ratio['flops']:.2f} x",
            ]
            cells.append(f"{ours['seconds_per_step']:.2f}, {theirs['seconds_per_step']:.2f}")
            cells.append(f"{ours['peak_bytes_above_model'] / GIB:.2f}, {theirs['peak_bytes_above_model'] / GIB:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed, memory and FLOPs against both, stage by stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    kinds = (("speed", "speed: times theirs"), ("memory", "peak memory: share of theirs"), ("flops", "FLOPs: share of theirs"))
    for axis, (kind, title) in zip(axes, kinds):
        for offset, (other, label, colour) in enumerate((("vs_trl", "TRL", "#3b6fb6"), ("vs_padded", "padded loop", "#d08a3e"))):
            heights = [found[other][kind] for found in results.values()]
            bars = axis.bar([i + 0.4 * offset for i in range(len(results))], heights, width=0.38, label=label, color=colour)
            axis.bar_label(bars, fmt="%.2g", fontsize=7)
        axis.axhline(1.0, color="#888", linewidth=0.8)
        axis.set_xticks([i + 0.2 for i in range(len(results))], [name.replace("_", "\n") for name in results], fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, 4 rows, 3 steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16, help="demonstrations per SFT step; a fourth of it comparisons")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after 2 of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stages", nargs="*", default=[], help="only these; the file of --json keeps the others")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "gsm8k")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers, rows, steps = (2, 4, 3) if args.quick else (args.layers, args.rows, args.steps)
    is_a_part = args.stages and args.json and args.json.exists()
    results = json.loads(args.json.read_text()) if is_a_part else {}
    results["machine"] = {"threads": args.threads, "layers": layers, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = [row["question"] + row["answer"] for row in shapes.read(args.data / "train.jsonl")]
        model = shapes.model_folder(work / "model", layers, texts)
        for name, job in jobs(args.data, work, rows, args.quick).items():
            if args.stages and name not in args.stages:
                continue
            job |= {"model": str(model), "work": folder}
            job["tokens"] = real_tokens(job)
            results[name] = compare(name, job, 1 if args.quick else 2, steps, args.threads)
            print(table({name: results[name]}), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    compared = {name: found for name, found in results.items() if name != "machine"}
    print(table(compared))
    if args.json:
        args.json.with_suffix(".md").write_text(table(compared) + "\n")
        draw(compared, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
