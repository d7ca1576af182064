"""Training without sharding: one process, or one full copy per rank whose gradients are summed once per update.

There is no wrapper and no hook: gradients pile up locally over any number of backwards and any methods of the module,
and are summed over ranks right before the step. Weights are fp32; a module that came in bf16 runs under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.engine.world import World
from posttrain.models.adapters import trained_parameters

BUCKET_ELEMENTS = 25_000_000


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors (norms, biases) don't."""
    trained = list(trained_parameters(module).values())
    if not trained:
        raise ValueError("the module has no parameter with requires_grad; freeze() is for models that aren't trained")
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    groups = decay_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its frozen base below an fp32 adapter, else of its weights."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def precision(dtype: torch.dtype, world: World) -> AbstractContextManager:
    """The precision of a forward pass of a module with fp32 masters."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(world.device.type, dtype=dtype)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over ranks in place, in buckets."""
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        full = sum(t.numel() for t in bucket) + (tensors[i + 1].numel() if i + 1 < len(tensors) else BUCKET_ELEMENTS) > BUCKET_ELEMENTS
        if full:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                t.copy_(part.view_as(t))
            bucket = []


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


class WholeBase:
    """Frozen weights below one or several adapters, whole on every rank; the models over them are its members."""

    def __init__(self, module: nn.Module, world: World) -> None:
        """Whole it is; the interface is ZeroBase's."""

    def forward(self, member: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return member(*args, **kwargs)

    def backward(self, value: Tensor) -> None:
        value.backward()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        return nullcontext()

    def close(self) -> None:
        pass


class PlainTrainer:
    """AdamW over what is trained of a module, whole on every rank. Gradients are sums over ranks.

    Without a `base` that is all of the module; with one it is an adapter, and the base may be other models' too, and sharded.
    """

    sharded = False

    def __init__(self, module: nn.Module, config: OptimizerConfig, world: World, base: Any = None) -> None:
        self.world = world
        self.module = module.to(world.device)
        self.parameters = list(trained_parameters(module).values())
        self.dtype = compute_dtype(module)
        if base is None:
            module.float()  # the weights are their own fp32 masters; those of an adapter are fp32 from the start
        self.base = base or WholeBase(module, world)
        self.optimizer = adamw(module, config)
        self.max_grad_norm = config.max_grad_norm
        self._terms: dict[str, list[Tensor]] = {}
        self._label = ""
        if world.size > 1:
            with world.phase("first broadcast of the weights"), torch.no_grad():
                for tensor in self.parameters if base is not None else (*module.parameters(), *module.buffers()):
                    dist.broadcast(tensor, src=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with precision(self.dtype, self.world):
            return self.base.forward(self.module, *args, **kwargs)

    def backward(self, value: Tensor, label: str) -> None:
        """Add the gradient of `value` to the running sum of the term `label`."""
        if self._label and label != self._label:
            self._set_aside()
        self._label = label
        self.base.backward(value)

    def poison(self, value: Tensor) -> None:
        """Called on every rank instead of `backward` when some rank's loss isn't finite; the step is refused later anyhow."""

    def _set_aside(self) -> None:
        """Move the gradients so far from `.grad` to their term."""
        gradients = self._take_gradients()
        kept = self._terms.setdefault(self._label, gradients)
        if kept is not gradients:
            torch._foreach_add_(kept, gradients)

    def _take_gradients(self) -> list[Tensor]:
        # a parameter without a gradient has gradient 0, as in the sharded backends' flat buffers
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return gradients

    def step(self, lr: float) -> tuple[float, bool, dict[str, float]]:
        """Sum over ranks, clip, step -> gradient norm before clipping, whether a step was made, norm per term (when there are several)."""
        norms: dict[str, float] = {}
        if self._terms:
            self._set_aside()
            for label, parts in self._terms.items():
                self._reduce(parts)
                norms[label] = float(total_norm(parts))
            first, *others = self._terms.values()
            for parts in others:
                torch._foreach_add_(first, parts)
            gradients = first
        else:
            gradients = self._take_gradients()
            self._reduce(gradients)
        self.discard()
        norm = total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            return float(norm), False, norms
        if self.max_grad_norm > 0 and norm + 1e-6 > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()
        return float(norm), True, norms

    def _reduce(self, gradients: list[Tensor]) -> None:
        if self.world.size > 1:
            sum_over_ranks(gradients)

    def discard(self) -> None:
        """Forget the gradients of this update."""
        self._terms, self._label = {}, ""
        for p in self.parameters:
            p.grad = None

    def abandon(self) -> None:
        """Called when an exception left an update."""
        self.discard()

    def masters(self) -> list[Tensor]:
        """The fp32 weights that this rank holds: all trained ones."""
        return [p.data for p in self.parameters]

    def refresh(self) -> None:
        """Called after `masters()` were written: here they are the module's weights already."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which every parameter is whole on every rank."""
        with precision(self.dtype, self.world), self.base.gathered():
            yield

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        """Context in which these parameters are whole on every rank."""
        return self.base.whole(parameters)

    def load_whole(self, state: dict[str, Tensor]) -> None:
        """Set the trained weights from a full state dict, which every rank has."""
        with torch.no_grad():
            for name, parameter in trained_parameters(self.module).items():
                parameter.copy_(state[name])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, the same on every rank."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        self.optimizer.state.clear()


class FrozenMember:
    """A model that isn't trained, one of several over a base that somebody else holds."""

    def __init__(self, module: nn.Module, world: World, base: Any) -> None:
        self.module, self.world, self.base = module, world, base
        self.dtype = compute_dtype(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with precision(self.dtype, self.world):
            return self.base.forward(self.module, *args, **kwargs)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with precision(self.dtype, self.world), self.base.gathered():
            yield

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        return self.base.whole(parameters)

    def close(self) -> None:
        pass


class PlainFrozen:
    """A model that isn't trained, whole on every rank."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module = module.to(world.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        return nullcontext()

    def close(self) -> None:
        pass
