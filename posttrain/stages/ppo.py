"""PPO-ptx: reinforcement learning against a reward model, with pretraining gradients mixed in.

    maximise  E[ r(x, y) - kl_coef * sum_t log(pi(y_t) / pi_ref(y_t)) ]  +  ptx_coef * E[ log pi(x_pretrain) ]

InstructGPT (arXiv 2203.02155), section 3.5, equation 2; the details that the paper leaves open follow "The N+
Implementation Details of RLHF with PPO" (arXiv 2403.17031). One iteration: sample responses, score them, put the
per-token KL into the rewards, estimate advantages (GAE), then a few epochs of minibatches; in each minibatch the PPO
gradient and the pretraining gradient are accumulated and ONE optimizer step is taken.

The order of events, where wrong guesses train fine and score badly: scores -> scaling -> clip -> a response without
end of turn has its score replaced -> the score is added at the last token. A truncated response is terminal, there is
no bootstrap value. returns = advantages + values, before whitening. Dropout is off.

What differs from the paper: `ptx_coef` weighs a mean over tokens (the paper prints no reduction; this is DeepSpeed-Chat's
reading), the reference is the policy that the stage started from, and there is no sampling from several policies.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/instructgpt.py llama-8b
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SamplingConfig, runtime, runtime_factory, when
from posttrain.controllers import KLController, RunningScale
from posttrain.models.described import CAUSAL, REWARD, ModelUse
from posttrain.ops import kl_k1, sum_by_length, whiten
from posttrain.rollout.settings import mixing_problems, require_same_tokens, rollout_problems

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel, TrainedModel
    from posttrain.forecast import Work
    from posttrain.models.model import PackedModel
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """From the reward model's output to the score that is added at the last token, in this order."""

    scaling: str = "none"
    """none (the calibrated score), calibration (divided by the held-out std stored with the reward model), or running
    (mean and std of all scores so far, as PPO-max does, arXiv 2307.04964)."""
    clip: float = 0.0
    """Scores are cut to [-clip, clip] (DeepSpeed-Chat: 5); 0 is off."""
    missing_eos_score: float = -1.0
    """Replaces the score of a response that did not end (N+, detail 23)."""

    def problems(self) -> list[str]:
        return when(
            (
                self.scaling not in ("none", "calibration", "running"),
                f"scaling={self.scaling!r} must be none, calibration or running",
            ),
            (self.clip < 0, f"clip={self.clip} must not be negative; 0 is off, 5 works"),
        )


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Core fields first; run-time fields (budgets, intervals) don't change the result."""

    policy: ModelConfig = ModelConfig()
    """The SFT model: what is trained, and the reference."""
    reward_model: ModelConfig = ModelConfig()
    """A reward-model folder: gives the scores, and starts the critic."""
    prompts: DataConfig = DataConfig(path="")
    """Prompt rows."""
    pretraining: DataConfig = DataConfig(path="")
    """Text rows for the pretraining gradient; needed unless `ptx_coef` is 0."""
    policy_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, schedule="constant", warmup_steps=10)
    """InstructGPT: 5e-6 at 1.3B, constant (appendix C.4)."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=9e-6, schedule="constant")
    """InstructGPT: 9e-6, fixed."""
    sampling: SamplingConfig = SamplingConfig()
    """InstructGPT samples at temperature 1."""
    score: ScoreConfig = ScoreConfig()
    num_iterations: int = 500
    """Rollouts (InstructGPT: 256k episodes / 512)."""
    rollout_batch_size: int = 512
    """Responses per iteration."""
    minibatch_size: int = 64
    """Responses per optimizer step."""
    num_epochs: int = 1
    """Passes over a rollout (InstructGPT: 1; N+: 4)."""
    kl_coef: float = 0.02
    """Weight of the per-token KL to the reference inside the reward."""
    kl_target: float = 0.0
    """KL per response that the coefficient is adapted to (Ziegler 2019, arXiv 1909.08593, section 2.2: 6); 0 keeps it fixed."""
    ptx_coef: float = 27.8
    """Weight of the pretraining loss, mean against mean; 0 is plain PPO."""
    ptx_batch_size: int = 512
    """Text windows per optimizer step (InstructGPT: 8 per episode)."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE lambda."""
    clip_range: float = 0.2
    """The policy's probability ratio is clipped to 1 +- this."""
    value_clip_range: float = 0.2
    """New values are clipped to the old ones +- this; 0 is off."""
    # advanced
    whiten_advantages: bool = True
    """Once per rollout, over all response tokens of all ranks."""
    critic_warmup_iterations: int = 0
    """Iterations at the start in which only the critic learns (PPO-max)."""
    ema_decay: float = 0.0
    """Moving average of the policy's weights, exported as `model` when on (InstructGPT: 0.992); 0 is off."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    max_prompt_length: int = 1024
    """Longer prompts are dropped whole."""
    max_dropped_fraction: float = 0.1
    """Largest share of prompts that may be dropped."""
    ptx_window: int = 1024
    """Tokens per text window."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps of each trained model in one iteration."""
        return self.num_epochs * (self.rollout_batch_size // self.minibatch_size)

    def problems(self) -> list[str]:
        own = when(
            (not self.reward_model.path, "reward_model.path is empty; a reward-model folder or '@stage' works"),
            (self.kl_coef < 0, f"kl_coef={self.kl_coef} must not be negative; 0 is off"),
            (self.kl_target < 0, f"kl_target={self.kl_target} must not be negative; 0 keeps kl_coef fixed"),
            (not 0 < self.gamma <= 1, f"gamma={self.gamma} must lie in (0, 1]; 1 works"),
            (not 0 <= self.lam <= 1, f"lam={self.lam} must lie in [0, 1]; 0.95 works"),
            (not 0 < self.clip_range < 1, f"clip_range={self.clip_range} must lie in (0, 1); 0.2 works"),
            (self.value_clip_range < 0, f"value_clip_range={self.value_clip_range} must not be negative; 0 is off"),
            (
                not 0 <= self.critic_warmup_iterations < self.num_iterations,
                f"critic_warmup_iterations={self.critic_warmup_iterations} must lie in [0, num_iterations={self.num_iterations})",
            ),
        )
        return rollout_problems(self) + mixing_problems(self) + own


# --- one equation each


def gae(rewards: Tensor, values: Tensor, lengths: Sequence[int], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) -> (advantages, returns), each (T,).

    `rewards (T,)` and `values (T,)` hold B responses one after another; delta_t = r_t + gamma V_{t+1} - V_t with V = 0
    after the last token, A_t = delta_t + gamma lam A_{t+1}, returns = A + V.
    """
    if not lengths:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    rows = torch.nn.utils.rnn.pad_sequence(list(rewards.split(list(lengths))), batch_first=True)  # (B, L)
    before = torch.nn.utils.rnn.pad_sequence(list(values.split(list(lengths))), batch_first=True)
    after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], dim=1)
    # behind a response's end rewards and values are 0, so the recursion starts at its last token from 0
    delta = rows + gamma * after - before
    advantages = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    flat = torch.cat([row[:length] for row, length in zip(advantages, lengths)])
    return flat, flat + values


def shape_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Sequence[int], kl_coef: float) -> Tensor:
    """Per-token rewards (T,): -kl_coef * k1 at every token, plus `scores (B,)` at each response's last (equation 2)."""
    rewards = -kl_coef * kl_k1(logprobs, ref_logprobs)
    last = torch.as_tensor(lengths).cumsum(0) - 1
    rewards[last] += scores
    return rewards


def shape_scores(scores: Tensor, finished: Tensor, clip: float, missing_eos_score: float) -> Tensor:
    """Clip `scores (B,)` to +-clip (0 is off), then replace those of responses that did not end."""
    clipped = scores.clamp(-clip, clip) if clip else scores
    return torch.where(finished, clipped, missing_eos_score)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over `mask (N,)` of max(-A ratio, -A clip(ratio)) (arXiv 1707.06347, equation 7), and sums of its diagnostics."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.where(mask, torch.maximum(-advantages * ratio, -advantages * clipped), 0)
    with torch.no_grad():
        stats = {
            "ratio": (ratio * mask).sum(),
            "clip_fraction": ((-advantages * clipped > -advantages * ratio) & mask).sum(),
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        }
    return loss.sum(), stats


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Sum over `mask (N,)` of max((V - R)^2, (clip(V, V_old +- clip_range) - R)^2) / 2; `clip_range` 0 doesn't clip (N+)."""
    error = (values - returns) ** 2
    if clip_range:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * torch.where(mask, error, 0).sum()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R); 1 is a perfect critic, 0 is one that knows only the mean. NaN where a number isn't finite."""
    spread, left = returns.var(correction=0), (returns - values).var(correction=0)
    if not (spread + left).isfinite():
        return math.nan
    return float(1 - left / spread) if spread > 0 else 0.0


