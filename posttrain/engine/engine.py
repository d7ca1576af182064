"""The engine: what it owns, no stage has to. The only way to train, step, save and export."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain.config import OptimizerConfig
from posttrain.engine.plain import PlainFrozen, PlainTrainer
from posttrain.engine.trained import MAX_SKIPPED, FrozenModel, TrainedModel
from posttrain.engine.update import Update
from posttrain.engine.world import World
from posttrain.engine.zero import ZeroFrozen, ZeroTrainer


class Engine:
    """Trained and frozen models of one stage, on whatever the launch file says.

    `Engine()` reads the launch from the environment; `Engine(world)` takes one that exists. `close()` ends it, and another
    engine may follow in the same process.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World.from_launch()
        self.models: list[FrozenModel] = []

    def seed(self, seed: int) -> None:
        """Seed Python, NumPy and torch, differently on every rank (dropout differs; whatever must agree has its own generator)."""
        random.seed(seed + self.world.rank)
        np.random.seed((seed + self.world.rank) % 2**32)
        torch.manual_seed(seed + self.world.rank)

    def train(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        total_steps: int,
        *,
        name: str,
        ema_decay: float = 0.0,
        max_skipped: int = MAX_SKIPPED,
    ) -> TrainedModel:
        """Take over `module` for training with AdamW and its own schedule over `total_steps` optimizer steps.

        `ema_decay` > 0 keeps an exponential moving average of the weights. After `max_skipped` refused steps in a row an
        update raises FloatingPointError. Raises ValueError when the launch file's precision isn't the module's.
        """
        self._check(module, name)
        module.train()
        trainer = ZeroTrainer if self.world.backend == "zero" else PlainTrainer
        backend: Any = trainer(module, optimizer, self.world)
        model = TrainedModel(name, backend, self.world, optimizer, total_steps, ema_decay, max_skipped)
        self.models.append(model)
        return model

    def freeze(self, module: nn.Module, *, name: str) -> FrozenModel:
        """Take over `module` for evaluation only: no gradients, no checkpoint, sharded under ZeRO-3."""
        self._check(module, name)
        module.eval().requires_grad_(False)
        frozen = ZeroFrozen if self.world.zero_stage == 3 else PlainFrozen
        model = FrozenModel(name, frozen(module, self.world), self.world)
        self.models.append(model)
        return model

    def update(self, model: TrainedModel) -> Update:
        """`with engine.update(model) as update:` any number of `update.backward(...)`, then one optimizer step."""
        return Update(model)

    def _check(self, module: nn.Module, name: str) -> None:
        assert name not in [model.name for model in self.models], f"two models are named {name!r}"
        asked = self.world.launch.mixed_precision
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        if asked == "bf16" and dtype != torch.bfloat16:
            raise ValueError(
                f"mixed_precision='bf16' in the launch file disagrees with {name}, which is {str(dtype).removeprefix('torch.')}; "
                f"ModelConfig.dtype='bf16' works, or leave mixed_precision out"
            )

    def close(self) -> None:
        """Free every model and optimizer. The process group stays, for the next engine."""
        for model in self.models:
            model.close()
        self.models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.world.barrier("closing the engine")
