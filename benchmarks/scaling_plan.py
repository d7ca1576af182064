"""The tables of docs/scaling.md, from the formulas of posttrain.costs and the file that benchmarks/scaling.py wrote.

    python benchmarks/scaling_plan.py                    # print them
    python benchmarks/scaling_plan.py --write            # put them into the page

What is said of GPUs is arithmetic: nothing was run on one. The page names the assumptions that stand here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import scaling  # noqa: E402

from posttrain import costs, forecast  # noqa: E402
from posttrain.config import ModelConfig, SamplingConfig, VLLMConfig  # noqa: E402
from posttrain.costs import Shape, Sharding  # noqa: E402
from posttrain.stages import dpo, grpo, ppo, reward_model, sft  # noqa: E402
from recipes.instructgpt import LLAMA_8B  # noqa: E402

PAGE, MEASURED = HERE.parent / "docs" / "scaling.md", HERE / "scaling.json"
GIB = 2**30

# Llama 3.1's config.json
LLAMA = {
    "8B": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336, vocabulary=128256),
    "70B": Shape(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, inner=28672, vocabulary=128256),
}

# Assumed of a GPU (an H100 SXM's data sheet) and of what is reached of it; nothing here was measured.
MEMORY, HOST_MEMORY = 80e9, 2000e9 / 8  # bytes, the host's for each of its eight GPUs
USED = 0.92  # of the memory; the rest is for the allocator, CUDA and NCCL
FLOPS, READING = 989e12, 3.35e12
EFFICIENCY = 0.35
NVLINK, NETWORK = 450e9, 400e9  # bytes a second: out of a GPU inside a host, out of a whole host, which a ring leaves once
GPUS_PER_HOST, VLLM_GPUS = 8, 8

# InstructGPT's data (arXiv 2203.02155, table 6), with lengths that are assumed
PROMPT, RESPONSE, RANKED = 256, 128, 6
SFT_ROWS, RM_ROWS, RL_PROMPTS = 12_725, 33_207, 31_144
ROWS = (32768, 16384, 8192, 4096, 2048)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One stage on so many GPUs, with the first settings that fit."""

    stage: str
    gpus: int
    file: str
    work: forecast.Work
    held: forecast.Held
    steps: int
    place: forecast.Place


def workloads(checkpointing: bool, row: int, vllm: bool) -> Iterator[tuple[str, Any, int]]:
    """(stage, workload, optimizer steps) of every stage on InstructGPT-sized data."""
    model = ModelConfig(path="model", dtype="bf16", gradient_checkpointing=checkpointing)
    budget: dict[str, Any] = {"max_tokens_per_micro_batch": row}

    def source(rows: int, length: int) -> dict[str, Any]:
        return {"rows": rows, "tokens": rows * length}

    tuned = replace(LLAMA_8B.sft, model=model, epochs=16.0, **budget)
    steps = round(SFT_ROWS * tuned.epochs / tuned.batch_size)
    yield "SFT", sft.workload(tuned, {**source(SFT_ROWS, PROMPT + RESPONSE), "optimizer steps": steps}), steps

    judge = replace(LLAMA_8B.reward_model, model=model, **budget)
    steps = round(RM_ROWS / judge.batch_size)
    ranked = {**source(RM_ROWS, PROMPT + RANKED * RESPONSE), "optimizer steps": steps}
    yield "reward model", reward_model.workload(judge, ranked), steps

    pairs = dpo.DPOConfig(model=model, reference="live", **budget)
    steps = round(RM_ROWS * pairs.epochs / pairs.batch_size)
    yield "DPO", dpo.workload(pairs, {**source(RM_ROWS, PROMPT + 2 * RESPONSE), "optimizer steps": steps}), steps

    cached = 1_000_000 if vllm else 32768  # a server's GPUs have room for all responses of a rollout beside the weights
    sampling = SamplingConfig(max_new_tokens=512, max_cached_tokens=cached, vllm=VLLMConfig(mode="server" if vllm else ""))
    group = grpo.GRPOConfig(policy=model, sampling=sampling, rollout_batch_size=1024, group_size=16, minibatch_size=256, **budget)
    yield "GRPO", grpo.workload(group, source(RL_PROMPTS, PROMPT)), group.num_iterations * group.updates_per_iteration

    full = replace(LLAMA_8B.ppo, policy=model, reward_model=model, sampling=sampling, num_iterations=500, **budget)
    yield "PPO-ptx", ppo.workload(full, source(RL_PROMPTS, PROMPT)), full.num_iterations * full.updates_per_iteration


def candidates(gpus: int) -> Iterator[tuple[str, Sharding]]:
    """Launch files with what they shard."""
    if gpus > GPUS_PER_HOST:
        yield "multi_node_zero3", Sharding(level=3, ranks=gpus)
        yield "multi_node_zero3, offload", Sharding(level=3, ranks=gpus, offload_optimizer=True, offload_weights=True)
        return
    yield "ddp", Sharding(level=0, ranks=gpus)
    yield "zero2", Sharding(level=2, ranks=gpus)
    yield "zero3", Sharding(level=3, ranks=gpus)
    yield "zero3_offload", Sharding(level=3, ranks=gpus, offload_optimizer=True, offload_weights=True)


