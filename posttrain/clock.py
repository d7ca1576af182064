"""Where a run's time goes: seconds by phase, which add up to the wall time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOADING, OTHER = "loading", "other"


class Clock:
    """Books every second under one name: that of the phase that it passed in, or `rest` when it passed in none.

    A phase that begins inside another one is a part of it: the passes of a held-out evaluation are evaluation. For one thread.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = now()
        self._phase = ""
        self._rest = OTHER
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def rest(self) -> str:
        """What time outside all phases is booked under, from now on."""
        return self._rest

    @rest.setter
    def rest(self, name: str) -> None:
        self._book()
        self._rest = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._phase:
            yield
            return
        self._book()
        self._phase = name
        try:
            yield
        finally:
            self._book()
            self._phase = ""

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the clock was made, up to now."""
        self._book()
        return dict(self._seconds)

    def _book(self) -> None:
        now = self._now()
        self._seconds[self._phase or self._rest] += now - self._since
        self._since = now


def between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was added between two readings of a clock, where something was."""
    added = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    return {name: seconds for name, seconds in added.items() if seconds > 0}
