"""Keys and values of the responses being decoded, as an attention structure.

Prompts enter once each, packed side by side; their keys and values are copied to every row that continues them. From then on
a decoding step is one packed row with one token per response, and the cache does the attending.

Rows end at the same column: prompts are aligned to the right, so that a step writes one column and reads one slice, for
all rows, and a row's mask (the columns before its own first one) never changes. Positions don't depend on the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain.models.attention import Structure


class DecodeCache:
    """Keys and values (R, Hkv, T, d) per layer for R rows of up to T = longest prompt + `max_new_tokens` columns.

    The prompts are written through `prefill`; every later forward gives `positions` (R,) and the cache itself as structure,
    followed by `advance`. `retain` lets finished rows leave.
    """

    def __init__(self, prompt_lengths: Sequence[int], max_new_tokens: int, device: torch.device | str = "cpu") -> None:
        self.filled = max(prompt_lengths)  # columns in use; the next token goes here
        self.capacity = self.filled + max_new_tokens
        self.first = torch.tensor([self.filled - length for length in prompt_lengths], device=device)  # (R,) a row's first column
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[torch.dtype, Tensor] = {}
        self._measure()

    @property
    def longest(self) -> int:
        """The most tokens that any row's next token attends to, itself included."""
        return self.filled + 1 - self.start

    @property
    def num_rows(self) -> int:
        return len(self.first)

    @property
    def positions(self) -> Tensor:
        """The position (R,) of the token that each row takes in next."""
        return self.filled - self.first

    def prefill(self, inner: Structure, spans: Sequence[tuple[int, int, int, int]]) -> Prefill:
        """The structure of a forward over packed prompts; see `Prefill`."""
        return Prefill(self, inner, spans)

    def store(self, layer: int, key: Tensor, value: Tensor, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Copy packed prompts' key and value (1, Hkv, N, d) of one layer to the rows that continue them."""
        if layer not in self.layers:
            # zeros, not empty: a masked column still takes part in 0 * value, and uninitialised memory may hold a NaN
            self.layers[layer] = tuple(  # type: ignore[assignment]
                new.new_zeros(self.num_rows, new.shape[1], self.capacity, new.shape[3]) for new in (key, value)
            )
        for cached, new in zip(self.layers[layer], (key, value)):
            for start, length, row, row_end in spans:
                cached[row:row_end, :, self.filled - length : self.filled] = new[0, :, start : start + length]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token per row: query (1, H, R, d), key and value (1, Hkv, R, d) -> (1, R, H, d)."""
        keys, values = self.layers[layer]
        rows, window = self.num_rows, slice(self.start, self.filled + 1)
        keys[:rows, :, self.filled] = key[0].transpose(0, 1)
        values[:rows, :, self.filled] = value[0].transpose(0, 1)
        # the query heads that share a key head stand in a query's place: no repeated keys
        grouped = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # (R, Hkv, H / Hkv, d)
        mask = self._mask(query.dtype)[:rows, ..., window] if self.ragged else None
        mixed = scaled_dot_product_attention(grouped, keys[:rows, :, window], values[:rows, :, window], attn_mask=mask, scale=scaling)
        return mixed.flatten(1, 2)[None]

    def advance(self) -> None:
        """The column just written counts from now on."""
        self.filled += 1
        assert self.filled <= self.capacity, "the cache is full"

    def retain(self, alive: Sequence[bool]) -> Tensor:
        """Drop the rows that are not alive; the last rows move into the holes. Returns each new row's old place (R',)."""
        places = [row for row, stays in enumerate(alive) if stays]
        rows = len(places)
        holes = [row for row in range(rows) if not alive[row]]
        tails = places[rows - len(holes) :]
        order = list(range(rows))
        for hole, tail in zip(holes, tails):
            order[hole] = tail
        old = torch.tensor(order, dtype=torch.int64, device=self.first.device)
        self.first = self.first[old]
        if holes:
            to, source = (torch.tensor(x, device=old.device) for x in (holes, tails))
            for buffers in self.layers.values():
                for cached in buffers:
                    used = cached[:, :, self.start : self.filled]
                    used[to] = used[source]
            for mask in self.masks.values():
                mask[to] = mask[source]
        if rows:
            self._measure()
        return old

    def _measure(self) -> None:
        self.start = int(self.first.min())  # no row looks to the left of this column
        self.ragged = int(self.first.max()) > self.start

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """Additive (R, 1, 1, T): the smallest number before a row's first column, then 0."""
        if dtype not in self.masks:
            before = torch.arange(self.capacity, device=self.first.device) < self.first[:, None]
            self.masks[dtype] = torch.where(before, torch.finfo(dtype).min, 0.0).to(dtype)[:, None, None]
        return self.masks[dtype]


@dataclass(frozen=True, eq=False)
class Prefill:
    """A forward over packed prompts that leaves their keys and values in a cache.

    `spans` has (start, length, row, row_end) per prompt: its place in the packed row and the rows that continue it;
    `inner` does the attending.
    """

    cache: DecodeCache
    inner: Structure
    spans: Sequence[tuple[int, int, int, int]]

    @property
    def longest(self) -> int:
        return self.inner.longest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.store(layer, key, value, self.spans)
        return self.inner.attend(layer, query, key, value, scaling)
