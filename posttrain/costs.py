"""Memory, traffic and arithmetic of training, by formula: what `--plan` and docs/scaling.md say, and what tests count after.

P is a model's number of parameters, N the number of processes, b the bytes of a weight (2 in bf16, 4 in fp32). Sharding is
that of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054); what DeepSpeed and the engine hold besides is said where it is
added. All sizes are bytes per process unless a name says otherwise. Pure functions of numbers: nothing is read, loaded or asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FP32, MOMENTS = 4, 8  # bytes a parameter: Adam keeps two fp32 moments
NF4 = 0.5 + 0.127 / 8  # bytes a weight in 4 bits with double quantisation (QLoRA, arXiv 2305.14314, section 3)
REDUCE_BUCKET = 500_000_000  # gradients, which DeepSpeed sends at a time
DDP_BUCKET = 25_000_000  # gradients, without DeepSpeed
LIVE = 1_050_000_000  # weights of ZeRO-3 that stay whole at once: stage3_max_live_parameters and one prefetched bucket
TERM_COPIES = 2  # of gradients, where an update has several terms: the first one's, and where they stood then
SAMPLED_LOGITS, PREFILL_TOKENS = 64 * 2**20, 8192  # what posttrain.rollout.local takes at a time
UNGATED = ("gpt2", "gpt_neox", "gpt_neo", "gptj", "opt", "phi", "bloom", "starcoder2", "falcon")  # families whose MLP has two matrices


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder-only transformer, as its config.json describes it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool = False
    gated: bool = True

    @property
    def attention(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Weights in the matrices of one layer."""
        return self.hidden * (2 * self.attention + 2 * self.keys + (3 if self.gated else 2) * self.inner)

    @property
    def trunk(self) -> int:
        """Weights that every token is multiplied with, the head apart."""
        return self.layers * self.layer

    @property
    def table(self) -> int:
        """Weights of the embeddings, and of the LM head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, without biases, which few families have."""
        return self.trunk + self.table * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json says, None where it doesn't. A config of several models is read by its "text_config"."""
    config = config.get("text_config") or config

    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    hidden, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "num_layers")
    heads, vocabulary = first("num_attention_heads", "n_head"), first("vocab_size")
    if not (hidden and layers and heads and vocabulary):
        return None
    kind = config.get("model_type", "")
    tied = config.get("tie_word_embeddings", kind in ("gpt2", "opt", "bloom", "gemma", "gemma2", "gemma3_text"))
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim") or hidden // heads,
        inner=first("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
        vocabulary=vocabulary,
        tied=bool(tied),
        gated=kind not in UNGATED,
    )


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model lies over `ranks` processes: ZeRO's level (0 is one copy each), and what is kept in the host's memory."""

    level: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What passes through a model: `count` tokens, `pairs` of them that see each other in attention; the LM head gives `scored` ones
    their log-probabilities, or only the sum of those of `summed` ones."""

    count: float = 0.0
    pairs: float = 0.0
    scored: float = 0.0
    summed: float = 0.0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> Tokens:
        return Tokens(**{name: value * times for name, value in vars(self).items()})


def tree(root: float, children: float = 0, response: float = 0, *, scored: float = 0, summed: float = 0) -> Tokens:
    """The tokens of a root with so many children of `response` tokens each; the root is computed once."""
    pairs = root * (root + 1) / 2 + children * (root * response + response * (response + 1) / 2)
    return Tokens(count=root + children * response, pairs=pairs, scored=scored, summed=summed)


def per_rank(weights: float, gradients: float, states: float, level: int, ranks: int) -> float:
    """What one of N processes holds of each (arXiv 1910.02054, section 5, figure 1): level 1 divides the optimizer's states by N,
    level 2 the gradients too, level 3 the weights too."""
    return weights / (ranks if level > 2 else 1) + gradients / (ranks if level > 1 else 1) + states / (ranks if level > 0 else 1)


# --- memory


def effective_level(level: int, weight_bytes: int) -> int:
    """Under ZeRO-1 bf16 models run as under ZeRO-2: DeepSpeed's first stage would add gradients up in bf16."""
    return 2 if level == 1 and weight_bytes == 2 else level


