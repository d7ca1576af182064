"""Attention over a packed forest: a token attends to its ancestors' tokens and to the earlier tokens of its own segment.

The function is registered with transformers' AttentionInterface under `NAME`; a model's forward is given `structure=`,
which its layers hand down to here. A structure has `longest`, the most tokens that any token attends to, and
`attend(layer, query (1, H, N, d), key (1, Hkv, N, d), value, scaling) -> (1, N, H, d)`.
Three structures give the same numbers: `TreeStructure` (FlashAttention segment by segment, for the CPU), `FlexStructure`
(FlexAttention, for CUDA) and `DenseStructure` (a boolean mask, the reference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from posttrain.packing import Forest

NAME = "posttrain_tree"

# What families pass down besides the tensors, with the values that change nothing. Anything else is refused: a keyword
# that this function doesn't act on (a window, a cap, a sink) would be a silently different model.
NEUTRAL: dict[str, tuple] = {
    "attention_mask": (None,),
    "dropout": (0, 0.0, None),
    "is_causal": (True, None),
    "softcap": (None,),
    "s_aux": (None,),
    "position_bias": (None,),
    "head_mask": (None,),
    "cache": (None,),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "output_router_logits": (False, None),
    "return_dict": (True, None),
}
IGNORED = ("position_ids", "use_cache", "cache_position")


class Structure(Protocol):
    @property
    def longest(self) -> int: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor: ...


def forest_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer. Raises ValueError on anything it can't honour."""
    name = type(module).__name__
    structure: Structure | None = kwargs.pop("structure", None)
    if structure is None:
        raise ValueError(f"{name} was called without structure=; a model loaded by posttrain runs through PackedModel, not by itself")
    window = kwargs.pop("sliding_window", None)
    if window is not None and structure.longest > window:
        raise ValueError(
            f"{name} has sliding_window={window}, shorter than a row of {structure.longest} tokens; rows of at most {window} work"
        )
    for keyword, given in dict(kwargs, attention_mask=attention_mask).items():
        if keyword not in IGNORED and not any(given is x or (isinstance(x, float | int) and given == x) for x in NEUTRAL.get(keyword, ())):
            raise ValueError(f"{name} asks attention for {keyword}={given!r}, which packed rows don't support")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    # under autocast, norms of queries and keys leave them in fp32
    return structure.attend(layer, query.to(value.dtype), key.to(value.dtype), value, scaling), None


AttentionInterface.register(NAME, forest_attention)


