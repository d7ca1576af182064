"""From prompts to what an update learns from: responses, and what policy and reference say about them before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.ops import kl_k1, kl_k3

if TYPE_CHECKING:
    from posttrain.config import SamplingConfig
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel
    from posttrain.rollout.local import Rollout
    from posttrain.run import Run

TOO_FAR = 0.1  # mean |log ratio| to vLLM, whose dtype isn't known here: bf16 gives up to 0.05, another temperature or model far more


@dataclass(frozen=True, eq=False)
class Experience:
    """A rollout of B responses and T response tokens, alike on every rank; per-token tensors hold the responses one after another."""

    rollout: Rollout
    lengths: list[int]  # B response lengths in tokens, summing to T
    finished: Tensor  # (B,) bool, ended by itself
    logprobs: Tensor  # (T,) log pi_old at the sampling temperature, as the trainer computes it
    ref_logprobs: Tensor  # (T,), or (0,) where there is no reference
    entropy: Tensor  # (T,) of the distribution that each token was drawn from, or an estimate of it


def sampler_of(sampling: SamplingConfig) -> Callable[..., Rollout]:
    """`sample` of vLLM where it is asked for, else of the local sampler: the same prompts in, the same rollout out."""
    from posttrain.rollout import local, vllm

    return vllm.sample if sampling.vllm.mode else local.sample


def sample_responses(
    run: Run,
    policy: FrozenModel,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    iteration: int,
    *,
    samples_per_prompt: int = 1,
    first_prompt: int = 0,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> Rollout:
    """Responses to the prompts of an iteration, by the local sampler or by vLLM. Ends the run in good order when it is asked to stop
    while sampling.

    `first_prompt` is how many prompts of this iteration were sampled before: no two share their random numbers.
    """
    from posttrain.rollout.local import SamplingInterrupted

    try:
        with run.timed("sampling"):
            rollout = sampler_of(sampling)(
                policy,
                prompts,
                sampling,
                world=run.engine.world,
                seed=run.seed,
                iteration=iteration,
                samples_per_prompt=samples_per_prompt,
                first_prompt=first_prompt,
                stop_ids=chat.end_of_turn_ids,
                decode=chat.decode_response,
                progress=lambda now: run.note(f"{policy.name}: {now}"),
                interrupted=run.stop_requested,
                on_response=on_response,
            )
    except SamplingInterrupted:
        run.heed_stop()
        raise
    run.heed_stop()
    return rollout


def annotate(
    run: Run, rollout: Rollout, policy: FrozenModel, reference: FrozenModel | None, max_tokens: int, sampling: SamplingConfig
) -> Experience:
    """Log-probabilities of a rollout under the policy and the reference, and the policy's entropies, alike on every rank.

    The policy isn't asked again where `sampling.reuse_logprobs` takes what was drawn with; -log pi of a token that was drawn is
    then an unbiased estimate of the entropy.
    """
    from posttrain.engine.inference import infer
    from posttrain.rollout.trees import response_trees

    trees = response_trees(rollout)

    def passed(model: FrozenModel, *want: str) -> list[Tensor]:
        found = infer(run.engine, model, trees, want, max_tokens, temperature=sampling.temperature)
        return [torch.cat(found[name]) for name in want]

    if sampling.reuse_logprobs and not sampling.vllm.mode and policy.dtype == torch.float32:
        logprobs = torch.cat(rollout.logprobs)
        entropy = -logprobs
    else:
        logprobs, entropy = passed(policy, "logprobs", "entropy")
        warn_of_another(run, torch.cat(rollout.logprobs), logprobs)
    return Experience(
        rollout=rollout,
        lengths=[len(response) for response in rollout.responses],
        finished=torch.tensor(rollout.finished),
        logprobs=logprobs,
        ref_logprobs=passed(reference, "logprobs")[0] if reference else torch.zeros(0),
        entropy=entropy,
    )


def warn_of_another(run: Run, sampled: Tensor, logprobs: Tensor) -> None:
    """Warn when the log-probabilities (T,) of sampler and trainer are too far apart for rounding: weights that didn't arrive, say."""
    if float((sampled - logprobs).abs().mean()) > TOO_FAR:
        run.warn(
            f"sampler and trainer differ by more than {TOO_FAR} in mean |log-probability|, so that importance weights correct little: does "
            "vLLM hold all of the policy's weights, and in its dtype?"
        )


def importance_weights(experience: Experience, cap: float) -> tuple[Tensor, dict[str, float]]:
    """What each token (T,) weighs, min(pi_trainer / pi_sampler, cap), or 1 where `cap` is 0; and how far the sampler was off.

    Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"): what
    the sampler's kernels round otherwise is weighed away. The KLs are of the sampler from the trainer, in nats per token.
    """
    sampled = torch.cat(experience.rollout.logprobs)
    ratio = (experience.logprobs - sampled).exp()
    off_policy = {"sampler_ratio": float(ratio.mean()), "sampler_ratio_max": float(ratio.max())}
    if not cap:
        return torch.ones_like(ratio), off_policy
    return ratio.clamp(max=cap), off_policy | {
        "sampler_ratio_capped": float((ratio > cap).float().mean()),
        "sampler_gap": float((sampled - experience.logprobs).abs().mean()),
        "sampler_kl": float(kl_k1(sampled, experience.logprobs).mean()),
        "sampler_kl_k3": float(kl_k3(sampled, experience.logprobs).mean()),
    }
