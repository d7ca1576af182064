"""What is measured: a SmolLM2-shaped model with random weights, and real rows in the forms that each side reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPE = dict(
    hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHOTS = 4  # solved questions before the one that is asked: what makes a preference row's prompt long


def model_folder(folder: Path, layers: int, texts: list[str], **shape: int) -> Path:
    """A causal LM with random weights, and a tokenizer trained on the rows it will read."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    shape = {**SHAPE, **shape}
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=shape["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", chat_template=TEMPLATE)
    ids = dict(pad_token_id=fast.pad_token_id, eos_token_id=fast.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192, **shape, **ids)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def scalar_folder(folder: Path, model: Path) -> Path:
    """A model with a scalar head, random too, and the tokenizer of `model`."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(1)
    LlamaForSequenceClassification(AutoConfig.from_pretrained(model, num_labels=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    if not path.exists():
        raise SystemExit(f"{path} is not there; --data names the folder that holds GSM8K's train.jsonl and example_model_solutions.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def demonstrations(data: Path, count: int) -> list[dict[str, Any]]:
    """GSM8K questions with their solutions."""
    rows = read(data / "train.jsonl")[:count]
    return [{"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]} for row in rows]


def comparisons(data: Path, count: int, responses: int, shots: int = SHOTS) -> list[dict[str, Any]]:
    """A question after `shots` solved ones, and recorded solutions, the right ones first."""
    solved = read(data / "train.jsonl")
    rows = []
    for number, row in enumerate(read(data / "example_model_solutions.jsonl")[:count]):
        before = solved[shots * number : shots * (number + 1)]
        prompt = "\n\n".join([*(f"Question: {s['question']}\nAnswer: {s['answer']}" for s in before), f"Question: {row['question']}"])
        recorded = [value for value in row.values() if isinstance(value, dict)]
        recorded.sort(key=lambda solution: not solution["is_correct"])
        chosen = [recorded[round(i * (len(recorded) - 1) / (responses - 1))]["solution"] for i in range(responses)]
        rows.append({"prompt": prompt, "responses": chosen})
    return rows


def prompts(data: Path, count: int) -> list[dict[str, Any]]:
    """GSM8K questions to be answered."""
    return [{"prompt": row["question"]} for row in read(data / "train.jsonl")[:count]]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def parity(text: str) -> float:
    """A reward that tells responses apart and costs nothing: whether their length is odd."""
    return float(len(text) % 2)
