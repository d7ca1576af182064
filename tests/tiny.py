"""Tiny random models and a tiny tokenizer, made on the spot: nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 320

SHAPES: dict[str, dict] = {
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=False),
    "llama_tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "mistral": dict(num_key_value_heads=2, sliding_window=None),
    "gemma": dict(num_key_value_heads=2, head_dim=8),
    "gpt_neox": dict(),
    "gpt2": dict(),
    "opt": dict(),
    "olmo2": dict(num_key_value_heads=2),
    "granite": dict(num_key_value_heads=2, logits_scaling=4.0),
}


@lru_cache
def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY entries with ChatML tokens; pad, bos and eos differ."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["the sum of three and four is seven", "sort these words: pear apple fig", "what is 12 + 30? the answer is 42."] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tiny_config(family: str = "llama", *, layers: int = 2, hidden: int = 32, heads: int = 4, vocabulary: int = VOCABULARY, **changes):
    """A transformers config of the family, a few thousand parameters."""
    shape = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=4,
    )
    if family == "gpt2":
        shape = dict(shape, n_embd=hidden, n_layer=layers, n_head=heads, n_inner=2 * hidden, n_positions=256)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
            shape.pop(name)
    if family == "opt":
        shape = dict(shape, ffn_dim=2 * hidden, word_embed_proj_dim=hidden)
        shape.pop("intermediate_size")
    extra = SHAPES.get(family, {})
    return AutoConfig.for_model(family.removesuffix("_tied"), **{**shape, **extra, **changes})


def tiny_model(family: str = "llama", *, seed: int = 0, **shape) -> PreTrainedModel:
    """A random causal LM in fp32; weights are larger than usual, so that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **shape), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def tiny_folder(folder: Path, family: str = "llama", *, seed: int = 0, chat_template: str | None = CHATML, **shape) -> Path:
    """A model folder as a user has it: weights, config, tokenizer."""
    tiny_model(family, seed=seed, **shape).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
