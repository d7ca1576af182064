"""A small training stage, run by one process and by a pair of ranks."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import CheckpointConfig, OptimizerConfig
from posttrain.data.sampler import Sampler
from posttrain.engine import Engine, TrainedModel
from posttrain.run import Run, Stopped
from posttrain.tracking import Tracker
from tests.engine.jobs import nll, packed, rows

STEPS = 6


def new_run(engine: Engine, folder: Path, **checkpoints: Any) -> Run:
    tracker = Tracker(folder, mode="disabled", is_main=engine.world.is_main)
    return Run(name="stage", folder=folder, seed=0, engine=engine, tracker=tracker, checkpoints=CheckpointConfig(**checkpoints))


def start(run: Run) -> tuple[TrainedModel, Sampler]:
    """A model and an order of rows, resumed if there is something to resume from."""
    run.engine.seed(run.seed)
    model = run.engine.train(packed(), OptimizerConfig(lr=1e-2), STEPS, name="policy")
    sampler = Sampler(7, 3, run.seed)
    run.resume({"policy": model}, rows=sampler)
    return model, sampler


def train(run: Run, *, interrupt_at: int = 0, rank: int = 0, scores: Sequence[float] = (), heed: str = "") -> dict[str, Any]:
    """STEPS updates; rank `rank` is sent SIGTERM in step `interrupt_at`; `heed` says where in a step that is looked at.

    Returns the weights, or {} when the run was stopped.
    """
    model, sampler = start(run)
    everything = rows(7)
    try:
        for step in run.steps(STEPS):
            batch = [everything[i] for i in sampler.take()]
            if run.step == interrupt_at and run.engine.world.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            if heed == "unchanged":
                run.heed_stop()
            nll(run.engine, model, batch)
            if heed in ("long", "short"):
                run.heed_stop(seconds_left=1e6 if heed == "long" else 0.0)
            run.log({"loss": float(step), "noise": float(torch.rand(()))}, tokens=100, optimizer_steps=1)
            run.samples([{"response": str(step)}])
            run.checkpoint(score=scores[step] if scores else None)
    except Stopped as stopped:
        return {"code": stopped.code, "message": stopped.message, "step": run.step}
    run.restore_best({"policy": model})
    return {"weights": model.state_dict_full()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fingerprint(weights: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(weights[name].contiguous().numpy().tobytes() for name in sorted(weights))).hexdigest()


# --- jobs of a pair


def stop_and_go(engine: Engine, *, folder: str) -> dict[str, Any]:
    """Straight through; then stopped by a signal to rank 1 alone, and resumed."""
    world, place = engine.world, Path(folder)
    straight = train(new_run(engine, place / "straight"))
    engine.models.clear()
    stopped = train(new_run(engine, place / "stopped"), interrupt_at=3, rank=1)
    engine.models.clear()
    world.stop.signal_number = 0
    resumed = train(new_run(engine, place / "stopped"))
    digests = [fingerprint(result["weights"]) for result in (straight, resumed)] if world.is_main else []
    return {"stopped": stopped, "digests": digests}


def refuse_on_every_rank(engine: Engine, *, folder: str) -> str:
    """The checkpoint of one process, met by two."""
    try:
        new_run(engine, Path(folder)).find_checkpoint()
    except ValueError as error:
        return str(error)
    return ""


def go_on_without_models(engine: Engine, *, folder: str) -> tuple[int, int]:
    """A stage that trains nothing, met by other ranks than those that began it: its step and its sum."""
    from tests.pipeline.stages_for_tests import Total

    run, total = new_run(engine, Path(folder)), Total()
    return run.resume({}, total=total), total.value
