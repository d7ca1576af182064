"""A worker process seen from its parent: started, asked, and killed when it hangs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from posttrain.rewards.config import RewardsConfig
from posttrain.rewards.worker import send

STARTUP_SECONDS = 120.0  # imports from a cold network drive
LONGEST_ANSWER = 1 << 16  # bytes; a worker that sends more is not one of ours any longer

# What the launcher tells a rank about itself: a reward function that saw it would take itself for one.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_", "DEEPSPEED_", "DS_", "FSDP_", "NCCL_")

Task = tuple[bytes, str]  # a pickled row and a response


class LostError(Exception):
    """The worker hung or died in the call it was at; the next `ask` starts it again."""


class UnavailableError(Exception):
    """No worker can be started."""


def environment(scratch: str) -> dict[str, str]:
    """The parent's variables without the launcher's; no GPU, one thread, this process's modules, a folder to be swept."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and not name.startswith(LAUNCHER_PREFIXES)}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    ours = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return kept | ours | {"PYTHONPATH": path, "TMPDIR": scratch}


class Worker:
    """One worker process at a time; used by one thread, but for `end`."""

    def __init__(self, config: RewardsConfig, scratch: str) -> None:
        self.config = config
        self.scratch = scratch
        self.process: subprocess.Popen | None = None
        self.channel: socket.socket | None = None
        self.received = b""

    def start(self) -> None:
        """Starts the process and waits until it has imported the functions. Raises UnavailableError."""
        # a new program, neither fork nor multiprocessing: a fork beside torch's threads can deadlock, and multiprocessing
        # would import the user's script again, torch and all. Its own session: Ctrl-C is the parent's to handle.
        self.channel, theirs = socket.socketpair()
        self.received = b""
        command = [sys.executable, "-P", "-m", "posttrain.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    env=environment(self.scratch),
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            self.channel.settimeout(STARTUP_SECONDS)
            send(self.channel, [(function.function, function.options) for function in self.config.functions])
            failure = self._answer(STARTUP_SECONDS)[1]
        except (LostError, OSError) as error:
            failure = str(error)
        if failure:
            self.kill()
            raise UnavailableError(f"a reward worker could not start: {failure}")

    def ask(self, tasks: Sequence[Task], skipped: int = 0) -> Iterator[tuple[float, str]]:
        """(value, failure) of every function on every task but the first `skipped` calls, in order, as they come.

        Raises LostError when the worker hung or died in the call whose value would be next, UnavailableError when none
        can be started.
        """
        if self.process is None:
            self.start()
        try:
            assert self.channel
            self.channel.settimeout(self.config.seconds_per_response)
            send(self.channel, (skipped, list(tasks)))
            for _ in range(len(tasks) * len(self.config.functions) - skipped):
                yield self._answer(self.config.seconds_per_response)
        except (LostError, OSError) as error:
            ended = self.kill()
            raise LostError(str(error) or ended) from None

    def _answer(self, seconds: float) -> tuple[float, str]:
        """The next line of the worker, within `seconds`; raises LostError, without a text when the worker has ended."""
        assert self.channel
        deadline = time.monotonic() + seconds
        while b"\n" not in self.received:
            # an answer that has already come counts, however late this thread wakes up
            self.channel.settimeout(max(deadline - time.monotonic(), 1e-6))
            try:
                chunk = self.channel.recv(1 << 16)
            except TimeoutError:
                raise LostError(f"timed out after {seconds:g} s") from None
            if not chunk:
                raise LostError
            self.received += chunk
            if len(self.received) > LONGEST_ANSWER and b"\n" not in self.received:
                raise LostError("the function wrote into its worker's channel")
        line, _, self.received = self.received.partition(b"\n")
        return read_answer(line)

    def end(self) -> None:
        """Kills the process and whatever it started; may be called from any thread."""
        process = self.process
        if process and process.returncode is None:  # not yet waited for, so that its number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> str:
        """Ends the process and forgets it. Returns how it had ended, which may have been before this call."""
        self.end()
        if self.channel:
            self.channel.close()
        process, self.process = self.process, None
        return ending(process.wait()) if process else "the worker was not running"


def read_answer(line: bytes) -> tuple[float, str]:
    """A worker's answer, checked: it comes from a process in which anything may have happened."""
    try:
        value, failure = json.loads(line)
        return math.nan if value is None else float(value), str(failure)
    except (ValueError, TypeError):
        raise LostError("the function wrote into its worker's channel") from None


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"the worker was killed by {signal.Signals(-code).name}" if code < 0 else f"the worker process ended with exit code {code}"
