"""Tokenizers and chat templates in the manner of several model families, made on the spot."""

from __future__ import annotations

import copy
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, tiny_tokenizer

LLAMA3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
{{- message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

SYSTEM_CHATML = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML

TOOLS = """{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def byte_level(template: str | None, *tokens: str, **names: str) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with more special tokens."""
    tokenizer = copy.deepcopy(tiny_tokenizer(None))
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    if names:
        tokenizer.add_special_tokens(names)
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def spaced(template: str | None = MISTRAL) -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: a space before every text, BOS put first, no id for pad."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    alphabet = [*map(chr, range(32, 127)), "\n", "\t"]
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator(["the sum of three and four is seven", "sort these words"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


FAMILIES = {
    "chatml": lambda: byte_level(CHATML),
    "chatml_system": lambda: byte_level(SYSTEM_CHATML),
    "default": lambda: byte_level(None, eos_token="<eos>"),
    "llama3": lambda: byte_level(LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", eos_token="<eos>"),
    "mistral": spaced,
    "mistral_bytes": lambda: byte_level(MISTRAL, eos_token="<eos>"),
    "gemma": lambda: byte_level(GEMMA, "<start_of_turn>", "<end_of_turn>", eos_token="<eos>"),
    "default_spaced": lambda: spaced(None),
}