def longest_path(lengths: list[int], parents: list[int]) -> int:
    """The most tokens that any token of the row attends to, itself included."""
    reach: list[int] = []
    for length, parent in zip(lengths, parents):
        reach.append(length + (reach[parent] if parent >= 0 else 0))
    return max(reach)


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """Repeat the key or value heads for the query heads that share them."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


class DenseStructure:
    """One boolean mask (N, N) for the whole row: the reference on any device, quadratic in the row."""

    def __init__(self, forest: Forest) -> None:
        self.longest = longest_path(forest.lengths, forest.parents)
        segment_of, visible = segment_tables(forest)
        order = torch.arange(forest.num_tokens, device=segment_of.device)
        self.mask = visible[segment_of[:, None], segment_of[None, :]] & (order[:, None] >= order[None, :])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        key, value = _grouped(key, query.shape[1]), _grouped(value, query.shape[1])
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scaling).transpose(1, 2)


def segment_tables(forest: Forest) -> tuple[Tensor, Tensor]:
    """The segment of each token (N,), and visible (S, S): whether a segment's tokens see another segment's earlier ones."""
    device = forest.input_ids.device
    count = len(forest.lengths)
    segment_of = torch.repeat_interleave(torch.arange(count), torch.tensor(forest.lengths))
    visible = torch.eye(count, dtype=torch.bool)
    for segment, parent in enumerate(forest.parents):
        if parent >= 0:
            visible[segment] |= visible[parent]
    return segment_of.to(device), visible.to(device)


@dataclass(frozen=True)
class Part:
    """A run of queries and the run of keys that it reads: a segment and itself, or all that descends from a segment and that segment."""

    queries: slice
    keys: slice
    causal: bool


def parts_of(forest: Forest) -> list[Part]:
    """The parts that a row's attention consists of; every token's own segment comes before its ancestors.

    Segments lie in preorder, so that all which descend from one are a single run.
    """
    spans = [slice(start, start + length) for start, length in zip(forest.starts, forest.lengths)]
    ends = [span.stop for span in spans]  # of a segment with all that descends from it
    for i, parent in reversed(list(enumerate(forest.parents))):
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[i])
    own = [Part(span, span, causal=True) for span in spans]
    return own + [Part(slice(span.stop, end), span, causal=False) for span, end in zip(spans, ends) if end > span.stop]


class TreeStructure:
    """FlashAttention in parts: each segment reads itself, and all that descends from a segment reads that segment at once.

    Nothing is masked, and no key or value is copied for the segments and heads that share it. For the CPU.
    """

    def __init__(self, forest: Forest) -> None:
        if forest.input_ids.device.type != "cpu":
            raise ValueError(f"attention='tree' works on a CPU, not on {forest.input_ids.device}; 'auto' works on both")
        self.longest = longest_path(forest.lengths, forest.parents)
        self.parts = parts_of(forest)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if missing := query.shape[-1] - value.shape[-1]:  # the kernel knows one width
            return self.attend(layer, query, key, pad(value, (0, missing)), scaling)[..., :-missing]
        return _Flash.apply(query, key, value, self.parts, scaling)


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Flash(torch.autograd.Function):
    """The parts of a row's attention, merged.

    Softmax over two sets of keys is the mean of the softmaxes over each, weighed by the sums of their exponentials, whose
    logarithms the kernel returns (FlashAttention-2, arXiv 2307.08691, section 3.1). Given the merged result and logarithm,
    the kernel's backward pass finds a part's share of the gradients (Ring Attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scaling: float) -> Tensor:
        _, heads, count, width = query.shape
        out = query.new_empty(1, count, heads, width).transpose(1, 2)
        total = query.new_empty(1, heads, count, dtype=torch.promote_types(query.dtype, torch.float32))  # log-sum-exp
        for part in parts:
            at = part.queries
            found, logsum = FLASH(query[:, :, at], key[:, :, part.keys], value[:, :, part.keys], 0.0, part.causal, scale=scaling)
            if part.causal:
                out[:, :, at], total[:, :, at] = found, logsum
            else:
                out[:, :, at].lerp_(found, torch.sigmoid(logsum - total[:, :, at])[..., None].to(found.dtype))
                total[:, :, at] = torch.logaddexp(total[:, :, at], logsum)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.parts, ctx.scaling = parts, scaling
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for part in ctx.parts:
            of_queries = (x[:, :, part.queries] for x in (grad[0].transpose(1, 2), query))
            of_keys = (x[:, :, part.keys] for x in (key, value))
            merged = (out[:, :, part.queries], total[:, :, part.queries])
            shares = FLASH_BACKWARD(*of_queries, *of_keys, *merged, 0.0, part.causal, scale=ctx.scaling)
            for whole, share, at in zip(grads, shares, (part.queries, part.keys, part.keys)):
                whole[:, :, at] += share
        return *grads, None, None


class FlexStructure:
    """FlexAttention with a block mask built from the segments: whole blocks of unrelated tokens are skipped."""

    def __init__(self, forest: Forest) -> None:
        self.longest = longest_path(forest.lengths, forest.parents)
        self.block_mask = block_mask(forest)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        gqa = query.shape[1] != key.shape[1]
        return _flex_attention(query.is_cuda)(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=gqa).transpose(1, 2)


def block_mask(forest: Forest, size: int = 128) -> Any:
    """The forest as a FlexAttention BlockMask on the forest's device, computed from the segments.

    A block of queries and keys counts its visible pairs as tokens-per-segment x visible x tokens-per-segment, so that the
    (N, N) mask is never written out and nothing has to be compiled anew for every row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, count = forest.input_ids.device, forest.num_tokens
    segment_of, visible = segment_tables(forest)
    blocks = -(-count // size)
    tokens = torch.zeros(blocks, len(forest.lengths))  # of each segment in each block
    tokens.index_put_((torch.arange(count) // size, segment_of.cpu()), torch.ones(()), accumulate=True)
    pairs = tokens @ visible.cpu().float() @ tokens.T  # without regard to order inside a pair of blocks
    order = torch.arange(blocks)
    full = (pairs == size * size) & (order[:, None] > order[None, :])
    partial = (pairs > 0) & (order[:, None] >= order[None, :]) & ~full

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many key blocks each query block reads (1, 1, blocks), and which (1, 1, blocks, blocks), the read ones first."""
        indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1).int()[None, None].to(device), indices.int()[None, None].to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[segment_of[query], segment_of[key]] & (query >= key)

    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(count, count))


@cache
def _flex_attention(compiled: bool) -> Any:
    """Compiled once for all rows: their lengths are dynamic, their segments are inputs."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def structure_for(forest: Forest, kind: str = "auto") -> Structure:
    """The attention structure of a packed row; `auto` is FlexAttention on CUDA and the tree on a CPU."""
    if kind == "auto":
        kind = {"cuda": "flex", "cpu": "tree"}.get(forest.input_ids.device.type, "dense")
    kinds: dict[str, Callable[[Forest], Structure]] = {"tree": TreeStructure, "dense": DenseStructure, "flex": FlexStructure}
    return kinds[kind](forest)