# --- the loop


def train(config: PPOConfig, run: Run) -> Path:
    """Train the policy and its critic against the reward model. Returns the policy's folder; the critic's is beside it."""
    from posttrain.data.chat import Chat
    from posttrain.data.sampler import Sampler
    from posttrain.engine.inference import infer
    from posttrain.engine.tally import Tally, UpdateLog
    from posttrain.inputs import check_fits, load_prompts, load_texts
    from posttrain.models.loading import CALIBRATION_FILE, Calibration
    from posttrain.rollout.diagnostics import rollout_summary, sample_rows, update_summary
    from posttrain.rollout.experience import annotate, importance_weights, sample_responses
    from posttrain.rollout.start_checks import FirstStep
    from posttrain.rollout.trees import minibatches, response_trees

    engine, budget, temperature = run.engine, config.max_tokens_per_micro_batch, config.sampling.temperature
    chat = Chat.load(config.policy.path, config.template, revision=config.policy.revision)
    _, prompts = load_prompts(
        run, config.prompts, chat, config.max_prompt_length, config.sampling.system_prompt, config.max_dropped_fraction
    )
    windows = load_texts(run, config.pretraining, chat, config.ptx_window) if config.ptx_coef else []
    policy, reference, critic, reward_model = load_models(config, chat, run)
    prompt_order = Sampler(len(prompts), config.rollout_batch_size, run.seed)
    text_order = Sampler(max(1, len(windows)), config.ptx_batch_size, run.seed + 1)
    updates_per_epoch = config.rollout_batch_size // config.minibatch_size
    kl_control, scale = KLController(config.kl_coef, config.kl_target), RunningScale()
    run.resume({"policy": policy, "critic": critic}, prompts=prompt_order, texts=text_order, kl=kl_control, scale=scale)
    first_step = FirstStep(policy, config.sampling)
    check_fits(policy.module, max(map(len, prompts)) + config.sampling.max_new_tokens, "prompts with their responses")

    for iteration in run.iterations(config.num_iterations):
        # 1. trajectories: y ~ pi(.|x), then log-probabilities, values and scores under the four models
        rollout = sample_responses(run, policy, chat, [prompts[i] for i in prompt_order.take()], config.sampling, iteration)
        experience = annotate(run, rollout, policy, reference, budget, config.sampling)
        first_step.check_rollout(torch.cat(rollout.logprobs), experience.logprobs, experience.ref_logprobs)
        judged = torch.stack(infer(engine, reward_model, response_trees(rollout), ("scores",), budget)["scores"])  # (B,)
        old_values = torch.cat(infer(engine, critic, response_trees(rollout), ("values",), budget)["values"])  # (T,)

        # 2. rewards: the score at the last token, - kl_coef * KL at every token
        raw = scale(judged) if config.score.scaling == "running" else judged
        scores = shape_scores(raw, experience.finished, config.score.clip, config.score.missing_eos_score)
        rewards = shape_rewards(scores, experience.logprobs, experience.ref_logprobs, experience.lengths, kl_control.coef)

        # 3. advantages; the returns keep their scale
        advantages, returns = gae(rewards, old_values, experience.lengths, config.gamma, config.lam)
        importance, off_policy = importance_weights(experience, config.sampling.importance_cap)  # 1 where the trainer's model sampled
        fields = {
            "old_logprobs": experience.logprobs,
            "old_values": old_values,
            "advantages": (whiten(advantages) if config.whiten_advantages else advantages) * importance,
            "returns": returns,
        }

        # 4. epochs of minibatches: exactly ONE optimizer step of the policy, and one of the critic, per minibatch
        tally, log, began, done, tokens = Tally(), UpdateLog(), time.monotonic(), 0, rollout.num_tokens
        for trees in minibatches(rollout, fields, updates_per_epoch, config.num_epochs, (run.seed, iteration)):
            minibatch = engine.pack(trees, budget, splittable=True)
            if iteration >= config.critic_warmup_iterations:
                text = engine.pack([windows[i] for i in text_order.take()] if config.ptx_coef else [], budget)
                first_step.before(minibatch)
                with engine.update(policy) as update:
                    for micro in minibatch.micro_batches():
                        logprobs = policy.logprobs(micro, temperature=temperature)
                        loss, stats = policy_loss(logprobs, micro["old_logprobs"], micro["advantages"], micro.trainable, config.clip_range)
                        update.backward(loss, over=minibatch.num_tokens, label="policy")
                        tally.add({**stats, "tokens": micro.trainable.sum()})
                    for micro in text.micro_batches():  # + ptx_coef * log pi(x)
                        update.backward(policy.nll(micro), over=text.num_tokens, weight=config.ptx_coef, label="ptx")
                first_step.after(update.grad_norm, update.lr, update.stepped)
                tally.settle(update.stepped)
                log.add(update)
                tokens += text.size + minibatch.size
            with engine.update(critic) as update:
                for micro in minibatch.micro_batches():
                    values = critic.values(micro)
                    loss = value_loss(values, micro["old_values"], micro["returns"], micro.trainable, config.value_clip_range)
                    update.backward(loss, over=minibatch.num_tokens)
            log.add(update, "critic_")
            tokens, done = tokens + minibatch.size, done + 1
            run.heed_stop(seconds_left=(time.monotonic() - began) / done * (config.updates_per_iteration - done))

        # 5. what happened
        metrics = rollout_summary(experience) | update_summary(log, tally, config.ptx_coef, run) | off_policy
        metrics |= {"score": float(judged.mean()), "shaped_score": float(scores.mean()), "kl_coef": kl_control.coef}
        metrics["reward"] = float(sum_by_length(rewards, experience.lengths).mean())
        metrics["value_explained_variance"] = explained_variance(old_values, returns)
        kl_control.update(metrics["kl"], len(scores))
        run.log(metrics, tokens=tokens, optimizer_steps=log.steps)
        run.samples(sample_rows(experience, chat, {"score": scores}))
        run.checkpoint()

    shift, spread = critic.module.calibration
    own_scale = {CALIBRATION_FILE: Calibration(bias=shift, std=spread).to_json()}
    engine.export(critic, run.folder / "critic", chat.tokenizer, extra_files=own_scale)
    return engine.export(policy, run.folder / "model", chat.tokenizer, ema=config.ema_decay > 0)