def trained_memory(
    parameters: float, weight_bytes: int, sharding: Sharding, *, ema: bool = False, terms: int = 1, largest: float = 0
) -> dict[str, float]:
    """What training P parameters holds after the last backward of an update, by part; what lies on the host is "host".

    Without ZeRO the weights are their own fp32 masters, and autocast keeps bf16 copies of them for the backward. `terms` are
    the losses with labels of their own in one update, `largest` the parameters of the largest tensor.
    """
    level, ranks = effective_level(sharding.level, weight_bytes), sharding.ranks
    p = float(parameters)
    if level == 0:
        parts = {"weights": FP32 * p, "gradients": FP32 * p * terms, "moments": MOMENTS * p, "average": FP32 * p * ema}
        parts["copies in bf16"] = 2 * p if weight_bytes == 2 else 0.0
        parts["reduce bucket"] = FP32 * min(p, max(DDP_BUCKET, largest)) if ranks > 1 else 0.0
        return {name: size for name, size in parts.items() if size}
    parts = {
        "weights": per_rank(weight_bytes * p, 0, 0, level, ranks),
        "gradients": per_rank(0, FP32 * p, 0, level, ranks),
        "masters": FP32 * p / ranks,
        "moments": MOMENTS * p / ranks,
        "average": FP32 * p / ranks * ema,
        "reduce bucket": FP32 * min(p, REDUCE_BUCKET),
    }
    if terms > 1 and not sharding.offload_optimizer:
        parts["terms"] = TERM_COPIES * parts["gradients"]
    if level == 3:
        parts["weights made whole"] = weight_bytes * min(p, LIVE)
    away = [*(("gradients", "masters", "moments", "average") if sharding.offload_optimizer else ())]
    away += ["weights"] if sharding.offload_weights else []
    parts["host"] = sum(parts.pop(name) for name in away)
    return {name: size for name, size in parts.items() if size}


def between_updates(parts: Mapping[str, float], level: int) -> dict[str, float]:
    """What of `trained_memory` is still held when the step is done. ZeRO-3 keeps its buffers for gradients, the others make them anew."""
    passing = ("terms", "weights made whole") if level == 3 else ("gradients", "copies in bf16", "reduce bucket", "terms")
    return {name: size for name, size in parts.items() if name not in passing}


def frozen_memory(parameters: float, weight_bytes: float, sharding: Sharding) -> dict[str, float]:
    """What a model that isn't trained holds: whole on every process, and sharded under ZeRO-3 alone."""
    if sharding.level < 3:
        return {"weights": weight_bytes * parameters}
    shard = weight_bytes * parameters / sharding.ranks
    whole = {"weights made whole": weight_bytes * min(float(parameters), LIVE)}
    return {"host" if sharding.offload_weights else "weights": shard, **whole}


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA's A and B on all matrices of a layer (arXiv 2106.09685, section 4.2): rank x (inputs + outputs) each."""
    d, a, k, i = shape.hidden, shape.attention, shape.keys, shape.inner
    return rank * shape.layers * ((d + a) * 2 + (d + k) * 2 + (d + i) * (3 if shape.gated else 2))


def layer_activations(shape: Shape, weight_bytes: int, *, autocast: bool = False) -> float:
    """Bytes kept per token and layer for the backward, counted in the code of Llama's layer.

    Each of two norms keeps its input and its normalised form, which the bf16 model keeps once in fp32 and once in bf16, and its
    output is the input of the matrices; attention keeps queries, keys, values, its output and a log-sum-exp per head; a gated
    MLP keeps four inner widths, another one two. Under autocast every matrix keeps its own bf16 copy of its input.
    """
    d, a, inner = shape.hidden, shape.attention, (4 if shape.gated else 2) * shape.inner
    b = 2 if autocast else weight_bytes
    norms = 26 * d if autocast else (24 if weight_bytes == 4 else 16) * d
    return norms + b * (2 * a + 2 * shape.keys + inner) + 4 * shape.heads + 8


def activations(shape: Shape, tokens: float, weight_bytes: int, *, checkpointing: bool = False, autocast: bool = False) -> float:
    """Bytes that one packed row of N tokens holds at the start of its backward, and what the backward of one layer adds.

    With gradient checkpointing (Chen et al. 2016, arXiv 1604.06174, section 4.1) each layer keeps its input alone, and one layer
    at a time is computed again. There is no term in N squared and none in the longest conversation.
    """
    wide = FP32 if autocast else weight_bytes
    layer = layer_activations(shape, weight_bytes, autocast=autocast)
    kept = shape.layers * wide * shape.hidden + layer if checkpointing else shape.layers * layer
    ends = 8 * shape.hidden + wide * shape.hidden  # the last norm's input and normalised form, the head's input
    backward = wide * (3 * shape.inner + 2 * shape.hidden)
    return tokens * (kept + ends + backward)


def head_memory(shape: Shape, tokens: float, weight_bytes: int, chunk_bytes: float, kept_bytes: float, *, is_trained: bool = True) -> float:
    """The LM head while it works: two chunks of fp32 logits and a copy of one in bf16, the logits that are kept for the backward
    (`CHUNK_BYTES` and `KEPT_BYTES` of `posttrain.models.logprobs`), the fp32 gradient of its weights and, where the embeddings are the
    same weights, theirs. What grows with N x V ends at a constant."""
    chunk = chunk_bytes * (2 if weight_bytes == 4 else 2.5) + is_trained * min(kept_bytes, FP32 * shape.vocabulary * tokens)
    gradient = FP32 * shape.table + (weight_bytes if weight_bytes == 2 else 0) * shape.table
    return chunk + is_trained * (gradient + weight_bytes * shape.table * shape.tied)


def cache_memory(shape: Shape, cached_tokens: float, weight_bytes: int) -> float:
    """Keys and values of `cached_tokens` tokens in all layers."""
    return 2.0 * shape.layers * shape.keys * cached_tokens * weight_bytes


