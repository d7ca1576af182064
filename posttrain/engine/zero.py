"""Training with DeepSpeed ZeRO 1, 2 and 3: one DeepSpeed engine per model, each with its own explicit numbers.

DeepSpeed averages gradients over ranks, so values are multiplied by the number of ranks before their backward.
`managed_gradient_accumulation: false` lets any number of backwards pile up until the one `step()`; under Accelerate's
`backward` each of them would be an optimizer step of its own. Every DeepSpeed attribute used here that isn't documented is
covered by a test, and pyproject.toml bounds the version.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.engine.plain import adamw, compute_dtype, decay_groups, sum_over_ranks, total_norm
from posttrain.engine.world import World
from posttrain.models.adapters import taken_out


@cache
def load_deepspeed() -> Any:
    """DeepSpeed, imported when it is needed, and quiet."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch renames, and says so at every call
    warnings.filterwarnings("ignore", message=".*`torch.distributed.*is deprecated", category=FutureWarning)
    return deepspeed


MOST_REDUCED = 500_000_000  # DeepSpeed's own bucket, in elements: 2 GB of fp32 that each trained model's engine sets aside


def deepspeed_config(world: World, dtype: torch.dtype, max_grad_norm: float, trained: int = 1) -> dict[str, Any]:
    """A fresh config with no "auto" in it: values that an earlier stage filled in would stay for the next one without a word.

    `trained` is how many numbers the model trains: a bucket for more gradients than that would only take memory.
    """
    launch = world.launch
    # Stage 1 would accumulate bf16 gradients in bf16, or in an optimizer that steps on NaN. Stage 2 accumulates in fp32 and refuses;
    # the numbers are stage 1's.
    stage = 2 if world.zero_stage == 1 and dtype == torch.bfloat16 else world.zero_stage
    zero: dict[str, Any] = {"stage": stage, **launch.zero_options}
    for name in ("offload_optimizer", "offload_param"):
        if getattr(launch, name) != "none":
            zero[name] = {"device": getattr(launch, name), "pin_memory": world.device.type == "cuda"}
    if stage == 3 and world.device.type == "cpu":
        # small parameters would stay whole on every rank, and a CPU run is there to try what a cluster does
        zero.setdefault("stage3_param_persistence_threshold", 0)
    zero.setdefault("reduce_bucket_size", min(trained, MOST_REDUCED))
    return {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def initialize(module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    return load_deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]


def placed(module: nn.Module, config: dict[str, Any], device: torch.device) -> nn.Module:
    """The module on the device. Under ZeRO-3 one weight after the other goes there and is sharded at once: a whole model needs room on
    the host, but never on the device."""
    if config["zero_optimization"]["stage"] == 3:
        load_deepspeed().zero.Init(module=module, config_dict_or_path=config)
    return module.to(device)


def forget(module: nn.Module) -> None:
    """Drop the module from DeepSpeed's global list of modules, which would keep its parameters alive for ever."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not module]


@contextmanager
def unhooked(ds: Any, offload: Any, walking: Callable[[nn.Module], AbstractContextManager] = nullcontext) -> Iterator[None]:
    """All parameters of a ZeRO-3 module whole on every rank, and no hook that would shard them again after a submodule's forward.

    The hooks come back in the context `walking(module)`."""
    parameters = [p for p in ds.module.parameters() if hasattr(p, "ds_id")]
    with load_deepspeed().zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            with walking(ds.module):
                offload._register_deepspeed_module(ds.module)


class ZeroTrainer:
    """AdamW over this rank's shard of fp32 masters. The interface is PlainTrainer's."""

    sharded = True

    def __init__(self, module: nn.Module, config: OptimizerConfig, world: World) -> None:
        self.world = world
        trained = [p for p in module.parameters() if p.requires_grad]
        self.dtype = trained[0].dtype if trained else torch.float32
        settings = deepspeed_config(world, self.dtype, config.max_grad_norm, sum(p.numel() for p in trained))
        self.stage = settings["zero_optimization"]["stage"]
        with world.phase("deepspeed.initialize"):
            whole = module if self.stage == 3 else module.to(world.device)
            optimizer = self._optimizer(whole, config)  # a weight that is sharded is no matrix any more, and would not decay
            self.ds = initialize(placed(module, settings, world.device), settings, optimizer)
        self.module = self.ds.module
        self.zero = self.ds.optimizer
        self._before: list[Tensor] = []
        self._terms: dict[str, list[Tensor]] = {}
        self._label = ""
        self._broken = False

    def _optimizer(self, module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        if self.world.launch.offload_optimizer == "none" or self.world.device.type == "cpu":
            return adamw(module, config)
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # several times faster on the host; compiled at its first use

        groups = decay_groups(module, config.weight_decay)
        return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, adamw_mode=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.ds(*args, **kwargs)

    def backward(self, value: Tensor, label: str) -> None:
        assert not self._broken, "an update was left by an exception; its gradients can't be taken back under ZeRO"
        if self._label and label != self._label:
            self._account()
        self._label = label
        self.ds.backward(value * self.world.size)

    def poison(self, value: Tensor) -> None:
        # a backward of NaN everywhere keeps DeepSpeed's bookkeeping on its trodden path; its step sees it and cleans up
        self.ds.backward(value * float("nan"))

    def discard(self) -> None:
        """Forget the gradients of a poisoned update."""
        self.ds.step()
        assert self.zero.overflow, "DeepSpeed stepped on a gradient that isn't finite"
        self._clean()

    def abandon(self) -> None:
        self._broken = True

    def step(self, lr: float) -> tuple[float, bool, dict[str, float]]:
        norms = self._term_norms()
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.ds.step()
        self._clean()
        norm = float(self.ds.get_global_grad_norm())
        return norm, not self.zero.overflow, norms

    def _clean(self) -> None:
        self._before, self._terms, self._label = [], {}, ""
        if self.stage == 3:
            # a parameter that the next update doesn't reach would be stepped with this one's gradient
            self.zero.grad_partitions_flat_buffer.zero_()

    def _accumulated(self) -> list[Tensor]:
        """Copies of the gradients so far: this rank's shard of their mean, or for stage 1 this rank's own, not yet averaged."""
        zero = self.zero
        if self.stage == 3:
            return [zero.grad_partitions_flat_buffer.clone()]
        if self.stage == 1:
            return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for group in zero.bit16_groups for p in group]
        shards = []
        for i in range(len(zero.bit16_groups)):
            if zero._use_compact_grad_partition_buffer(i):
                shards.append(zero._get_compact_grad_partition_buffer(i).flat_partition.clone())
            else:
                flat = zero.get_flat_partition(
                    zero.params_in_partition[i],
                    zero.first_offset[i],
                    zero.partition_size[i],
                    dtype=torch.float32,
                    device=self.world.device,
                    param_group_idx=i,
                )
                shards.append(flat.clone())
        return shards

    def _account(self) -> None:
        """Book what was added to the gradient since the last call to the term at work."""
        if self.world.launch.offload_optimizer != "none":
            return  # the shards are on the host in pieces; fetching them would cost more than the number is worth
        now = self._accumulated()
        change = list(torch._foreach_sub(now, self._before)) if self._before else now
        self._before = [t.clone() for t in now] if change is now else now
        kept = self._terms.setdefault(self._label, change)
        if kept is not change:
            torch._foreach_add_(kept, change)

    def _term_norms(self) -> dict[str, float]:
        if not self._terms:
            return {}
        self._account()
        if self.stage == 1:
            for parts in self._terms.values():
                sum_over_ranks(parts)
            return {label: float(total_norm(parts)) / self.world.size for label, parts in self._terms.items()}
        squares = torch.stack([total_norm(parts).double().square() for parts in self._terms.values()])
        return dict(zip(self._terms, self.world.sum(squares, "norms of the terms").sqrt().tolist()))

    def masters(self) -> list[Tensor]:
        """The fp32 weights that this rank holds: flat shards."""
        shards = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return [shard.data for shard in shards]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the module's weights up to date with the masters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # a forward may have left some whole, which would keep their old values
        for i in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def gathered(self) -> AbstractContextManager:
        return unhooked(self.ds, self.zero.parameter_offload) if self.stage == 3 else nullcontext()

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        return load_deepspeed().zero.GatheredParameters(parameters, enabled=self.stage == 3 and bool(parameters))

    @torch.no_grad()
    def load_whole(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                with load_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                    if self.stage < 3 or self.world.is_main:
                        parameter.copy_(state[name])
        self.zero.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's shard of masters and moments."""
        masters = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return {"masters": [m.data for m in masters], "moments": [dict(self.zero.optimizer.state[m]) for m in masters]}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        masters = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for master, value, moments in zip(masters, state["masters"], state["moments"], strict=True):
            master.data.copy_(value)
            self.zero.optimizer.state[master] = {key: m.to(master.device) if isinstance(m, Tensor) else m for key, m in moments.items()}
        self.refresh()

    def close(self) -> None:
        self.zero.optimizer.state.clear()
        self.ds.destroy()
        forget(self.module)


class Members(nn.Module):
    """The root that ZeRO-3 knows: it holds the base through the first model over it, and runs any of them."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, member: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return member(*args, **kwargs)


class ZeroBase:
    """Frozen weights below one or several adapters, sharded by ZeRO-3. Adapters and scalar heads stay whole on every rank.

    They are small, and so any number of optimizers can step over one sharded base: two DeepSpeed engines over one module would
    hook it twice, and two parameter groups in one engine move the idle one by its momentum. The interface is WholeBase's.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        root = Members(module)
        settings = deepspeed_config(world, compute_dtype(module), 0.0)
        self._is_gathered = False
        with taken_out(module), world.phase("deepspeed.initialize"):
            self.ds = initialize(placed(root, settings, world.device), settings, None)

    def forward(self, member: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.ds.module(member, *args, **kwargs)  # DeepSpeed's own forward would switch autocast off

    def backward(self, value: Tensor) -> None:
        value.backward()
        # the first layer's input has no gradient, so nothing told DeepSpeed that its weights are done with
        self.ds.optimizer.release_backward_leftovers()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._is_gathered:  # by another model over the same base
            yield
            return
        self._is_gathered = True
        try:
            with unhooked(self.ds, self.ds.optimizer, taken_out):
                yield
        finally:
            self._is_gathered = False

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        sharded = [p for p in parameters if hasattr(p, "ds_id")]
        return load_deepspeed().zero.GatheredParameters(sharded, enabled=bool(sharded))

    def close(self) -> None:
        self.ds.destroy()
        forget(self.ds.module)


class ZeroFrozen:
    """A model that isn't trained, sharded by ZeRO-3."""

    def __init__(self, module: nn.Module, world: World) -> None:
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        settings = deepspeed_config(world, dtype, 0.0)
        with world.phase("deepspeed.initialize"):
            self.ds = initialize(placed(module, settings, world.device), settings, None)
        self.module = self.ds.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.ds(*args, **kwargs)

    def gathered(self) -> AbstractContextManager:
        return unhooked(self.ds, self.ds.optimizer)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        return load_deepspeed().zero.GatheredParameters(parameters, enabled=bool(parameters))

    def close(self) -> None:
        self.ds.destroy()
        forget(self.module)
