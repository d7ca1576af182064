"""How near each stage's update is to what the machine can do, and sampling to what its memory can read.

    python benchmarks/limits.py                  # 6 layers; --layers 30 for the size of SmolLM2-135M
    python benchmarks/limits.py --quick --json FILE

The peak is that of an fp32 matrix product, measured here. Only FLOPs that the mathematics needs are counted: forward and
twice that backward for every token of the forest in the trunk, for every scored token in the head, and for every pair of
tokens that see each other in attention; what an implementation computes again counts as waste. A step that samples has its
own limit: every weight is read once for each step of decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shapes
from compare_trl import HERE, jobs, real_tokens
from pace import Side, alternate

GROUP, NEW_TOKENS, PROMPTS = 8, 128, 2


def gemm_peak() -> float:
    """FLOP/s of fp32 matrix products (rows, 576) x (576, 1536) and square ones, the best of many."""
    import torch

    best = 0.0
    for m, k, n in ((2048, 576, 1536), (2048, 1536, 576), (1536, 1536, 1536), (2048, 2048, 2048)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        for _ in range(8):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * m * k * n / (time.perf_counter() - began))
    return best


def read_rate(gigabytes: float = 1.0) -> float:
    """Bytes per second at which a matrix-vector product reads its matrix from memory."""
    import torch

    matrix, vector = torch.randn(int(gigabytes * 1e9) // 4 // 4096, 4096), torch.randn(4096)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        matrix @ vector
        best = max(best, matrix.numel() * 4 / (time.perf_counter() - began))
    return best


def needed_flops(trees: Sequence[Any], layers: int, *, forwards_only: int = 0, scored: int = 0) -> float:
    """FLOPs of one update over `trees`, and of `forwards_only` passes without gradient; `scored` tokens go through the LM head."""
    d, heads, kv, inner = (
        shapes.SHAPE[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    per_token = 2 * layers * (2 * d * d + 2 * d * (d // heads) * kv + 3 * d * inner)
    tokens, pairs = 0, 0
    for tree in trees:
        for segment in tree.segments:
            length, before = len(segment), 0 if segment is tree.root else len(tree.root)
            tokens += length
            pairs += length * before + length * (length + 1) // 2
    forward = tokens * per_token + 4 * layers * d * pairs + 2 * scored * d * shapes.SHAPE["vocab_size"]
    return (3 + forwards_only) * forward


def trained_rows(job: dict[str, Any], layers: int, work: Path, warmup: int, steps: int, threads: int) -> dict[str, float]:
    """An update of a stage that trains on rows: a whole step."""
    name = job["stage"]
    side = Side("ours", f"side_ours:{name.removesuffix('_k4')}", job, threads)
    alternate([side], warmup, steps)
    trees = trees_of(job, work)
    scored = 0 if name.startswith("reward_model") else sum(tree.num_trainable for tree in trees)
    flops = needed_flops(trees, layers, forwards_only=int(name == "dpo"), scored=scored)
    found = side.summary(warmup, job["tokens"])
    return {"needed_flops": flops, "seconds": found["seconds_per_step"], "counted_over_needed": found["flops_per_step"] / flops}


def trained_rollouts(job: dict[str, Any], layers: int, warmup: int, steps: int, threads: int) -> dict[str, float]:
    """The updates of a stage that samples, without the sampling: of the policy, and in PPO of the critic too."""
    from transformers import AutoTokenizer

    from posttrain.packing import Tree, segment

    side = Side("ours", f"side_ours:{job['stage']}", job, threads)
    for _ in range(warmup + steps):
        side.step()
    side.end()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    response = segment([0] * job["new_tokens"])
    trees = []
    for row in shapes.read(Path(job["rows"])):
        asked = tokenizer.apply_chat_template([shapes.turn("user", row["prompt"])], add_generation_prompt=True, return_dict=False)
        trees.append(Tree(segment(asked), (response,) * job.get("group", 1)))
    flops = needed_flops(trees, layers, scored=job["new_tokens"] * sum(len(tree.children) for tree in trees))
    if job["stage"] == "ppo":
        flops += needed_flops(trees, layers)
    return {"needed_flops": flops, "seconds": side.phase_seconds("update", warmup)}


def sampling(model: Path, prompts: list[str], threads: int, new_tokens: int) -> dict[str, float]:
    """Tokens per second of our sampler and of transformers.generate, taking turns, and the bound that memory sets."""
    import torch

    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM

    from posttrain.config import ModelConfig, SamplingConfig
    from posttrain.data.chat import Chat
    from posttrain.engine import Engine
    from posttrain.models.loading import load_causal_lm
    from posttrain.rollout.local import sample

    engine = Engine()
    chat = Chat.load(str(model), "auto", revision="")
    ids = [chat.tokenizer.apply_chat_template([shapes.turn("user", p)], add_generation_prompt=True, return_dict=False) for p in prompts]
    packed = engine.freeze(load_causal_lm(ModelConfig(path=str(model)), chat.tokenizer), name="policy")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = SamplingConfig(max_new_tokens=new_tokens)
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids]).repeat_interleave(GROUP, 0)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]).repeat_interleave(GROUP, 0)

    def ours() -> None:
        sample(packed, ids, config, world=engine.world, seed=0, stop_ids=[], samples_per_prompt=GROUP)

    def theirs() -> None:
        with torch.no_grad():
            plain.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, top_k=0
            )

    seconds = taking_turns([ours, theirs], warmup=1, times=3)
    weights = sum(p.numel() for p in plain.parameters()) * 4
    rows = GROUP * len(ids)
    bound = rows * read_rate() / weights
    return {
        "tokens_per_second": rows * new_tokens / seconds[0],
        "generate_tokens_per_second": rows * new_tokens / seconds[1],
        "speed_vs_generate": seconds[1] / seconds[0],
        "bound_tokens_per_second": bound,
        "share_of_bound": rows * new_tokens / seconds[0] / bound,
    }


def taking_turns(calls: Sequence[Callable[[], None]], warmup: int, times: int) -> list[float]:
    """Median seconds of each call, one after the other in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + times):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[place].append(time.perf_counter() - began)
    return [statistics.median(values) for values in seconds]


