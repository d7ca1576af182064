"""A trained model is one module with one forward: a packed row in, log-probabilities, entropies, values or scores out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.models.attention import NAME, Structure, structure_for
from posttrain.models.logprobs import LogitTransform, TokenLogprobs, logit_transform
from posttrain.packing import Forest

if TYPE_CHECKING:
    from posttrain.models.adapters import Adapter

CAUSAL_WANT = ("logprobs", "entropy", "nll")
SCALAR_WANT = ("values", "scores")


class PackedModel(nn.Module):
    """A transformers model that reads packed rows: a causal LM, or a sequence classifier with one label.

    `hf` is the transformers model; its LM head is replaced by one that shares its parameters. `calibration` (shift, scale)
    maps the scalar head's output: values and scores are (raw - shift) / scale. `longest_row` is the length of conversation
    beyond which packing would not be exact, or None. `neftune_alpha` adds NEFTune's noise to the embeddings in training mode.
    `adapter` is what is trained where the rest is frozen, or None.
    """

    def __init__(
        self,
        hf: Any,
        *,
        attention: str = "auto",
        longest_row: int | None = None,
        calibration: tuple[float, float] = (0.0, 1.0),
        transform: LogitTransform | None = None,
    ) -> None:
        super().__init__()
        # any other attention would ignore the structure and read across trees, without a word
        hf.set_attn_implementation(NAME)
        self.hf = hf
        self.attention = attention
        self.longest_row = longest_row
        self.calibration = calibration
        self.neftune_alpha = 0.0
        self.adapter: Adapter | None = None
        self.is_scalar = isinstance(getattr(hf, "score", None), nn.Linear)
        if not self.is_scalar:
            transform = transform or logit_transform(hf.config.get_text_config())
            hf.set_output_embeddings(TokenLogprobs.take_over(hf.get_output_embeddings(), transform))
        self.train(hf.training)

    @property
    def trunk(self) -> nn.Module:
        """The transformer without its head; called with one packed row it gives the final hidden states."""
        return self.hf.get_decoder()

    @property
    def head(self) -> Any:
        """The LM head (TokenLogprobs) or the scalar head (nn.Linear)."""
        return self.hf.score if self.is_scalar else self.hf.get_output_embeddings()

    @property
    def offers(self) -> tuple[str, ...]:
        return SCALAR_WANT if self.is_scalar else CAUSAL_WANT

    def forward(self, forest: Forest, want: tuple[str, ...], temperature: float = 1.0) -> dict[str, Tensor]:
        """Everything wanted of one packed row of N tokens and B responses, in fp32.

        `logprobs (N,)`: log pi of each trainable token at `temperature`; `entropy (N,)` of the distribution it was drawn
        from, without gradient; `nll ()`: the sum of -log pi over the trainable tokens at temperature 1; `values (N,)`: the
        scalar head before each trainable token; `scores (B,)`: the scalar head at each response's last token. Per-token
        results are 0 where a token is not trainable.
        Raises ValueError when the row is longer than the model can be trusted with, or its head doesn't give what is wanted.
        """
        if missing := set(want) - set(self.offers):
            raise ValueError(f"{type(self.hf).__name__} gives {', '.join(self.offers)}, not {', '.join(sorted(missing))}")
        hidden = self.hidden_states(forest)
        places = forest.scored_tokens
        before = hidden[forest.predecessor[places]]  # (M, d)
        result: dict[str, Tensor] = {}
        if "logprobs" in want or "entropy" in want:
            logprobs, entropy = self.head(before, forest.input_ids[places], temperature, "entropy" in want)
            result["logprobs"] = spread(logprobs, places, forest)
            if entropy is not None:
                result["entropy"] = spread(entropy, places, forest)
        if "nll" in want:
            result["nll"] = self.head(before, forest.input_ids[places], counted=forest.trainable[places])
        if "values" in want:
            result["values"] = spread(self.calibrated(before), places, forest)
        if "scores" in want:
            result["scores"] = self.calibrated(hidden[forest.last_token])
        return {name: result[name] for name in want}

    def hidden_states(self, forest: Forest) -> Tensor:
        """The final hidden states (N, d) of a packed row."""
        noise = embedding_noise(forest, self.neftune_alpha) if self.training and self.neftune_alpha else None
        return self.run_trunk(forest.input_ids, forest.position_ids, structure_for(forest, self.attention), noise)

    def run_trunk(self, input_ids: Tensor, position_ids: Tensor, structure: Structure, noise: Tensor | None = None) -> Tensor:
        """The final hidden states (N, d) of one row of `input_ids (N,)` under any attention structure.

        `noise (N,)` times 1 / sqrt(d) is the half-width of uniform noise added to each token's embedding.
        Raises ValueError for a path longer than `longest_row`.
        """
        if self.longest_row is not None and structure.longest > self.longest_row:
            raise ValueError(
                f"a conversation of {structure.longest} tokens is longer than the {self.longest_row} that "
                f"{type(self.hf).__name__} can be trusted with; at most {self.longest_row} tokens work"
            )
        if noise is None:
            inputs = {"input_ids": input_ids[None]}
        else:
            embedded = self.hf.get_input_embeddings()(input_ids)  # (N, d)
            width = noise[:, None] / embedded.shape[-1] ** 0.5
            inputs = {"inputs_embeds": (embedded + torch.empty_like(embedded).uniform_(-1, 1) * width.to(embedded.dtype))[None]}
        with self.adapter.switch.to(self.adapter.name) if self.adapter else nullcontext():
            return self.trunk(**inputs, position_ids=position_ids[None], use_cache=False, structure=structure).last_hidden_state[0]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute each layer's activations in the backward pass, or keep them. Only training mode recomputes."""
        if on:
            contexts = {"context_fn": self.adapter.switch.for_recomputation} if self.adapter else {}
            self.hf.activation_checkpointing_enable({"use_reentrant": False, **contexts})
        else:
            self.hf.activation_checkpointing_disable()

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (M, V) in fp32 from `hidden (M, d)`, with the family's own transform: what a sampler draws from."""
        return self.head.logits(hidden)

    def calibrated(self, hidden: Tensor) -> Tensor:
        """The scalar head's output (M,) for `hidden (M, d)`, shifted and scaled by the calibration, in fp32."""
        shift, scale = self.calibration
        return (self.head(hidden).squeeze(-1).float() - shift) / scale


