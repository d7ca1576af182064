"""The frozen base in 4 bits (QLoRA, arXiv 2305.14314): NF4 levels, one scale per block of 64 weights, the scales in 8 bits.

bitsandbytes quantises and restores; the matrix product is the ordinary one in the dtype of the input. (Its own layer takes
another kernel in evaluation mode on CPUs, whose results differ from training's by far more than rounding.)
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config import AdapterConfig, when

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at its import which CPU kernel it lacks, one that isn't used here

BLOCK = 64
INSTALL = 'pip install "posttrain[qlora]" installs it'


def quantize_problems(config: AdapterConfig) -> list[str]:
    """Why this machine can't hold a base as `config` asks, found on one block and before any model is loaded; [] when it can."""
    if config.quantize != "nf4":
        return []
    if importlib.util.find_spec("bitsandbytes") is None:
        return [f"adapter.quantize='nf4' needs bitsandbytes, which is not installed; {INSTALL}; quantize='none' works without"]
    try:
        layer = NF4Linear(nn.Linear(BLOCK, 1, bias=False))
        broken = "" if bool(torch.isfinite(layer.weight).all()) else "it gives back numbers that aren't finite"
    except Exception as error:  # whatever a missing kernel or driver does
        broken = f"{type(error).__name__}: {error}"
    return when(
        (bool(broken), f"adapter.quantize='nf4': bitsandbytes' kernels don't run on this machine ({broken}); quantize='none' works")
    )


class NF4Linear(nn.Module):
    """A linear layer whose weight (out, in) is held in 4 bits and never trained.

    Everything is held as bytes in buffers that no state dict shows: casting or sharding the model leaves them alone.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from bitsandbytes import functional

        device = torch.device("cuda") if torch.cuda.is_available() else linear.weight.device
        packed, state = functional.quantize_4bit(
            linear.weight.detach().to(device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.bias = linear.bias
        tables = dict(packed=packed, scales=state.absmax, mean=state.offset, levels=state.code)
        tables |= dict(scales_of_scales=state.state2.absmax, levels_of_scales=state.state2.code)
        for name, table in tables.items():
            self.register_buffer(name, table.reshape(-1).contiguous().view(torch.uint8), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the 4 bits mean, in the dtype that it had."""
        from bitsandbytes import functional

        def table(name: str) -> Tensor:
            return getattr(self, name).view(torch.float32)

        inner = functional.QuantState(absmax=table("scales_of_scales"), code=table("levels_of_scales"), blocksize=256, dtype=torch.float32)
        state = functional.QuantState(
            absmax=self.scales,  # type: ignore[arg-type]
            shape=torch.Size((self.out_features, self.in_features)),
            code=table("levels"),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=table("mean").squeeze(),
            state2=inner,
        )
        return functional.dequantize_4bit(self.packed.view(-1, 1), state)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        result = _FrozenProduct.apply(x.to(dtype), self)
        return result if self.bias is None else result + self.bias.to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W^T, and the gradient of x; the weight is restored anew for each, so that it is never kept in full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None


def quantize_linears(hf: nn.Module) -> None:
    """Put every linear layer but the heads and adapters into 4 bits. Raises ValueError when this machine can't, or there is none."""
    if problems := quantize_problems(AdapterConfig(rank=1, quantize="nf4")):
        raise ValueError(problems[0])
    if any(isinstance(module, NF4Linear) for module in hf.modules()):
        return  # another adapter over the same base has done it
    heads = {id(head) for head in (hf.get_output_embeddings(), getattr(hf, "score", None)) if head is not None}  # type: ignore[operator]
    found = [
        name for name, module in hf.named_modules() if isinstance(module, nn.Linear) and id(module) not in heads and ".lora_" not in name
    ]
    if not found:
        raise ValueError(f"adapter.quantize='nf4': {type(hf).__name__} has no nn.Linear layers to quantise; quantize='none' works")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        setattr(hf.get_submodule(parent), leaf, NF4Linear(hf.get_submodule(name)))  # type: ignore[arg-type]


def round_trip(hf: nn.Module) -> None:
    """Give every linear layer but the heads the weights that its 4 bits would mean: the base that a QLoRA adapter was trained on."""
    originals = {name: module for name, module in hf.named_modules() if isinstance(module, nn.Linear)}
    quantize_linears(hf)
    for name, module in list(hf.named_modules()):
        if isinstance(module, NF4Linear):
            parent, _, leaf = name.rpartition(".")
            originals[name].weight.data = module.weight.to(originals[name].weight.device)
            setattr(hf.get_submodule(parent), leaf, originals[name])
