"""Linear maps for a few rows at a time on a CPU: weights laid out once for oneDNN, as decoding reads them at every token.

A matrix product of 8 or 16 rows is bound by how its weights are read; from a row-major matrix that takes 1.5 to 3 times as long
as from blocks in the order of the kernel. The copy costs the memory of the weights, for as long as the context is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

SMALLEST = 2**19  # elements; below it the call costs what the layout saves
ROWS = 16  # that the layout is made for; others work as well


def can_prepack(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear map that gains from it: large, in fp32, on a CPU that has oneDNN."""
    return (
        isinstance(module, nn.Linear)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= SMALLEST
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def apply_prepacked(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """inputs W^T + b for `inputs (..., d)` and a weight from oneDNN's reordering."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@contextmanager
def prepacked(module: nn.Module) -> Iterator[None]:
    """Inside, every large linear map of `module` computes with a copy of its weights in oneDNN's own layout, without gradient.

    Weights must not change meanwhile. Does nothing on other devices, in other dtypes and under autocast.
    """
    maps = [] if torch.is_autocast_enabled("cpu") else [m for m in module.modules() if can_prepack(m)]
    try:
        for linear in maps:
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
            linear.forward = partial(apply_prepacked, weight, linear.bias)  # type: ignore[method-assign]
        yield
    finally:
        for linear in maps:
            vars(linear).pop("forward", None)