def spread(values: Tensor, places: Tensor, forest: Forest) -> Tensor:
    """Per-token results `values (M,)` at `places (M,)` -> (N,), 0 elsewhere and where a token is not trainable.

    The one token that a row without trainable tokens is read at keeps its place in the autograd graph, times 0.
    """
    counted = values * forest.trainable[places]
    return counted.new_zeros(forest.num_tokens).index_put((places,), counted)


def embedding_noise(forest: Forest, alpha: float) -> Tensor:
    """NEFTune's alpha / sqrt(L) per token (N,), L the length of the token's conversation (arXiv 2310.05914, algorithm 1)."""
    lengths: list[int] = []
    for length, parent in zip(forest.lengths, forest.parents):
        lengths.append(length + (lengths[parent] if parent >= 0 else 0))
    per_segment = alpha / torch.tensor(lengths, dtype=torch.float32).sqrt()
    return torch.repeat_interleave(per_segment, torch.tensor(forest.lengths)).to(forest.input_ids.device)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set every residual, embedding and MLP dropout to `p`, and attention dropout and layer drop to 0.

    Attention dropout stays off: the packed attention has none. An adapter's own dropout is left alone.
    Raises ValueError when the family has no dropout to set.
    """
    found = False
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        in_attention = type(module).__name__.endswith("Attention")
        if isinstance(module, nn.Dropout):
            is_attention = name.rsplit(".", 1)[-1] in ("attn_dropout", "attention_dropout")
            module.p = 0.0 if is_attention else p
            found |= not is_attention
        for attribute in ("dropout", "hidden_dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(vars(module).get(attribute), float | int):
                is_residual = attribute not in ("attention_dropout", "layerdrop") and not in_attention
                setattr(module, attribute, p if is_residual else 0.0)
                found |= is_residual
    if p and not found:
        raise ValueError(f"dropout={p}: this model has no dropout layers; dropout=0 works")
