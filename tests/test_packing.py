from __future__ import annotations

import random
import time

import pytest
import torch

from posttrain.packing import Segment, Tree, forest, pack, plan, segment, split


def random_tree(generator: random.Random, index: int, children: int, first_response: int = 0) -> Tree:
    def part(trainable: bool) -> Segment:
        return segment([generator.randrange(5, 300) for _ in range(generator.randrange(1, 9))], trainable)

    ids = tuple(range(first_response, first_response + max(1, children)))
    return Tree(part(False), tuple(part(True) for _ in range(children)), index, ids)


def ancestors_by_walking(row, i: int) -> list[int]:
    """The tokens before token i, found by following predecessors one by one."""
    path = []
    while int(row.predecessor[i]) != i:
        i = int(row.predecessor[i])
        path.append(i)
    return path[::-1]


def test_every_response_reads_as_its_prompt_followed_by_itself():
    generator = random.Random(0)
    trees = [random_tree(generator, n, children) for n, children in enumerate([0, 1, 3, 5, 0, 2])]
    row = forest(trees)
    for tree, part in row.groups:
        for k, last in enumerate(row.last_token[part].tolist()):
            path = [*ancestors_by_walking(row, last), last]
            expected = torch.cat([tree.root.input_ids, *([tree.children[k].input_ids] if tree.children else [])])
            assert row.input_ids[path].tolist() == expected.tolist()
            assert row.position_ids[path].tolist() == list(range(len(expected)))


def test_a_response_owns_its_own_tokens_and_a_shared_prompt_belongs_to_nobody():
    row = forest([Tree(segment([1, 2, 3]), (segment([4, 5], True), segment([6], True))), Tree(segment([7, 8], [False, True]))])
    assert row.response_of.tolist() == [-1, -1, -1, 0, 0, 1, 2, 2]
    assert row.sum_by_response(torch.arange(8.0)).tolist() == [3 + 4, 5, 7]


def test_a_roots_first_token_is_never_trainable():
    with pytest.raises(AssertionError, match="first token"):
        Tree(segment([1, 2], True))


def test_fields_stand_at_their_tokens_and_are_zero_elsewhere():
    row = forest([Tree(segment([1, 2]), (segment([3, 4], True, values=torch.tensor([0.5, 0.25])),)), Tree(segment([5]))])
    assert row["values"].tolist() == [0, 0, 0.5, 0.25, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_plan_covers_every_element_once_within_the_budget_and_in_step(world_size: int):
    generator = random.Random(world_size)
    for _ in range(50):
        sizes = [generator.randrange(1, 60) for _ in range(generator.randrange(1, 40))]
        budget = generator.randrange(60, 200)
        ranks = plan(sizes, budget, world_size)
        assert sorted(i for rank in ranks for row in rank for i in row) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in row) <= budget for rank in ranks for row in rank)
        assert len({len(rank) for rank in ranks}) == 1
        assert ranks == plan(sizes, budget, world_size)


def slow_plan(sizes: list[int], budget: int, world_size: int) -> list[tuple[int, ...]]:
    """The rows found by trying every number of them, from one per rank: the largest element left goes to the emptiest row."""
    for count in range(world_size, 10**6, world_size):
        rows: list[list[int]] = [[] for _ in range(count)]
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            emptiest = min(range(count), key=lambda k: (sum(sizes[n] for n in rows[k]), k))
            rows[emptiest].append(i)
        if all(sum(sizes[i] for i in row) <= budget for row in rows):
            return sorted(tuple(sorted(row)) for row in rows)
    raise AssertionError


def test_the_plan_has_as_few_rows_as_trying_every_number_of_them():
    generator = random.Random(7)
    for _ in range(60):
        budget, world_size = generator.randrange(60, 120), generator.choice([1, 2, 3])
        sizes = [generator.randrange(1, 60) for _ in range(generator.randrange(1, 30))]
        found = sorted(tuple(row) for rank in plan(sizes, budget, world_size) for row in rank)
        assert found == slow_plan(sizes, budget, world_size)


@pytest.mark.parametrize("smallest", [0.51, 0.34, 0.26, 0.01])
def test_a_plan_of_twenty_thousand_elements_takes_no_second(smallest: float):
    generator = random.Random(0)
    sizes = [generator.randrange(int(smallest * 1000), 1000 if smallest > 0.5 else int(smallest * 1000) + 100) for _ in range(20_000)]
    began = time.process_time()
    ranks = plan(sizes, 1000, 8)
    assert time.process_time() - began < 1
    assert sorted(i for rank in ranks for row in rank for i in row) == list(range(20_000))


def test_tokens_are_balanced_over_ranks():
    generator = random.Random(3)
    sizes = [generator.randrange(20, 200) for _ in range(256)]
    loads = [sum(sizes[i] for row in rank for i in row) for rank in plan(sizes, 2048, 4)]
    assert max(loads) / min(loads) < 1.15


def test_an_element_above_the_budget_is_named_with_a_budget_that_works():
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=50 is below element 2 with 61 tokens; 61 works"):
        plan([10, 20, 61], 50, 2)


def test_a_split_tree_repeats_its_root_and_keeps_every_response_once():
    tree = random_tree(random.Random(1), 7, 5, first_response=20)
    budget = len(tree.root) + max(map(len, tree.children))
    parts = split(tree, budget)
    assert len(parts) > 1 and all(part.num_tokens <= budget and part.index == 7 for part in parts)
    assert [i for part in parts for i in part.response_ids] == list(tree.response_ids)
    assert all(torch.equal(part.root.input_ids, tree.root.input_ids) for part in parts)
    assert sum(part.num_trainable for part in parts) == tree.num_trainable


def test_a_split_root_trains_its_own_tokens_once():
    tree = Tree(segment([1, 2, 3], [False, True, True]), tuple(segment([4] * 4, True) for _ in range(3)))
    assert [part.num_trainable for part in split(tree, 7)] == [2 + 4, 4, 4]


def test_ranks_get_equally_many_micro_batches_and_dummies_train_nothing():
    trees = [random_tree(random.Random(2), n, 2, first_response=2 * n) for n in range(3)]
    budget = max(tree.num_tokens for tree in trees)
    shares = [pack(trees, budget, world_size=4, rank=rank) for rank in range(4)]
    rows = [list(share.micro_batches()) for share in shares]
    assert {len(share) for share in rows} == {1}
    dummies = [row for share in rows for row in share if not row.groups]
    assert len(dummies) == 1 and not dummies[0].trainable.any() and len(dummies[0].scored_tokens) == 1
    seen = sorted(i for share in rows for row in share if row.groups for i in row.response_ids.tolist())
    assert seen == list(range(6))


def test_no_trees_no_micro_batches():
    empty = pack([], 100)
    assert list(empty.micro_batches()) == [] and empty.num_tokens == 0
