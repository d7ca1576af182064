"""GRPO and its family: reinforcement learning without a critic, a response is compared with others to the same prompt.

    maximise  E[ sum_t w_t min(ratio_t A, clip(ratio_t, 1 - clip_low, 1 + clip_high) A) ] - kl_coef * KL(pi || pi_ref)

DeepSeekMath (arXiv 2402.03300), section 4.1. One iteration: sample `group_size` responses to each prompt, score them with
reward functions, a reward model or both, turn scores into advantages within each group, then a few epochs of minibatches;
text or demonstrations may be mixed into the same optimizer step (`ptx_coef`). Dropout is off.

The family differs in four places, each named in `ObjectiveConfig`; `ALGORITHMS` holds them by name:

    name           advantage                 loss        normalisation   KL              and
    grpo           group_std                 clip        sequence_mean   in the loss     the default
    dr_grpo        group_mean                clip        constant        none            arXiv 2503.20783
    dapo           group_std                 clip, 0.28  token_mean      none            arXiv 2503.14476; mask_truncated,
                                                                                         overlong_cache, sampling_rounds
    gspo           group_std                 sequence    sequence_mean   none            arXiv 2507.18071
    cispo          group_std                 cispo       token_mean      none            arXiv 2506.13585
    rloo           leave_one_out             reinforce   sequence_sum    in the reward   arXiv 2402.14740
    reinforce_pp   batch                     clip        sequence_mean   in the reward   arXiv 2501.03262

Where wrong guesses train fine and score badly: the standard deviation is the unbiased one, and a group whose responses score
alike has advantages of exactly 0; a response that could not be scored, or that `mask_truncated` leaves out, counts in no
denominator (a truncated one does count in its group's baseline); ratios are to the policy that sampled, as the trainer
computes it, at the sampling temperature.

What differs from the papers: the reference is the policy that the stage started from and is never replaced; DAPO's
overlong penalty is added after groups were judged informative or not; CISPO's upper bound is undisclosed, 5 is TRL's.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/r1.py qwen-7b
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SamplingConfig, runtime, runtime_factory, when
from posttrain.models.described import CAUSAL, REWARD, ModelUse
from posttrain.ops import kl_k1, kl_k3
from posttrain.rewards.config import RewardsConfig
from posttrain.rollout.advantages import group_mean, group_std, leave_one_out, over_batch
from posttrain.rollout.experience import importance_weights
from posttrain.rollout.settings import mixing_problems, one_of, require_same_tokens, rollout_problems

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel, TrainedModel
    from posttrain.forecast import Work
    from posttrain.packing import Forest, Tree
    from posttrain.rollout.experience import Experience
    from posttrain.rollout.groups import Judged
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is maximised. The defaults are DeepSeekMath's GRPO; `ALGORITHMS` has the others."""

    advantage: str = "group_std"
    """From the scores of a group to advantages: group_std, group_mean, leave_one_out, or batch (which knows no groups)."""
    loss: str = "clip"
    """clip (the token's ratio), sequence (the response's, GSPO), cispo (a weight without gradient) or reinforce (no ratio)."""
    clip_low: float = 0.2
    """Ratios below 1 - this are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + this are clipped (DAPO: 0.28)."""
    normalisation: str = "sequence_mean"
    """How tokens are weighed: sequence_mean, token_mean, sequence_sum, or constant (per response, max_new_tokens)."""
    kl: str = "loss"
    """Where the KL to the reference stands: none (no reference is loaded), loss (k3) or reward (k1, summed over the response)."""
    kl_coef: float = 0.04
    """Its weight (DeepSeekMath: 0.04; R1: 0.001)."""
    importance_cap: float = 0.0
    """Each token is weighed by pi_trainer / pi_sampler, at most this (truncated importance sampling; 2 is usual), for samplers that
    round otherwise than the trainer; 0 leaves it to `sampling.vllm.importance_cap`, and is off without vLLM."""

    def problems(self) -> list[str]:
        return when(
            *one_of(self, advantage=ADVANTAGES, loss=LOSSES, normalisation=NORMALISATIONS, kl=("none", "loss", "reward")),
            (not 0 < self.clip_low <= 1, f"clip_low={self.clip_low} must lie in (0, 1]; 0.2 works"),
            (self.clip_high <= 0, f"clip_high={self.clip_high} must be positive; 0.2 works"),
            (self.kl_coef < 0, f"kl_coef={self.kl_coef} must not be negative; kl='none' is off"),
            (self.importance_cap < 0, f"importance_cap={self.importance_cap} must not be negative; 0 is off, 2 is usual"),
        )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Core fields first; run-time fields (budgets, intervals) don't change the result."""

    policy: ModelConfig = ModelConfig()
    """What is trained, and the reference."""
    prompts: DataConfig = DataConfig(path="")
    """Prompt rows; the reward functions see all their columns."""
    rewards: RewardsConfig = RewardsConfig()
    """Reward functions and their weights."""
    reward_model: ModelConfig = ModelConfig()
    """A reward-model folder, whose score is one more part of the reward; "" is none."""
    reward_model_weight: float = 1.0
    """Its weight in the sum."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, schedule="constant")
    """DeepSeekMath: 1e-6."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=1024)
    """DeepSeekMath: 1024 tokens."""
    num_iterations: int = 200
    """Rollouts."""
    rollout_batch_size: int = 1024
    """Responses per iteration, all groups together."""
    group_size: int = 64
    """Responses to each prompt (DeepSeekMath: 64; R1: 16)."""
    minibatch_size: int = 1024
    """Responses per optimizer step (DeepSeekMath: one step per rollout)."""
    num_epochs: int = 1
    """Passes over a rollout."""
    mask_truncated: bool = False
    """Don't train on responses that max_new_tokens cut off (DAPO's overlong filtering)."""
    overlong_cache: int = 0
    """Tokens before max_new_tokens in which the score falls by up to 1 (DAPO: 4096 of 20480, equation 13); 0 is off."""
    sampling_rounds: int = 0
    """Dynamic sampling (DAPO): refill until all groups are informative, in at most so many rounds; 0 is off, 10 works."""
    pretraining: DataConfig = DataConfig(path="")
    """Rows mixed into each optimizer step; needed unless `ptx_coef` is 0."""
    pretraining_type: str = "text"
    """text (windows of `ptx_window` tokens) or demonstration (conversations up to that length)."""
    ptx_coef: float = 0.0
    """Weight of their loss, mean against mean; 0 is off."""
    ptx_batch_size: int = 32
    """Windows or conversations per optimizer step."""
    ptx_window: int = 1024
    """Tokens per text window, or of the longest conversation."""
    # advanced
    ema_decay: float = 0.0
    """Moving average of the policy's weights, exported as `model` when on; 0 is off."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    max_prompt_length: int = 1024
    """Longer prompts are dropped whole."""
    max_dropped_fraction: float = 0.1
    """Largest share of prompts that may be dropped."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    @property
    def prompts_per_iteration(self) -> int:
        return self.rollout_batch_size // self.group_size

    @property
    def updates_per_epoch(self) -> int:
        return self.rollout_batch_size // self.minibatch_size

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps in one iteration."""
        return self.num_epochs * self.updates_per_epoch

    @property
    def weights(self) -> dict[str, float]:
        """Part of the reward -> weight."""
        return self.rewards.weights | ({"reward_model": self.reward_model_weight} if self.reward_model.path else {})

    def problems(self) -> list[str]:
        group, batch, goal = self.group_size, self.rollout_batch_size, self.objective
        own = when(
            *one_of(self, pretraining_type=("text", "demonstration")),
            (
                not any(self.weights.values()),
                "rewards.functions is empty and there is no reward_model; (RewardConfig(function='package.module:function'),) works",
            ),
            (
                "reward_model" in self.rewards.parts and bool(self.reward_model.path),
                "rewards.functions: a function is called reward_model, as the reward model's part is; give it another `name`",
            ),
            (
                group < 1 or batch % max(1, group) != 0,
                f"rollout_batch_size={batch} must be a multiple of group_size={group}; {max(batch // max(1, group), 1) * group} works",
            ),
            (group < 2 and goal.advantage != "batch", f"group_size={group} leaves nothing to compare with; 8 works"),
            (
                goal.loss == "reinforce" and self.updates_per_iteration != 1,
                f"objective.loss='reinforce' has no ratio, so only one step per rollout is on-policy; minibatch_size={batch} "
                "and num_epochs=1 work, or loss='clip'",
            ),
            (
                not 0 <= self.overlong_cache <= self.sampling.max_new_tokens,
                f"overlong_cache={self.overlong_cache} must lie in [0, sampling.max_new_tokens={self.sampling.max_new_tokens}]; 0 is off",
            ),
            (self.sampling_rounds < 0, f"sampling_rounds={self.sampling_rounds} must not be negative; 0 is off, 10 works"),
            (
                self.sampling_rounds > 0 and group < 2,
                f"sampling_rounds={self.sampling_rounds} keeps groups whose scores differ, which needs group_size of at least 2; 8 works",
            ),
        )
        return rollout_problems(self) + mixing_problems(self) + own


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]] = {
    "group_std": group_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch": over_batch,
}


# --- losses per token (N,), and which of them are clipped


def clip(logprobs: Tensor, micro: Forest, goal: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """max(-A ratio, -A clip(ratio)), token by token (DeepSeekMath, equation 3; both bounds as in DAPO, equation 8)."""
    return pessimistic((logprobs - micro["old_logprobs"]).exp(), micro["advantages"], goal)


def sequence(logprobs: Tensor, micro: Forest, goal: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The same with one ratio per response, exp(mean_t log ratio_t) (GSPO, arXiv 2507.18071, equations 5 and 7)."""
    log_ratio = micro.sum_by_response(logprobs - micro["old_logprobs"])  # (B,)
    lengths = micro.sum_by_response(torch.ones_like(logprobs)).clamp(min=1)
    ratio = (log_ratio / lengths).exp()[micro.response_of.clamp(min=0)]
    return pessimistic(ratio, micro["advantages"], goal)


