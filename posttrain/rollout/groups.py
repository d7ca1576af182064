"""Groups of responses with their rewards: G samples of each prompt, scored while the others are still being sampled.

With several rounds (dynamic sampling, DAPO, arXiv 2503.14476, algorithm 1) only informative groups are kept, those whose
scores differ, and further prompts are sampled until there are enough of them or the rounds are used up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.rewards.config import RewardsConfig
from posttrain.rewards.scores import combine, require_scored, stack_parts
from posttrain.rollout.advantages import differs
from posttrain.rollout.local import Rollout

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel
    from posttrain.rewards.pool import Rewards
    from posttrain.run import Run

REWARD_MODEL = "reward_model"  # the part's name


@dataclass(frozen=True, eq=False)
class Judged:
    """P groups of G responses each, B = P G of them, alike on every rank."""

    rollout: Rollout
    parts: dict[str, Tensor]  # part of the reward -> (B,), NaN where it could not be told
    scores: Tensor  # (B,) their weighted sum, NaN where a part is missing

    @property
    def informative(self) -> Tensor:
        """(P,) bool: the scores in the group differ."""
        return differs(self.scores, self.rollout.prompt_of)


@dataclass(eq=False)
class Judge:
    """What scores a response: functions in worker processes (`pool`), a trained reward model, or both."""

    run: Run
    chat: Chat
    config: RewardsConfig
    pool: Rewards | None
    reward_model: FrozenModel | None
    weights: Mapping[str, float]
    max_tokens: int

    def listener(self, rows: Sequence[Mapping[str, Any]], samples_per_prompt: int) -> Callable[[int, list[int]], None] | None:
        """What is told of every response as soon as it has ended: the pool begins to judge it. `rows` are those of the prompts."""
        pool = self.pool
        if pool is None:
            return None

        def hear(b: int, tokens: list[int]) -> None:
            pool.submit(b, dict(rows[b // samples_per_prompt]), self.chat.decode_response(tokens))

        return hear

    def __call__(self, rollout: Rollout) -> Judged:
        """Wait for the pool and ask the reward model. Raises RuntimeError when too many responses could not be scored."""
        from posttrain.engine.inference import infer
        from posttrain.rollout.trees import response_trees

        parts: dict[str, Tensor] = {}
        failures: list[str] = []
        if self.pool is not None:
            with self.run.timed("rewards"):
                shares = self.run.engine.world.gather((self.pool.collect(), self.pool.failures), "gathering rewards")
            everything = {b: values for share, _ in shares for b, values in share.items()}
            failures = [text for _, texts in shares for text in texts]
            parts = stack_parts(everything, range(len(rollout.responses)), self.config.parts)
        if self.reward_model is not None:
            trees = response_trees(rollout)
            parts[REWARD_MODEL] = torch.stack(infer(self.run.engine, self.reward_model, trees, ("scores",), self.max_tokens)["scores"])
        scores = combine(parts, self.weights)
        require_scored(scores, self.config, failures)
        return Judged(rollout, parts, scores)


def choose(judged: Judged, groups: Sequence[int]) -> Judged:
    """Some of the groups, in the order given."""
    rollout, size = judged.rollout, len(judged.rollout.responses) // len(judged.rollout.prompts)
    kept = [group * size + n for group in groups for n in range(size)]
    return Judged(
        rollout=Rollout(
            prompts=[rollout.prompts[group] for group in groups],
            responses=[rollout.responses[b] for b in kept],
            prompt_of=torch.arange(len(groups)).repeat_interleave(size),
            logprobs=[rollout.logprobs[b] for b in kept],
            finished=[rollout.finished[b] for b in kept],
        ),
        parts={name: values[kept] for name, values in judged.parts.items()},
        scores=judged.scores[kept],
    )


def join(rounds: Sequence[Judged]) -> Judged:
    """All groups of several rounds, one round after another."""
    if len(rounds) == 1:
        return rounds[0]
    rollouts = [judged.rollout for judged in rounds]
    size = len(rollouts[0].responses) // len(rollouts[0].prompts)
    prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
    return Judged(
        rollout=Rollout(
            prompts=prompts,
            responses=[response for rollout in rollouts for response in rollout.responses],
            prompt_of=torch.arange(len(prompts)).repeat_interleave(size),
            logprobs=[logprobs for rollout in rollouts for logprobs in rollout.logprobs],
            finished=[finished for rollout in rollouts for finished in rollout.finished],
        ),
        parts={name: torch.cat([judged.parts[name] for judged in rounds]) for name in rounds[0].parts},
        scores=torch.cat([judged.scores for judged in rounds]),
    )


def gather_groups(sample_round: Callable[[int], Judged], count: int, max_rounds: int, run: Run) -> tuple[Judged, Judged]:
    """(what to learn from, everything that was sampled): `count` groups, sampled by `sample_round(number)`.

    `max_rounds` 0 takes one round as it is. Else its informative groups are kept and refilled, in at most so many rounds;
    when they are too few there are fewer groups, and when there is none the last round is kept, which has nothing to teach.
    """
    rounds = [sample_round(0)]
    if not max_rounds:
        rollout = rounds[0].rollout
        if len(rollout.responses) > len(rollout.prompts) and not rounds[0].informative.any():
            run.warn(
                "all responses to each prompt of an iteration scored alike: every advantage was 0 and nothing was learnt; "
                "easier or harder prompts, larger groups, a longer cold start, or sampling_rounds teach more"
            )
        return rounds[0], rounds[0]
    while sum(int(judged.informative.sum()) for judged in rounds) < count and len(rounds) < max_rounds:
        rounds.append(sample_round(len(rounds)))
    everything = join(rounds)
    kept = everything.informative.nonzero().squeeze(-1).tolist()[:count]
    if len(kept) < count:
        run.warn(
            f"fewer than {count} groups of an iteration had responses that differ in score, after {max_rounds} rounds of sampling; "
            "easier or harder prompts, or larger groups, teach more"
        )
    return (choose(everything, kept) if kept else rounds[-1]), everything
