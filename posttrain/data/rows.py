"""The five types of rows that stages take, checked one by one: what is wrong is said with file, row and column.

demonstration  messages (role, content; tool_calls; train), tools
comparison     prompt, responses (best first), ranks for ties (smaller is better)
judgement      prompt, response, desirable
prompt         prompt, and any columns that a reward function wants
text           text
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.config import DataConfig, did_you_mean
from posttrain.data.formats import FORMATS, Format, find_format
from posttrain.data.sources import read_items

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "tool_calls", "train", "name", "tool_call_id", "reasoning_content")
SHOWN = 5


class RowError(ValueError):
    """What is wrong with one column of one row."""

    def __init__(self, column: str, why: str) -> None:
        super().__init__(why)
        self.column, self.why = column, why


class RowType(NamedTuple):
    """The columns a row must have, the function that checks and normalises it, and one that is right."""

    columns: tuple[str, ...]
    check: Callable[[dict[str, Any]], dict[str, Any]]
    example: dict[str, Any]


def read_rows(config: DataConfig, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind from a source, converted from a published format where they come in one, checked and normalised.

    Extra columns stay. Raises ValueError with the first few errors of the source, each with file, row number (from 1) and
    column, and with a row that is right.
    """
    row_type = row_type_of(kind)
    rows: list[dict[str, Any]] = []
    errors: dict[tuple[str, str], list[str]] = {}  # the places of each error: one wrong column is one message, not a thousand
    for item in read_items(config):
        try:
            rows.append(row_type.check(_convert(item.row, config.format, kind, row_type)))
        except RowError as error:
            errors.setdefault((error.column, error.why), []).append(f"{item.source}, row {item.number}")
    if errors:
        example = f"a {kind} row that works: {json.dumps(row_type.example, ensure_ascii=False)}"
        raise ValueError("\n".join([*_described(errors), example]))
    return rows


def _described(errors: Mapping[tuple[str, str], list[str]]) -> list[str]:
    lines = []
    for (column, why), places in itertools.islice(errors.items(), SHOWN):
        others = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
        lines.append(f"{places[0]}{others}, column {column!r}: {why}")
    rest = sum(map(len, errors.values())) - sum(len(places) for places in itertools.islice(errors.values(), SHOWN))
    return [*lines, f"... and {rest:,} more rows with errors"] if rest else lines


def row_type_of(kind: str) -> RowType:
    """The row type of that name. Raises ValueError."""
    if kind not in ROW_TYPES:
        raise ValueError(f"kind={kind!r} is no row type{did_you_mean(kind, ROW_TYPES)}")
    return ROW_TYPES[kind]


def _convert(row: dict[str, Any], name: str, kind: str, row_type: RowType) -> dict[str, Any]:
    """The row itself where it has our columns, else what its published format makes of it."""
    if not name and all(column in row for column in row_type.columns):
        return row
    found = find_format(name, kind, row)
    if found is None:
        missing = next(column for column in row_type.columns if column not in row)
        known = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS if f.kind == kind)
        also = f", and no known format fits: {known}" if known else ""
        near = did_you_mean(missing, row)
        raise RowError(missing, f"is missing{near if near.startswith('; did') else f'; the row has {_names(row)}'}{also}")
    return _published(row, found)


def _published(row: dict[str, Any], found: Format) -> dict[str, Any]:
    missing = [column for column in found.columns if column not in row]
    if missing:
        raise RowError(missing[0], f"is missing, and format={found.name!r} needs it; the row has {_names(row)}")
    for column in found.columns:
        if row[column] is None:
            raise RowError(column, f"is null, and format={found.name!r} needs it")
    try:
        return dict(found.convert(row))
    except RowError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RowError(", ".join(found.columns) or "any", f"format={found.name!r} can't read it: {error}") from None


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no column"


# --- messages


