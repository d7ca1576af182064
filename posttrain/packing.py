"""Rows to packed forests: the one batch representation of every stage.

A micro-batch is one flat row of N tokens, cut into segments. A segment has a parent segment or none; its tokens
attend to every token of its ancestors and to the earlier tokens of its own segment, and its positions continue its
parent's. There is no padding and no attention mask. `predecessor[i]` is the token whose hidden state predicts token i:
i-1 inside a segment, the parent's last token for a segment's first one, and i itself for a root's first token, which
nothing predicts and which is therefore never trainable.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapreplace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens: `input_ids (L,)` int64, `trainable (L,)` bool, and named per-token numbers `fields[name] (L,)`."""

    input_ids: Tensor
    trainable: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1 and len(self.input_ids) > 0, "a segment has at least one token"
        assert all(len(x) == len(self) for x in (self.trainable, *self.fields.values())), "one number per token"

    def __len__(self) -> int:
        return len(self.input_ids)


def segment(input_ids: Sequence[int], trainable: bool | Sequence[bool] = False, **fields: Tensor) -> Segment:
    """A Segment from plain lists; one bool for `trainable` holds for every token."""
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    mask = torch.full(ids.shape, trainable) if isinstance(trainable, bool) else torch.as_tensor(trainable, dtype=torch.bool)
    return Segment(ids, mask, fields)


@dataclass(frozen=True, eq=False)
class Tree:
    """One element of a batch: a root segment and its children, which all continue the root and never see each other.

    `index` is the element's place in the global batch. Its responses are the children, or the root where it has none;
    `response_ids` are their places in the global batch of responses (default: nobody asks).
    `ranks` orders the responses of a comparison: smaller is better, equal is a tie.
    """

    root: Segment
    children: tuple[Segment, ...] = ()
    index: int = 0
    response_ids: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert not bool(self.root.trainable[0]), "nothing predicts a root's first token"
        for name in ("response_ids", "ranks"):
            assert len(getattr(self, name)) in (0, self.num_responses), f"one of {name} per response"

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (self.root, *self.children)

    @property
    def num_responses(self) -> int:
        return len(self.children) or 1

    @property
    def num_tokens(self) -> int:
        return sum(len(part) for part in self.segments)

    @property
    def num_trainable(self) -> int:
        return sum(int(part.trainable.sum()) for part in self.segments)


def split(tree: Tree, max_tokens: int) -> list[Tree]:
    """Cut a tree into trees of at most `max_tokens` by repeating its root. Exact for losses that are sums over responses.

    The root's own trainable tokens count once: only the first part keeps them.
    Raises ValueError when the root and one child don't fit.
    """
    if tree.num_tokens <= max_tokens or not tree.children:
        return [tree]
    parts: list[list[int]] = []
    room = 0
    for i, child in enumerate(tree.children):
        if not parts or len(child) > room:
            parts.append([])
            room = max_tokens - len(tree.root)
        parts[-1].append(i)
        room -= len(child)

    def pick(values: tuple, chosen: list[int]) -> tuple:
        return tuple(values[i] for i in chosen) if values else ()

    silent = Segment(tree.root.input_ids, torch.zeros_like(tree.root.trainable), tree.root.fields)
    return [
        Tree(silent if n else tree.root, pick(tree.children, part), tree.index, pick(tree.response_ids, part), pick(tree.ranks, part))
        for n, part in enumerate(parts)
    ]


@dataclass(eq=False)
class Forest:
    """One packed row of N tokens, S segments and B responses, on one device.

    `input_ids, position_ids, predecessor (N,)` int64; `trainable (N,)` bool, the only mask; `starts, lengths, parents`
    lists of S ints (parent -1 for a root); `last_token (B,)` the place of each response's last token;
    `response_of (N,)` the response that a token belongs to, or -1 (a prompt with children); `response_ids (B,)` global.
    `groups` lists, for each tree that counts, the tree and the slice of B that its responses fill; a dummy row, which
    only keeps a rank in step with the others, has no groups and nothing trainable.
    """

    input_ids: Tensor
    position_ids: Tensor
    predecessor: Tensor
    trainable: Tensor
    starts: list[int]
    lengths: list[int]
    parents: list[int]
    last_token: Tensor
    response_of: Tensor
    response_ids: Tensor
    fields: dict[str, Tensor]
    groups: list[tuple[Tree, slice]]

    def __getitem__(self, name: str) -> Tensor:
        """The per-token numbers `name` (N,); 0 where a segment has none."""
        return self.fields[name]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_responses(self) -> int:
        return len(self.last_token)

    @cached_property
    def scored_tokens(self) -> Tensor:
        """Places (M,) of the tokens whose predictions are read: the trainable ones, or one real token when there are none.

        A head that is evaluated on nothing drops out of the autograd graph, and a sharded backend then waits for its
        gradient for ever.
        """
        places = self.trainable.nonzero().squeeze(-1)
        return places if len(places) else self.last_token[:1]

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum per-token `values (N,)` over each response's trainable tokens -> (B,)."""
        counted = torch.where(self.trainable & (self.response_of >= 0), values, 0)
        total = values.new_zeros(self.num_responses)
        return total.index_add(0, self.response_of.clamp(min=0), counted)

    def to(self, device: torch.device | str) -> Forest:
        tensors = ("input_ids", "position_ids", "predecessor", "trainable", "last_token", "response_of", "response_ids")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return replace(self, **moved, fields={name: value.to(device) for name, value in self.fields.items()})