def checkpoint_copy(parameters: float, weight_bytes: int, sharding: Sharding, *, ema: bool = False, beside: int = 1) -> float:
    """Bytes on the host for each of `beside` processes of the first machine while a checkpoint is written in the background: the first
    process has a copy of whole weights, and of the moments where there is no ZeRO; with it every process copies its shard."""
    whole = weight_bytes if sharding.level else FP32 + MOMENTS + FP32 * ema
    shard = (FP32 + MOMENTS + FP32 * ema) / sharding.ranks if sharding.level else 0
    return parameters * (whole / beside + shard)


def sampling_memory(shape: Shape, parameters: float, cached_tokens: float, weight_bytes: int, sharding: Sharding) -> float:
    """What sampling adds to what is held: the cache, a prefill, pieces of logits, and under ZeRO-3 the whole model."""
    prefill = PREFILL_TOKENS * weight_bytes * (3 * shape.inner + 4 * shape.hidden)
    whole = weight_bytes * parameters if sharding.level == 3 else 0
    return whole + cache_memory(shape, cached_tokens, weight_bytes) + prefill + 2 * SAMPLED_LOGITS


def checkpoint_bytes(parameters: float, weight_bytes: int, sharding: Sharding, *, ema: bool = False) -> float:
    """One checkpoint of one trained model on disk, all its files: whole weights, masters where they are apart, moments, average."""
    own = FP32 + MOMENTS if sharding.level == 0 else weight_bytes + FP32 + MOMENTS
    return parameters * (own + FP32 * ema)


# --- traffic


def communication(
    parameters: float, weight_bytes: int, sharding: Sharding, *, micro_batches: int = 1, terms: int = 1, checkpointing: bool = False
) -> dict[str, float]:
    """Bytes that enter each collective in one optimizer step of a trained model with so many micro-batches per process.

    As the engine and DeepSpeed do it, gradients travel in fp32: without ZeRO once per step and term; under ZeRO-1 once, and once
    more per term for its norm; under ZeRO-2 with every micro-batch, by all-reduce, although each process keeps its shard only;
    under ZeRO-3 they are scattered with every micro-batch. New weights are gathered once per step; ZeRO-3 gathers all weights in
    the forward and in the backward of every micro-batch, and once only where they all stay whole between the two.
    """
    if sharding.ranks == 1:
        return {}
    level, gradients, weights = effective_level(sharding.level, weight_bytes), FP32 * parameters, weight_bytes * parameters
    if level == 0:
        return {"all_reduce": gradients * terms}
    if level == 3:
        gathers = 1 if parameters <= LIVE and not checkpointing else 2
        return {"all_gather": weights * gathers * micro_batches, "reduce_scatter": gradients * micro_batches}
    times = micro_batches if level == 2 else 1 + (terms if terms > 1 else 0)
    return {"all_reduce": gradients * times, "all_gather": weights}


def sent(volumes: Mapping[str, float], ranks: int) -> float:
    """Bytes that each process sends for these collectives by rings: an all-reduce is a reduce-scatter and an all-gather, and each
    of those moves (N - 1) / N of its volume (arXiv 1910.02054, section 7.1). With bf16 everywhere and one micro-batch this is the
    paper's 2 P for levels 0 to 2 and 3 P for level 3 (section 7.2)."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    return sum(passes[name] * size for name, size in volumes.items()) * (ranks - 1) / ranks


# --- arithmetic


def forward_flops(shape: Shape, tokens: Tokens) -> float:
    """2 per weight and token, and 4 per width of attention and pair (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    head = 2 * shape.table * (tokens.scored + tokens.summed)
    return 2 * shape.trunk * tokens.count + 4 * shape.layers * shape.attention * tokens.pairs + head


def training_flops(shape: Shape, tokens: Tokens, *, checkpointing: bool = False, frozen_base: bool = False) -> float:
    """Forward and backward: 3 times the forward in the trunk, and 3.5 times in attention, whose backward computes the scores again
    (FlashAttention-2, arXiv 2307.08691, section 4.1). The head computes logits twice, but once for a sum, and for chunks that it
    kept, which aren't told apart here. Checkpointing computes the trunk and its attention once more, but for the last matrix of each
    layer, whose output nobody needs again; under an adapter frozen weights have no gradient, which saves one of the three."""
    saved = 1 if frozen_base else 0
    again = (shape.trunk - shape.layers * shape.hidden * shape.inner) * checkpointing
    trunk = 2 * ((3 - saved) * shape.trunk + again) * tokens.count
    attention = (3.5 + checkpointing) * 4 * shape.layers * shape.attention * tokens.pairs
    return trunk + attention + 2 * shape.table * ((4 - saved) * tokens.scored + (3 - saved) * tokens.summed)


def decoding_bytes(shape: Shape, rows: float, prompt: float, new_tokens: float, weight_bytes: int) -> float:
    """Bytes read to sample `rows` responses side by side: all weights once for every step, and each row's keys and values so far."""
    weights = (shape.trunk + shape.table) * weight_bytes * new_tokens
    return weights + cache_memory(shape, rows * new_tokens * (prompt + new_tokens / 2), weight_bytes)
