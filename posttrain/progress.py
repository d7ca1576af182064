"""How far a stage is, on the console: a live bar on a terminal, one compact line per log step anywhere else."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# what a person wants to see first; anything else comes after these
TELLING = (
    "loss",
    "validation_loss",
    "pair_accuracy",
    "validation_accuracy",
    "gold_score",
    "score",
    "kl",
    "entropy",
    "clip_fraction",
    "ptx_loss",
    "policy_loss",
    "value_loss",
    "grad_norm",
    "lr",
)
COUNTED = ("tokens", "tokens_per_second")  # the rate at the end of the line says it


class Progress:
    """A stage's way through `total` steps (or iterations: `unit`), beginning after `start`; a context manager.

    `update(step, metrics, tokens)` says that `step` of `total` are done and that `tokens` went by since the last update.
    Without a terminal an update with metrics prints one line; one without prints nothing. Silent unless `is_main`.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        unit: str = "step",
        start: int = 0,
        is_main: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit, self.step = name, total, unit, start
        self._is_main, self._clock = is_main, clock
        self._console = console
        self._bar: Any = None
        self._metrics: dict[str, Any] = {}
        self._tokens = 0
        # rate and ETA look back over the last updates only: the first step is slow, and lengths change
        self._marks: deque[tuple[float, int, int]] = deque([(clock(), start, 0)], maxlen=20)

    def __enter__(self) -> Progress:
        if not self._is_main:
            return self
        from rich.console import Console

        self._console = self._console or Console()
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as LiveBar

            text = (TextColumn("{task.description}", style="bold", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
            self._bar = LiveBar(*text, TextColumn("{task.fields[tail]}", markup=False), console=self._console)
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.step, tail="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, tokens: int = 0) -> None:
        if not self._is_main:
            return
        self.step = step
        self._tokens += tokens
        self._marks.append((self._clock(), step, self._tokens))
        self._metrics = dict(metrics) if metrics else self._metrics
        if self._bar:
            self._bar.update(self._task, completed=step, tail=self._tail(3))
        elif metrics and self._console:
            self._console.print(f"{self.name} {step}/{self.total}  {self._tail(5)}", markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Show for a moment what is going on inside a step ("sampling 120/512"), on a terminal only."""
        if self._bar:
            self._bar.update(self._task, tail=text)

    def _tail(self, limit: int) -> str:
        parts = [f"{name} {number(value, name)}" for name, value in telling(self._metrics, limit)]
        (before, first_step, first_tokens), (now, step, tokens) = self._marks[0], self._marks[-1]
        seconds = now - before
        if seconds > 0 and step > first_step:
            rate = (tokens - first_tokens) / seconds
            per_step = seconds / (step - first_step)
            parts.append(f"{number(rate)} tok/s" if rate else f"{number(1 / per_step)} {self.unit}s/s")
            parts.append(f"ETA {duration(per_step * (self.total - step))}")
        return "  ".join(parts)


def telling(metrics: Mapping[str, Any], limit: int) -> list[tuple[str, Any]]:
    """The `limit` metrics that say most, as (last part of the name, value): TELLING's order first, then as given."""
    short = [(name.rsplit("/", 1)[-1], value) for name, value in metrics.items() if not isinstance(value, str) and name not in COUNTED]
    rank = {name: place for place, name in enumerate(TELLING)}
    return sorted(short, key=lambda pair: rank.get(pair[0], len(rank)))[:limit]


def number(value: Any, name: str = "") -> str:
    """A number in at most six characters or so: 1.234, 0.031, 12.3k, 4.1M, 3e-4."""
    if value is None:
        return "-"
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        power = min(int(math.log10(size) // 3), 4)
        return f"{value / 1000**power:.3g}{('', 'k', 'M', 'B', 'T')[power]}" if size < 1e15 else f"{value:.2e}"
    if size and (size < 1e-3 or name.endswith("lr")):
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value) if isinstance(value, int) else f"{value:.{3 if size < 10 else 1}f}"


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:10:00."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
