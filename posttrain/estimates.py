"""How large a stage's data and models are, before any of them is loaded, and what is wrong with their lengths.

Tokens are guesses from a sample of rows, and marked so.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config import DataConfig, ModelConfig, replace

SAMPLE = 256
LARGEST = 32  # rows that are looked at for their size, the longest by characters
READ_BYTES = 200e6  # what is read in a few seconds


def rows_and_tokens(data: DataConfig, kind: str, model_path: str) -> dict[str, Any]:
    """{"rows", "tokens"} of a source; tokens are guessed from a sample with the model's tokenizer, or from characters.

    Of a hub set that says its size, only the sample is fetched.
    """
    from posttrain.data.rows import read_rows
    from posttrain.data.sources import hub_rows

    if data.path.startswith("@"):
        return {"rows": f"known when {data.path} has run"}
    count = hub_rows(data)
    rows = read_rows(replace(data, limit=min(count, SAMPLE)) if count else data, kind)
    count = round(count * len(rows) / min(count, SAMPLE)) if count else len(rows)  # a tree of the hub is many rows
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    texts = ["".join(_texts(row)) for row in sample]
    tokenizer = _tokenizer(model_path)
    lengths = [len(e.ids) for e in tokenizer.encode_batch(texts)] if tokenizer else [len(text) / 4 for text in texts]
    how = f"from {len(sample)} rows" if tokenizer else f"4 characters a token, from {len(sample)} rows"
    return {"rows": count, "tokens": round(sum(lengths) / len(lengths) * count), "tokens are": f"a guess, {how}"}


def row_problems(data: DataConfig, kind: str, config: Any) -> list[str]:
    """What is wrong with the lengths of a source's rows for a stage with `model`, `template`, `max_length`, `max_dropped_fraction` and
    `max_tokens_per_micro_batch`: more rows too long than may be dropped, a comparison larger than a packed row.

    Only what is known in seconds: hub data, gigabytes, and a model that isn't here yet are left to the stage, which looks
    at every row before it loads a model.
    """
    rows, tokenizer = _at_hand(data, kind, config.model)
    found = too_long(rows, tokenizer, data.path, config.max_length, config.max_dropped_fraction, "max_length")
    return found + (oversize(rows, tokenizer, data.path, config) if kind == "comparison" else [])


def prompt_problems(config: Any, model: ModelConfig) -> list[str]:
    """The same for the `prompts` of a stage that samples; and what is wrong with a vLLM that is to sample."""
    rows, tokenizer = _at_hand(config.prompts, "prompt", model)
    found = too_long(rows, tokenizer, config.prompts.path, config.max_prompt_length, config.max_dropped_fraction, "max_prompt_length")
    if not config.sampling.vllm.mode:
        return found
    from posttrain.rollout.vllm import sampling_problems  # imports transformers, which takes seconds

    return found + sampling_problems(config.sampling, config.max_prompt_length)


def _at_hand(data: DataConfig, kind: str, model: ModelConfig) -> tuple[list[dict[str, Any]], Any]:
    """The rows of a local source and the model's tokenizer, ([], None) unless both can be read in seconds."""
    path, tokenizer = Path(data.path).expanduser(), _tokenizer(model.path)
    if not data.path or tokenizer is None or not path.exists() or _bytes(path) > READ_BYTES:
        return [], None
    from posttrain.data.rows import read_rows

    return read_rows(data, kind), tokenizer


