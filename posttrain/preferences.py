"""Responses and pairs of responses: what preference losses read, and what is logged about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from posttrain.ops import ordered_pairs
from posttrain.packing import Forest, Segment, Tree

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Responses:
    """B responses: `logprobs`, `ref_logprobs` (0 without a reference) and `lengths`, each (B,) sums over tokens in fp64;
    `groups` the elements that they belong to, each with its slice of B."""

    logprobs: Tensor
    ref_logprobs: Tensor
    lengths: Tensor
    groups: Sequence[tuple[Tree, slice]]

    @property
    def log_ratios(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x) (B,)."""
        return self.logprobs - self.ref_logprobs

    @classmethod
    def of_row(cls, micro: Forest, logprobs: Tensor, ref_logprobs: Tensor) -> Responses:
        """Those of a packed row, from `logprobs (N,)` per token and `ref_logprobs (B,)`."""
        lengths = micro.sum_by_response(micro.trainable.double())
        return cls(micro.sum_by_response(logprobs.double()), ref_logprobs, lengths.clamp(min=1), micro.groups)

    @classmethod
    def of_trees(cls, trees: Sequence[Tree], logprobs: Tensor, ref_logprobs: Tensor) -> Responses:
        """Those of many trees, from their sums (B,)."""
        lengths = torch.tensor([float(child.trainable.sum()) for tree in trees for child in tree.children], dtype=torch.float64)
        ends = accumulate(tree.num_responses for tree in trees)
        groups = [(tree, slice(end - tree.num_responses, end)) for tree, end in zip(trees, ends)]
        return cls(logprobs, ref_logprobs, lengths.clamp(min=1), groups)


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a better and a worse response to one prompt, each of these (P,): sums of log-probabilities, counts of tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def lead(self) -> Tensor:
        """By how much the chosen log-ratio leads."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_lead(self) -> Tensor:
        """The same, of log-ratios per token."""
        return self.chosen_ratio / self.chosen_lengths - self.rejected_ratio / self.rejected_lengths


def pair_up(responses: Responses) -> tuple[Pairs, Tensor, Tensor]:
    """All non-tied pairs, the places (P, 2) of their better and worse responses, and the share (P,) of each in its element."""
    places: list[tuple[int, int]] = []
    shares: list[float] = []
    for tree, part in responses.groups:
        ordered = ordered_pairs(tree.ranks)
        places += [(part.start + winner, part.start + loser) for winner, loser in ordered]
        shares += [1 / len(ordered)] * len(ordered)
    device = responses.logprobs.device
    index = torch.tensor(places, dtype=torch.int64, device=device).reshape(-1, 2)
    columns = (responses.logprobs, responses.ref_logprobs, responses.lengths)
    pairs = Pairs(*(column[side] for column in columns for side in index.unbind(1)))
    return pairs, index, torch.tensor(shares, dtype=torch.float64, device=device)


def best_response(tree: Tree) -> int:
    """The place of the first response of the best rank."""
    return tree.ranks.index(min(tree.ranks))


def longest_row(trees: Sequence[Tree]) -> int:
    """Tokens of the longest prompt with one of its responses."""
    return max(len(tree.root) + max(map(len, tree.children)) for tree in trees)


def mismatched(trees: Sequence[Tree], longest: int) -> list[Tree]:
    """Each prompt with the response of the row before it (the first with the last row's), cut where the two exceed `longest` tokens."""
    pairs = []
    for tree, before in zip(trees, [*trees[-1:], *trees[:-1]]):
        response, room = before.children[0], longest - len(tree.root)
        pairs.append(Tree(tree.root, (Segment(response.input_ids[:room], response.trainable[:room]),)))
    return pairs


def side_sums(name: str, side: Tensor, share: Tensor, responses: Responses, rewards: Tensor) -> dict[str, Tensor]:
    """Sums over the responses at `side (P,)`, weighted by `share (P,)`, of what is logged about them."""
    logprobs, lengths = responses.logprobs[side].detach(), responses.lengths[side]
    columns = {"logprobs": logprobs, "logprobs_per_token": logprobs / lengths, "rewards": rewards[side]}
    columns |= {"log_ratio": responses.log_ratios[side].detach(), "length": lengths}
    return {f"{name}_{column}": (share * values).sum() for column, values in columns.items()} | {name: share.sum()}


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Means from the sums of a whole step: of each side over its responses, of the rest over elements. NaN where there are none."""
    over = {"nll_loss": sums.get("nll_tokens", 0.0)} | {name: sums[name.split("_")[0]] for name in sums if name.split("_")[0] in SIDES}
    means = {name: value / count if (count := over.get(name, sums["elements"])) else math.nan for name, value in sums.items()}
    means["margin"] = means["chosen_rewards"] - means["rejected_rewards"]
    return {name: value for name, value in means.items() if name not in (*SIDES, "elements", "nll_tokens")}
