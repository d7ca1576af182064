"""What a stage will hold, send and take in time on this launch: the formulas of posttrain.costs applied to the files of its models.

Memory is arithmetic. Time is a guess: of the speed of one matrix product on this device a training step is taken to reach
EFFICIENCY, and sampling SAMPLING_EFFICIENCY of what that and the speed of memory allow; both were measured by benchmarks/limits.py
on a CPU, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import costs
from posttrain.config import ModelConfig, SamplingConfig, replace
from posttrain.costs import Shape, Sharding, Tokens
from posttrain.estimates import count_parameters, rows_and_tokens
from posttrain.models.described import config_of
from posttrain.speed import matmul_flops, read_rate

EFFICIENCY, SAMPLING_EFFICIENCY = 0.6, 0.33
GIB = 2**30
MOST_PROCESSES = 512  # that are tried when something doesn't fit


@dataclass(frozen=True, kw_only=True)
class Role:
    """One of a stage's models. `trained` and `read` are the tokens, over all processes and the whole stage, that pass through it with
    and without a gradient; `shares_base` says that it is an adapter over the base of the stage's first role."""

    name: str
    model: ModelConfig
    is_trained: bool = True
    is_scalar: bool = False
    ema: bool = False
    terms: int = 1
    shares_base: bool = False
    trained: Tokens = Tokens()
    read: Tokens = Tokens()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How the first role samples: `responses` in one rollout over all processes, `rollouts` of them, prompts of `prompt` tokens."""

    config: SamplingConfig
    responses: int
    rollouts: int
    prompt: float
    longest_prompt: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a stage does. `row` is max_tokens_per_micro_batch and `longest` the smallest that it may be; `update` are the tokens
    of one optimizer step over all processes."""

    roles: tuple[Role, ...]
    row: int
    longest: int
    update: float
    sampled: Sampled | None = None
    copies_checkpoints: bool = True


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stage runs: `memory` bytes of a process's device; `beside` processes share a machine, each `host` bytes of its memory."""

    sharding: Sharding
    device: str = "cpu"
    memory: float = 0.0
    host: float = 0.0
    beside: int = 1


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one process: by part while updating, in all while sampling, and on the host."""

    updating: Mapping[str, float] = field(default_factory=dict)
    sampling: float = 0.0
    host: float = 0.0

    @property
    def peak(self) -> float:
        return max(sum(self.updating.values()), self.sampling)


@dataclass(frozen=True)
class Model:
    """What a model's files say, and the bytes of one of its weights on a device."""

    shape: Shape
    parameters: int
    weight_bytes: int


def forecast(work: Work) -> dict[str, Any]:
    """{"parameters", "memory", "on disk", "sent", "time", "warning"}, those that there is something to say of. Where a model's
    shape isn't known yet, that is said instead."""
    described = {role.name: found for role in work.roles if (found := described_by(role.model))}
    for path in sorted({role.model.path for role in work.roles if role.name not in described}):
        return {"memory": f"known when {path} has run" if path.startswith("@") else f"unknown, as {path!r} has no config.json to be read"}
    place = here()
    known = {role.name: Model(*described[role.name], weight_bytes(role.model, place.device)) for role in work.roles}
    first, held = known[work.roles[0].name], memory(work, known, place)
    lines: dict[str, Any] = {"parameters": first.parameters, "memory": said_of_memory(held, place)}
    lines["on disk"] = f"{size(on_disk(work, known, place.sharding))} a checkpoint"
    if place.sharding.ranks > 1:
        lines["sent"] = f"{size(traffic(work, known, place.sharding))} by each process in an optimizer step of every trained model"
    if any(role.trained.count for role in work.roles):
        lines["time"] = said_of_time(work, known, place.sharding.ranks)
    if not fits(held, place):
        lines["warning"] = f"more than there is; {remedy(work, known, place)}"
    return lines


def trees_of(found: Mapping[str, Any], times: float, *, window: int = 0, head: str = "") -> Tokens:
    """All tokens of a source (`rows_and_tokens`), read so many times, as trees of its mean length or as windows; nothing where they
    aren't known. `head` says what is asked of the LM head: "scored", "summed" or nothing."""
    if "tokens" not in found:
        return Tokens()
    length = window or found["tokens"] / found["rows"]
    return costs.tree(length, **({head: length} if head else {})) * (found["tokens"] / length * times)


def sampled(config: Any, size: Mapping[str, Any]) -> Sampled:
    """How a stage samples that has `prompts`, `sampling`, `max_prompt_length`, `num_iterations` and `rollout_batch_size`; where prompts
    aren't known, they are taken to be as long as they may be."""
    prompt = size["tokens"] / size["rows"] if "tokens" in size else config.max_prompt_length
    return Sampled(
        config=config.sampling,
        responses=config.rollout_batch_size,
        rollouts=config.num_iterations,
        prompt=prompt,
        longest_prompt=config.max_prompt_length,
    )


