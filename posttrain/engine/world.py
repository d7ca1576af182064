"""The processes of one run: who I am, and the few collectives that stages need, watched so that a hang names itself."""

from __future__ import annotations

import faulthandler
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from posttrain.clock import Clock
from posttrain.engine.hosts import Lines, appear, name_interface, several_hosts
from posttrain.engine.launch import Launch, prepare_environment, quiet_start, read_launch
from posttrain.engine.signals import StopFlag

T = TypeVar("T")

HANG_MINUTES = 30.0
JOIN_MINUTES = 10.0  # launchers start all ranks at once; DeepSpeed may compile for a minute
FAREWELL_SECONDS = 5.0  # for a rank whose collective breaks off by itself to finish its records
ENDED = 70  # exit code of a rank that gives up waiting
FOR_EVER = timedelta(days=365)


class Watchdog:
    """Ends the process when one phase takes longer than `minutes` (0: never), naming the rank and the phase, with every thread's stack.

    A rank that waits for ever in a collective can't be interrupted from Python, so the process leaves at once; the
    launcher then ends the other ranks.
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self.rank = rank
        self.seconds = minutes * 60
        self._phases: list[tuple[str, float]] = []
        self._broken_off = ""
        self._stop = threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str, timed: bool = True) -> Iterator[None]:
        self._phases.append((name, time.monotonic() if timed else math.inf))
        self._broken_off = ""
        try:
            yield
        except BaseException:
            self._broken_off = self._broken_off or self.where()
            raise
        finally:
            self._phases.pop()

    def where(self) -> str:
        """The phases that this rank is in, the outermost first; after an error those that it was in then."""
        return self._broken_off or " > ".join(name for name, _ in list(self._phases)) or "its own work"

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            phases = list(self._phases)
            if phases and time.monotonic() - phases[-1][1] > self.seconds:
                waited = f"rank {self.rank} has waited {self.seconds:.0f} s in: {self.where()}"
                print(f"{waited}; the run ends here", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(ENDED)


@dataclass(eq=False)
class World:
    """The ranks of this run. Every method that communicates must be called by every rank, in the same order.

    `backend` is "single", "ddp" or "zero"; `zero_stage` is 0 unless it is "zero".
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "single"
    zero_stage: int = 0
    launch: Launch = field(default_factory=Launch)
    hang_minutes: float = HANG_MINUTES

    def __post_init__(self) -> None:
        self._watchdog = Watchdog(self.rank, self.hang_minutes)
        self._lines: Lines | None = None
        self.clock = Clock()

    @classmethod
    def from_launch(cls, hang_minutes: float = HANG_MINUTES) -> World:
        """Join the process group that the launcher prepared; one process when there is none. Raises ValueError on launch settings
        that posttrain can't honour.

        A rank may wait `hang_minutes` for the others, for instance while rank 0 tokenises; 0 waits for ever.
        """
        prepare_environment()
        name_interface()
        launch = read_launch()
        from accelerate import PartialState

        # gloo has to be asked for by name: with use_cpu set, Accelerate would leave DeepSpeed out without a word
        kwargs: dict[str, Any] = (
            {"timeout": timedelta(minutes=hang_minutes + 1) if hang_minutes else FOR_EVER} if launch.backend != "single" else {}
        )
        if launch.backend != "single" and not torch.cuda.is_available():
            kwargs["backend"] = "gloo"
        joining = Watchdog(int(os.environ.get("RANK", "0")), JOIN_MINUTES if launch.backend != "single" else 0)
        with quiet_start(launch), joining.phase("joining the other ranks"):
            state = PartialState(cpu=launch.use_cpu, **kwargs)
        joining.close()
        if launch.backend == "zero" and state.num_processes == 1 and state.device.type == "cpu":
            raise ValueError("DeepSpeed on a CPU needs two processes or more, not num_processes=1; accelerate_configs/cpu.yaml works")
        world = cls(
            rank=state.process_index,
            size=state.num_processes,
            device=state.device,
            backend=launch.backend,
            zero_stage=launch.zero_stage,
            launch=launch,
            hang_minutes=hang_minutes,
        )
        if several_hosts():
            with world.phase("connecting the hosts"):
                world._lines = Lines(world.rank, world.size, world.broadcast, world._lost)
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def phase(self, name: str, timed: bool = True):
        """Context: what this rank is doing, for messages; the watchdog ends it when it takes too long, unless it isn't `timed`."""
        return self._watchdog.phase(name, timed)

    def timed(self, phase: str):
        """Context: what this rank's time is booked under; see `posttrain.clock`."""
        return self.clock.phase(phase)

    def barrier(self, phase: str = "barrier") -> None:
        with self.phase(phase):
            if self.size > 1:
                dist.barrier()

    def broadcast(self, value: T, phase: str = "broadcast") -> T:
        """Rank 0's picklable `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        with self.phase(phase):
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T, phase: str = "gather") -> list[T]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.phase(phase):
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool, phase: str = "any") -> bool:
        """Whether any rank's flag is set."""
        return bool(self.sum(float(flag), phase) > 0)

    def sum(self, value: Any, phase: str = "sum") -> Any:
        """Sum over ranks of a number (in float64) or of a tensor (a new tensor of its dtype)."""
        if self.size == 1:
            return value
        number = not isinstance(value, torch.Tensor)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device) if number else value.detach().clone()
        with self.phase(phase):
            dist.all_reduce(total)
        return total.item() if number else total

    def first_says(self, decide: Callable[[], T], phase: str = "decision of rank 0") -> T:
        """`decide()` evaluated on rank 0 only; its result, or its exception, on every rank.

        Without this an exception on rank 0 would leave the others waiting.
        """
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.is_main:
            try:
                outcome = (decide(), None)
            except Exception as error:
                outcome = (None, error)
        value, failure = self.broadcast(outcome, phase)
        if failure is not None:
            raise failure
        return value

    def check_shared(self, folder: Path) -> None:
        """Make `folder`. Raises ValueError, on every rank, when some rank can't write there, or doesn't see what another one writes."""
        self.first_says(lambda: folder.mkdir(parents=True, exist_ok=True), "making the output folder")
        if self.size == 1:
            return
        marks = [folder / f".{name}" for name in self.gather(secrets.token_hex(8))]
        wrong = ""
        try:
            marks[self.rank].touch()
        except OSError as error:
            wrong = f"can't write there ({error})"
        if not self.any(bool(wrong), "writing into the output folder") and not appear(marks):
            wrong = "doesn't see what others write there"
        found = self.gather((socket.gethostname(), wrong), "looking into the output folder")
        marks[self.rank].unlink(missing_ok=True)
        if blind := [f"rank {rank} on host {host} {wrong}" for rank, (host, wrong) in enumerate(found) if wrong]:
            raise ValueError(
                f"{folder.absolute()} isn't one folder that all ranks share: {'; '.join(blind)}. Every rank writes its part of a "
                f"checkpoint there, and reads what rank 0 has written; a path on a file system that all hosts mount (NFS, Lustre) works"
            )

    def fail(self, error: BaseException) -> None:
        """Tell the other hosts that this rank ends by `error`, which their launchers don't see.

        Where the error is only that another rank has ended, which has been said, the process ends here: a traceback would bury that.
        """
        if self._lines is not None and self._lines.fail(error):
            os._exit(ENDED)

    def _lost(self, what: str) -> None:
        """End this rank, as another one has ended. In a thread of its own: the main one may wait in a collective for ever."""
        print(
            f"\n{what}\nrank {self.rank} was in: {self._watchdog.where()}; it can't go on alone and ends here. What is saved is kept: "
            f"when all hosts are well, the same command, started again on each of them, goes on from the newest checkpoint.\n",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(FAREWELL_SECONDS)
        os._exit(ENDED)

    @cached_property
    def stop(self) -> StopFlag:
        """The flag that SIGTERM and Ctrl-C set, from the first time that it is asked for."""
        return StopFlag()

    def close(self) -> None:
        """Stop watching and give signals back. The process group stays, for the next world."""
        self._watchdog.close()
        if self._lines is not None:
            self._lines.close()
        if "stop" in vars(self):
            self.stop.close()
            del self.stop
