"""What the updates of a step did, summed over micro-batches and ranks, so that metrics depend on neither."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.engine.update import Update
    from posttrain.engine.world import World


class Tally:
    """Named sums on this rank; `total` adds up the ranks. Every rank must add the same names."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.open: dict[str, Tensor] = {}  # added since the last `settle`

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        _pile_up(self.open, {name: torch.as_tensor(value).detach().double() for name, value in values.items()})

    def settle(self, counts: bool) -> None:
        """Keep what was added since the last call, or forget it: an update that was refused has nothing to tell."""
        if counts:
            _pile_up(self.sums, self.open)
        self.open = {}

    def total(self, world: World) -> dict[str, float]:
        """The sums over all ranks, which start from nothing again."""
        self.settle(True)
        names = sorted(self.sums)
        summed = world.sum(torch.stack([self.sums[name].to(world.device) for name in names])).tolist() if names else []
        self.sums = {}
        return dict(zip(names, summed))


def _pile_up(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, number in more.items():
        sums[name] = sums[name] + number if name in sums else number


def report(update: Update, prefix: str = "") -> dict[str, float]:
    """What an update says: gradient norms, learning rate, losses per term. Where it made no step, norm and losses are NaN:
    a sum that ended at a loss that isn't finite is no mean."""
    made = 1.0 if update.stepped else math.nan
    numbers = {f"{prefix}{label}_loss" if label != "loss" else f"{prefix}loss": value * made for label, value in update.terms.items()}
    numbers |= {f"{prefix}grad_norm": math.nan if update.grad_norm is None else update.grad_norm, f"{prefix}lr": update.lr}
    if update.skipped_steps:
        numbers[f"{prefix}skipped_steps"] = float(update.skipped_steps)
    return numbers | {f"{prefix}{label}_grad_norm": value * made for label, value in update.term_norms.items()}


class UpdateLog:
    """What several updates of an iteration report. Refused ones, which made no step, are counted and left out of the means."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.made: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self._skipped: dict[str, float] = {}

    def add(self, update: Update, prefix: str = "") -> None:
        model = update.model.name
        self.made[model] = self.made.get(model, 0) + update.stepped
        self.refused[model] = self.refused.get(model, 0) + (not update.stepped)
        for name, value in report(update, prefix).items():
            if name.endswith("skipped_steps"):  # counts on over the whole run
                self._skipped[name] = value
                continue
            column = self.values.setdefault(name, [])
            if update.stepped:
                column.append(value)

    @property
    def steps(self) -> int:
        """Optimizer steps that were made, of the model that is named first where several are trained side by side."""
        return next(iter(self.made.values()), 0)

    def means(self) -> dict[str, float]:
        """Means over the updates that were made; NaN where none was."""
        return {name: sum(column) / len(column) if column else math.nan for name, column in self.values.items()} | self._skipped

    def warnings(self) -> list[str]:
        """In words, which updates were refused."""
        return [
            f"{count} of {count + self.made[model]} updates of {model} were refused, as their loss or gradient was not finite; "
            "what is logged is about the others"
            for model, count in self.refused.items()
            if count
        ]
