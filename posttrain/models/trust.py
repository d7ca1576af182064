"""Which models may be packed: a check of the config, and a probe that measures on a small copy of the same class.

Packing is silently wrong for some models: those that ignore the attention interface, look beyond a token's own path
(windows, recurrence, RoPE that depends on the longest position in the row), or change their logits after the head. So
trust is earned by each model and refused by name.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.models.attention import NAME
from posttrain.models.model import PackedModel, set_dropout
from posttrain.packing import Tree, forest, segment

TOLERANCE = 1e-4  # of log-probabilities in fp32; honest disagreement is below 1e-5, a silent failure above 1e-3

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
RECURRENT = ("mamba_d_state", "ssm_state_size", "state_size", "conv_kernel", "linear_conv_kernel_dim", "lru_width")
WORKS = "Llama, Qwen, Mistral, GPT-NeoX and OPT models work"


def longest_row(config: Any) -> int | None:
    """The most tokens that one conversation may have for packing to be exact, or None when nothing limits it.

    The smallest of: the context, a sliding window, and the length at which longrope and dynamic-NTK RoPE change their
    frequencies (below it they don't depend on the other conversations in the row).
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or "sliding_attention" in kinds:  # without kinds, a window holds in every layer
        limits.append(getattr(config, "sliding_window", None))
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None)))
    known = [int(limit) for limit in limits if limit]
    return min(known) if known else None


def _ropes(config: Any) -> list[dict]:
    """The config's RoPE parameters: one dict, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def check_config(config: Any, model_class: type) -> None:
    """Refuse, by name, what the config already shows can't be packed exactly. Raises ValueError."""
    kinds = set(getattr(config, "layer_types", None) or ())
    experts = next((name for name in EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    stateful = getattr(model_class, "_is_stateful", False) or any(getattr(config, name, None) for name in RECURRENT)
    softcap = getattr(config, "attn_logit_softcapping", None)
    reasons = [
        (config.is_encoder_decoder, "it is an encoder-decoder"),
        (config.get_text_config() is not config, "it has other inputs than text"),
        (experts, f"it mixes experts ({experts}), and its router's loss would vanish"),
        (stateful, "its recurrent layers carry state from one conversation to the next"),
        (kinds - {"full_attention", "sliding_attention"}, f"its layers are of kind {', '.join(sorted(kinds))}"),
        (softcap, f"it caps attention logits (attn_logit_softcapping={softcap})"),
        (getattr(config, "alibi", False), "it biases attention by distance (alibi)"),
        (not getattr(model_class, "_supports_attention_backend", False), "it doesn't use transformers' attention interface"),
    ]
    for holds, reason in reasons:
        if holds:
            raise ValueError(f"{model_class.__name__} ({config.model_type}) can't be packed: {reason}; {WORKS}")


def shrink(config: Any) -> Any:
    """A config of the same class and flags with two small layers, a short context and 128 tokens."""
    small = copy.deepcopy(config)
    heads, shared = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    own_width = getattr(small, "head_dim", None)
    kinds = getattr(small, "layer_types", None)
    changes: dict[str, Any] = {
        "layer_types": None if kinds is None else (sorted(set(kinds)) * 2)[:2],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if shared == heads else (1 if shared == 1 else 2),
        "head_dim": 16,
        "hidden_size": 64 if own_width in (None, small.hidden_size // heads) else 48,
        "word_embed_proj_dim": 64 if getattr(small, "word_embed_proj_dim", None) == small.hidden_size else 32,
        "intermediate_size": 96,
        "ffn_dim": 96,
        "n_inner": None,
        "vocab_size": 128,
        "max_position_embeddings": 48,
        "original_max_position_embeddings": 24,
        "sliding_window": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": _shrink_rope(getattr(small, "rope_parameters", None)),
    }
    for name, value in changes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    return small


def _shrink_rope(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    changed = {name: _shrink_rope(value) for name, value in rope.items()}
    partial = changed.get("partial_rotary_factor") or 1.0
    for name in ("short_factor", "long_factor"):
        if name in changed:
            changed[name] = changed[name][: int(16 * partial) // 2]
    if changed.get("original_max_position_embeddings"):
        changed["original_max_position_embeddings"] = 24
    return changed


_PROBED: dict[str, str] = {}


def probe(config: Any) -> None:
    """Measure on a small random copy, in fp32, that packed log-probabilities equal those of separate rows.

    The separate rows go through the model's own eager attention and its own logits, so that a head that forgets the
    family's scale or cap shows. Raises ValueError naming the model and what went wrong.
    """
    digest = hashlib.sha256(f"{type(config).__name__} {config.to_json_string(use_diff=False)}".encode()).hexdigest()
    if digest not in _PROBED:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                small = shrink(config)
                _PROBED[digest] = disagreement(small, longest_row(small))
            except Exception as error:  # whatever a family does here that it shouldn't, is a reason not to trust it
                _PROBED[digest] = f"a small copy of it does not run ({type(error).__name__}: {error})"
    if _PROBED[digest]:
        raise ValueError(f"{config.model_type} can't be packed: {_PROBED[digest]}; {WORKS}")


def disagreement(small: Any, limit: int | None) -> str:
    """What differs between packed and separate rows of a small random model, or "" when nothing does.

    `limit` is the longest neighbour to try.
    """
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would also reset every GPU's generator
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():  # larger than usual, so that a mistake shows
        parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    set_dropout(model, 0.0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, small.vocab_size, (length,)).tolist()

    prompt, responses = tokens(7), [tokens(5), tokens(9)]
    tree = Tree(segment(prompt), tuple(segment(response, True) for response in responses))
    expected = torch.cat([_own_logprobs(model, prompt, response) for response in responses])
    short, long = Tree(segment(tokens(6))), Tree(segment(tokens(limit or 48)))

    model.set_attn_implementation(NAME)
    packed = PackedModel(model, attention="tree")
    rows = {"a prompt with two responses": [tree], "a row beside others": [short, tree, short], "a row beside a long one": [long, tree]}
    for name, trees in rows.items():
        row = forest(trees)
        error = (packed(row, ("logprobs",))["logprobs"][row.trainable] - expected).abs().max().item()
        if not error < TOLERANCE:
            return f"log-probabilities of {name} differ by {error:.1e} from the model's own on separate rows"
    return ""


def _own_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    taken = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return taken.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