def rollouts_plan(config: Any, workload: Callable[[Any, Mapping[str, Any]], Work]) -> dict[str, Any]:
    """What --plan says of PPO and GRPO (see `sampled`): prompts, an upper bound on tokens, steps, memory and time."""
    size = rows_and_tokens(config.prompts, "prompt", config.policy.path)
    work = workload(config, size)
    if "tokens" in size:
        tokens = sum(role.trained.count + role.read.count for role in work.roles)
        size = {"prompts": size["rows"], "optimizer steps": config.num_iterations * config.updates_per_iteration}
        size["tokens at most"] = round(tokens)
    return size | forecast(work)


# --- what is known


def described_by(config: ModelConfig) -> tuple[Shape, int] | None:
    """A model's shape and number of parameters, by its config.json and the heads of its weights where they are on this disk; None
    for the output of a stage that hasn't run, a hub model that can't be asked for, and other kinds of models."""
    folder = Path(config.path).expanduser()
    if not config.path or config.path.startswith("@"):
        return None
    if (folder / "adapter_config.json").is_file():
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return described_by(ModelConfig(path=str(named or "")))
    shape = costs.shape_of(config_of(config))
    return (shape, count_parameters(config.path) or shape.parameters) if shape else None


def weight_bytes(config: ModelConfig, device: str) -> int:
    """Bytes of one weight as `posttrain.models.loading.compute_dtype` has it."""
    dtype = config.dtype if config.dtype != "auto" else "bf16" if device == "cuda" else "fp32"
    return 2 if dtype == "bf16" else 4


def here() -> Place:
    """This launch and this machine."""
    import torch

    from posttrain.engine.launch import read_launch

    launch, ranks = read_launch(), int(os.environ.get("WORLD_SIZE", "1"))
    away = dict(offload_optimizer=launch.offload_optimizer != "none", offload_weights=launch.offload_param != "none")
    sharding = Sharding(level=launch.zero_stage, ranks=ranks, **away)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / beside
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return Place(sharding=sharding, device="cuda", memory=memory, host=share, beside=beside)
    return Place(sharding=sharding, memory=share, host=share, beside=beside)


# --- memory


def memory(work: Work, models: Mapping[str, Model], place: Place) -> Held:
    """What one process holds at most. Models are updated one after the other, and nobody samples meanwhile."""
    parts = {role.name: role_memory(role, models[role.name], place.sharding) for role in work.roles}
    host = sum(part.pop("host", 0.0) for part in parts.values())
    staying = {role.name: staying_memory(parts[role.name], role, models[role.name], place.sharding) for role in work.roles}
    peaks = []
    for role in work.roles:
        model = models[role.name]
        passing = sum(parts[role.name].values()) - staying[role.name]
        if role.is_trained:
            row = row_memory(role, model, fullest_row(work, place.sharding.ranks), place)
            peaks.append({**staying, "gradients and buffers": passing, **row})
    updating = max(peaks, key=lambda peak: sum(peak.values()))
    copied = checkpoint_copies(work, models, place)
    if place.device == "cpu":
        updating, host = {**updating, "offloaded": host, "copy for a checkpoint": copied}, 0.0
    sampling = sum(staying.values()) + sampling_memory(work, models, place) if work.sampled else 0.0
    return Held(updating={name: part for name, part in updating.items() if part}, sampling=sampling, host=host + copied)


def own_setting(role: Role, model: Model, sharding: Sharding) -> tuple[int, int, Sharding]:
    """(parameters, bytes of a weight, sharding) of what is trained in a model; adapters are never sharded."""
    if role.model.adapter.rank:
        return costs.adapter_parameters(model.shape, role.model.adapter.rank), 4, replace(sharding, level=0)
    return model.parameters, model.weight_bytes, sharding


def role_memory(role: Role, model: Model, sharding: Sharding) -> dict[str, float]:
    """What a model holds in updates, by part."""
    p, b, adapter = model.parameters, model.weight_bytes, role.model.adapter
    if not adapter.rank:
        if not role.is_trained:
            return costs.frozen_memory(p, b, sharding)
        return costs.trained_memory(p, b, sharding, ema=role.ema, terms=role.terms, largest=model.shape.table)
    linear = model.shape.trunk if adapter.quantize == "nf4" else 0
    base = costs.frozen_memory(p, (linear * costs.NF4 + (p - linear) * b) / p, sharding)
    own, width, whole = own_setting(role, model, sharding)
    above = costs.trained_memory(own, width, whole, ema=role.ema, terms=role.terms) if role.is_trained else {"weights": float(width * own)}
    return above if role.shares_base else {name: above.get(name, 0.0) + base.get(name, 0.0) for name in {**above, **base}}


