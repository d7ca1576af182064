"""SIGTERM, Ctrl-C and a dead launcher become a flag, which a run looks at when it can stop in good order."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

IMPATIENT_SECONDS = 2.0
ORPHAN_SECONDS = 60.0


class StopFlag:
    """Set by SIGTERM, SIGINT, or the death of the launcher; `signal_number` is 0 until then.

    A second Ctrl-C, some seconds after the first one, raises KeyboardInterrupt (launchers pass the first one on twice).
    `accelerate launch` with one process dies of SIGTERM without passing it on, and its worker would live on as an orphan:
    when the launcher is gone the flag is set, and the process ends by force `orphan_seconds` later.
    """

    def __init__(self, orphan_seconds: float = ORPHAN_SECONDS) -> None:
        self.signal_number = 0
        self.orphan_seconds = orphan_seconds
        self._since = 0.0
        self._closed = threading.Event()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in (signal.SIGTERM, signal.SIGINT)}
        if was_launched():
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), name="launcher", daemon=True).start()

    @property
    def seconds_ago(self) -> float:
        """How long ago the flag was set; 0 when it isn't."""
        return time.monotonic() - self._since if self.signal_number else 0.0

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number and self.seconds_ago > IMPATIENT_SECONDS:
            raise KeyboardInterrupt
        self._set(number)

    def _set(self, number: int) -> None:
        if not self.signal_number:
            self._since = time.monotonic()
            self.signal_number = number

    def _watch_parent(self, parent: int) -> None:
        while os.getppid() == parent:
            if self._closed.wait(0.5):
                return
        self._set(signal.SIGTERM)
        if not self._closed.wait(self.orphan_seconds):
            os._exit(128 + signal.SIGTERM)

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def was_launched() -> bool:
    """Whether a launcher started this process. A run that a shell started may outlive it (nohup)."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