def models_of(work: forecast.Work, shape: Shape) -> dict[str, forecast.Model]:
    return {role.name: forecast.Model(shape, shape.parameters, 2) for role in work.roles}


def fit(name: str, gpus: int, stage: str) -> Fit | None:
    """The fastest settings under which a stage fits, of those the smallest row, with offload only where nothing else does; None when
    none does."""
    fitting = [found for file, sharding in candidates(gpus) for found in fits_under(name, gpus, stage, file, sharding)]
    held_here = [found for found in fitting if not found.place.sharding.offload_weights]
    return min(held_here or fitting, key=lambda found: (hours(name, found)[0], found.work.row), default=None)


def fits_under(name: str, gpus: int, stage: str, file: str, sharding: Sharding) -> Iterator[Fit]:
    place = forecast.Place(sharding=sharding, device="cuda", memory=MEMORY * USED, host=HOST_MEMORY, beside=GPUS_PER_HOST)
    for checkpointing in (False, True):
        for row in ROWS:
            found = {label: (work, steps) for label, work, steps in workloads(checkpointing, row, vllm=name == "70B")}
            work, steps = found[stage]
            held = forecast.memory(work, models_of(work, LLAMA[name]), place)
            if row >= work.longest and forecast.fits(held, place):
                yield Fit(stage=stage, gpus=gpus, file=file, work=work, held=held, steps=steps, place=place)


def hours(name: str, found: Fit) -> tuple[float, float, float]:
    """(all of a stage, computing and sending nothing at the same time; seconds of computing and of sending in one step)."""
    work, gpus, models = found.work, found.gpus, models_of(found.work, LLAMA[name])
    sampling, compute = forecast.seconds(work, models, gpus, FLOPS, READING, EFFICIENCY)
    if is_apart(found):  # one engine over its own GPUs, which read and multiply together
        share = forecast.SAMPLING_EFFICIENCY * VLLM_GPUS
        sampling = forecast.sampling_seconds(work, models, 1, FLOPS * share, READING * share)
    sent = forecast.traffic(work, models, found.place.sharding) / (NVLINK if gpus <= GPUS_PER_HOST else NETWORK)
    return (sampling + compute + sent * found.steps) / 3600, compute / found.steps, sent


def is_apart(found: Fit) -> bool:
    """Whether a vLLM server samples, on GPUs of its own."""
    return bool(found.work.sampled and found.work.sampled.config.vllm.mode)


# --- tables


def bytes_a_parameter() -> str:
    """What one trained parameter costs on each of 8 GPUs, in bf16."""
    lines = ["| launch file | weights | gradients | masters | moments | two terms (ptx) | sum | with ptx |", "|---" * 8 + "|"]
    for file, sharding in (("ddp", Sharding(ranks=8)), ("zero2", Sharding(level=2, ranks=8)), ("zero3", Sharding(level=3, ranks=8))):
        many = 1e15  # buckets and live weights vanish beside so many
        one, two = (costs.trained_memory(many, 2, sharding, terms=terms) for terms in (1, 2))
        passing = ("reduce bucket", "weights made whole")
        sums = [sum(size for name, size in parts.items() if name not in passing) / many for parts in (one, two)]
        parts = [one.get(name, 0) / many for name in ("weights", "gradients", "masters", "moments")]
        weights = f"{parts[0]:.2f}" + (f" + {one['copies in bf16'] / many:.0f}" if "copies in bf16" in one else "")
        more = f"{sums[1] - sums[0]:.2f}"
        lines.append(f"| {file} | {weights} | {' | '.join(f'{x:.2f}' for x in parts[1:])} | {more} | {sums[0]:.2f} | {sums[1]:.2f} |")
    return "\n".join(lines)


def traffic() -> str:
    """What a process sends for an 8B model's step, by level and number of micro-batches."""
    lines = ["| launch file | enters collectives, in P parameters | GB sent, 1 micro-batch | 4 | 16 |", "|---" * 5 + "|"]
    said = {
        "ddp": "all-reduce 4P once",
        "zero2": "all-reduce 4P a micro-batch, all-gather 2P once",
        "zero3": "reduce-scatter 4P, all-gather 2 x 2P, a micro-batch",
    }
    shape = LLAMA["8B"]
    for file, sharding in (("ddp", Sharding(ranks=8)), ("zero2", Sharding(level=2, ranks=8)), ("zero3", Sharding(level=3, ranks=8))):
        volumes = [costs.communication(shape.parameters, 2, sharding, micro_batches=count) for count in (1, 4, 16)]
        lines.append(f"| {file} | {said[file]} | {' | '.join(f'{costs.sent(v, 8) / 1e9:.0f}' for v in volumes)} |")
    return "\n".join(lines)


