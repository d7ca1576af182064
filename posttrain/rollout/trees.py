"""A rollout as trees: each prompt once, with the responses to it as its children."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

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
