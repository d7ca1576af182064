"""Where the reference's log-probabilities come from: nowhere, a frozen model, or a table made before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from posttrain.packing import Forest, Tree

if TYPE_CHECKING:
    from posttrain.engine.model import FrozenModel, TrainedModel
    from posttrain.run import Run


class Reference(NamedTuple):
    """Sums (B,) of log pi_ref in fp64: of the responses in a packed row, and of other responses that step n asks for."""

    of_row: Callable[[Forest], Tensor]
    of_step: Callable[[int, Sequence[Tree]], Tensor]


def no_reference() -> Reference:
    """0 for every response."""
    return Reference(lambda micro: torch.zeros_like(micro.response_ids, dtype=torch.float64), lambda step, trees: zeros(trees))


def zeros(trees: Sequence[Tree]) -> Tensor:
    """0 for every response of the trees (B,)."""
    return torch.zeros(sum(tree.num_responses for tree in trees), dtype=torch.float64)


def live(run: Run, model: FrozenModel, max_tokens: int) -> Reference:
    """Computed by a frozen model when they are asked for."""
    from posttrain.engine.kept import sequence_logprobs

    return Reference(
        lambda micro: micro.sum_by_response(model.logprobs(micro).double()),
        lambda step, trees: sequence_logprobs(run.engine, model, trees, max_tokens),
    )


def cached(run: Run, policy: TrainedModel, trees: Sequence[Tree], steps: Sequence[Sequence[Tree]], max_tokens: int) -> Reference:
    """Computed once by the policy, which has taken no step yet. `trees` have their responses numbered from 0; `steps` are the
    trees, of one response each, that `of_step` will be asked for."""
    table = starting_logprobs(run, policy, trees, max_tokens).to(run.engine.world.device)
    others = starting_logprobs(run, policy, [tree for step in steps for tree in step], max_tokens)
    by_step = others.split([len(step) for step in steps])
    return Reference(lambda micro: table[micro.response_ids], lambda step, trees: by_step[step])


def starting_logprobs(run: Run, policy: TrainedModel, trees: Sequence[Tree], max_tokens: int) -> Tensor:
    """Sums (B,) of log pi under a policy that has taken no step yet, from the disk as far as they are there.

    Raises Stopped when the run is asked to stop; what was computed is kept.
    """
    from posttrain.engine.kept import kept_logprobs

    def after_part(done: int) -> None:
        run.say(f"{run.name}: reference log-probabilities of {done:,} of {len(trees):,} rows")
        run.heed_stop()

    return kept_logprobs(run.engine, policy, trees, max_tokens, run.cache, after_part)
