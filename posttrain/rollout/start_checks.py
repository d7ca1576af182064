"""What must hold around the first optimizer step of a run, or hours are spent on a policy that doesn't learn what it samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from posttrain.engine.tally import Tally
from posttrain.rollout.experience import TOO_FAR

if TYPE_CHECKING:
    from posttrain.config import SamplingConfig
    from posttrain.engine.model import TrainedModel
    from posttrain.packing import PackedBatch

PIECE = 2**22


class FirstStep:
    """Around the first update of a fresh run: `before(...)`, the update, `after(...)`. Both raise RuntimeError and say why.

    Before, the policy in training mode must give its own samples the ratio 1: a mean |log ratio| above 1e-4 (fp32) or
    2e-2 (bf16) means dropout, another temperature or another dtype. After a step with a learning rate above 0 the
    gradient norm is positive and the master weights have changed.
    """

    def __init__(self, policy: TrainedModel, sampling: SamplingConfig) -> None:
        self.policy, self.temperature = policy, sampling.temperature
        self.is_own_sampler = not sampling.vllm.mode
        self.is_due = self.awaits_step = policy.steps == 0
        self._checksum = 0.0

    @property
    def limit(self) -> float:
        """Largest mean |log ratio|: the rounding of the dtype that is computed in, whatever the masters are held in."""
        return 2e-2 if self.policy.dtype == torch.bfloat16 else 1e-4

    def check_rollout(self, sampled: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> None:
        """The log-probabilities (T,) that the sampler drew with, the trainer's and the reference's are one before the first step.

        Raises RuntimeError: the sampler draws from another distribution, or the reference is another model.
        """
        if not self.is_due:
            return
        sampler_limit = self.limit if self.is_own_sampler else TOO_FAR
        for who, logprobs, limit in (("the sampler", sampled, sampler_limit), ("the reference", ref_logprobs, self.limit)):
            if not len(logprobs):  # no reference
                continue
            distance = float((logprobs - old_logprobs).abs().mean())
            if not distance < limit:
                raise RuntimeError(
                    f"before the first step {who} and {self.policy.name} differ by {distance:.2e} in mean |log-probability|, "
                    f"not below {limit:.0e}: they are not the same distribution"
                )

    def before(self, minibatch: PackedBatch) -> None:
        if self.awaits_step:
            self._checksum = self._weights()
        if not self.is_due:
            return
        tally = Tally()
        with torch.no_grad():
            for micro in minibatch.micro_batches():
                logprobs = self.policy.logprobs(micro, temperature=self.temperature)
                tally.add({"distance": torch.where(micro.trainable, logprobs - micro["old_logprobs"], 0).abs().sum()})
        distance = tally.total(self.policy.world)["distance"] / minibatch.num_tokens
        limit = self.limit
        if not distance < limit:
            raise RuntimeError(
                f"before the first step {self.policy.name}'s mean |log ratio| to its own samples is {distance:.2e}, not below {limit:.0e}: "
                "what is trained is not what was sampled from"
            )

    def after(self, grad_norm: float | None, lr: float, stepped: bool, *, has_signal: bool = True) -> None:
        """`has_signal` says that a response of the minibatch was better than another; the first such step must move the policy."""
        if not self.awaits_step or not stepped:
            return
        self.is_due = False
        if not has_signal:
            return
        self.awaits_step = False
        if lr > 0 and not (grad_norm and grad_norm > 0):
            raise RuntimeError(f"the first step of {self.policy.name} had gradient norm {grad_norm}: no response was better than another")
        if lr > 0 and self._weights() == self._checksum:
            raise RuntimeError(f"the first step of {self.policy.name} with lr={lr:.1e} changed no weight: the optimizer is not connected")

    def _weights(self) -> float:
        """A number that changes when the master weights do."""
        return self.policy.world.sum(sum(map(_size, self.policy.backend.masters())))


def _size(weights: torch.Tensor) -> float:
    """Sum of absolute values in fp64, a piece at a time: the masters may be one flat tensor of billions."""
    return sum(float(piece.double().abs().sum()) for piece in weights.flatten().split(PIECE))