def staying_memory(parts: Mapping[str, float], role: Role, model: Model, sharding: Sharding) -> float:
    """What of these parts is still held between updates."""
    _, width, own = own_setting(role, model, sharding)
    return sum(costs.between_updates(parts, costs.effective_level(own.level, width)).values())


def micro_batches(work: Work, ranks: int) -> int:
    """Packed rows of each process in one optimizer step; the fewest that hold it."""
    return max(1, -(-round(work.update) // (work.row * ranks)))


def fullest_row(work: Work, ranks: int) -> int:
    """Tokens in a packed row: an equal part of a step, but at least the longest element, and the whole budget where a step isn't known."""
    part = round(work.update / (micro_batches(work, ranks) * ranks))
    return min(work.row, max(part, work.longest)) if work.update else work.row


def row_memory(role: Role, model: Model, tokens: int, place: Place) -> dict[str, float]:
    """What one packed row adds in an update."""
    from posttrain.models.logprobs import CHUNK_BYTES, KEPT_BYTES

    autocast = model.weight_bytes == 2 and (place.sharding.level == 0 or role.model.adapter.rank > 0)
    checkpointing = role.model.gradient_checkpointing
    row = costs.activations(model.shape, tokens, model.weight_bytes, checkpointing=checkpointing, autocast=autocast)
    whole = not role.model.adapter.rank
    logits = CHUNK_BYTES[place.device], KEPT_BYTES[place.device]
    head = 0.0 if role.is_scalar else costs.head_memory(model.shape, tokens, model.weight_bytes, *logits, is_trained=whole)
    return {f"activations of {tokens:,} tokens": row, "LM head": head}


def sampling_memory(work: Work, models: Mapping[str, Model], place: Place) -> float:
    """What the first role's sampling adds on one process; a vLLM beside or elsewhere has memory of its own."""
    assert work.sampled is not None
    first, sampling = models[work.roles[0].name], work.sampled.config
    if sampling.vllm.mode:
        return 0.0
    longest = work.sampled.longest_prompt + sampling.max_new_tokens
    side_by_side = min(sampling.max_cached_tokens // longest, -(-work.sampled.responses // place.sharding.ranks))
    return costs.sampling_memory(first.shape, first.parameters, side_by_side * longest, first.weight_bytes, place.sharding)


def checkpoint_copies(work: Work, models: Mapping[str, Model], place: Place) -> float:
    """Bytes of the copy from which a checkpoint is written while training goes on."""
    trained = [(role, own_setting(role, models[role.name], place.sharding)) for role in work.roles if role.is_trained]
    copies = [costs.checkpoint_copy(*setting, ema=role.ema, beside=place.beside) for role, setting in trained]
    return sum(copies) if work.copies_checkpoints else 0.0


def on_disk(work: Work, models: Mapping[str, Model], sharding: Sharding) -> float:
    """Bytes of one checkpoint of all trained models."""
    trained = [role for role in work.roles if role.is_trained]
    return sum(costs.checkpoint_bytes(*own_setting(role, models[role.name], sharding), ema=role.ema) for role in trained)


def traffic(work: Work, models: Mapping[str, Model], sharding: Sharding) -> float:
    """Bytes that each process sends while every trained model makes one step."""
    count, total = micro_batches(work, sharding.ranks), 0.0
    for role in work.roles:
        if role.is_trained:
            setting = own_setting(role, models[role.name], sharding)
            checkpointing = role.model.gradient_checkpointing
            volumes = costs.communication(*setting, micro_batches=count, terms=role.terms, checkpointing=checkpointing)
            if sharding.level == 3 and role.model.adapter.rank:
                volumes["all_gather"] = 2.0 * models[role.name].parameters * models[role.name].weight_bytes * count
            total += costs.sent(volumes, sharding.ranks)
    return total


# --- what doesn't fit


def fits(held: Held, place: Place) -> bool:
    return held.peak <= place.memory and held.host <= place.host


def remedy(work: Work, models: Mapping[str, Model], place: Place) -> str:
    """The first settings with which it would fit, the cheapest ones tried first."""
    for changes, other, setting in remedies(work, place):
        if fits(memory(other, models, setting), setting):
            return f"{', '.join(changes)} would fit"
    return "nothing that was tried would fit"


def remedies(work: Work, place: Place) -> Iterator[tuple[list[str], Work, Place]]:
    changes: list[str] = []
    if not all(role.model.gradient_checkpointing for role in work.roles if role.is_trained):
        roles = tuple(replace(role, model=replace(role.model, gradient_checkpointing=True)) for role in work.roles)
        changes, work = ["gradient_checkpointing=True"], replace(work, roles=roles)
        yield changes, work, place
    if work.row > work.longest:
        changes, work = [*changes, f"max_tokens_per_micro_batch={work.longest}"], replace(work, row=work.longest)
        yield changes, work, place
    if work.sampled:
        longest = work.sampled.longest_prompt + work.sampled.config.max_new_tokens
        config = replace(work.sampled.config, max_cached_tokens=16 * longest)
        if config.max_cached_tokens < work.sampled.config.max_cached_tokens:
            changes = [*changes, f"max_cached_tokens={config.max_cached_tokens}"]
            work = replace(work, sampled=replace(work.sampled, config=config))
            yield changes, work, place
    own, folder = place.sharding, "accelerate_configs/" + ("" if place.device == "cuda" else "cpu_")
    if own.ranks > 1 and own.level < 3:
        yield [*changes, f"{folder}zero3.yaml"], work, replace(place, sharding=replace(own, level=3))
    if place.device == "cuda":
        offloaded = Sharding(level=3, ranks=own.ranks, offload_optimizer=True, offload_weights=True)
        yield [*changes, f"{folder}zero3_offload.yaml"], work, replace(place, sharding=offloaded)
    ranks = 2
    while ranks <= MOST_PROCESSES:
        if ranks > own.ranks:
            # processes of a CPU share its memory: more of them are more machines
            yield [*changes, f"{folder}zero3.yaml on {ranks} such devices"], work, replace(place, sharding=Sharding(level=3, ranks=ranks))
        ranks *= 2


# --- time


def seconds(
    work: Work, models: Mapping[str, Model], ranks: int, flops: float, reading: float, efficiency: float = EFFICIENCY
) -> tuple[float, float]:
    """(sampling, everything else) on `ranks` devices that multiply `flops` and read `reading` bytes a second."""
    compute = 0.0
    for role in work.roles:
        shape, frozen = models[role.name].shape, bool(role.model.adapter.rank)
        trained = costs.training_flops(shape, role.trained, checkpointing=role.model.gradient_checkpointing, frozen_base=frozen)
        compute += trained + costs.forward_flops(shape, role.read)
    drawing = sampling_seconds(work, models, ranks, flops * SAMPLING_EFFICIENCY, reading * SAMPLING_EFFICIENCY)
    return drawing, compute / (flops * efficiency * ranks)


def sampling_seconds(work: Work, models: Mapping[str, Model], ranks: int, flops: float, reading: float) -> float:
    """Decoding is bound by reading weights and cache, or by arithmetic where many responses stand side by side."""
    if work.sampled is None:
        return 0.0
    draws, model = work.sampled, models[work.roles[0].name]
    new, mine = draws.config.max_new_tokens, -(-draws.responses // ranks)
    rows = max(1, min(mine, draws.config.max_cached_tokens // (draws.longest_prompt + new)))
    read = costs.decoding_bytes(model.shape, rows, draws.prompt, new, model.weight_bytes) * mine / rows
    tokens = costs.tree(draws.prompt, 1, new, scored=new) * mine
    return draws.rollouts * max(read / reading, costs.forward_flops(model.shape, tokens) / flops)


# --- in words


def size(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / GIB:,.2f} GiB" if count < 100 * GIB else f"{count / GIB:,.0f} GiB"


def said_of_memory(held: Held, place: Place) -> str:
    ranks, level = place.sharding.ranks, place.sharding.level
    where = "one process" if ranks == 1 else f"each of {ranks} processes, " + (f"ZeRO-{level}" if level else "a copy each")
    parts = ", ".join(f"{name.replace('_', ' ')} {part / GIB:.2f}" for name, part in held.updating.items() if part > 0.005 * held.peak)
    text = f"{size(held.peak)} of {size(place.memory)} in {where}: {parts}"
    text += f"; while sampling {held.sampling / GIB:.2f}" if held.sampling else ""
    return text + (f"; {size(held.host)} of the host's" if held.host and place.device == "cuda" else "")


def said_of_time(work: Work, models: Mapping[str, Model], ranks: int) -> str:
    sampling, rest = seconds(work, models, ranks, matmul_flops(), read_rate() if work.sampled else math.inf)
    text = f"about {duration(sampling + rest)} on " + ("one device" if ranks == 1 else f"{ranks} devices") + " like this one"
    text += f", {duration(sampling)} of it sampling" if sampling else ""
    return f"{text}; at {EFFICIENCY:.0%} of its matrix product, the share measured on a CPU"


def duration(length: float) -> str:
    minutes = length / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