def oversize(rows: Sequence[dict[str, Any]], tokenizer: Any, source: str, config: Any) -> list[str]:
    """A problem for the comparison that has more tokens, with all its responses, than one packed row; else [].

    Exact for the longest rows by characters.
    """
    max_length, max_tokens = config.max_length, config.max_tokens_per_micro_batch
    # what has K responses of at most `max_length` with their prompt, has fewer than K times as many tokens
    able = [i for i, row in enumerate(rows) if len(row["responses"]) * max_length > max_tokens]
    longest = sorted(able, key=lambda i: -sum(map(len, _texts(rows[i]))))[:LARGEST]
    near = []
    for i in longest:
        parts = [rows[i]["prompt"], *rows[i]["responses"]]
        prompt, *responses = (len(e.ids) for e in tokenizer.encode_batch(["".join(_texts(part)) for part in parts]))
        # a template adds some tokens to each part: only what may come near the limit is worth importing transformers for
        if prompt + max(responses) <= max_length and 1.05 * (prompt + sum(responses)) + 16 * len(parts) > max_tokens:
            near.append(i)
    if not near:
        return []
    from posttrain.data.chat import Chat

    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    sizes = {}
    for i in near:
        prompt = len(chat.prompt(rows[i]["prompt"], tools=rows[i].get("tools")))
        responses = [len(chat.response(response)) for response in rows[i]["responses"]]
        if prompt + max(responses) <= max_length:  # else it is dropped
            sizes[i] = prompt + sum(responses)
    worst = max(sizes, key=lambda i: sizes[i], default=-1)
    if worst < 0 or sizes[worst] <= max_tokens:
        return []
    return [
        f"max_tokens_per_micro_batch={max_tokens} is below row {worst + 1} of {source}, whose prompt and "
        f"{len(rows[worst]['responses'])} responses have {sizes[worst]} tokens; {sizes[worst]} works"
    ]


def too_long(
    rows: Sequence[dict[str, Any]], tokenizer: Any, source: str, max_length: int, max_dropped_fraction: float, field: str
) -> list[str]:
    """A problem when more rows than may be dropped are longer than `max_length` tokens, which `field` says; else [].

    Judged by a sample, without what a template adds: a share that is beyond doubt.
    """
    if not rows:
        return []
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    lengths = [len(e.ids) for e in tokenizer.encode_batch([_shortest(row) for row in sample])]
    share = sum(length > max_length for length in lengths) / len(sample)
    doubt = 0.0 if len(sample) == len(rows) else 3 * (share * (1 - share) / len(sample)) ** 0.5
    if share - doubt <= max_dropped_fraction:
        return []
    fitting = sorted(lengths)[math.ceil((1 - max_dropped_fraction) * len(lengths)) - 1]
    return [
        f"{field}={max_length} is below the length of {share:.0%} of the rows of {source}, which would be dropped: more than "
        f"max_dropped_fraction={max_dropped_fraction}; {field}={fitting} and what the template adds works"
    ]


def _shortest(row: dict[str, Any]) -> str:
    """What of a row must fit, or it is dropped: a conversation up to the assistant's first words, a prompt with its longest response."""
    if "messages" in row:
        ends = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        return "".join(_texts(row["messages"][: ends[0] + 1] if ends else []))
    responses = ["".join(_texts(response)) for response in (*row.get("responses", ()), row.get("response", ""))]
    return "".join(_texts(row["prompt"])) + max(responses, key=len)


def count_parameters(model_path: str) -> int:
    """Parameters in a folder's safetensors, read from their headers; 0 where there are none."""
    return sum(_header_parameters(file) for file in sorted(Path(model_path).glob("*.safetensors"))) if model_path else 0


def _header_parameters(file: Path) -> int:
    with file.open("rb") as content:
        (size,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(size))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for length in entry["shape"]:
                count *= length
            total += count
    return total


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) if path.is_dir() else path.stat().st_size


def _tokenizer(model_path: str) -> Any:
    file = Path(model_path) / "tokenizer.json"
    if not model_path or not file.is_file():
        return None
    return _read_tokenizer(str(file), file.stat().st_mtime_ns)


@cache
def _read_tokenizer(file: str, changed: int) -> Any:
    """A tokenizer, read once for all stages of a plan; anew where its file has `changed`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(file)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row that a model reads, whatever its type."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name in ("messages", "content", "prompt", "responses", "response", "text"):
            yield from _texts(value.get(name))
