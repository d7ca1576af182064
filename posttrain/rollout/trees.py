"""A rollout as trees: each prompt once, with the responses to it as its children."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from posttrain.packing import Tree, segment

if TYPE_CHECKING:
    from posttrain.rollout.local import Rollout


def response_trees(rollout: Rollout, chosen: Sequence[int] = (), fields: Mapping[str, Tensor] | None = None) -> list[Tree]:
    """Trees of the `chosen` responses (all where none are named), every response token trainable.

    `fields` are per-token numbers (T,), all responses one after another; each response takes its part along.
    """
    lengths = [len(response) for response in rollout.responses]
    parts = {name: values.split(lengths) for name, values in (fields or {}).items()}
    prompt_of = rollout.prompt_of.tolist()
    trees = []
    for prompt, group in groupby(sorted(chosen) or range(len(lengths)), key=lambda i: prompt_of[i]):
        ids = tuple(group)
        children = tuple(segment(rollout.responses[i], True, **{name: part[i] for name, part in parts.items()}) for i in ids)
        trees.append(Tree(segment(rollout.prompts[prompt]), children, index=prompt, response_ids=ids))
    return trees


def minibatches(
    rollout: Rollout,
    fields: Mapping[str, Tensor],
    count: int,
    num_epochs: int,
    key: tuple[int, ...],
    chosen: Sequence[int] | None = None,
) -> Iterator[list[Tree]]:
    """`num_epochs` passes over the `chosen` responses (default: all), each in an order of its own that depends on `key` only, cut
    into `count` minibatches that are alike in size; fewer where there are fewer responses than that."""
    indices = range(len(rollout.responses)) if chosen is None else chosen
    for epoch in range(num_epochs):
        order = np.random.default_rng([*key, epoch]).permutation(np.array(indices, dtype=np.int64))
        for part in np.array_split(order, min(count, len(order)) or 1):
            if len(part):
                yield response_trees(rollout, part.tolist(), fields)
