"""Pairs, mismatched responses and sums, by hand."""

from __future__ import annotations

import torch

from posttrain.packing import Tree, forest, segment
from posttrain.preferences import Responses, best_response, mismatched, pair_up


def comparison(ranks: tuple[int, ...], lengths: tuple[int, ...]) -> Tree:
    return Tree(segment([1, 2]), tuple(segment([3] * n, [True] * (n - 1) + [n == 1]) for n in lengths), ranks=ranks)


def test_pairs_are_all_but_the_ties_and_share_their_element():
    trees = [comparison((1, 0, 1), (2, 4, 5)), comparison((0, 1), (1, 3))]
    logprobs, ref = torch.arange(5).double(), torch.arange(5).double() * 10
    pairs, places, share = pair_up(Responses.of_trees(trees, logprobs, ref))
    assert places.tolist() == [[1, 0], [1, 2], [3, 4]] and share.tolist() == [0.5, 0.5, 1.0]
    assert pairs.chosen.tolist() == [1, 1, 3] and pairs.rejected.tolist() == [0, 2, 4] and pairs.ref_rejected.tolist() == [0, 20, 40]
    assert pairs.chosen_lengths.tolist() == [3, 3, 1] and pairs.rejected_lengths.tolist() == [1, 4, 2]
    assert pairs.lead.tolist() == [-9, 9, 9] and pairs.mean_lead.tolist() == [-3, -3 + 4.5, -27 + 18]
    assert [best_response(tree) for tree in trees] == [1, 0]


def test_the_responses_of_a_packed_row_are_those_of_its_trees():
    trees = [comparison((1, 0, 1), (2, 4, 5)), comparison((0, 1), (1, 3))]
    row = forest(trees)
    tokens = torch.rand(row.num_tokens)
    sums = torch.stack([tokens[row.trainable & (row.response_of == b)].double().sum() for b in range(5)])
    packed, by_tree = Responses.of_row(row, tokens, sums * 2), Responses.of_trees(trees, sums, sums * 2)
    for name in ("logprobs", "lengths", "log_ratios"):
        torch.testing.assert_close(getattr(packed, name), getattr(by_tree, name))
    assert [part for _, part in packed.groups] == [part for _, part in by_tree.groups] == [slice(0, 3), slice(3, 5)]
    nothing = pair_up(Responses.of_row(forest(trees, dummy=True), tokens, sums))
    assert len(nothing[0].lead) == len(nothing[2]) == 0


def test_mismatched_responses_are_those_of_the_row_before_cut_to_what_fits():
    def tree(prompt: int, response: int) -> Tree:
        return Tree(segment([1] * prompt), (segment([response] * response, True),), ranks=(0,))

    pairs = mismatched([tree(3, 4), tree(5, 2), tree(2, 6)], longest=8)
    assert [pair.children[0].input_ids.tolist() for pair in pairs] == [[6] * 5, [4] * 3, [2] * 2]
    assert [len(pair.root) for pair in pairs] == [3, 5, 2] and all(pair.num_tokens <= 8 for pair in pairs)