def load_models(config: PPOConfig, chat: Chat, run: Run) -> tuple[TrainedModel, FrozenModel, TrainedModel, FrozenModel]:
    """Policy, reference, critic, reward model. The reference is the starting policy; the critic starts as the reward model.

    Raises ValueError when the reward model reads other tokens than the policy writes.
    """
    from posttrain.models.loading import load_causal_lm

    require_same_tokens(config.reward_model, config.policy, chat, config.template)
    shift_and_spread = score_scale(config)
    engine, modules = run.engine, read_models(config, chat, run)
    policy_updates = (config.num_iterations - config.critic_warmup_iterations) * config.updates_per_iteration
    critic_updates = config.num_iterations * config.updates_per_iteration
    policy = engine.train(next(modules), config.policy_optimizer, policy_updates, name="policy", ema_decay=config.ema_decay)
    reference = engine.reference(policy, lambda: load_causal_lm(config.policy, chat.tokenizer))
    critic = engine.train(next(modules), config.critic_optimizer, critic_updates, name="critic")
    reward_model = engine.freeze(next(modules), name="reward_model")
    critic.module.calibration = reward_model.module.calibration = shift_and_spread
    return policy, reference, critic, reward_model


def read_models(config: PPOConfig, chat: Chat, run: Run) -> Iterator[PackedModel]:
    """Policy, critic and reward model: adapters over one base, or each read when the one before was handed over, so that under
    ZeRO-3 only one of them is ever whole."""
    from posttrain.models.loading import load_causal_lm, load_roles, load_scalar_model

    if config.policy.adapter.rank:
        yield from load_roles(config.policy, config.reward_model, chat.tokenizer, seed=run.seed)
        return
    yield load_causal_lm(config.policy, chat.tokenizer)
    for _ in range(2):
        yield load_scalar_model(config.reward_model, fresh_head=False, seed=run.seed)


