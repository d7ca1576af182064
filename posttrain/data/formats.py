"""Published data formats: one small function each, from a row as published to a row of ours.

A format is recognised from its columns or named in `DataConfig.format`; "package.module:function" names one of your own.
Columns that a format doesn't use stay in the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from posttrain.config import did_you_mean, resolve

Row = Mapping[str, Any]


class Format(NamedTuple):
    """`columns` tell rows of this format; `convert` makes a row of `kind` and raises ValueError where it can't."""

    name: str
    kind: str
    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def _but(row: Row, *columns: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in columns}


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# --- instruction data


def dolly_instruction(row: Row) -> str:
    """The instruction, and below it the context where there is one."""
    return f"{row['instruction']}\n\n{row['context']}" if row["context"] else row["instruction"]


def dolly(row: Row) -> dict[str, Any]:
    """databricks-dolly-15k: instruction, context, response (and category)."""
    return {**_but(row, "instruction", "context", "response"), "messages": _turn(dolly_instruction(row), row["response"])}


def dolly_prompt(row: Row) -> dict[str, Any]:
    return {**_but(row, "instruction", "context"), "prompt": dolly_instruction(row)}


def gsm8k(row: Row) -> dict[str, Any]:
    """GSM8K: a question, and an answer whose last line is "#### number"."""
    return {**_but(row, "question", "answer"), "messages": _turn(row["question"], row["answer"])}


def gsm8k_prompt(row: Row) -> dict[str, Any]:
    return {**_but(row, "question"), "prompt": row["question"]}


def prompt_response(row: Row) -> dict[str, Any]:
    """One prompt (text or messages) with its response as text."""
    before = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else list(row["prompt"])
    return {**_but(row, "prompt", "response"), "messages": [*before, {"role": "assistant", "content": row["response"]}]}


def conversation_prompt(row: Row) -> dict[str, Any]:
    """A demonstration's messages before its last answer."""
    messages = list(row["messages"])
    while messages and messages[-1].get("role") != "assistant":
        messages.pop()
    return {**_but(row, "messages"), "prompt": messages[:-1] or list(row["messages"])}


# --- preference data


def preference(row: Row) -> dict[str, Any]:
    """prompt, chosen, rejected: texts, or messages that may repeat the prompt (HuggingFaceH4/ultrafeedback_binarized, *_prefs)."""
    chosen, rejected = row["chosen"], row["rejected"]
    rest = _but(row, "chosen", "rejected")
    if isinstance(chosen, str):
        return {**rest, "responses": [chosen, rejected]}
    prompt, responses = split_dialogues(chosen, rejected)
    return {**rest, "prompt": prompt or row["prompt"], "responses": responses}


def split_dialogues(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Two dialogues as the prompt that they share and the two responses, which begin with the assistant."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def hh_messages(text: str) -> list[dict[str, str]]:
    """The turns of "\\n\\nHuman: ..\\n\\nAssistant: ..". Raises ValueError for a text that doesn't begin so."""
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise ValueError(f"begins with {text[:30]!r}; '\\n\\nHuman: ...\\n\\nAssistant: ...' works")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def hh(row: Row) -> dict[str, Any]:
    """Anthropic/hh-rlhf: two whole dialogues; the prompt is what they share, the responses are what differs."""
    prompt, responses = split_dialogues(hh_messages(row["chosen"]), hh_messages(row["rejected"]))
    return {**_but(row, "chosen", "rejected"), "prompt": prompt, "responses": responses}


_SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


def sharegpt_messages(turns: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT's {from, value} turns as messages. Raises ValueError for an unknown speaker."""
    messages = []
    for turn in turns:
        role = _SHAREGPT.get(turn["from"])
        if role is None:
            raise ValueError(f"a turn is from {turn['from']!r}{did_you_mean(turn['from'], _SHAREGPT)}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def sharegpt_preference(row: Row) -> dict[str, Any]:
    """ShareGPT conversations with one chosen and one rejected answer."""
    responses = [sharegpt_messages([row[name]]) for name in ("chosen", "rejected")]
    return {**_but(row, "conversations", "chosen", "rejected"), "prompt": sharegpt_messages(row["conversations"]), "responses": responses}


def labelled_conversation(row: Row) -> dict[str, Any]:
    """KTO rows as LLaMA-Factory publishes them: messages that end with the assistant's, and a label for that last answer."""
    *prompt, response = row["messages"]
    return {**_but(row, "messages", "label"), "prompt": prompt, "response": [response], "desirable": row["label"]}


def labelled_completion(row: Row) -> dict[str, Any]:
    """KTO rows as TRL publishes them (trl-lib/kto-mix-14k): prompt, completion, label; texts or messages."""
    return {**_but(row, "completion", "label"), "response": row["completion"], "desirable": row["label"]}


FORMATS = (
    Format("dolly", "demonstration", ("instruction", "context", "response"), dolly),
    Format("dolly", "prompt", ("instruction", "context"), dolly_prompt),
    Format("gsm8k", "demonstration", ("question", "answer"), gsm8k),
    Format("gsm8k", "prompt", ("question", "answer"), gsm8k_prompt),
    Format("prompt_response", "demonstration", ("prompt", "response"), prompt_response),
    Format("conversation", "prompt", ("messages",), conversation_prompt),
    Format("sharegpt_preference", "comparison", ("conversations", "chosen", "rejected"), sharegpt_preference),
    Format("preference", "comparison", ("prompt", "chosen", "rejected"), preference),
    Format("hh", "comparison", ("chosen", "rejected"), hh),
    Format("labelled_conversation", "judgement", ("messages", "label"), labelled_conversation),
    Format("labelled_completion", "judgement", ("prompt", "completion", "label"), labelled_completion),
)


def find_format(name: str, kind: str, columns: Iterable[str]) -> Format | None:
    """The format that `name` says or, for "", the one whose columns are all there. Raises ValueError for an unknown name."""
    if ":" in name:
        return Format(name, kind, (), resolve(name))
    of_kind = [known for known in FORMATS if known.kind == kind]
    if name:
        found = next((known for known in of_kind if known.name == name), None)
        if found is None:
            raise ValueError(f"format={name!r} makes no {kind} rows{did_you_mean(name, (known.name for known in of_kind))}")
        return found
    present = set(columns)
    return max((known for known in of_kind if present.issuperset(known.columns)), key=lambda known: len(known.columns), default=None)
