"""Token log-probabilities without the (N, V) logits: the LM head, applied in chunks, with its own backward.

The head is the only place where a vocabulary-sized number per token exists, and only for one chunk of tokens at a time:
the forward keeps the chunk's log-sum-exp, the backward computes the chunk's logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Of fp32 logits per chunk. On a CPU a chunk should stay near the caches; on a GPU every chunk costs a pass over the fp32
# gradient of the head, so chunks are larger.
CHUNK_BYTES = {"cpu": 32 * 1024**2, "cuda": 512 * 1024**2}


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to its logits after the LM head: `softcap * tanh(scale * logits / softcap)`; 0 is no cap."""

    scale: float = 1.0
    softcap: float = 0.0

    def apply_(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Chain rule in place: the gradient of the transformed logits becomes the gradient of the raw ones."""
        if self.softcap:
            grad.mul_(1 - (transformed / self.softcap).square_())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def logit_transform(config: Any) -> LogitTransform:
    """The family's own transform, read from its config (Granite divides, Cohere multiplies, Gemma 2 and 3 cap)."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(transform(h W^T + b) / temperature)[target], and the entropy, which has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        transform: LogitTransform,
        entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        count = len(targets)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        matrix = weight.detach().to(dtype)
        for part in _chunks(hidden, len(weight)):
            logits = _logits(hidden[part], matrix, bias, transform).div_(temperature)  # (c, V) fp32
            normalizer[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normalizer[part]
            if entropies is not None:
                probabilities = (logits - normalizer[part, None]).exp_()
                entropies[part] = normalizer[part] - probabilities.mul_(logits).sum(-1)
        # The parameters themselves are kept, not saved tensors: a sharded backend empties their storage after the forward
        # and fills it again before the backward, and a saved view would still look at the emptied one.
        ctx.weight, ctx.bias = weight, bias
        ctx.temperature, ctx.transform, ctx.dtype = temperature, transform, dtype
        ctx.save_for_backward(hidden, targets, normalizer)
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, normalizer = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        matrix = ctx.weight.detach().to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(matrix.shape, dtype=torch.float32, device=hidden.device) if need_weight else None
        grad_bias = torch.zeros(len(matrix), dtype=torch.float32, device=hidden.device) if need_bias else None
        for part in _chunks(hidden, len(matrix)):
            logits = _logits(hidden[part], matrix, ctx.bias, ctx.transform)
            kept = logits.clone() if ctx.transform.softcap else logits
            # d logprob / d logits = onehot(target) - softmax, times 1 / temperature
            grad = logits.div_(ctx.temperature).sub_(normalizer[part, None]).exp_().neg_()
            grad.scatter_add_(-1, targets[part, None], grad.new_ones(len(grad), 1))
            grad.mul_(grads[0][part, None] / ctx.temperature)
            grad = ctx.transform.backward_(grad, kept)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ matrix).to(hidden.dtype)
            if grad_weight is not None and ctx.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part].float())
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[part].to(ctx.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(ctx.weight.dtype),
            None if grad_bias is None else grad_bias.to(ctx.bias.dtype),
            *(None,) * 5,
        )


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    count, budget = len(hidden), CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"]
    size = max(1, budget // (4 * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """(c, V) in fp32, freshly allocated, after the family's transform."""
    logits = hidden.to(matrix.dtype) @ matrix.T
    if bias is not None:
        logits += bias.detach().to(matrix.dtype)
    return transform.apply_(logits.float())


class TokenLogprobs(nn.Linear):
    """The LM head of a model. With targets it gives log-probabilities, without them the plain linear map.

    It shares the parameters of the head that it takes the place of. They are used inside this module's own forward,
    because a sharded backend only gathers a parameter for the module that holds it.
    """

    transform: LogitTransform

    @classmethod
    def take_over(cls, head: nn.Linear, transform: LogitTransform) -> TokenLogprobs:
        with torch.device("meta"):
            module = cls(head.in_features, head.out_features, bias=head.bias is not None)
        module.weight, module.bias = head.weight, head.bias
        module.transform = transform
        return module

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0, entropy: bool = False
    ) -> Any:
        """Log-probabilities (M,) of `targets (M,)` from `hidden (M, d)`, and the entropies (M,) or None, all in fp32.

        Logits are transformed as the family does, then divided by `temperature`. The entropy has no gradient.
        Without targets: the raw logits (..., V), as the model's own forward expects them of its head.
        """
        if targets is None:
            return super().forward(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return _ChunkedLogprobs.apply(hidden, self.weight, self.bias, targets, temperature, self.transform, entropy, dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (M, V) in fp32, after the family's transform: what a sampler draws from."""
        return self.transform.apply_(super().forward(hidden).float())
