"""Sums over micro-batches and ranks, for metrics that must not depend on either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.engine.world import World


class Tally:
    """Named sums on this rank; `total` adds up the ranks. Every rank must add the same names."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            number = torch.as_tensor(value).detach().double().cpu()
            self.sums[name] = self.sums[name] + number if name in self.sums else number

    def total(self, world: World) -> dict[str, float]:
        """The sums over all ranks, which start from nothing again."""
        names = sorted(self.sums)
        summed = world.sum(torch.stack([self.sums[name] for name in names])) if names else torch.zeros(0)
        self.sums = {}
        return dict(zip(names, summed.tolist()))
