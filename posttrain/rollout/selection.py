"""Which weights of a training run are kept: those whose responses to held-out prompts score highest.

Perplexity does not track how good responses are: LIMA's authors read responses of their checkpoints between the 5th and the
10th epoch and kept the best (arXiv 2305.11206, section 3), and InstructGPT picks its SFT model by the reward model's score
(arXiv 2203.02155, section 3.5). Here functions or a reward model read them. All evaluations of a run ask the same prompts
with the same random numbers, so that two of them differ by the weights alone; every response is kept in samples.jsonl, for
those who would rather choose by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig, ModelConfig, SamplingConfig, when
from posttrain.rewards.config import RewardsConfig

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel, TrainedModel
    from posttrain.rollout.groups import Judged
    from posttrain.rollout.local import Rollout, SamplingProgress
    from posttrain.run import Run

SCORE = "generation_score"


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What is answered at each evaluation, who scores it, and which evaluations may be chosen."""

    prompts: DataConfig = DataConfig(path="")
    """Held-out prompt rows; "" leaves the choice to the held-out loss."""
    rewards: RewardsConfig = RewardsConfig()
    """Functions that score a response, or else:"""
    reward_model: ModelConfig = ModelConfig()
    """A reward model that does; one with other tokens reads the texts through its own template."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    first_epoch: float = 0.0
    """The earliest that may be chosen (LIMA: 5)."""
    last_epoch: float = 0.0
    """The latest that may be chosen (LIMA: 10); 0 is the end."""
    max_prompt_length: int = 1024
    """Longer prompts are dropped, counted and said."""
    max_dropped_fraction: float = 0.1
    """Largest share of prompts that may be dropped."""

    @property
    def is_on(self) -> bool:
        return bool(self.prompts.path)

    @property
    def weights(self) -> dict[str, float]:
        """Part of the score -> weight."""
        from posttrain.rollout.groups import REWARD_MODEL

        return self.rewards.weights if self.rewards.functions else {REWARD_MODEL: 1.0}

    def problems(self) -> list[str]:
        judges = bool(self.rewards.functions) + bool(self.reward_model.path)
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        return when(
            (
                self.is_on and judges != 1,
                f"{'both' if judges else 'neither'} of rewards.functions and reward_model.path score the responses; exactly one works",
            ),
            (not self.is_on and judges > 0, "prompts.path is empty, so that nothing is scored; held-out prompt rows work"),
            (self.samples_per_prompt < 1, f"samples_per_prompt={self.samples_per_prompt} must be at least 1; 1 works"),
            (self.first_epoch < 0, f"first_epoch={self.first_epoch} must not be negative; 0 is the beginning"),
            (
                self.last_epoch != 0 and self.last_epoch < self.first_epoch,
                f"last_epoch={self.last_epoch} is before first_epoch={self.first_epoch}; 0 is the end",
            ),
            (self.max_prompt_length < 1, f"max_prompt_length={self.max_prompt_length} must be at least 1; 1024 works"),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (
                longest > self.sampling.max_cached_tokens,
                f"sampling.max_cached_tokens={self.sampling.max_cached_tokens} is below max_prompt_length + sampling.max_new_tokens; "
                f"{longest} works",
            ),
        )


class Examiner:
    """Asks a model the held-out prompts and scores what it says. Every rank makes one and calls it."""

    def __init__(self, config: SelectionConfig, run: Run, chat: Chat, max_tokens: int) -> None:
        from posttrain.data.chat import Chat
        from posttrain.inputs import load_prompts
        from posttrain.models.loading import load_scalar_model

        self.config, self.run, self.chat, self.max_tokens = config, run, chat, max_tokens
        limits = config.max_prompt_length, config.sampling.system_prompt, config.max_dropped_fraction
        self.rows, self.prompts = load_prompts(run, config.prompts, chat, *limits)
        self.reward_model: FrozenModel | None = None
        self.judges_chat = chat
        if config.reward_model.path:
            self.judges_chat = Chat.load(config.reward_model.path, revision=config.reward_model.revision)
            self.reward_model = run.engine.freeze(load_scalar_model(config.reward_model, fresh_head=False), name="reward_model")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest possible response."""
        return max(map(len, self.prompts)) + self.config.sampling.max_new_tokens

    def __call__(self, model: TrainedModel) -> dict[str, float]:
        """Mean score, response length in tokens, and the share of responses that ended by themselves.

        Raises Stopped when the run is asked to stop and the rest doesn't fit its grace time, and RuntimeError when too many
        responses could not be scored.
        """
        from posttrain.rewards.pool import Rewards
        from posttrain.rewards.scores import part_means
        from posttrain.rollout.groups import Judge

        with self.run.timed("evaluation"), Rewards(self.config.rewards) if self.config.rewards.functions else nullcontext() as pool:
            judge = Judge(self.run, self.chat, self.config.rewards, pool, self.reward_model, self.config.weights, self.max_tokens)
            rollout = self._answer(model, judge.listener(self.rows, self.config.samples_per_prompt))
            read = rollout if self.judges_chat.digest == self.chat.digest else self._reread(rollout)
            judged = replace(judge(read), rollout=rollout)
        self.run.samples(self._sample_rows(judged))
        scored = judged.scores[judged.scores.isfinite()]
        count = len(rollout.responses)
        return (part_means(judged.parts) if len(judged.parts) > 1 else {}) | {
            SCORE: float(scored.double().mean()),
            "response_length": rollout.num_tokens / count,
            "share_finished": sum(rollout.finished) / count,
        }

    def _answer(self, model: TrainedModel, on_response: Any) -> Rollout:
        """Responses to all prompts, the same random numbers at every call.

        The model has made its step already: when the run is asked to stop, sampling goes on if the rest fits the grace time;
        else the step is given up, as the score that its checkpoint needs is not there.
        """
        from posttrain.rollout.experience import sampler_of
        from posttrain.rollout.local import SamplingInterrupted

        run, seconds_left = self.run, 0.0

        def progress(now: SamplingProgress) -> None:
            nonlocal seconds_left
            seconds_left = now.seconds_left
            run.note(f"responses to held-out prompts: {now}")

        try:
            return sampler_of(self.config.sampling)(
                model,
                self.prompts,
                self.config.sampling,
                world=run.engine.world,
                seed=run.seed,
                samples_per_prompt=self.config.samples_per_prompt,
                stop_ids=self.chat.end_of_turn_ids,
                decode=self.chat.decode_response,
                progress=progress,
                interrupted=lambda: run.stop_requested() and seconds_left > run.checkpoints.grace_seconds,
                on_response=on_response,
            )
        except SamplingInterrupted:
            run.heed_stop(seconds_left=seconds_left)
            raise

    def _reread(self, rollout: Rollout) -> Rollout:
        """The same prompts and responses in the reward model's own tokens; one that was cut off has no end of turn there either."""
        chat, system = self.judges_chat, self.config.sampling.system_prompt
        prompts = [chat.prompt(row["prompt"], system, row.get("tools")) for row in self.rows]
        ended = [chat.response(self.chat.decode_response(ids)) for ids in rollout.responses]
        responses = [ids if finished or len(ids) == 1 else ids[:-1] for ids, finished in zip(ended, rollout.finished)]
        return replace(rollout, prompts=prompts, responses=responses)

    def _sample_rows(self, judged: Judged) -> Sequence[dict[str, Any]]:
        rollout = judged.rollout
        return [
            {
                "prompt": self.rows[place]["prompt"],
                "response": self.chat.decode_response(rollout.responses[b]),
                "score": float(judged.scores[b]) if judged.scores[b].isfinite() else None,
                "finished": rollout.finished[b],
            }
            for b, place in enumerate(rollout.prompt_of.tolist())
        ]
