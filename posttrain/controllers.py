"""Numbers that follow a run and outlive a restart: the adaptive KL coefficient, the running scale of scores, the fall of a level."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class KLController:
    """A KL coefficient that follows the measured KL (Ziegler 2019, arXiv 1909.08593, section 2.2).

    After n responses it is multiplied by 1 + n / horizon * clip(kl / target - 1, -0.2, 0.2); `target` 0 keeps it fixed.
    """

    def __init__(self, coef: float, target: float, horizon: int = 10_000) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, num_responses: int) -> None:
        if self.target and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * num_responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class RunningScale:
    """Mean and variance of all scores seen (Chan et al. 1979), for `scaling="running"`. Scores that aren't finite don't count."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        seen = scores[scores.isfinite()]
        if n := len(seen):
            mean, total = float(seen.mean()), self.count + n
            delta = mean - self.mean
            self.squares += float(((seen - mean) ** 2).sum()) + delta * delta * self.count * n / total
            self.mean += delta * n / total
            self.count = total
        return (scores - self.mean) / (math.sqrt(self.squares / max(1, self.count)) + 1e-8)

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Fall:
    """How far a noisy number has fallen: the mean of its first `WINDOW` values minus that of its last ones."""

    WINDOW = 10

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: list[float] = []

    def update(self, value: float) -> float:
        """Values that aren't finite don't count."""
        if math.isfinite(value):
            self.first = [*self.first, value][: self.WINDOW]
            self.last = [*self.last, value][-self.WINDOW :]
        return sum(self.first) / max(1, len(self.first)) - sum(self.last) / max(1, len(self.last))

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
