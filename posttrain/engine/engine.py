"""The engine: what it owns, no stage has to. The only way to train, step, save and export."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from posttrain.config import OptimizerConfig
from posttrain.engine import checkpoint
from posttrain.engine.model import MAX_SKIPPED, FrozenModel, TrainedModel
from posttrain.engine.plain import FrozenMember, PlainFrozen, PlainTrainer, WholeBase
from posttrain.engine.signals import StopFlag
from posttrain.engine.update import Update
from posttrain.engine.world import World
from posttrain.engine.writing import Writing
from posttrain.engine.zero import ZeroBase, ZeroFrozen, ZeroTrainer
from posttrain.models.adapters import starting_view, trained_parameters
from posttrain.packing import PackedBatch, Tree, pack


class Engine:
    """Trained and frozen models of one stage, on whatever the launch file says.

    `Engine()` reads the launch from the environment; `Engine(world)` takes one that exists. `close()` ends it, and another
    engine may follow in the same process.
    """

    def __init__(self, world: World | None = None) -> None:
        self._owns_world = world is None
        self.world = world or World.from_launch()
        self.models: list[FrozenModel] = []
        self._bases: dict[Any, Any] = {}  # frozen weights below adapters
        self._saving: tuple[Writing, Callable[[float], None]] | None = None

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
        backend: Any
        if getattr(module, "adapter", None):
            backend = PlainTrainer(module, optimizer, self.world, self._base(module))
        else:
            backend = (ZeroTrainer if self.world.backend == "zero" else PlainTrainer)(module, optimizer, self.world)
        model = TrainedModel(name, backend, self.world, optimizer, total_steps, ema_decay, max_skipped)
        self.models.append(model)
        return model

    def freeze(self, module: nn.Module, *, name: str) -> FrozenModel:
        """Take over `module` for evaluation only: no gradients, no checkpoint, sharded under ZeRO-3."""
        self._check(module, name)
        if getattr(module, "adapter", None):  # what it shares with other models is theirs to set
            module.training = False
            for parameter in trained_parameters(module).values():
                parameter.requires_grad_(False)
            return self._frozen(name, FrozenMember(module, self.world, self._base(module)))
        module.eval().requires_grad_(False)
        return self._frozen(name, (ZeroFrozen if self.world.zero_stage == 3 else PlainFrozen)(module, self.world))

    def _frozen(self, name: str, backend: Any) -> FrozenModel:
        self.models.append(FrozenModel(name, backend, self.world))
        return self.models[-1]

    def _base(self, module: Any) -> Any:
        """The frozen weights below a model with an adapter; all models over them find the same ones."""
        switch = module.adapter.switch
        if switch not in self._bases:
            base = ZeroBase if self.world.zero_stage == 3 else WholeBase
            self._bases[switch] = base(switch.members[0], self.world)
            for member in switch.members:  # what ZeRO-3 has sharded is there already
                member.to(self.world.device)
        return self._bases[switch]

    def reference(self, policy: TrainedModel, load: Callable[[], nn.Module]) -> FrozenModel:
        """The weights that the stage starts `policy` from, frozen and named "reference", also after a checkpoint was loaded.

        Where all weights are trained, `load()` reads them anew. Below an adapter they are there: the same model with the adapter
        off when it started fresh, else with a copy of the adapter as it was when it was read.
        """
        if getattr(policy.module, "adapter", None):
            return self._frozen("reference", FrozenMember(starting_view(policy.module), self.world, policy.backend.base))
        return self.freeze(load(), name="reference")

    @contextmanager
    def update(self, model: TrainedModel) -> Iterator[Update]:
        """`with engine.update(model) as update:` any number of `update.backward(...)`, then one optimizer step."""
        with self.world.timed("update"), Update(model) as update:
            yield update

    def pack(self, trees: Sequence[Tree], max_tokens: int, *, splittable: bool = False) -> PackedBatch:
        """This rank's share of a global batch, as `posttrain.packing.pack` plans it; every rank passes the same trees."""
        world = self.world
        return pack(trees, max_tokens, world_size=world.size, rank=world.rank, device=world.device, splittable=splittable)

    def save(
        self,
        folder: Path,
        models: Mapping[str, TrainedModel],
        state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        *,
        background: bool = False,
        done: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Write a checkpoint, entirely or not at all: `models` with optimizers, schedules and EMA, `state` (JSON and tensors, the same
        on every rank), random numbers. Raises OSError on every rank when it can't be written; earlier ones are untouched then.

        With `background` it returns when the state is copied to the host, and writes while training goes on; whoever calls `settle`
        first after that lets it be a checkpoint, or gets its OSError. `done` is called then, on every rank, with the seconds it took.
        """
        self.settle()
        with self.world.timed("saving"):
            self._saving = (checkpoint.begin(self.world, Path(folder), models, state, manifest, background=background), done)
        if not background:
            self.settle()

    def settle(self, wait: bool = True) -> None:
        """See to the checkpoint that is being written in the background, if there is one: finish it, or without `wait` only if all ranks
        have written their files. Collective; saving, loading, exporting and closing begin with it. Raises OSError as `save` does."""
        if self._saving is None:
            return
        writing, done = self._saving
        with self.world.timed("saving"):
            if wait or writing.is_written():
                self._saving = None
                writing.finish()
                done(writing.seconds)

    def wait_for_files(self) -> None:
        """Wait until this rank's part of a checkpoint is written, without asking the others; alone, that is all of it."""
        if self._saving is not None:
            self._saving[0].wait_here()

    def load(self, folder: Path, models: Mapping[str, TrainedModel], *, restart_optimizer: bool = False) -> dict[str, Any]:
        """Go on from a checkpoint; returns its `state`. With `restart_optimizer` only its weights are taken, from any backend.

        Raises ValueError when it was written under another backend or number of ranks."""
        self.settle()
        return checkpoint.load(self.world, Path(folder), models, restart_optimizer=restart_optimizer)

    def newest_good(self, folder: Path) -> Path | None:
        """The newest undamaged checkpoint in `folder`, or None; damaged ones are named and passed over."""
        self.settle()
        return self.world.first_says(lambda: checkpoint.newest_good(Path(folder)), "looking for checkpoints")

    def check(self, folder: Path) -> None:
        """Raise ValueError, with the command that works, when checkpoint `folder` needs another launch than this one.

        Reads its manifest only, so that it can be asked before any model is loaded."""
        checkpoint.refuse_other_setting(self.world, Path(folder))

    def prune(self, folder: Path, keep: int, also: Sequence[Path] = (), verified: Path | None = None) -> None:
        """Drop all but the newest `keep` checkpoints and those in `also`, once the newest one was read back undamaged; `verified` was,
        when it was written."""
        self.world.first_says(lambda: checkpoint.prune(Path(folder), keep, also, verified), "dropping old checkpoints")

    def export(
        self, model: FrozenModel, folder: Path, tokenizer: Any, *, ema: bool = False, extra_files: Mapping[str, str] | None = None
    ) -> Path:
        """Write a plain Hugging Face folder, verified by reading it back; with `ema` the averaged weights. Returns `folder`.

        An adapter is merged into its base, or written alone where its config says `merge=False`.
        """
        from posttrain.models.adapter_files import write_adapter
        from posttrain.models.export import write_model

        assert isinstance(model, TrainedModel) or not ema, "only a trained model has averaged weights"
        folder, hf, adapter = Path(folder), model.module.hf, model.module.adapter
        is_alone = adapter is not None and not adapter.config.merge
        self.settle()

        def write() -> str:
            if is_alone:
                return write_adapter(adapter, hf, weights, head, tokenizer, folder, extra_files)
            return write_model(hf, weights, tokenizer, folder, extra_files)

        with self.world.timed("exporting"):
            with model.averaged() if isinstance(model, TrainedModel) and ema else nullcontext():
                weights, head = model.adapter_weights() if is_alone else (model.state_dict_full(), {})
            self.world.first_says(write, f"writing {folder.name}")
        return folder

    @property
    def stop(self) -> StopFlag:
        """Whether this process was asked to stop; see `posttrain.engine.signals`."""
        return self.world.stop

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
        self.settle()
        for model in self.models:
            model.close()
        self.models.clear()
        for base in self._bases.values():
            base.close()
        self._bases.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.world.barrier("closing the engine")
        if self._owns_world:
            self.world.close()
