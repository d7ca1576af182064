"""Tensor maths shared by two or more stages: torch only, no collectives, no models.

Per-token tensors are flat. A rollout keeps its responses one after another in a tensor (T,) with `lengths`, a list of
B ints; a packed row keeps them in (N,) with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def whiten(values: Tensor) -> Tensor:
    """Shift `values (T,)` to mean 0 and scale them to variance 1.

    The biased variance plus 1e-8 under the root, so that constant values give 0 and not NaN.
    """
    return (values - values.mean()) * torch.rsqrt(values.var(correction=0) + 1e-8)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 estimate of KL(pi || ref) per token, log pi - log ref: unbiased, may be negative (Schulman 2020)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(pi || ref) per token, exp(d) - d - 1 with d = log ref - log pi: unbiased and never negative (Schulman 2020)."""
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def sum_by_length(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum `values (T,)` over each of B consecutive runs of `lengths` -> (B,)."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths, dtype=torch.int64))
    return values.new_zeros(len(lengths)).index_add(0, owner, values)


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All (winner, loser) index pairs of ranked responses, smaller rank is better; ties give no pair."""
    n = range(len(ranks))
    return [(i, j) for i in n for j in n if ranks[i] < ranks[j]]
