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

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            number = torch.as_tensor(value).detach().double()
            self.sums[name] = self.sums[name] + number if name in self.sums else number

    def total(self, world: World) -> dict[str, float]:
        """The sums over all ranks, which start from nothing again."""
        names = sorted(self.sums)
        summed = world.sum(torch.stack([self.sums[name].to(world.device) for name in names])).tolist() if names else []
        self.sums = {}
        return dict(zip(names, summed))


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
    """Means of what several updates report."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, update: Update, prefix: str = "") -> None:
        for name, value in report(update, prefix).items():
            self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(column) / len(column) for name, column in self.values.items()}
