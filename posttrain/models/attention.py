"""Attention over a packed forest: a token attends to its ancestors' tokens and to the earlier tokens of its own segment.

The function is registered with transformers' AttentionInterface under `NAME`; a model's forward is given `structure=`,
which its layers hand down to here. A structure has `longest`, the most tokens that any token attends to, and
`attend(layer, query (1, H, N, d), key (1, Hkv, N, d), value, scaling) -> (1, N, H, d)`.
Three structures give the same numbers: `TreeStructure` (per segment, for the CPU), `FlexStructure` (FlexAttention, for
CUDA) and `DenseStructure` (a boolean mask, the reference).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from posttrain.packing import Forest

NAME = "posttrain_tree"
QUERY_BLOCK = 128

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
    return structure.attend(layer, query, key, value, scaling), None


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


class TreeStructure:
    """Scaled-dot-product attention segment by segment over its ancestors and itself."""

    def __init__(self, forest: Forest) -> None:
        self.lengths, self.parents = forest.lengths, forest.parents
        self.longest = longest_path(forest.lengths, forest.parents)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        key, value = _grouped(key, query.shape[1]), _grouped(value, query.shape[1])
        # split, not slices: the backward of a slice is a tensor of zeros as long as the whole row
        queries, keys, values = (x.split(self.lengths, dim=2) for x in (query, key, value))
        paths: list[tuple[Tensor, Tensor]] = []
        parts: list[Tensor] = []
        for i, parent in enumerate(self.parents):
            path = (keys[i], values[i])
            if parent >= 0:
                path = (torch.cat((paths[parent][0], keys[i]), 2), torch.cat((paths[parent][1], values[i]), 2))
            paths.append(path)
            parts.extend(_attend_blocks(queries[i], *path, scaling))
        return torch.cat(parts, dim=2).transpose(1, 2)


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> list[Tensor]:
    """Queries are the last tokens of the keys. Blocks of queries read the keys up to their own end, not beyond."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    if before == 0:
        return [scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)]
    parts = []
    for block in query.split(QUERY_BLOCK, dim=2) if length > QUERY_BLOCK else (query,):
        end = before + block.shape[2]
        mask = torch.ones(block.shape[2], end, dtype=torch.bool, device=query.device).tril_(before)
        parts.append(scaled_dot_product_attention(block, key[:, :, :end], value[:, :, :end], attn_mask=mask, scale=scaling))
        before = end
    return parts


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
    """The attention structure of a packed row; `auto` is FlexAttention on CUDA and the tree elsewhere."""
    if kind == "auto":
        kind = "flex" if forest.input_ids.is_cuda else "tree"
    kinds: dict[str, Callable[[Forest], Structure]] = {"tree": TreeStructure, "dense": DenseStructure, "flex": FlexStructure}
    return kinds[kind](forest)
