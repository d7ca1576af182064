"""Jobs on one process or a pair of ranks, with a disk that is slow, full, or there when the process is killed.

`python -m tests.engine.writing_jobs FOLDER` trains until it is killed while it writes its second checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.engine import Engine
from posttrain.engine.writing import Writer
from posttrain.run import Run, Stopped
from tests.engine.jobs import nll, rows, trainees
from tests.run_jobs import new_run, start, train


@contextmanager
def disk(before: Callable[[Path], Any]) -> Iterator[None]:
    """Inside, `before` is called with the path of each file of a checkpoint that is about to be written."""
    plain = Writer._write

    def write(self: Writer, name: str, value: Any) -> None:
        before(self.folder / name)
        plain(self, name, value)

    Writer._write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        Writer._write = plain  # type: ignore[method-assign]


def step_of(path: Path) -> int:
    """The step whose checkpoint a file in its temporary folder belongs to."""
    return int(path.parent.name.split("_")[1].split(".")[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def two_ways(engine: Engine, *, folder: str) -> dict[str, Any]:
    """The same state saved in place and in the background, with updates and random draws before the background may write."""
    models, path, gate = trainees(engine), Path(folder), threading.Event()
    engine.seed(7)
    state = {"cursor": torch.arange(3), "list": [1]}
    for step in range(2):
        nll(engine, models["policy"], rows(seed=step))
    engine.save(path / "step_000001", models, state, {"stage": "test"})
    with disk(lambda path: gate.wait(60)):
        engine.save(path / "step_000002", models, state, {"stage": "test"}, background=True)
        state["cursor"] += 1
        state["list"].append(2)
        for step in range(2, 4):
            nll(engine, models["policy"], rows(seed=step))
        torch.rand(3)
        engine.settle(wait=False)
        early = names(path)
        engine.world.barrier()
        gate.set()
        engine.settle()
    return {"early": early, "late": names(path)}


def one_rank_is_slow(engine: Engine, *, folder: str) -> dict[str, Any]:
    """Borders while only the last rank still writes, and after it has written."""
    world, path, gate = engine.world, Path(folder), threading.Event()
    models, took = trainees(engine), []
    if world.rank < world.size - 1:
        gate.set()
    with disk(lambda path: gate.wait(60)):
        engine.save(path / "step_000001", models, {}, {}, background=True, done=took.append)
        if gate.is_set():
            engine.wait_for_files()
        world.barrier()
        engine.settle(wait=False)
        early = (names(path), list(took))
        gate.set()
        engine.wait_for_files()
        world.barrier()
        engine.settle(wait=False)
    return {"early": early, "late": (names(path), len(took))}


def full_at(engine: Engine, *, folder: str, rank: int, step: int) -> dict[str, Any]:
    """A run that saves at every step, on a disk that is full for one rank when it writes the checkpoint of `step`."""
    world, run = engine.world, new_run(engine, Path(folder), every=1)

    def before(path: Path) -> None:
        if world.rank == rank and step_of(path) == step:
            raise OSError(28, "No space left on device")

    with disk(before):
        try:
            train(run)
            error = ""
        except OSError as caught:
            error = str(caught)
    world.barrier()
    return {"error": error, "step": run.step, "left": names(Path(folder) / "checkpoints")}


def stopped_while_it_writes(engine: Engine, *, folder: str, heed: str = "") -> dict[str, Any]:
    """A run of a slow disk, asked to stop in step 3 while the checkpoint of step 2 is being written."""
    run = new_run(engine, Path(folder), every=2)
    with disk(lambda path: time.sleep(0.15)):
        ended = train(run, interrupt_at=3, heed=heed)
    engine.world.stop.signal_number = 0
    return {**ended, "left": names(Path(folder) / "checkpoints")}


def straight_and_resumed(engine: Engine, *, folder: str, killed: str) -> tuple[bool, list[str]]:
    """Whether the run that was killed in `killed` ends, resumed, like one that goes straight through."""
    whole = train(new_run(engine, Path(folder), every=2))["weights"]
    engine.models.clear()
    found = names(Path(killed) / "checkpoints")
    rest = train(new_run(engine, Path(killed), every=2))["weights"]
    return all(torch.equal(value, rest[name]) for name, value in whole.items()), found


def best_while_writing(engine: Engine, *, folder: str) -> list[list[str]]:
    """What is on the disk while the third checkpoint, a better one, is not written yet, and when it is; one is kept beside the best."""
    gate, run, place = threading.Event(), new_run(engine, Path(folder), every=1, keep=1), Path(folder) / "checkpoints"
    model, _ = start(run)
    found = []
    with disk(lambda path: step_of(path) < 3 or gate.wait(60)):
        for step in run.steps(4):
            if step == 3:
                engine.settle(wait=False)
                found.append(names(place))
                gate.set()
                break
            nll(engine, model, rows(seed=step))
            run.checkpoint(score=[-1.0, -2.0, 0.0][step])
            if step < 2:
                engine.wait_for_files()
        engine.settle()
    return [*found, names(place)]


def until_killed(run: Run) -> None:
    """Train; once step 5 is logged, the last rank dies over the second file of the checkpoint of step 4."""
    world, seen = run.engine.world, 0

    def before(path: Path) -> None:
        nonlocal seen
        if step_of(path) != 4 or world.rank < world.size - 1:
            return
        seen += 1
        if seen == 2:
            log = run.folder / "metrics.jsonl"
            while len(log.read_text().splitlines()) < 5:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    with disk(before):
        train(run)


if __name__ == "__main__":
    engine = Engine()
    try:
        until_killed(new_run(engine, Path(sys.argv[1]), every=2))
    except (Stopped, RuntimeError):
        os._exit(3)  # the other rank is gone