def ppo_job(data: Path, work: Path, quick: bool) -> dict[str, Any]:
    """As many responses as GRPO's, each to a prompt of its own."""
    rows = shapes.prompts(data, PROMPTS * GROUP)
    return {"stage": "ppo", "rows": shapes.write(work / "ppo.jsonl", rows), "count": len(rows), "new_tokens": 32 if quick else NEW_TOKENS}


def trees_of(job: dict[str, Any], work: Path) -> list[Any]:
    """The rows of a job as the stage reads them."""
    from posttrain.data.chat import Chat
    from posttrain.data.tokenized import comparison_trees, demonstration_trees
    from posttrain.engine import Engine

    chat = Chat.load(job["model"], "auto", revision="")
    make = comparison_trees if "responses" in (rows := shapes.read(Path(job["rows"])))[0] else demonstration_trees
    return make(rows, chat, 8192, max_dropped_fraction=0.0, cache=work / "cache", world=Engine().world)[0]


def table(results: dict[str, Any]) -> str:
    lines = ["| Update | Share of the GEMM peak | Seconds | FLOPs counted over FLOPs needed |", "|---|---|---|---|"]
    for name, found in results["stages"].items():
        counted = f"{found['counted_over_needed']:.2f}" if "counted_over_needed" in found else ""
        lines.append(f"| {name} | {found['share_of_peak']:.0%} | {found['seconds']:.2f} | {counted} |")
    s = results["sampling"]
    lines.append(
        f"\nSampling, {PROMPTS} prompts x {GROUP}: {s['tokens_per_second']:.0f} tokens/s, {s['share_of_bound']:.0%} of the bound "
        f"({s['bound_tokens_per_second']:.0f}), {s['speed_vs_generate']:.2f} x transformers.generate"
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Each update's share of the GEMM peak, and the sampler beside generate and beside its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2), layout="constrained")
    stages, sampled = results["stages"], results["sampling"]
    bars = left.bar(
        [name.replace("_", "\n") for name in stages], [100 * found["share_of_peak"] for found in stages.values()], color="#3b6fb6"
    )
    left.bar_label(bars, fmt="%.0f", fontsize=8)
    left.set_ylim(0, 100)
    left.set_title("update: % of the fp32 GEMM peak", fontsize=9)
    kinds = {"generate": "generate_tokens_per_second", "posttrain": "tokens_per_second", "reading the weights": "bound_tokens_per_second"}
    bars = right.bar(list(kinds), [sampled[kind] for kind in kinds.values()], color=["#d08a3e", "#3b6fb6", "#999999"])
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set_title("sampling: tokens/s", fontsize=9)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, 4 rows, 3 steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--stages", nargs="*", default=[], help="only the updates of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "gsm8k")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers, rows, steps = (2, 4, 3) if args.quick else (args.layers, args.rows, args.steps)

    import torch

    torch.set_num_threads(args.threads)
    peak = gemm_peak()
    results: dict[str, Any] = {"gemm_peak_flops": peak, "layers": layers, "threads": args.threads, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = [row["question"] + row["answer"] for row in shapes.read(args.data / "train.jsonl")]
        model = shapes.model_folder(work / "model", layers, texts)
        scalar = shapes.scalar_folder(work / "scalar", model)
        warmup = 1 if args.quick else 2
        for name, job in (jobs(args.data, work, rows, args.quick) | {"ppo": ppo_job(args.data, work, args.quick)}).items():
            if args.stages and name not in args.stages:
                continue
            job |= {"model": str(model), "scalar": str(scalar), "work": folder}
            if "new_tokens" in job:
                found = trained_rollouts(job, layers, warmup, steps, args.threads)
            else:
                job["tokens"] = real_tokens(job)
                found = trained_rows(job, layers, work, warmup, steps, args.threads)
            results["stages"][name] = {**found, "share_of_peak": found["needed_flops"] / found["seconds"] / peak}
        asked = [row["prompt"] for row in shapes.prompts(args.data, PROMPTS)]
        results["sampling"] = sampling(model, asked, args.threads, 32 if args.quick else NEW_TOKENS)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        args.json.with_suffix(".md").write_text(table(results) + "\n")
        draw(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
