"""From the parts of a reward to one score per response, and to what is logged and when a run stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain.rewards.config import RewardsConfig


def combine(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the parts (B,) -> scores (B,); NaN where any part that counts is NaN.

    A part of weight 0 is only logged: a response whose logged part failed is still scored.
    """
    counted = [name for name, weight in weights.items() if weight]
    assert counted, "no part has a weight"
    return torch.stack([parts[name] * weights[name] for name in counted]).sum(0)


def part_means(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """`reward/NAME` -> mean over the responses that this part could score; left out where there is none."""
    means = {f"reward/{name}": values[~values.isnan()] for name, values in parts.items()}
    return {name: values.mean().item() for name, values in means.items() if values.numel()}


def stack_parts(collected: Mapping[int, Mapping[str, float]], keys: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    """What `Rewards.collect` returned as one tensor (B,) per part, responses in the order of `keys`."""
    return {name: torch.tensor([collected[key][name] for key in keys], dtype=torch.float32) for name in names}


def require_scored(scores: Tensor, config: RewardsConfig, failures: Sequence[str]) -> None:
    """Stops the run when too many scores (B,), of all ranks, are NaN. Raises RuntimeError with the first failure's text."""
    failed, total = int(scores.isnan().sum()), scores.numel()
    if failed > config.max_failed_fraction * total:
        raise RuntimeError(
            f"{failed} of {total} responses could not be scored, more than max_failed_fraction={config.max_failed_fraction}. "
            + ("The first failure:\n" + failures[0] if failures else "The failures are told by the ranks that met them.")
        )
