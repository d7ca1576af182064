"""One optimizer step, and everything that may happen inside it."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from posttrain.engine.model import TrainedModel


class Update:
    """Any number of backwards, then ONE optimizer step when the block ends.

    The gradient is the sum over ranks and backwards of `weight * loss_sum / over`. A loss that isn't finite on any rank is
    agreed on by all ranks before its backward (0 times infinity is NaN, so a weight of 0 would not help), and then nobody steps.
    After the block: `grad_norm` before clipping (None when a loss wasn't finite), `lr` of this step, `stepped`,
    `terms {label: weighted global mean loss}` and, where two labels or more were used, `term_norms {label: gradient norm}`.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        self.grad_norm: float | None = None
        self.lr = model.lr
        self.stepped = False
        self.terms: dict[str, float] = {}
        self.term_norms: dict[str, float] = {}
        self._refused = ""

    def backward(self, loss_sum: Tensor, *, over: float, weight: float = 1.0, label: str = "loss") -> None:
        """Accumulate the gradient of `weight * loss_sum / over`.

        `loss_sum` is this rank's sum over one micro-batch (a scalar; 0 with a graph for a dummy one), `over` the GLOBAL
        count that its term is divided by. Every rank calls it equally often. Raises ValueError when `over` isn't positive.
        """
        if not over > 0:
            raise ValueError(f"over={over} must be positive: there is nothing to train on in the term {label!r} of {self.model.name}")
        assert loss_sum.ndim == 0, "backward takes a scalar, the sum of a loss over one micro-batch"
        value = loss_sum * (weight / over)
        world, backend = self.model.world, self.model.backend
        total = world.sum(float(value.detach()), f"loss of {self.model.name}")
        with world.phase(f"backward of {self.model.name}"):
            if math.isfinite(total):
                self.terms[label] = self.terms.get(label, 0.0) + total
                backend.backward(value, label)
            else:
                self._refused = self._refused or f"the loss {label!r} is {total}"
                backend.poison(value)

    @property
    def skipped_steps(self) -> int:
        """The model's refused steps so far, this one included."""
        return self.model.skipped_steps

    def __enter__(self) -> Update:
        assert self.model.module.training, f"{self.model.name} is in evaluation mode; updates belong outside evaluating()"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        model = self.model
        if kind is not None:
            model.backend.abandon()
            return
        assert self.terms or self._refused, "an update needs at least one backward"
        with model.world.phase(f"step of {model.name}"):
            if self._refused:
                model.backend.discard()
            else:
                norm, self.stepped, self.term_norms = model.backend.step(self.lr)
                if self.stepped:
                    self.grad_norm = norm
                else:
                    self._refused = f"the gradient norm is {norm}"
        model.after_update(self.stepped, self._refused)
