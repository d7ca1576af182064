"""What a stage is given: where it is, how far it got, and when to stop.

    def train(config: XConfig, run: Run) -> Path:
        ...
        run.resume({"policy": policy}, prompts=sampler)         # everything that the future depends on
        for step in run.steps(config.num_steps):                # continues where the newest checkpoint stopped
            ...
            run.log({"loss": loss}, tokens=batch.size, optimizer_steps=1)
            run.checkpoint(score=-held_out_loss)                # saves when due; saves and stops when asked to
        run.restore_best({"policy": policy})

Every method is called by every rank, in the same order; rank 0 writes.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.clock import LOADING, OTHER, Clock, between
from posttrain.config import CheckpointConfig

if TYPE_CHECKING:
    from posttrain.engine import Engine, TrainedModel
    from posttrain.progress import Progress
    from posttrain.tracking import Tracker


USED = "used.json"  # what a stage without checkpoints has used so far


class Stateful(Protocol):
    """Anything with a cursor: samplers, controllers, running statistics."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Stopped(SystemExit):
    """A stage that was asked to stop and did so in good order. Exit code 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.message = message


@dataclass
class Counters:
    """What a stage has used so far, over all its launches."""

    seconds: float = 0.0
    tokens: int = 0
    optimizer_steps: int = 0
    phases: dict[str, float] = field(default_factory=dict)  # the seconds, by what they went into


@dataclass
class Best:
    """The checkpoint with the highest score; step -1 is none."""

    step: int = -1
    score: float = -math.inf


@dataclass(eq=False)
class Run:
    """One stage in progress. `folder` is the stage's own; `step` counts the steps that are done, the current one included.

    Metrics, samples and checkpoints of the n-th step carry the number n, so that a stage resumed from step_000040 goes
    on with entry 41.
    """

    name: str
    folder: Path
    seed: int
    engine: Engine
    tracker: Tracker
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    restart_optimizer: bool = False
    identity: str = ""
    step: int = 0
    total: int = 0
    keeps_results: bool = False
    counters: Counters = field(default_factory=Counters)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._models: dict[str, TrainedModel] = {}
        self._objects: dict[str, Stateful] = {}
        self._registered = False
        self._start_state: dict[str, Any] = {}
        self._best = Best()
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self._logged = time.monotonic()
        self._clock.rest = LOADING
        self._counted = self._timed = self._clock.read()
        self._stop_signal = 0
        self._stop_seen = 0.0
        self._samples_open = False
        self._newest: Path | None = None
        self._progress: Progress | None = None
        self._done: Callable[[], int] | None = None

    @property
    def _clock(self) -> Clock:
        return self.engine.world.clock

    @property
    def cache(self) -> Path:
        """Where tokenised rows are kept, for all stages of the pipeline."""
        return self.folder.parent / "cache"

    # --- going on

    def find_checkpoint(self) -> Path | None:
        """The newest good checkpoint, looked for once. Raises ValueError when it needs another launch than this one."""
        if self._newest is None:
            self._newest = self.engine.newest_good(self.folder / "checkpoints")
            if self._newest and not self.restart_optimizer:
                self.engine.check(self._newest)
        return self._newest

    def resume(self, models: Mapping[str, TrainedModel], **objects: Stateful) -> int:
        """Register what the future depends on, and load the newest good checkpoint if there is one. Returns its step, or 0.

        `models` are the trained models by name; `objects` have `state_dict()` and `load_state_dict()`, which speak JSON
        or tensors. Raises ValueError when the checkpoint was made by another backend or number of ranks.
        """
        self._models, self._objects, self._registered = dict(models), objects, True
        newest = self.find_checkpoint()
        if newest is not None:
            self._load_state(self.engine.load(newest, self._models, restart_optimizer=self.restart_optimizer))
            self.say(f"{self.name}: resumes at step {self.step} from {newest}")
        self.tracker.rewind(self.step)
        self._keep_samples(self.step)
        self._start_state = self._objects_state()
        return self.step

    def resume_after(self, step: int, keeps: bool = True) -> None:
        """For a stage whose results on disk say themselves how far it got: go on after `step` steps, with what they have used.

        `keeps` is False for a stage that begins anew when it is interrupted.
        """
        self.step, self.keeps_results = step, keeps
        used = self.folder / USED
        if step and used.exists():
            self.counters = Counters(**json.loads(used.read_text(encoding="utf-8")))
        self.tracker.rewind(step)
        self._keep_samples(step)

    def steps(self, total: int, unit: str = "step") -> Iterator[int]:
        """The 0-based numbers of the steps still to do out of `total`; `unit` names them on the progress bar."""
        from posttrain.progress import Progress

        self.total = total
        try:
            with Progress(self.name, total, unit=unit, start=self.step, is_main=self.engine.world.is_main) as self._progress:
                self._clock.rest = OTHER
                for index in range(self.step, total):
                    self._start_state = self._objects_state()
                    self.step = index + 1
                    yield index
                    self._progress.update(self.step)
        finally:
            self._progress = None

    def iterations(self, total: int) -> Iterator[int]:
        """`steps` of a stage whose step is a rollout and several optimizer steps."""
        return self.steps(total, unit="iteration")

    def rounds(self, total: int, unit: str, done: Callable[[], int]) -> Iterator[int]:
        """Steps of which nobody knows how many it takes: until `done()` says that `total` of something (`unit`) are there.

        Progress, rate and ETA are those of `done()`. Yields the 0-based numbers of the steps.
        """
        from posttrain.progress import Progress

        self._done = done
        try:
            with Progress(self.name, total, unit=unit, start=done(), is_main=self.engine.world.is_main) as self._progress:
                self._clock.rest = OTHER
                while done() < total:
                    self.step += 1
                    yield self.step - 1
                    self._progress.update(done())
        finally:
            self._progress = self._done = None

    def note(self, text: str) -> None:
        """Show for a moment what goes on inside a step, on a terminal only."""
        if self._progress:
            self._progress.note(text)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Context: what the stage's time is booked under, in `time/...` and in stage.json."""
        return self.engine.world.timed(phase)

    # --- saying

    def log(self, metrics: Mapping[str, float], tokens: int = 0, optimizer_steps: int = 0) -> None:
        """Log numbers at the current step. `tokens` and `optimizer_steps` are what was used since the last call, over all ranks.

        With them goes where this rank's seconds since then went, `time/update` and the like, which add up to what has passed.
        """
        self.counters.tokens += tokens
        self.counters.optimizer_steps += optimizer_steps
        now = time.monotonic()
        numbers = {name: float(value) for name, value in metrics.items()}
        if tokens and now > self._logged:
            numbers.setdefault("tokens_per_second", tokens / (now - self._logged))
            numbers.setdefault("tokens", float(self.counters.tokens))
        self._logged = now
        self.metrics |= {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._timed, before = self._clock.read(), self._timed
        spent = {f"time/{name}": round(seconds, 4) for name, seconds in between(before, self._timed).items()}
        self.tracker.log(self.step, numbers | spent)
        if self._progress:
            self._progress.update(self._done() if self._done else self.step, numbers, tokens)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows (prompt, response, score, ...) of the current step to samples.jsonl and to the tracker's table."""
        if not self._samples_open:
            self._keep_samples(-1)  # a stage that doesn't resume begins anew
        if self.engine.world.is_main:
            rows = [{"step": self.step, **row} for row in rows]
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.tracker.table("samples", rows, self.step)

    def results(self, results: Mapping[str, Any]) -> Path:
        """Write the stage's numbers to results.json, where the report finds them."""
        path = self.folder / "results.json"
        if self.engine.world.is_main:
            write_json(path, dict(results))
        return path

    def warn(self, text: str) -> None:
        """Say something that a user should know, once, and keep it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"{self.name}: {text}")

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar if there is one."""
        if self.engine.world.is_main:
            print(text, flush=True)

    # --- saving and stopping

    def checkpoint(self, score: float | None = None, force: bool = False) -> None:
        """Call at the end of each step. Saves when due, when `score` is the highest so far, and before stopping.

        A checkpoint is due every `checkpoint.every` steps, every `checkpoint.minutes`, and after the last step. It is written while
        the next steps go on, and counts when it is complete. Raises Stopped when the run was asked to stop, after saving, and
        OSError when this or an earlier one couldn't be written.
        """
        height = -math.inf if score is None or math.isnan(score) else float(score)
        better = height > self._best.score
        if better:
            self._best = Best(self.step, height)
        stopping = self.stopping()
        every, minutes = self.checkpoints.every, self.checkpoints.minutes
        is_old = self.engine.world.any(0 < minutes * 60 < time.monotonic() - self._saved_at, "asking whether the checkpoint is old")
        if force or better or stopping or is_old or self.step >= self.total or (every and self.step % every == 0):
            self._save(self.step, self._objects_state())
        if self.step >= self.total:  # nothing is left to go on beside it
            self.engine.settle()
        if not self._registered and self.engine.world.is_main:
            self.count_time()
            write_json(self.folder / USED, vars(self.counters))
        if stopping:
            raise self._stopped()

    def stopping(self) -> bool:
        """Whether any rank was asked to stop (SIGTERM, Ctrl-C, a dead launcher). Asks all ranks.

        As they meet here anyhow, a checkpoint that they have written is finished, too. Raises OSError when one of them couldn't.
        """
        world = self.engine.world
        self.engine.settle(wait=False)
        if not self._stop_signal and world.any(self.stop_requested(), "asking whether to stop"):
            flags = world.gather((self.engine.stop.signal_number, self.engine.stop.seconds_ago))
            self._stop_signal = max(number for number, _ in flags)
            self._stop_seen = time.monotonic() - max(seconds for _, seconds in flags)
        return bool(self._stop_signal)

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop. Asks nobody: not a thing to branch on around a collective."""
        return bool(self.engine.stop.signal_number)

    def heed_stop(self, seconds_left: float | None = None) -> None:
        """For stages with long steps: stop inside a step if asked to. Raises Stopped.

        Without `seconds_left` the step must not have changed a model yet: the state that it began with is saved.
        Later in a step, `seconds_left` is the stage's measured estimate of what remains of it: when that fits the grace
        time the step goes on to its own `checkpoint`, else the run stops with the checkpoint that it has.
        """
        if not self.stopping():
            return
        if seconds_left is None:
            self._save(self.step - 1, self._start_state)
            raise self._stopped()
        needed = seconds_left + self._save_seconds
        remaining = self.checkpoints.grace_seconds - (time.monotonic() - self._stop_seen)
        if self.engine.world.any(needed > remaining, "asking whether the step can be finished"):
            self.say(f"{self.name}: step {self.step} needs {seconds_left:.0f} s more, {max(remaining, 0.0):.0f} s are left; it is given up")
            raise self._stopped()

    def pace(self, total: int) -> Callable[[int], None]:
        """For a long pass inside a step, such as a held-out evaluation: a callback that is told of each part of `total` that is done.

        When the run is asked to stop, the pass goes on if what is left of it fits the grace time; else the callback raises
        Stopped. Every rank must call it equally often.
        """
        began, done = time.monotonic(), 0

        def progress(part: int) -> None:
            nonlocal done
            done += part
            self.heed_stop(seconds_left=(time.monotonic() - began) * max(total - done, 0) / max(done, 1))

        return progress

    def restore_best(self, models: Mapping[str, TrainedModel]) -> int:
        """Load the weights of the best checkpoint by score, if any was scored. Returns the step that the weights are from.

        A damaged one is named and passed over: the weights stay those of the last step.
        """
        from posttrain.engine import checkpoint

        self.engine.settle()
        if self._best.step in (-1, self.step):
            return self.step
        folder = self._checkpoint_folder(self._best.step)
        wrong = self.engine.world.first_says(lambda: checkpoint.damage(folder), "looking at the best checkpoint")
        if wrong:
            self.warn(f"the best checkpoint, {folder}, is damaged ({wrong}); the weights stay those of step {self.step}, the newest")
            return self.step
        self.engine.load(folder, dict(models), restart_optimizer=True)
        self.say(f"{self.name}: takes the weights of step {self._best.step}, the best so far (score {self._best.score:.4g})")
        return self._best.step

    def count_time(self) -> None:
        """Add the time since the last call to what the stage has used."""
        self._counted, before = self._clock.read(), self._counted
        for name, seconds in between(before, self._counted).items():
            if name == self._clock.rest == LOADING:  # a stage without steps: it does its work where others load
                name = OTHER
            self.counters.seconds += seconds
            self.counters.phases[name] = self.counters.phases.get(name, 0.0) + seconds

    # --- inside

    def _checkpoint_folder(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def _objects_state(self) -> dict[str, Any]:
        return {name: copy.deepcopy(item.state_dict()) for name, item in self._objects.items()}

    def _save(self, step: int, objects: dict[str, Any]) -> None:
        """Save as the checkpoint of `step`, unless it exists; once it is complete, those go that are no longer needed."""
        if step == self._saved_step or not self._registered:
            return
        self.count_time()
        state = {
            "step": step,
            "objects": objects,
            "counters": vars(self.counters),
            "metrics": self.metrics,
            "warnings": self.warnings,
            "best": vars(self._best),
        }
        manifest = {"stage": self.name, "step": step, "identity": self.identity}
        folder = self._checkpoint_folder(step)
        # as long as this one isn't complete, a run goes on from the one before, which knows the best of its own time
        best = [self._checkpoint_folder(self._best.step)] if self._best.step >= 0 else []

        def done(seconds: float) -> None:
            self._save_seconds = seconds
            self.engine.prune(folder.parent, keep=self.checkpoints.keep, also=best, verified=folder)

        self.engine.save(folder, self._models, state, manifest, background=self.checkpoints.background, done=done)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step = self._saved_step = int(state["step"])
        self.counters = Counters(**state["counters"])
        self.metrics = dict(state["metrics"])
        self.warnings = list(dict.fromkeys([*state["warnings"], *self.warnings]))  # reading the rows has warned already
        self._best = Best(**state["best"])
        if self._best.step >= 0 and not self._checkpoint_folder(self._best.step).exists():
            self.say(f"{self.name}: the best checkpoint, step {self._best.step}, is gone; the best is looked for anew")
            self._best = Best()
        for name, item in self._objects.items():
            item.load_state_dict(state["objects"][name])

    def _stopped(self) -> Stopped:
        self.engine.settle()
        if self._saved_step >= 0:
            kept = f"saved in {self._checkpoint_folder(self._saved_step)}"
        else:
            kept = "there is no checkpoint yet" if self._registered else f"what it wrote is kept in {self.folder}"
        message = f"{self.name}: stopped in step {self.step}; {kept}. To go on, run the same command again: {command_line()}"
        self.say(message)
        return Stopped(message, self._stop_signal)

    def _keep_samples(self, last_step: int) -> None:
        """Drop the samples that were written after the step from which the stage goes on."""
        from posttrain.tracking import cut_after

        self._samples_open = True
        if self.engine.world.is_main:
            cut_after(self.folder / "samples.jsonl", last_step)


def command_line() -> str:
    """The command that goes on with this run, as far as a worker process knows it: without --redo, which would begin
    anew, and without --restart-optimizer, which would lose the optimizer's state again."""
    words = [word for word in sys.argv if not word.startswith("--redo=") and word != "--restart-optimizer"]
    while "--redo" in words:
        at = words.index("--redo")
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("-")), len(words))
        del words[at:end]
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return f"{'accelerate launch ...' if launched else 'python'} {shlex.join(words)}"


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
