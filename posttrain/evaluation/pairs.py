"""How often scores put ranked responses in the right order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from posttrain.evaluation.statistics import bootstrap_ratio
from posttrain.ops import ordered_pairs
from posttrain.packing import Tree


def correct_pairs(scores: Tensor, ranks: Sequence[int]) -> tuple[int, int]:
    """(pairs in the right order, pairs) from the `scores (K,)` of ranked responses; ties give no pair, equal scores are wrong."""
    values = scores.tolist()
    orders = [values[winner] > values[loser] for winner, loser in ordered_pairs(ranks)]
    return sum(orders), len(orders)


def pair_accuracy(scores: Sequence[Tensor], trees: Sequence[Tree], seed: int) -> dict[str, Any]:
    """Share of all elements' pairs in the right order, with a 95 % interval.

    Whole prompts are resampled, because the pairs of one prompt are not independent.
    """
    correct, pairs = zip(*(correct_pairs(own, tree.ranks) for own, tree in zip(scores, trees)))
    interval = bootstrap_ratio(list(map(float, correct)), list(map(float, pairs)), seed=seed)
    return {"pair_accuracy": interval.mean, "ci95": [interval.low, interval.high], "n_pairs": sum(pairs), "n_prompts": interval.n}