def check_messages(value: Any, column: str, *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """Messages with plain-text contents, null keys left out and tool arguments parsed. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(column, f"must be a list of messages, not {_short(value)}")
    return [_check_message(message, f"message {n}", column, may_be_empty) for n, message in enumerate(value, 1)]


def _check_message(value: Any, name: str, column: str, may_be_empty: bool) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(column, f"{name} must be an object with role and content, not {_short(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    for key in message:
        # a key of somebody else's is none of our business; a slip of the pen is ("trian": false)
        if key not in MESSAGE_KEYS and did_you_mean(key, MESSAGE_KEYS).startswith("; did"):
            raise RowError(column, f"{name} has the key {key!r}{did_you_mean(key, MESSAGE_KEYS)}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(column, f"{name} has role {role!r}; there is {', '.join(ROLES)}")
    message = {key: message[key] for key in MESSAGE_KEYS if key in message}
    message["content"] = _content(message.get("content", ""), name, column)
    calls = _tool_calls(message.get("tool_calls"), name, column) if role == "assistant" else []
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and not message["content"].strip() and not calls and not may_be_empty:
        raise RowError(column, f"{name} is an empty assistant turn; give it text or a tool call, or leave it out")
    if "train" in message and (not isinstance(message["train"], bool) or (message["train"] and role != "assistant")):
        raise RowError(column, f"{name} has train={message['train']!r}; true and false work, true for assistant messages only")
    return message


def _content(value: Any, name: str, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise RowError(column, f"{name} must have text as its content, not {_short(value)}")


def _tool_calls(value: Any, name: str, column: str) -> list[dict[str, Any]]:
    calls = []
    for call in value or []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(column, f"{name} has the tool call {_short(call)}; " + '{"function": {"name": "f", "arguments": {}}} works')
        arguments = _parsed(function.get("arguments", {}))
        if not isinstance(arguments, Mapping):
            raise RowError(column, f"{name} calls {function['name']!r} with {_short(arguments)}; arguments are an object or its JSON text")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return calls


def _parsed(value: Any) -> Any:
    """JSON text read, everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _short(value: Any) -> str:
    text = "null" if value is None else f"{type(value).__name__} {value!r}"
    return text if len(text) < 60 else text[:57] + "..."


# --- the five types


def _check_tools(row: dict[str, Any]) -> dict[str, Any]:
    tools = _parsed(row.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools", f"must be a list of JSON schemas or its JSON text, not {_short(tools)}")
    row = {name: value for name, value in row.items() if name != "tools"}
    return {**row, "tools": tools} if tools else row


def _check_prompt(value: Any, column: str = "prompt") -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        if not value.strip():
            raise RowError(column, "is empty; give it some text")
        return value
    messages = check_messages(value, column)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(column, f"ends with the {messages[-1]['role']}'s message; a prompt ends with a user or tool message")
    return messages


def _check_response(value: Any, column: str) -> str | list[dict[str, Any]]:
    # a model may well have answered nothing: that is a response, and a bad one
    if isinstance(value, str):
        return value
    messages = check_messages(value, column, may_be_empty=True)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowError(column, "a response begins and ends with the assistant's message")
    return messages


def _demonstration(row: dict[str, Any]) -> dict[str, Any]:
    return {**_check_tools(row), "messages": check_messages(row["messages"], "messages")}


def _comparison(row: dict[str, Any]) -> dict[str, Any]:
    responses, ranks = row["responses"], row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowError("responses", f"must be a list of 2 or more, best first, not {_short(responses)}")
    checked = {"prompt": _check_prompt(row["prompt"]), "responses": [_check_response(r, "responses") for r in responses]}
    if ranks is not None:
        if not isinstance(ranks, Sequence) or len(ranks) != len(responses) or not all(type(rank) is int for rank in ranks):
            raise RowError("ranks", f"must be {len(responses)} whole numbers, one per response, smaller is better, not {_short(ranks)}")
        checked["ranks"] = list(ranks)
    return {**{name: value for name, value in _check_tools(row).items() if name != "ranks"}, **checked}


def _judgement(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["desirable"], bool):
        raise RowError("desirable", f"must be true or false, not {_short(row['desirable'])}")
    return {**_check_tools(row), "prompt": _check_prompt(row["prompt"]), "response": _check_response(row["response"], "response")}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {**_check_tools(row), "prompt": _check_prompt(row["prompt"])}


def _text(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["text"], str) or not row["text"]:
        raise RowError("text", f"must be text with at least one character, not {_short(row['text'])}")
    return row


_ASK = {"role": "user", "content": "What is 2 + 2?"}
ROW_TYPES = {
    "demonstration": RowType(("messages",), _demonstration, {"messages": [_ASK, {"role": "assistant", "content": "4"}]}),
    "comparison": RowType(("prompt", "responses"), _comparison, {"prompt": _ASK["content"], "responses": ["4", "5"]}),
    "judgement": RowType(("prompt", "response", "desirable"), _judgement, {"prompt": _ASK["content"], "response": "4", "desirable": True}),
    "prompt": RowType(("prompt",), _prompt, {"prompt": _ASK["content"], "answer": "4"}),
    "text": RowType(("text",), _text, {"text": "A document of any length."}),
}
