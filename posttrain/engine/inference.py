"""A pass without gradient over a global batch: log-probabilities, values or scores of every response, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.packing import Tree

if TYPE_CHECKING:
    from posttrain.engine.engine import Engine


def infer(
    engine: Engine,
    model: Any,
    trees: Sequence[Tree],
    want: tuple[str, ...],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Tensor]]:
    """Results of every response of a global batch, in global order, as fp32 CPU tensors.

    Ranks share the work by the packing plan and gather the results, which are small. Per-token results come as one
    tensor (L,) of each response's trainable tokens, `scores` as a tensor (). `progress` is called with the number of
    tokens of each packed row that is done.
    """
    numbered = number_responses(trees)
    batch = engine.pack(numbered, max_tokens, splittable=True)
    local: list[tuple[int, dict[str, Tensor]]] = []
    with engine.world.timed("scoring"), model.evaluating():
        for micro in batch.micro_batches():
            result = {name: values.float().cpu() for name, values in model(micro, want=want, temperature=temperature).items()}
            if progress is not None:
                progress(micro.num_tokens)
            if not micro.groups:  # a dummy row belongs to nobody
                continue
            owner = torch.where(micro.trainable, micro.response_of, -1).cpu()
            for b, response in enumerate(micro.response_ids.tolist()):
                mine = owner == b
                local.append((response, {n: x[b] if n == "scores" else x[mine] for n, x in result.items()}))
        everything = dict(pair for share in engine.world.gather(local) for pair in share)
    return {name: [everything[i][name] for i in range(len(everything))] for name in want}


def number_responses(trees: Sequence[Tree]) -> list[Tree]:
    """The same trees with their responses numbered from 0 in order."""
    numbered, first = [], 0
    for tree in trees:
        ids = tuple(range(first, first + tree.num_responses))
        numbered.append(Tree(tree.root, tree.children, tree.index, ids, tree.ranks))
        first += tree.num_responses
    return numbered
