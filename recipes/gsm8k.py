"""GSM8K as published, as rows: recorded solutions become comparisons, passages become text, and a checker of answers.

Functions named as `DataConfig.format`, so that the files are read as they are.
"""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def comparison(row: dict[str, Any]) -> dict[str, Any]:
    """A row of example_model_solutions: four recorded solutions, the right ones before the wrong ones."""
    recorded = [value for value in row.values() if isinstance(value, dict) and "solution" in value]
    return {
        "prompt": row["question"],
        "responses": [solution["solution"] for solution in recorded],
        "ranks": [0 if solution["is_correct"] else 1 for solution in recorded],
    }


def passage(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Dolly as plain text: its passage, where it has one, and what was written about it."""
    return {"text": "\n\n".join(part for part in (row["context"], row["response"]) if part)}


def final_number(text: str) -> str:
    """The last number of a text, without thousands separators and a final full stop; "" when there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else ""


def score(row: dict[str, Any], response: str) -> float:
    """1 when the last number of the response is that of the row's answer ("#### 18"), else 0 (GSM8K, arXiv 2110.14168)."""
    gold, given = final_number(row["answer"]), final_number(response)
    return float(bool(given) and float(given) == float(gold))