def pessimistic(ratio: Tensor, advantages: Tensor, goal: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - goal.clip_low, 1 + goal.clip_high)
    return torch.maximum(free, bounded), bounded > free


def cispo(logprobs: Tensor, micro: Forest, goal: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-stop_grad(min(ratio, 1 + clip_high)) A log pi: clipped tokens keep a gradient (MiniMax-M1, arXiv 2506.13585, equation 4)."""
    ratio, bound = (logprobs - micro["old_logprobs"]).detach().exp(), 1 + goal.clip_high
    return -ratio.clamp(max=bound) * micro["advantages"] * logprobs, ratio > bound


def reinforce(logprobs: Tensor, micro: Forest, goal: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-A log pi: the policy gradient itself, for one step per rollout (RLOO, arXiv 2402.14740)."""
    return -micro["advantages"] * logprobs, torch.zeros_like(micro.trainable)


LOSSES: dict[str, Callable[[Tensor, Forest, ObjectiveConfig], tuple[Tensor, Tensor]]] = {
    "clip": clip,
    "sequence": sequence,
    "cispo": cispo,
    "reinforce": reinforce,
}


# --- normalisations: responses of L tokens -> the weight of each token (B,), and what a response adds to the denominator (B,)


def sequence_mean(lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean over responses of the mean over tokens (GRPO): a token of a long response weighs less."""
    return 1 / lengths, torch.ones_like(lengths)


def token_mean(lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean over all tokens of the optimizer step (DAPO)."""
    return torch.ones_like(lengths), lengths


def sequence_sum(lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean over responses of the sum over tokens (RLOO)."""
    return torch.ones_like(lengths), torch.ones_like(lengths)


def constant(lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Sum over tokens by what the responses could have had (Dr.GRPO)."""
    return torch.ones_like(lengths), torch.full_like(lengths, max_new_tokens)


NORMALISATIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}

ALGORITHMS: dict[str, ObjectiveConfig] = {
    "grpo": ObjectiveConfig(),
    "dr_grpo": ObjectiveConfig(advantage="group_mean", normalisation="constant", kl="none"),
    "dapo": ObjectiveConfig(clip_high=0.28, normalisation="token_mean", kl="none"),
    "gspo": ObjectiveConfig(loss="sequence", clip_low=3e-4, clip_high=4e-4, kl="none"),
    "cispo": ObjectiveConfig(loss="cispo", clip_high=4.0, normalisation="token_mean", kl="none"),
    "rloo": ObjectiveConfig(advantage="leave_one_out", loss="reinforce", normalisation="sequence_sum", kl="reward", kl_coef=0.03),
    "reinforce_pp": ObjectiveConfig(advantage="batch", kl="reward", kl_coef=0.001),
}


def overlong_penalty(lengths: Tensor, longest: int, cache: int) -> Tensor:
    """What DAPO adds to the score (B,) of responses of `lengths (B,)`: 0 up to longest - cache, then falling to -1 (equation 13)."""
    return ((longest - cache - lengths) / cache).clamp(-1, 0) if cache else torch.zeros_like(lengths)


# --- the loop


def train(config: GRPOConfig, run: Run) -> Path:
    """Train the policy against the rewards. Returns its folder."""
    from posttrain.data.chat import Chat
    from posttrain.data.sampler import Sampler
    from posttrain.engine.tally import Tally, UpdateLog
    from posttrain.inputs import check_fits, load_prompts
    from posttrain.rewards.pool import Rewards
    from posttrain.rollout.diagnostics import rollout_summary, sample_rows, update_summary
    from posttrain.rollout.experience import annotate, sample_responses
    from posttrain.rollout.groups import Judge, gather_groups
    from posttrain.rollout.start_checks import FirstStep
    from posttrain.rollout.trees import minibatches

    engine, goal, budget, temperature = run.engine, config.objective, config.max_tokens_per_micro_batch, config.sampling.temperature
    chat = Chat.load(config.policy.path, config.template, revision=config.policy.revision)
    limits = config.max_prompt_length, config.sampling.system_prompt, config.max_dropped_fraction
    rows, prompts = load_prompts(run, config.prompts, chat, *limits)
    mixed_in = load_mixed_in(config, chat, run)
    policy, reference, reward_model = load_models(config, chat, run)
    prompt_order = Sampler(len(prompts), config.prompts_per_iteration, run.seed)
    mixed_order = Sampler(max(1, len(mixed_in)), config.ptx_batch_size, run.seed + 1)
    run.resume({"policy": policy}, prompts=prompt_order, mixed_in=mixed_order)
    first_step = FirstStep(policy, config.sampling)
    check_fits(policy.module, max(map(len, prompts)) + config.sampling.max_new_tokens, "prompts with their responses")

    with Rewards(config.rewards) if config.rewards.functions else nullcontext() as pool:
        judge = Judge(run, chat, config.rewards, pool, reward_model, config.weights, budget)

        def sample_round(number: int) -> Judged:  # y_1 .. y_G ~ pi(.|x) and their rewards
            chosen, size = prompt_order.take(), config.group_size
            asked, iteration = [prompts[i] for i in chosen], run.step - 1
            heard = judge.listener([rows[i] for i in chosen], size)
            keys: dict[str, Any] = dict(samples_per_prompt=size, first_prompt=number * len(asked), on_response=heard)
            return judge(sample_responses(run, policy, chat, asked, config.sampling, iteration, **keys))

        for iteration in run.iterations(config.num_iterations):
            # 1. groups of responses, their rewards, and log-probabilities under policy and reference
            judged, sampled = gather_groups(sample_round, config.prompts_per_iteration, config.sampling_rounds, run)
            experience = annotate(run, judged.rollout, policy, reference, budget, config.sampling)
            first_step.check_rollout(torch.cat(judged.rollout.logprobs), experience.logprobs, experience.ref_logprobs)

            # 2. advantages, and what each token weighs
            fields, counts, off_policy = weigh_tokens(config, judged, experience)

            # 3. epochs of minibatches: exactly ONE optimizer step per minibatch
            tally, log, began, done, tokens = Tally(), UpdateLog(), time.monotonic(), 0, sampled.rollout.num_tokens
            chosen = counts.nonzero().squeeze(-1).tolist()
            if not chosen:
                run.warn(
                    "an iteration had no response to learn from: all were truncated or unscored; a larger sampling.max_new_tokens helps"
                )
            shares = config.updates_per_epoch, config.num_epochs, (run.seed, iteration), chosen
            for trees in minibatches(judged.rollout, fields, *shares):
                minibatch = engine.pack(trees, budget, splittable=True)
                text = engine.pack([mixed_in[i] for i in mixed_order.take()] if config.ptx_coef else [], budget)
                over = float(counts[[i for tree in trees for i in tree.response_ids]].sum())
                first_step.before(minibatch)
                with engine.update(policy) as update:
                    for micro in minibatch.micro_batches():
                        logprobs = policy.logprobs(micro, temperature=temperature)
                        loss, stats = policy_loss(logprobs, micro, goal)
                        update.backward(loss, over=over, label="policy")
                        tally.add({**stats, "tokens": micro.trainable.sum()})
                    for micro in text.micro_batches():  # + ptx_coef * log pi(x)
                        update.backward(policy.nll(micro), over=text.num_tokens, weight=config.ptx_coef, label="ptx")
                has_signal = any(bool(child.fields["advantages"].any()) for tree in trees for child in tree.children)
                first_step.after(update.grad_norm, update.lr, update.stepped, has_signal=has_signal)
                tally.settle(update.stepped)
                log.add(update)
                tokens, done = tokens + text.size + minibatch.size, done + 1
                run.heed_stop(seconds_left=(time.monotonic() - began) / done * (config.updates_per_iteration - done))

            # 4. what happened
            metrics = rollout_summary(experience) | update_summary(log, tally, config.ptx_coef, run)
            run.log(metrics | reward_summary(sampled, judged) | off_policy, tokens=tokens, optimizer_steps=log.steps)
            run.samples(sample_rows(experience, chat, {"score": judged.scores, **judged.parts}))
            run.checkpoint()

    return engine.export(policy, run.folder / "model", chat.tokenizer, ema=config.ema_decay > 0)


def weigh_tokens(config: GRPOConfig, judged: Judged, experience: Experience) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Per-token fields (T,) of a rollout, what each response adds to the loss's denominator (B,), and how far the sampler was off.

    A response that counts 0 is not trained: nobody could score it, or `mask_truncated` leaves it out.
    """
    goal, lengths = config.objective, torch.tensor(experience.lengths)
    scores = judged.scores.double() + overlong_penalty(lengths.double(), config.sampling.max_new_tokens, config.overlong_cache)
    penalties = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    if goal.kl == "reward":
        penalties = goal.kl_coef * kl_k1(experience.logprobs, experience.ref_logprobs).double()
    advantages = ADVANTAGES[goal.advantage](scores, penalties, judged.rollout.prompt_of, experience.lengths)
    weights, counts = NORMALISATIONS[goal.normalisation](lengths.double(), config.sampling.max_new_tokens)
    counted = scores.isfinite() & (experience.finished | (not config.mask_truncated))

    importance, off_policy = importance_weights(experience, goal.importance_cap or config.sampling.importance_cap)
    fields = {
        "old_logprobs": experience.logprobs,
        "advantages": (advantages * importance).float(),
        "weights": weights.repeat_interleave(lengths).float(),
        # without a reference nothing reads it
        "ref_logprobs": experience.ref_logprobs if len(experience.ref_logprobs) else experience.logprobs,
    }
    return fields, torch.where(counted, counts, 0), off_policy


def policy_loss(logprobs: Tensor, micro: Forest, goal: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over a packed row's trainable tokens of the loss and of kl_coef * k3, and sums of its diagnostics."""
    mask = micro.trainable
    losses, clipped = LOSSES[goal.loss](logprobs, micro, goal)
    if goal.kl == "loss":
        losses = losses + goal.kl_coef * kl_k3(logprobs, micro["ref_logprobs"])
    log_ratio = torch.where(mask, (logprobs - micro["old_logprobs"]).detach(), 0)
    stats = {
        "ratio": (log_ratio.exp() * mask).sum(),
        "clip_fraction": (clipped & mask).sum(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
    }
    return torch.where(mask, losses * micro["weights"], 0).sum(), stats


def load_mixed_in(config: GRPOConfig, chat: Chat, run: Run) -> list[Tree]:
    """The rows whose gradient is added to each step: text windows or conversations; none where `ptx_coef` is 0."""
    from posttrain.inputs import load_demonstrations, load_texts

    if not config.ptx_coef:
        return []
    if config.pretraining_type == "text":
        return load_texts(run, config.pretraining, chat, config.ptx_window)
    return load_demonstrations(run, config.pretraining, chat, config.ptx_window, config.max_dropped_fraction)


def load_models(config: GRPOConfig, chat: Chat, run: Run) -> tuple[TrainedModel, FrozenModel | None, FrozenModel | None]:
    """Policy, reference (where a KL is taken) and reward model (where there is one). The reference is the starting policy.

    Raises ValueError when the reward model reads other tokens than the policy writes.
    """
    from posttrain.models.loading import load_causal_lm, load_scalar_model

    engine = run.engine
    if config.reward_model.path:
        require_same_tokens(config.reward_model, config.policy, chat, config.template)
    updates = config.num_iterations * config.updates_per_iteration
    module = load_causal_lm(config.policy, chat.tokenizer, seed=run.seed)
    policy = engine.train(module, config.optimizer, updates, name="policy", ema_decay=config.ema_decay)
    reference = None
    if config.objective.kl != "none":
        reference = engine.reference(policy, lambda: load_causal_lm(config.policy, chat.tokenizer))
    if not config.reward_model.path:
        return policy, reference, None
    return policy, reference, engine.freeze(load_scalar_model(config.reward_model, fresh_head=False), name="reward_model")


def reward_summary(sampled: Judged, learnt: Judged) -> dict[str, float]:
    """About everything that was sampled: means of the score and of each part, groups whose responses score alike, unscored rows."""
    from posttrain.rewards.scores import part_means

    scored = sampled.scores[sampled.scores.isfinite()]
    alike = int((~sampled.informative).sum())
    return part_means(sampled.parts) | {
        "score": float(scored.mean()),
        "zero_variance_groups": float(alike),
        "share_informative": 1 - alike / len(sampled.rollout.prompts),
        "unscored": float(len(sampled.scores) - len(scored)),
        "sampled_groups": float(len(sampled.rollout.prompts)),
        "learnt_groups": float(len(learnt.rollout.prompts)),
    }


def uses(config: GRPOConfig) -> list[ModelUse]:
    """What is asked of the models, for the check before anything is loaded."""
    episodes = {"max_prompt_length": config.max_prompt_length, "sampling.max_new_tokens": config.sampling.max_new_tokens}
    windows = ({"ptx_window": config.ptx_window},) if config.ptx_coef else ()
    policy = ModelUse(field="policy", model=config.policy, template=config.template, rows=(episodes, *windows), becomes=CAUSAL)
    policy = replace(policy, reads_text=config.ptx_coef > 0 and config.pretraining_type == "text")
    if not config.reward_model.path:
        return [policy]
    judge = ModelUse(field="reward_model", model=config.reward_model, template=config.template, rows=(episodes,), kind=REWARD)
    return [policy, replace(judge, like="policy")]


def check(config: GRPOConfig) -> list[str]:
    """Prompts that are too long, more of them than may be dropped; a vLLM that can't be asked."""
    from posttrain.estimates import prompt_problems

    return prompt_problems(config, config.policy)


def plan(config: GRPOConfig) -> dict[str, Any]:
    """Prompts, an upper bound on tokens, steps, memory and time."""
    from posttrain.forecast import rollouts_plan

    return rollouts_plan(config, workload)


def workload(config: GRPOConfig, size: Mapping[str, Any]) -> Work:
    """What passes through the models, of prompts as `plan` counts them; every response is as long as it may be."""
    from posttrain.costs import tree
    from posttrain.forecast import Role, Work, sampled

    draws, new = sampled(config, size), config.sampling.max_new_tokens
    updates = config.num_iterations * config.updates_per_iteration if "tokens" in size else 0
    # a prompt is computed once for its group
    seen = tree(draws.prompt, config.group_size, new, scored=config.group_size * new)
    seen *= (config.num_iterations if updates else 0) * config.rollout_batch_size / config.group_size
    text = tree(config.ptx_window, summed=config.ptx_window) * (config.ptx_batch_size * updates if config.ptx_coef else 0)
    learnt = seen * config.num_epochs + text
    terms = 2 if config.ptx_coef else 1
    roles = [Role(name="policy", model=config.policy, ema=config.ema_decay > 0, terms=terms, trained=learnt, read=seen)]
    if config.objective.kl != "none":
        roles.append(Role(name="reference", model=config.policy, is_trained=False, shares_base=True, read=seen))
    if config.reward_model.path:
        judged = replace(seen, scored=0)
        roles.append(Role(name="reward_model", model=config.reward_model, is_trained=False, is_scalar=True, read=judged))
    return Work(
        roles=tuple(roles),
        row=config.max_tokens_per_micro_batch,
        longest=max(config.max_prompt_length + new, config.ptx_window if config.ptx_coef else 0),
        update=learnt.count / max(1, updates),
        sampled=draws,
        copies_checkpoints=config.checkpoint.background,
    )


def smoke(config: GRPOConfig) -> GRPOConfig:
    """The same stage for two iterations of four groups, on 64 rows."""
    size = min(8, config.group_size)
    return replace(
        config,
        prompts=replace(config.prompts, limit=64),
        pretraining=replace(config.pretraining, limit=64),
        sampling=replace(config.sampling, max_new_tokens=min(16, config.sampling.max_new_tokens)),
        overlong_cache=min(8, config.overlong_cache),
        mask_truncated=False,  # so few tokens end hardly any response
        num_iterations=2,
        group_size=size,
        rollout_batch_size=4 * size,
        minibatch_size=4 * size if config.objective.loss == "reinforce" else 2 * size,
        num_epochs=1,
        ptx_batch_size=16,
    )