def activations() -> str:
    """One packed row of bf16, by model, with and without gradient checkpointing."""
    lines = [
        "| model | KiB a token and layer | GiB of 8,192 tokens | with checkpointing | LM head | cache, GiB of 65,536 tokens |",
        "|---" * 6 + "|",
    ]
    from posttrain.models.logprobs import CHUNK_BYTES, KEPT_BYTES

    for name, shape in LLAMA.items():
        row = [costs.activations(shape, 8192, 2, checkpointing=checkpointing) / GIB for checkpointing in (False, True)]
        head = costs.head_memory(shape, 8192, 2, CHUNK_BYTES["cuda"], KEPT_BYTES["cuda"]) / GIB
        cache = costs.cache_memory(shape, 65536, 2) / GIB
        layer = costs.layer_activations(shape, 2) / 1024
        lines.append(f"| {name} | {layer:.0f} | {row[0]:.1f} | {row[1]:.1f} | {head:.1f} | {cache:.1f} |")
    return "\n".join(lines)


def plan(name: str) -> str:
    """Every stage of one model on 8 to 64 GPUs."""
    heads = ["stage", "GPUs", "launch file", "tokens a row", "recompute", "GiB a GPU", "host GiB a GPU", "steps"]
    heads += ["compute s a step", "sent s a step", "hours", "GPU hours"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for stage in ("SFT", "reward model", "DPO", "GRPO", "PPO-ptx"):
        for gpus in (8, 16, 32, 64):
            found = fit(name, gpus, stage)
            lines.append(f"| {stage} | {gpus} | doesn't fit{' |' * (len(heads) - 2)}" if found is None else row_of(name, found))
    return "\n".join(lines)


def row_of(name: str, found: Fit) -> str:
    total, compute, sent = hours(name, found)
    recompute = "yes" if found.work.roles[0].model.gradient_checkpointing else "no"
    devices = found.gpus + (VLLM_GPUS if is_apart(found) else 0)
    cells = [found.stage, f"{found.gpus} + {VLLM_GPUS} vLLM" if is_apart(found) else f"{found.gpus}", found.file, f"{found.work.row:,}"]
    cells += [recompute, f"{found.held.peak / GIB:.0f}", f"{found.held.host / GIB:.0f}", f"{found.steps:,}"]
    cells += [f"{compute:.1f}", f"{sent:.1f}", f"{total:.1f}", f"{total * devices:,.0f}"]
    return f"| {' | '.join(cells)} |"


def measured() -> str:
    """What CPU processes held, against the formulas as they are now."""
    found = json.loads(MEASURED.read_text())
    lines = ["| ZeRO | processes | MiB held by a rank | formula | measured over formula | the paper's formula |", "|---" * 6 + "|"]
    for point in found["zero"]:
        said = scaling.zero_formulas(point["parameters"], point["zero"], point["ranks"])
        held, formula, paper = (value / 2**20 for value in (point["held_bytes"], said["formula_bytes"], said["paper_bytes"]))
        lines.append(f"| {point['zero']} | {point['ranks']} | {held:.1f} | {formula:.1f} | {held / formula:.2f} | {paper:.1f} |")
    how = "`python benchmarks/scaling.py" + (" --quick`" if found["quick"] else "`")
    sft = [points for points in found["sweeps"].values() if points[0]["stage"] == "sft" and scaling.per_token(points, "formula_bytes")]
    grown, said = ([scaling.per_token(points, of) / 1024 for points in sft] for of in ("peak_bytes_above_model", "formula_bytes"))
    added = f"{min(grown):.0f} to {max(grown):.0f} KiB"
    text = (
        f"From {how}, on a model of {found['zero'][0]['parameters']:,} parameters. In the same run, with another model,\n"
        f"every further token of an SFT step added {added} of resident memory, whether rows grew in number or in length\n"
        f"and with 4 times the vocabulary; the formula counts {max(said):.0f} KiB of tensors, not what the allocator holds back."
    )
    return "\n".join([*lines, "", text])


TABLES = {
    "bytes a parameter": bytes_a_parameter,
    "traffic": traffic,
    "activations": activations,
    "measured": measured,
    "plan 8B": lambda: plan("8B"),
    "plan 70B": lambda: plan("70B"),
}


def block(name: str) -> re.Pattern[str]:
    """A table's place in the page."""
    return re.compile(rf"(<!-- {re.escape(name)} -->\n)([^<]*)(\n<!-- end -->)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/scaling.md")
    args = parser.parse_args()
    page = PAGE.read_text()
    for name, make in TABLES.items():
        text = make()
        print(f"{name}\n\n{text}\n")
        page = block(name).sub(lambda found, text=text: f"{found.group(1)}{text}{found.group(3)}", page)
    if args.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