def score_scale(config: PPOConfig) -> tuple[float, float]:
    """What is subtracted from the reward model's raw score, and what it is divided by; the critic predicts on the same scale.

    Raises ValueError naming the folder when the scores are to be divided by a spread that isn't one.
    """
    from posttrain.models.loading import read_calibration

    stored = read_calibration(config.reward_model.path)
    if config.score.scaling != "calibration":
        return stored.bias, 1.0
    if not 0 < stored.std < math.inf:
        raise ValueError(
            f"score.scaling='calibration' divides by the std of held-out scores, which is {stored.std} in {config.reward_model.path!r}; "
            "scaling='running' works, or a reward model that tells its held-out responses apart"
        )
    return stored.bias, stored.std


def uses(config: PPOConfig) -> list[ModelUse]:
    """What is asked of the models, for the check before anything is loaded."""
    episodes = {"max_prompt_length": config.max_prompt_length, "sampling.max_new_tokens": config.sampling.max_new_tokens}
    windows = ({"ptx_window": config.ptx_window},) if config.ptx_coef else ()
    policy = ModelUse(field="policy", model=config.policy, template=config.template, rows=(episodes, *windows), becomes=CAUSAL)
    judge = ModelUse(field="reward_model", model=config.reward_model, template=config.template, rows=(episodes,), kind=REWARD)
    return [replace(policy, reads_text=config.ptx_coef > 0), replace(judge, like="policy")]


