"""What must not get slower, in about a minute: ratios inside one run, which tests/test_speed.py holds against wide margins.

    python benchmarks/regression.py
    python benchmarks/regression.py --json FILE

Two layers of SmolLM2's shape on rows made up here. SFT and DPO take turns with the plain padded loop of side_padded.py, the
sampler with transformers.generate. FLOPs are counted, so they are the same in every run, and compared with those that the
mathematics needs. What starts is measured in CPU seconds as a multiple of `import torch`. Of times the best of several counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
from limits import needed_flops, sampling, trees_of
from pace import Side, alternate, ratios

ROOT = Path(__file__).parent.parent
PARTS = ("sft", "dpo", "sampling", "start_up")
LAYERS, WARMUP, STEPS = 2, 1, 2
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wise", "owls", "count", "stars")


def text(draw: random.Random, shortest: int, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest)))


def demonstrations(count: int) -> list[dict[str, Any]]:
    """Ragged conversations: the longest of them are what a padded batch pays for."""
    draw = random.Random(0)
    return [{"messages": [shapes.turn("user", text(draw, 10, 50)), shapes.turn("assistant", text(draw, 10, 100))]} for _ in range(count)]


def comparisons(count: int) -> list[dict[str, Any]]:
    """Long prompts with two short responses, as few-shot preference data has them."""
    draw = random.Random(1)
    return [{"prompt": text(draw, 100, 150), "responses": [text(draw, 10, 40), text(draw, 10, 40)]} for _ in range(count)]


def job_of(stage: str, rows: list[dict[str, Any]], model: Path, work: Path) -> dict[str, Any]:
    path = shapes.write(work / f"{stage}_{len(rows)}.jsonl", rows)
    return {"stage": stage, "rows": path, "count": len(rows), "model": str(model), "work": str(work)}


def updates(job: dict[str, Any], work: Path, threads: int, others: tuple[str, ...] = ("padded",)) -> dict[str, Any]:
    """One stage's update against the padded loop's, and its FLOPs against those that are needed."""
    sides = {side: Side(side, f"side_{side}:{job['stage']}", job, threads) for side in ("ours", *others)}
    alternate(list(sides.values()), WARMUP, STEPS)
    trees = trees_of(job, work)
    tokens = sum(tree.num_tokens for tree in trees)
    found = {side: process.summary(WARMUP, tokens) for side, process in sides.items()}
    needed = needed_flops(trees, LAYERS, forwards_only=int(job["stage"] == "dpo"), scored=sum(tree.num_trainable for tree in trees))
    counted = found["ours"]["flops_per_step"] / needed
    against = ratios(found["ours"], found["padded"]) if "padded" in found else {}
    return {**against, "counted_over_needed": counted, "tokens": tokens, "raw": found}


def growth(few: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """How much more a token costs in a step of many rows than in one of few: 1 is linear."""
    more = many["tokens"] / few["tokens"]
    seconds = (many["raw"]["ours"]["seconds_per_step_min"], few["raw"]["ours"]["seconds_per_step_min"])
    return {"tokens": more, "seconds": seconds[0] / seconds[1] / more, "flops": many["counted_over_needed"] / few["counted_over_needed"]}


def cpu_seconds(*command: str, times: int = 2) -> float:
    """User CPU seconds of a Python process, the fewest of several."""
    best = float("inf")
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        best = min(best, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return best


def start_up() -> dict[str, float]:
    """What a command pays before it does anything, in units of `import torch`: a recipe's imports, and its --plan."""
    torch = cpu_seconds("-c", "import torch")
    with tempfile.TemporaryDirectory() as folder:
        plan = cpu_seconds("recipes/instructgpt.py", "tiny", "--plan", "--output-dir", folder)
    return {
        "torch_seconds": torch,
        "posttrain": cpu_seconds("-c", "import posttrain") / torch,
        "recipe": cpu_seconds("-c", "import recipes.instructgpt") / torch,
        "plan": plan / torch,
    }


def measure(parts: Sequence[str], threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = shapes.model_folder(work / "model", LAYERS, list(WORDS))
        if "sft" in parts:
            found["sft"] = updates(job_of("sft", demonstrations(6), model, work), work, threads)
            few = updates(job_of("sft", demonstrations(2), model, work), work, threads, others=())
            found["growth"] = growth(few, found["sft"])
        if "dpo" in parts:
            found["dpo"] = updates(job_of("dpo", comparisons(2), model, work), work, threads)
        if "sampling" in parts:
            asked = [row["messages"][0]["content"] for row in demonstrations(2)]
            found["sampling"] = sampling(model, asked, threads, new_tokens=16)
        if "start_up" in parts:
            found["start_up"] = start_up()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.parts, args.threads)
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
