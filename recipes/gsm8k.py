"""GSM8K and Dolly as published, as rows: recorded solutions become comparisons, passages become text.

Functions named as `DataConfig.format`, so that the files are read as they are.
"""

from __future__ import annotations

from typing import Any


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
