"""The two kinds of models that a stage works with: trained ones, which an update steps, and frozen ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.engine.plain import compute_dtype
from posttrain.engine.world import World
from posttrain.models.adapters import merged, weights

MAX_SKIPPED = 5


def whole_state(
    model: FrozenModel, module: nn.Module, *, leave_out: Collection[str] = (), dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict of `module` on rank 0's CPU, {} on the others; one parameter at a time is whole elsewhere. Tied weights stay tied."""
    whole: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if name in leave_out:
            continue
        with model.backend.whole([value] if isinstance(value, nn.Parameter) else []):
            if model.world.is_main:
                if id(value) not in copies:
                    cast = dtype if dtype is not None and value.is_floating_point() else value.dtype
                    copies[id(value)] = value.detach().to("cpu", cast, copy=True)
                whole[name] = copies[id(value)]
    return whole


class FrozenModel:
    """A model in evaluation mode that is never trained and never part of a checkpoint. Under ZeRO-3 it is sharded.

    Calling it, or `logprobs`, `values`, `scores`, is collective under ZeRO-3: every rank calls it equally often.
    """

    def __init__(self, name: str, backend: Any, world: World) -> None:
        self.name = name
        self.backend = backend
        self.world = world

    @property
    def module(self) -> Any:
        """The PackedModel itself. Call the engine's model, not this: only that keeps ranks and precision right."""
        return self.backend.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.world.phase(f"forward of {self.name}"):
            if self._differentiates:
                return self.backend.forward(*args, **kwargs)
            with torch.no_grad():
                return self.backend.forward(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, whatever its weights are held in."""
        return getattr(self.backend, "dtype", None) or compute_dtype(self.module)

    @property
    def _differentiates(self) -> bool:
        return False

    def logprobs(self, forest: Any, temperature: float = 1.0) -> Tensor:
        """log pi of each trainable token (N,), 0 elsewhere."""
        return self(forest, want=("logprobs",), temperature=temperature)["logprobs"]

    def nll(self, forest: Any) -> Tensor:
        """The sum of -log pi over the trainable tokens (), cheaper than from `logprobs`."""
        return self(forest, want=("nll",))["nll"]

    def values(self, forest: Any) -> Tensor:
        """The scalar head before each trainable token (N,), 0 elsewhere."""
        return self(forest, want=("values",))["values"]

    def scores(self, forest: Any) -> Tensor:
        """The scalar head at each response's last token (B,)."""
        return self(forest, want=("scores",))["scores"]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; what was before comes back after."""
        modes = [(part, part.training) for part in self.module.modules()]  # one by one: another model may share some of them
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for part, training in modes:
                part.training = training

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Sampling: every parameter whole on every rank, evaluation mode, no gradients, no gradient checkpointing; restored after.

        Inside, `module` may be called directly and by different ranks differently often. Entering and leaving is collective.
        """
        layers = [m for m in self.module.modules() if getattr(m, "gradient_checkpointing", False)]
        with self.world.timed("sampling"), self.evaluating():
            for layer in layers:
                layer.gradient_checkpointing = False
            try:
                with self.backend.gathered():
                    yield
            finally:
                for layer in layers:
                    layer.gradient_checkpointing = True

    def state_dict_full(self) -> dict[str, Tensor]:
        """The whole state dict of the transformers model, an adapter merged into it, on rank 0's CPU; {} on the others. Collective."""
        hf, adapter = getattr(self.module, "hf", self.module), getattr(self.module, "adapter", None)
        with self.world.phase(f"gathering {self.name} for export"):
            state = whole_state(self, hf, dtype=None if adapter else getattr(self.backend, "dtype", None))
        return merged(state, hf, adapter.name) if adapter and state else state

    def adapter_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adapter alone, under peft's names, and the scalar head ({} without one), on the CPU."""
        module = self.module
        head = {"score.weight": module.head.weight} if module.is_scalar else {}
        parts = (weights(module.hf, module.adapter.name), head)
        alone, score = ({name: value.detach().to("cpu", copy=True) for name, value in part.items()} for part in parts)
        return alone, score

    def close(self) -> None:
        """Let go of the weights, although somebody may still hold this object."""
        self.backend.close()
        self.backend = None


class TrainedModel(FrozenModel):
    """A model with its own optimizer and schedule. `steps` counts the optimizer steps made, `skipped_steps` those refused."""

    def __init__(
        self,
        name: str,
        backend: Any,
        world: World,
        config: OptimizerConfig,
        total_steps: int,
        ema_decay: float,
        max_skipped: int = MAX_SKIPPED,
    ) -> None:
        super().__init__(name, backend, world)
        self.config = config
        self.total_steps = total_steps
        self.ema_decay = ema_decay
        self.max_skipped = max_skipped
        self.steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.ema: list[Tensor] = [w.float().clone() for w in backend.masters()] if ema_decay > 0 else []

    @property
    def _differentiates(self) -> bool:
        return torch.is_grad_enabled()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.config.lr_at(self.steps, self.total_steps)

    def after_update(self, stepped: bool, why_not: str) -> None:
        """Count a step, or a refused one. Raises FloatingPointError after `max_skipped` refused steps in a row."""
        if stepped:
            self.steps += 1
            self.skipped_in_a_row = 0
            if self.ema:
                torch._foreach_lerp_(self.ema, self.backend.masters(), 1 - self.ema_decay)
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self.name} refused {self.skipped_in_a_row} updates in a row after {self.steps} steps; in the last one {why_not}"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module holds the EMA weights; the trained ones come back, bit for bit, after. Collective."""
        if not self.ema:
            raise ValueError(f"{self.name} has no EMA weights: ema_decay={self.ema_decay}; 0.99 works")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, master in zip(self.ema, self.backend.masters()):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.backend.refresh()

    def state_dict_full(self, *, ema: bool = False) -> dict[str, Tensor]:
        """As for a frozen model; with `ema`, the averaged weights. Collective."""
        with self.averaged() if ema else nullcontext():
            return super().state_dict_full()
