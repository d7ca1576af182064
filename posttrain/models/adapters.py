"""LoRA adapters (arXiv 2106.09685) in the linear layers of a model: W x + alpha / rank * B A x, with W frozen and B = 0 at first.

Several adapters may lie over one base: a policy's, its reference's, a critic's, a reward model's. Which one is on is a list
that all layers of the base look at, so that switching is one assignment, touches no parameter and can't be half done.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import AdapterConfig
from posttrain.models.quantized import NF4Linear, quantize_linears

DEFAULT = "default"
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Which frozen weights an adapter belongs to; `digest` is "" until somebody asks for it."""

    path: str
    revision: str = ""
    digest: str = ""


@dataclass(eq=False)
class Switch:
    """What is shared by the models over one base: which adapter is on (at most one name), and who they are, the one with all of
    the base first."""

    on: list[str] = field(default_factory=list)
    members: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def to(self, name: str) -> Iterator[None]:
        """Inside, the adapter `name` is on, "" none; what was before comes back after, whatever happens."""
        before = list(self.on)
        self.on[:] = [name] if name else []
        try:
            yield
        finally:
            self.on[:] = before

    def for_recomputation(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The contexts of a checkpointed layer's forward and of its recomputation, which must not take the adapter that is on by then:
        another model over the same base may have run in between."""
        return nullcontext(), self.to(self.on[0] if self.on else "")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A model's adapter: its `name` in the layers ("" is off), its shape, its base, and the weights of its `start` ({} when fresh)."""

    name: str
    config: AdapterConfig
    base: BaseModel
    switch: Switch
    start: Mapping[str, Tensor] = field(default_factory=dict)


def attach(
    hf: Any, config: AdapterConfig, base: BaseModel, *, name: str, switch: Switch, start: Mapping[str, Tensor], seed: int
) -> Adapter:
    """Put an adapter into the layers of a transformers model and freeze everything else but a scalar head; see `Adapter`.

    A is Kaiming-uniform from `seed` and B zero, or both are those of `start`. The adapter is fp32 whatever the base is.
    Raises ValueError when a target matches no layer, or when `start` belongs to other layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = target_names(hf, config.targets)
    fan_in_fan_out = any(_is_transposed(hf.get_submodule(target)) for target in names)
    shape = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, whatever it is
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=fan_in_fan_out,
    )
    hf.requires_grad_(False)
    inject_adapter_in_model(shape, hf, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(hf).values():
        layer._active_adapter = switch.on
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.float().requires_grad_(True)
        if name in layer.lora_A:
            drawn = torch.empty(layer.lora_A[name].weight.shape)
            layer.lora_A[name].weight.data.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
    if config.quantize == "nf4":
        quantize_linears(hf)
    if isinstance(getattr(hf, "score", None), nn.Linear):
        hf.score.float().requires_grad_(True)
    if not switch.on:
        switch.on[:] = [name]
    adapter = Adapter(name, config, base, switch, start)
    if start:
        set_weights(hf, name, start)
    return adapter


def target_names(hf: Any, targets: tuple[str, ...]) -> list[str]:
    """The names of the layers that `targets` mean: all linear ones but the heads when it is empty, else those whose name ends so."""
    heads = {id(head) for head in (hf.get_output_embeddings(), getattr(hf, "score", None)) if head is not None}
    adapted = layers(hf)
    linear = [
        name
        for name, module in hf.named_modules()
        if name in adapted or (_is_linear(module) and id(module) not in heads and not _is_inside(name, adapted))
    ]
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    if wrong := [target for target, matched in found.items() if not matched]:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ValueError(
            f"adapter.targets={targets}: {', '.join(map(repr, wrong))} is no linear layer of {type(hf).__name__}; it has {', '.join(known)}"
        )
    return [name for name in linear if not targets or any(name in matched for matched in found.values())]


def _is_inside(name: str, adapted: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in adapted)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | NF4Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight of a layer is (in, out), as GPT-2's are."""
    return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"


def layers(hf: nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, by name."""
    return {name: module for name, module in hf.named_modules() if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)}


def weights(hf: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of one adapter, under peft's names: the layer's, then lora_A.weight or lora_B.weight."""
    return {
        f"{layer_name}.{side}.weight": getattr(layer, side)[name].weight
        for layer_name, layer in layers(hf).items()
        for side in ("lora_A", "lora_B")
        if name in getattr(layer, side)
    }


@torch.no_grad()
def set_weights(hf: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Write `values` into one adapter. Raises ValueError when they are of other layers or have another shape."""
    own = weights(hf, name)
    if lacking := sorted(own.keys() ^ values.keys()):
        where = "the adapter's files" if lacking[0] in own else "the model"
        raise ValueError(f"{len(lacking)} tensors of the adapter don't fit, such as {lacking[0]}, which {where} lacks")
    for key, parameter in own.items():
        if parameter.shape != values[key].shape:
            raise ValueError(f"{key} of the adapter's files is {tuple(values[key].shape)}, the model's is {tuple(parameter.shape)}")
        parameter.copy_(values[key])


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What training this model moves, by name: of several adapters over one base only its own, and its own scalar head."""
    adapter: Adapter | None = getattr(module, "adapter", None)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if adapter is None:
        return trained
    own = {id(p) for p in weights(module, adapter.name).values()}
    return {name: p for name, p in trained.items() if id(p) in own or not _is_of_an_adapter(name)}


def _is_of_an_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def starting_view(module: Any) -> Any:
    """The weights that a model with an adapter started from, as a model over the same base that isn't trained.

    A fresh adapter started from nothing, so it is off; of one that is continued, a frozen copy as it was is put beside it.
    """
    adapter: Adapter = module.adapter
    name = ""
    if adapter.start:
        name = REFERENCE
        for layer in layers(module).values():
            if adapter.name in layer.lora_A:
                _copy_adapter(layer, adapter.name, name)
        set_weights(module.hf, name, adapter.start)
    view = copy.copy(module)
    view.adapter = replace(adapter, name=name)
    view.training = False
    return view


def _copy_adapter(layer: Any, source: str, name: str) -> None:
    for side in (layer.lora_A, layer.lora_B):
        side[name] = copy.deepcopy(side[source]).requires_grad_(False)
    layer.lora_dropout[name] = nn.Identity()
    for table in (layer.r, layer.lora_alpha, layer.scaling, layer.use_rslora, layer.use_dora, layer.lora_bias):
        table[name] = table[source]


@contextmanager
def taken_out(module: nn.Module) -> Iterator[None]:
    """Inside, the module lacks its adapters and scalar heads: what walks over it finds the frozen base alone."""
    sides = [side for layer in layers(module).values() for side in (layer.lora_A, layer.lora_B, layer.lora_dropout)]
    owners: list[tuple[nn.Module, str]] = [(side, name) for side in sides for name in side]
    owners += [(owner, "score") for owner in module.modules() if isinstance(getattr(owner, "score", None), nn.Linear)]
    kept = [(owner, name, owner._modules.pop(name)) for owner, name in owners]
    try:
        yield
    finally:
        for owner, name, part in kept:
            owner._modules[name] = part


def delta(layer: Any, a: Tensor, b: Tensor, name: str) -> Tensor:
    """alpha / rank * B A in fp32, laid out as the layer's own weight."""
    product = (b.float() @ a.float()) * layer.scaling[name]
    return product.T if _is_transposed(layer) else product


@torch.no_grad()
def merged(state: Mapping[str, Tensor], hf: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict of the plain model: W + alpha / rank * B A where the adapter `name` lies, everything in the base's dtype.

    `state` is the whole state dict of `hf` with its adapters; what is merged is added in fp32, then rounded once.
    """
    adapted = layers(hf)
    full = {key: value for key, value in state.items() if not _is_of_an_adapter(key)}
    for layer_name, module in hf.named_modules():
        if isinstance(module, NF4Linear):
            full[f"{layer_name}.weight"] = module.weight.cpu()
    plain = {key.replace(".base_layer.", "."): value for key, value in full.items()}
    for layer_name, layer in adapted.items():
        if name not in layer.lora_A:
            continue
        key = f"{layer_name}.weight"
        a, b = (state[f"{layer_name}.{side}.{name}.weight"] for side in ("lora_A", "lora_B"))
        plain[key] = (plain[key].float() + delta(layer, a, b, name)).to(plain[key].dtype)
    dtype = hf.get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    return {key: copies.setdefault(id(value), value.to(dtype) if value.is_floating_point() else value) for key, value in plain.items()}


def fold_in(hf: nn.Module, config: AdapterConfig, start: Mapping[str, Tensor]) -> None:
    """Add an adapter's update to the weights of a plain model, in place."""
    with torch.no_grad():
        for key in [key for key in start if key.endswith(".lora_A.weight")]:
            layer_name = key.removesuffix(".lora_A.weight")
            layer: Any = hf.get_submodule(layer_name)
            product = start[f"{layer_name}.lora_B.weight"].float() @ start[key].float() * (config.alpha / config.rank)
            product = product.T if _is_transposed(layer) else product
            layer.weight.copy_((layer.weight.float() + product).to(layer.weight.dtype))


def share_trunk(hf: Any, make: Callable[[], Any]) -> Any:
    """Another transformers model over the very trunk of `hf`; `make()` builds it without weights.

    Raises ValueError when the two classes have different trunks.
    """
    with torch.device("meta"):
        other = make()
    trunk = getattr(hf, hf.base_model_prefix)
    if type(getattr(other, other.base_model_prefix, None)) is not type(trunk):
        raise ValueError(f"{type(hf).__name__} and {type(other).__name__} don't have the same kind of trunk, so they can't share one")
    setattr(other, other.base_model_prefix, trunk)
    return other
