"""Penalties on a response's text: 0 for nothing to complain about, down to -1."""

from __future__ import annotations

from typing import Any

from posttrain.config import when
from posttrain.rewards.config import requires


def length_problems(*, limit: int = 0, buffer: int = 0, **_: Any) -> list[str]:
    return when(
        (not 0 < buffer <= limit, f"limit={limit}, buffer={buffer}: the buffer must be positive and at most the limit; 4000, 800 works")
    )


@requires(check=length_problems)
def length_penalty(row: dict[str, Any], response: str, *, limit: int, buffer: int) -> float:
    """Soft punishment of long responses: 0 up to limit - buffer characters, then linearly down to -1 at `limit` and beyond.

    DAPO's equation 13 (arXiv 2503.14476), in characters, as a reward function sees no tokens; `limit` is L_max and `buffer`
    L_cache.
    """
    return min(0.0, max(-1.0, (limit - buffer - len(response)) / buffer))


def repetition_problems(*, n: int = 4, **_: Any) -> list[str]:
    return when((n < 1, f"n={n} must be at least 1; 4 works"))


@requires(check=repetition_problems)
def repetition_penalty(row: dict[str, Any], response: str, *, n: int = 4) -> float:
    """Minus the share of the response's n-grams of words that have been there before: -(1 - different / all).

    0 for a response of fewer than n words (arXiv 2502.03373, appendix C.2, on words instead of tokens).
    """
    words = response.split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0
