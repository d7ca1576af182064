"""From scores to advantages without a critic: a response is compared with others. One small function per method.

Each takes `scores (B,)` of responses of `lengths`, NaN where nobody could score, `penalties (T,)` that their tokens pay (0, or a
KL), and the group (B,) that each is in; it gives one advantage per token (T,), 0 for responses without a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.ops import sum_by_length, whiten

STD_GUARD = 1e-4  # added to a group's standard deviation, as TRL does


def differs(scores: Tensor, group_of: Tensor) -> Tensor:
    """(P,) bool: whether two scored responses of a group have different scores (B,). Exact, as a variance would not be."""
    scored = scores.isfinite()
    highest = scores.new_full((int(group_of.max()) + 1,), -torch.inf)
    lowest = -highest
    highest.scatter_reduce_(0, group_of[scored], scores[scored], "amax")
    lowest.scatter_reduce_(0, group_of[scored], scores[scored], "amin")
    return highest > lowest


def group_moments(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation and number (B,) of the scored responses in each one's group; NaN is unscored."""
    scored = scores.isfinite()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, torch.where(scored, values, 0))[groups]

    count = total(torch.ones_like(scores))
    mean = total(scores) / count.clamp(min=1)
    variance = total((scores - mean).square()) / (count - 1).clamp(min=1)
    return mean, variance.sqrt(), count


def group_std(scores: Tensor, penalties: Tensor, groups: Tensor, lengths: Sequence[int]) -> Tensor:
    """GRPO: A = (r - mean) / std over the group (DeepSeekMath, section 4.1.2)."""
    totals = scores - sum_by_length(penalties, lengths)
    mean, std, _ = group_moments(totals, groups)
    return spread((totals - mean) / (std + STD_GUARD), totals, groups, lengths)


def group_mean(scores: Tensor, penalties: Tensor, groups: Tensor, lengths: Sequence[int]) -> Tensor:
    """Dr.GRPO: A = r - mean, so that easy and hard prompts weigh no more than others (arXiv 2503.20783)."""
    totals = scores - sum_by_length(penalties, lengths)
    return spread(totals - group_moments(totals, groups)[0], totals, groups, lengths)


def leave_one_out(scores: Tensor, penalties: Tensor, groups: Tensor, lengths: Sequence[int]) -> Tensor:
    """RLOO: A_i = r_i - mean of the others = n / (n - 1) (r_i - mean) (arXiv 2402.14740)."""
    totals = scores - sum_by_length(penalties, lengths)
    mean, _, count = group_moments(totals, groups)
    return spread((totals - mean) * count / (count - 1).clamp(min=1), totals, groups, lengths)


def over_batch(scores: Tensor, penalties: Tensor, groups: Tensor, lengths: Sequence[int]) -> Tensor:
    """REINFORCE++: A_t = r - sum_{i >= t} penalty_i, whitened over the tokens of the whole batch (arXiv 2501.03262)."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    totals = sum_by_length(penalties, lengths)
    paid = penalties.cumsum(0) - penalties - (totals.cumsum(0) - totals)[owner]  # by the earlier tokens of the response
    to_go = (scores - totals)[owner] + paid
    scored = to_go.isfinite()
    advantages = torch.zeros_like(to_go)
    if scored.any() and to_go[scored].min() < to_go[scored].max():
        advantages[scored] = whiten(to_go[scored])
    return advantages


def spread(advantages: Tensor, totals: Tensor, groups: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each response's number (B,) at each of its tokens (T,); exactly 0 where it wasn't scored or its group is all alike."""
    counted = differs(totals, groups)[groups] & totals.isfinite()
    return torch.where(counted, advantages, 0).repeat_interleave(torch.tensor(lengths))
