"""Checkpoints that are there entirely or not at all: everything that the future of a run depends on.

    step_000040/
      manifest.json            written last: backend, ZeRO stage, ranks, digest of every file
      state.pt                 the run's own state and the models' counters
      rng.rank0.pt             random-number generators of every rank
      policy.weights.pt        trained weights and buffers under the module's names, whole: what any backend can start from
      policy.rank0.pt          optimizer (under ZeRO the shard of masters and moments) and EMA

They are written in a temporary folder beside, which is renamed when every rank has written and flushed its files and read them
back. That may go on in the background, from a copy of the state, while training does.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.engine.model import TrainedModel, whole_state
from posttrain.engine.world import World
from posttrain.engine.writing import MANIFEST, File, Writing, digest_of, fresh, on_host, temporary
from posttrain.models.adapters import trained_parameters

COUNTERS = ("steps", "skipped_steps", "skipped_in_a_row")


def begin(
    world: World,
    folder: Path,
    models: Mapping[str, TrainedModel],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    background: bool = False,
) -> Writing:
    """Begin to write a checkpoint; `state` is JSON and tensors, the same on every rank. Collective.

    With `background` the state is copied to the host now, and a thread writes the copies while training goes on: 12 bytes for
    each trained parameter of this rank's share, 16 with EMA, until they are written. Without, everything is written from where
    it is, one model at a time. The files are the same. Raises FloatingPointError when weights aren't finite; what comes later,
    `Writing.finish` raises.
    """
    for name, model in models.items():
        broken = not all(bool(torch.isfinite(master).all()) for master in model.backend.masters())
        if world.any(broken, f"checking {name} before saving"):
            raise FloatingPointError(f"{name} has weights that aren't finite after {model.steps} steps; {folder.name} was not written")
    world.first_says(lambda: fresh(temporary(folder)), "opening a checkpoint")
    description = {**manifest, **setting(world), "models": list(models)}
    return Writing(world, folder, own_files(world, models, state, copy=background), description, background=background)


def own_files(world: World, models: Mapping[str, TrainedModel], state: Mapping[str, Any], *, copy: bool) -> Iterator[File]:
    """Names and contents of the files that this rank writes, on the host. Collective: every rank goes through all of them."""
    for name, model in models.items():
        weights = trained_weights(model)
        if world.is_main:
            yield f"{name}.weights.pt", weights
        if world.is_main or model.backend.sharded:
            yield f"{name}.rank{world.rank}.pt", on_host({"optimizer": model.backend.optimizer_state(), "ema": model.ema}, copy)
    yield f"rng.rank{world.rank}.pt", random_state(world)
    if world.is_main:
        counters = {name: {key: getattr(model, key) for key in COUNTERS} for name, model in models.items()}
        yield "state.pt", on_host({"state": dict(state), "counters": counters}, copy)


def load(world: World, folder: Path, models: Mapping[str, TrainedModel], *, restart_optimizer: bool = False) -> dict[str, Any]:
    """Put models, optimizers, schedules, EMA and random numbers back as they were; returns the run's `state`. Collective.

    With `restart_optimizer` only weights are taken, from a checkpoint of any backend: moments, EMA and schedule begin anew.
    Raises ValueError when backend, ZeRO stage or number of ranks differ, or a model is missing.
    """
    contents = read_manifest(folder)
    if missing := [name for name in models if name not in contents["models"]]:
        raise ValueError(f"{folder} has the models {', '.join(contents['models'])}, not {', '.join(missing)}")
    if not restart_optimizer:
        refuse_other_setting(world, folder)
    saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    for name, model in models.items():
        weights = torch.load(folder / f"{name}.weights.pt", map_location="cpu", weights_only=True, mmap=True)
        buffers = dict(model.module.named_buffers())
        for key in set(buffers) & set(weights):
            buffers[key].copy_(weights[key])
        if restart_optimizer:
            model.backend.load_whole(weights)
            for average, master in zip(model.ema, model.backend.masters()):
                average.copy_(master)
            continue
        rank = world.rank if model.backend.sharded else 0
        part = torch.load(folder / f"{name}.rank{rank}.pt", map_location="cpu", weights_only=True)
        if not model.backend.sharded:
            model.backend.load_whole(weights)
        model.backend.load_optimizer_state(part["optimizer"])
        for average, value in zip(model.ema, part["ema"], strict=True):
            average.copy_(value)
        for key, value in saved["counters"][name].items():
            setattr(model, key, value)
    if not restart_optimizer and world.rank < contents["world_size"]:
        restore_random_state(torch.load(folder / f"rng.rank{world.rank}.pt", map_location="cpu", weights_only=True))
    world.barrier("loading a checkpoint")
    return saved["state"]


def trained_weights(model: TrainedModel) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, whole, on rank 0's CPU; {} on the others. Collective."""
    trained = {id(p) for p in trained_parameters(model.module).values()}
    frozen = {name for name, p in model.module.named_parameters(remove_duplicate=False) if id(p) not in trained}
    with model.world.phase(f"gathering {model.name} for a checkpoint"):
        return whole_state(model, model.module, leave_out=frozen)


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} can't be read ({error})"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if digest_of(path) != digest:
            return f"{name} is not what was written"
    return ""


def newest_good(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in `folder`; a damaged one is named and passed over. For one rank: it reads files only."""
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        wrong = damage(candidate)
        if not wrong:
            return candidate
        print(f"checkpoint {candidate} is damaged and passed over: {wrong}", flush=True)
    return None


def prune(folder: Path, keep: int, also: Sequence[Path] = (), verified: Path | None = None) -> None:
    """Drop all but the newest `keep` checkpoints and those in `also`, once the newest one was read back undamaged. For one rank.

    `verified` is one that was, when it was written.
    """
    found = sorted(folder.glob("step_*"))
    old = [path for path in found[: -max(keep, 1)] if path not in also]
    if old and (found[-1] == verified or not damage(found[-1])):
        for path in old:
            shutil.rmtree(path)


def setting(world: World) -> dict[str, Any]:
    return {"backend": world.backend, "zero_stage": world.zero_stage, "world_size": world.size}


def refuse_other_setting(world: World, folder: Path) -> None:
    """Raise ValueError, with the command that works, when `folder` was written under another backend or number of ranks."""
    contents = read_manifest(folder)
    saved = {key: contents[key] for key in setting(world)}
    if saved == setting(world) or not contents["models"]:  # where nothing is trained, nothing is sharded
        return
    name = f"zero{saved['zero_stage']}" if saved["backend"] == "zero" else saved["backend"]
    if saved["backend"] == "single":
        command = "python ..."
    else:
        config = f"{'cpu_' if world.device.type == 'cpu' else ''}{name}.yaml"
        command = f"accelerate launch --config_file accelerate_configs/{config} --num_processes {saved['world_size']} ..."
    here = f"zero{world.zero_stage}" if world.backend == "zero" else world.backend
    raise ValueError(
        f"checkpoint {folder} was written by {name} with {saved['world_size']} process(es), this launch is {here} with {world.size}; "
        f"`{command}` goes on with it, --restart-optimizer takes only its weights"
    )


def random_state(world: World) -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=False)
    inner = {"key": [int(word) for word in numpy_state["state"]["key"]], "pos": int(numpy_state["state"]["pos"])}
    return {
        "python": random.getstate(),
        "numpy": {
            "bit_generator": "MT19937",
            "state": inner,
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
