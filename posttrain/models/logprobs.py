"""Token log-probabilities without the (N, V) logits: the LM head, applied in chunks, with its own backward.

The head is the only place where a vocabulary-sized number per token exists, and only for one chunk of tokens at a time:
the forward keeps the chunk's log-sum-exp, the backward computes the chunk's logits again. Two cases need no second time: the
chunks that fit a fixed budget are kept, and a sum of log-probabilities knows its gradient, up to a factor, in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Of fp32 logits per chunk. On a CPU a chunk should stay near the caches; on a GPU every chunk costs a pass over the fp32
# gradient of the head, so chunks are larger.
CHUNK_BYTES = {"cpu": 64 * 1024**2, "cuda": 512 * 1024**2}
# Of the first chunks' logits that wait for their backward: a product with the head less for each.
KEPT_BYTES = {"cpu": 512 * 1024**2, "cuda": 1024**3}


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
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        head = _Head(weight.detach().to(dtype), bias, transform)
        kept: list[Tensor] = []  # of the first chunks
        # a cap's chain rule needs the logits as they were before the temperature
        keep = KEPT_BYTES[_kind(hidden)] // (4 * len(weight)) if differentiate and not transform.softcap else 0
        for part in chunks(hidden, len(weight)):
            logits = head.logits(hidden[part]).div_(temperature)  # (c, V) fp32
            if part.stop <= keep:
                kept.append(logits)
                head.buffers.pop("logits")
            top = logits.amax(-1, keepdim=True)
            exponentials = torch.sub(logits, top, out=head.scratch(logits)).exp_()
            sums = exponentials.sum(-1)
            normalizer[part] = sums.log() + top.squeeze(-1)
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normalizer[part]
            if entropies is not None:
                entropies[part] = normalizer[part] - exponentials.mul_(logits).sum(-1) / sums
        # The parameters themselves are kept, not saved tensors: a sharded backend empties their storage after the forward
        # and fills it again before the backward, and a saved view would still look at the emptied one.
        ctx.weight, ctx.bias = weight, bias
        ctx.temperature, ctx.transform, ctx.dtype = temperature, transform, dtype
        ctx.kept = kept
        ctx.save_for_backward(hidden, targets, normalizer)
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, normalizer = ctx.saved_tensors
        head = _Head(ctx.weight.detach().to(ctx.dtype), ctx.bias, ctx.transform)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad)
        kept, ctx.kept = ctx.kept[::-1], []  # overwritten below, so never read a second time
        for part in chunks(hidden, len(head.matrix)):
            if kept:
                logits = transformed = kept.pop()
            else:
                logits = head.logits(hidden[part])
                transformed = logits.clone() if ctx.transform.softcap else logits
                logits.div_(ctx.temperature)
            # d logprob / d logits = onehot(target) - softmax, times 1 / temperature
            grad = logits.sub_(normalizer[part, None]).exp_().neg_()
            grad.scatter_add_(-1, targets[part, None], grad.new_ones(len(grad), 1))
            grad.mul_(grads[0][part, None] / ctx.temperature)
            gradients.add(part, ctx.transform.backward_(grad, transformed))
        return *gradients.like(ctx.weight, ctx.bias), *(None,) * 6


class _ChunkedNLL(torch.autograd.Function):
    """The sum of -log softmax(transform(h W^T + b))[target] over the tokens that are counted; its gradients come with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counted: Tensor,
        transform: LogitTransform,
        dtype: torch.dtype,
        differentiate: bool,
    ) -> Tensor:
        head = _Head(weight.detach().to(dtype), bias, transform)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad if differentiate else (False,) * 3)
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in chunks(hidden, len(weight)):
            logits = head.logits(hidden[part])  # (c, V) fp32
            kept = logits.clone() if transform.softcap else logits
            chosen, top = logits.gather(-1, targets[part, None]), logits.amax(-1, keepdim=True)
            grad = logits.sub_(top).exp_()
            sums = grad.sum(-1, keepdim=True)
            total += torch.where(counted[part, None], sums.log() + top - chosen, 0).sum()
            if gradients.needed:
                # d -logprob / d logits = softmax - onehot(target)
                grad.mul_(counted[part, None] / sums)
                grad.scatter_add_(-1, targets[part, None], -counted[part, None].float())
                gradients.add(part, transform.backward_(grad, kept))
        ctx.weight, ctx.bias, ctx.gradients = weight, bias, gradients
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradient of a sum of log-probabilities can be asked for once"
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scale_(grads[0]).like(ctx.weight, ctx.bias), *(None,) * 5


def chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    """Consecutive parts of `hidden (M, d)` whose logits stay within CHUNK_BYTES, of equal length but for one token."""
    count, size = len(hidden), max(1, CHUNK_BYTES[_kind(hidden)] // (4 * vocabulary))
    number = -(-count // size)
    cuts = [-(-count * i // number) for i in range(number + 1)]  # rounded up: the first chunk is a longest one
    return [slice(start, end) for start, end in pairwise(cuts)]


def _kind(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


class _Head:
    """`matrix (V, d)` in the dtype to compute in, the bias and the transform, applied to chunks of tokens.

    All chunks share their buffers: a fresh (c, V) for each would cost as much in page faults as a fifth of the product.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
        self.matrix, self.bias, self.transform = matrix, bias, transform
        self.buffers: dict[str, Tensor] = {}

    def logits(self, hidden: Tensor) -> Tensor:
        """(c, V) in fp32, after the family's transform; the next chunk's may overwrite them."""
        logits = torch.mm(hidden.to(self.matrix.dtype), self.matrix.T, out=self._buffer("logits", len(hidden), self.matrix.dtype))
        if self.bias is not None:
            logits += self.bias.detach().to(self.matrix.dtype)
        return self.transform.apply_(logits.float())

    def scratch(self, logits: Tensor) -> Tensor:
        """Another tensor like the chunk's logits (c, V), which the next chunk may overwrite too."""
        return self._buffer("scratch", len(logits), logits.dtype)

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if name not in self.buffers or len(self.buffers[name]) < rows:
            self.buffers[name] = self.matrix.new_empty(rows, len(self.matrix), dtype=dtype)
        return self.buffers[name][:rows]


class _Gradients:
    """Gradients of the head's input (M, d), weight (V, d) and bias (V,), those that are `needed`, chunk by chunk."""

    def __init__(self, hidden: Tensor, head: _Head, needed: Sequence[bool]) -> None:
        matrix = head.matrix
        self.inputs, self.matrix, self.needed = hidden, matrix, any(needed[:3])
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros(matrix.shape, dtype=torch.float32, device=hidden.device) if needed[1] else None
        self.bias = torch.zeros(len(matrix), dtype=torch.float32, device=hidden.device) if needed[2] else None

    def add(self, part: slice, grad: Tensor) -> None:
        """Take in the gradient (c, V) fp32 of one chunk's raw logits."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(self.matrix.dtype)
        if self.hidden is not None:
            self.hidden[part] = (grad @ self.matrix).to(self.hidden.dtype)
        if self.weight is not None and grad.dtype == torch.float32:
            self.weight.addmm_(grad.T, self.inputs[part].float())
        elif self.weight is not None:
            self.weight += grad.T @ self.inputs[part].to(grad.dtype)

    def scale_(self, factor: Tensor) -> _Gradients:
        for grad in (self.hidden, self.weight, self.bias):
            if grad is not None:
                grad.mul_(factor)
        return self

    def like(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three gradients, in the dtypes of what they belong to; None for those that aren't needed."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


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
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        counted: Tensor | None = None,
    ) -> Any:
        """Log-probabilities (M,) of `targets (M,)` from `hidden (M, d)`, and the entropies (M,) or None, all in fp32.

        Logits are transformed as the family does, then divided by `temperature`. The entropy has no gradient.
        With `counted (M,)` bool: the sum () of -log-probabilities at temperature 1 over the tokens it is true for, which costs a
        product with the head less. Without targets: the raw logits (..., V), as the model's own forward expects them of its head.
        """
        if targets is None:
            return super().forward(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        parameters, differentiate = (hidden, self.weight, self.bias, targets), torch.is_grad_enabled()
        if counted is None:
            return _ChunkedLogprobs.apply(*parameters, temperature, self.transform, entropy, dtype, differentiate)
        if len(chunks(hidden, len(self.weight))) == 1:  # its logits are kept, which is as good
            logprobs, _ = _ChunkedLogprobs.apply(*parameters, 1.0, self.transform, False, dtype, differentiate)
            return -torch.where(counted, logprobs, 0).sum()
        return _ChunkedNLL.apply(*parameters, counted, self.transform, dtype, differentiate)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (M, V) in fp32, after the family's transform: what a sampler draws from."""
        return self.transform.apply_(self.forward(hidden).float())