def check(config: PPOConfig) -> list[str]:
    """Prompts that are too long, more of them than may be dropped; a vLLM that can't be asked."""
    from posttrain.estimates import prompt_problems

    return prompt_problems(config, config.policy)


def plan(config: PPOConfig) -> dict[str, Any]:
    """Prompts, an upper bound on tokens, steps, memory and time."""
    from posttrain.forecast import rollouts_plan

    return rollouts_plan(config, workload)


def workload(config: PPOConfig, size: Mapping[str, Any]) -> Work:
    """What passes through the four models, of prompts as `plan` counts them; every response is as long as it may be."""
    from posttrain.costs import tree
    from posttrain.forecast import Role, Work, sampled

    draws, new = sampled(config, size), config.sampling.max_new_tokens
    updates = config.num_iterations * config.updates_per_iteration if "tokens" in size else 0
    seen = tree(draws.prompt, 1, new, scored=new) * (config.num_iterations * config.rollout_batch_size if updates else 0)
    judged = replace(seen, scored=0)
    text = tree(config.ptx_window, summed=config.ptx_window) * (config.ptx_batch_size * updates if config.ptx_coef else 0)
    learnt = seen * config.num_epochs + text
    terms = 2 if config.ptx_coef else 1
    judge = Role(
        name="reward_model",
        model=config.reward_model,
        is_trained=False,
        is_scalar=True,
        shares_base=config.policy.adapter.rank > 0,
        read=judged,
    )
    return Work(
        roles=(
            Role(name="policy", model=config.policy, ema=config.ema_decay > 0, terms=terms, trained=learnt, read=seen),
            Role(name="reference", model=config.policy, is_trained=False, shares_base=True, read=seen),
            replace(judge, name="critic", is_trained=True, trained=judged * config.num_epochs),
            judge,
        ),
        row=config.max_tokens_per_micro_batch,
        longest=max(config.max_prompt_length + new, config.ptx_window if config.ptx_coef else 0),
        update=learnt.count / max(1, updates),
        sampled=draws,
        copies_checkpoints=config.checkpoint.background,
    )


def smoke(config: PPOConfig) -> PPOConfig:
    """The same stage for two iterations of 32 responses, on 64 rows."""
    return replace(
        config,
        prompts=replace(config.prompts, limit=64),
        pretraining=replace(config.pretraining, limit=64),
        sampling=replace(config.sampling, max_new_tokens=min(16, config.sampling.max_new_tokens)),
        num_iterations=2,
        rollout_batch_size=32,
        minibatch_size=16,
        num_epochs=1,
        ptx_batch_size=16,
        critic_warmup_iterations=0,
    )