def forest(trees: Sequence[Tree], *, dummy: bool = False) -> Forest:
    """Lay trees side by side in one packed row. With `dummy`, nothing in it is trainable and no tree counts."""
    assert trees, "a packed row has at least one tree"
    starts: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    parts: list[Segment] = []
    positions, predecessors, responses = [], [], []
    last_token: list[int] = []
    groups: list[tuple[Tree, slice]] = []
    offset = 0
    for tree in trees:
        root_index, root_length, first_response = len(parts), len(tree.root), len(last_token)
        root_end = offset + root_length - 1
        for part in tree.segments:
            is_root = part is tree.root and len(parts) == root_index
            length = len(part)
            starts.append(offset)
            lengths.append(length)
            parents.append(-1 if is_root else root_index)
            parts.append(part)
            positions.append(torch.arange(length) + (0 if is_root else root_length))
            before = torch.arange(offset - 1, offset + length - 1)
            before[0] = offset if is_root else root_end
            predecessors.append(before)
            is_response = not (is_root and tree.children)
            responses.append(torch.full((length,), len(last_token) if is_response else -1))
            offset += length
            if is_response:
                last_token.append(offset - 1)
        groups.append((tree, slice(first_response, len(last_token))))

    trainable = torch.cat([part.trainable for part in parts])
    names = sorted({name for part in parts for name in part.fields})
    ids = [i for tree in trees for i in (tree.response_ids or (-1,) * tree.num_responses)]
    return Forest(
        input_ids=torch.cat([part.input_ids for part in parts]),
        position_ids=torch.cat(positions),
        predecessor=torch.cat(predecessors),
        trainable=torch.zeros_like(trainable) if dummy else trainable,
        starts=starts,
        lengths=lengths,
        parents=parents,
        last_token=torch.tensor(last_token),
        response_of=torch.cat(responses),
        response_ids=torch.tensor(ids),
        fields={name: torch.cat([part.fields.get(name, torch.zeros(len(part))) for part in parts]) for name in names},
        groups=[] if dummy else groups,
    )


def plan(sizes: Sequence[int], max_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Spread elements over ranks and micro-batches -> plan[rank][micro_batch] = element indices.

    Every rank gets the same number of micro-batches (empty ones where the elements run out), as few as will hold
    everything; none exceeds `max_tokens`, and tokens are balanced: the largest element left goes to the emptiest row, the
    fullest row left to the rank with the fewest tokens. A pure function, so that every rank computes the same plan.
    Raises ValueError naming an element that fits in no row.
    """
    largest = max(sizes, default=0)
    if largest > max_tokens:
        row = list(sizes).index(largest)
        raise ValueError(f"max_tokens_per_micro_batch={max_tokens} is below element {row} with {largest} tokens; {largest} works")
    # With more rows none gets fuller, so the fewest that hold everything are searched for by halves. One element a row always fits.
    descending = sorted(sizes, reverse=True)
    depths = range(max(1, -(-sum(sizes) // (max_tokens * world_size))), max(1, -(-len(sizes) // world_size)))
    depth = depths.start + bisect_left(depths, True, key=lambda depth: _fits(descending, max_tokens, depth * world_size))
    rows = _fill(sizes, depth * world_size)
    result: list[list[list[int]]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for size, elements in sorted(rows, key=lambda row: (-row[0], row[1])):
        rank = min((k for k in range(world_size) if len(result[k]) < depth), key=lambda k: (load[k], k))
        result[rank].append(sorted(elements))
        load[rank] += size
    return result


def _fits(descending: Sequence[int], max_tokens: int, count: int) -> bool:
    """Whether `_fill` leaves all of `count` rows with at most `max_tokens`."""
    rows = list(descending[:count])[::-1]  # ascending, which is a heap
    for size in descending[count:]:
        if rows[0] + size > max_tokens:
            return False
        heapreplace(rows, rows[0] + size)
    return True


def _fill(sizes: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """Elements in `count` rows -> (tokens, elements) per row: the largest element left goes to the emptiest row."""
    emptiest = [(0, row) for row in range(count)]  # a heap
    rows: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size, row = emptiest[0]
        heapreplace(emptiest, (size + sizes[i], row))
        rows[row].append(i)
    return [(size, rows[row]) for size, row in emptiest]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One rank's share of a global batch of trees, with the global counts that losses are divided by.

    `num_tokens` trainable tokens and `num_trees` elements over all ranks; `size` all tokens over all ranks (what throughput counts).
    """

    trees: Sequence[Tree]
    rows: list[list[int]]
    num_tokens: int
    num_trees: int
    size: int
    device: torch.device | str = "cpu"

    def micro_batches(self) -> Iterator[Forest]:
        """This rank's packed rows, the same number on every rank; a missing one is a dummy of the smallest tree."""
        for row in self.rows:
            chosen = [self.trees[i] for i in row] or [min(self.trees, key=lambda tree: tree.num_tokens)]
            yield forest(chosen, dummy=not row).to(self.device)


def pack(
    trees: Sequence[Tree],
    max_tokens: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    device: torch.device | str = "cpu",
    splittable: bool = False,
) -> PackedBatch:
    """Pack a global batch of trees under a token budget; every rank calls it with the same trees. No trees, no micro-batches.

    `splittable` says that the loss is a sum over responses, so that a tree above the budget may repeat its root.
    Raises ValueError naming the element that doesn't fit.
    """
    parts = [part for tree in trees for part in split(tree, max_tokens)] if splittable else list(trees)
    rows = plan([part.num_tokens for part in parts], max_tokens, world_size)[rank] if parts else []
    return PackedBatch(
        trees=parts,
        rows=rows,
        num_tokens=sum(tree.num_trainable for tree in parts),
        num_trees=len(trees),
        size=sum(part.num_tokens for part in parts),
        device=device,
    )
