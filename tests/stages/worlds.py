"""Small worlds for the stages: conversations, rankings, prompts and texts, ragged and seeded."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["the", "sum", "of", "three", "and", "four", "is", "seven", "sort", "words", "pear", "apple", "fig", "what", "answer"]


def phrase(draw: random.Random, least: int = 1, most: int = 12) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def conversations(count: int, seed: int = 0, most_turns: int = 3) -> list[dict[str, Any]]:
    """One to `most_turns` exchanges each; every fifth conversation has a turn that isn't trained."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        messages: list[dict[str, Any]] = []
        for turn in range(draw.randint(1, most_turns)):
            messages.append({"role": "user", "content": phrase(draw)})
            messages.append({"role": "assistant", "content": phrase(draw)})
            if n % 5 == 4 and turn == 1:
                messages[1]["train"] = False
        rows.append({"messages": messages})
    return rows


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"text": phrase(draw, 2, 30)} for _ in range(count)]


def prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [{"prompt": phrase(draw)} for _ in range(count)]


def rankings(count: int, seed: int = 0, most: int = 4, ties: bool = True) -> list[dict[str, Any]]:
    """Two to `most` responses per prompt, ranked by how often they say "apple"; with `ties`, or without any."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        responses = [phrase(draw, 2, 10) for _ in range(draw.randint(2, most))]
        apples = [response.split().count("apple") for response in responses]
        if len(set(apples)) > 1 and (ties or len(set(apples)) == len(apples)):
            ranks = [sum(other > mine for other in apples) for mine in apples]
            rows.append({"prompt": phrase(draw), "responses": responses, "ranks": ranks})
    return rows


def judgements(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One response per prompt, desirable where it says "apple"."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        response = phrase(draw, 2, 14)
        rows.append({"prompt": phrase(draw), "response": response, "desirable": "apple" in response.split()})
    return rows
