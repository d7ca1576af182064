r"""Verifiers: is this response right? Functions (row, response, **options) -> float side by side, 1.0 for yes and 0.0 for no.

The truth stands in a column of the row, `answer` unless another is named. A row without it raises KeyError, which leaves
its responses unscored: a wrong column is seen at once instead of training towards nothing.
Code against tests is posttrain/rewards/code.py; penalties are posttrain/rewards/text.py.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

from posttrain.rewards.answers import answer_tag, final_answer, last_boxed, stated_number
from posttrain.rewards.config import requires

# --- numbers and mathematics


def gsm8k(row: dict[str, Any], response: str, *, column: str = "answer", stated: bool = False) -> float:
    r"""The response gives the number of a GSM8K solution, 18 for "... #### 18": equal as numbers, so that "18.", "$18" and
    "18.00" are right, and so is "1080" for "1,080".

    What counts as given is posttrain/rewards/answers.py `stated_number`: the last of `#### 18`, `A: 18`, `\boxed{18}` and
    `<answer>18</answer>`, else, unless `stated`, the last number. Raises ValueError for a row without a number (arXiv 2110.14168).
    """
    truth = stated_number(str(row[column]))
    if truth is None:
        raise ValueError(f"column {column!r} of a row for gsm8k states no number: {row[column]!r:.200}; '#### 18' works")
    return float(stated_number(response, fallback=not stated) == truth)


@requires("math_verify")
def math_answer(row: dict[str, Any], response: str, *, column: str = "answer", stated: bool = False) -> float:
    r"""The response's answer is mathematically equal to the row's: 1/2, 0.5 and \frac{1}{2} are one (math-verify).

    The answer is the last \boxed{...}, else the last <answer></answer>, else, unless `stated`, what math-verify finds in
    the text. math-verify's own time limit is off: it works by signals, which do not interrupt long arithmetic; the worker's
    limit does. Raises ValueError for a row whose own answer can't be read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that their time limit is off
        logging.getLogger(name).setLevel(logging.ERROR)
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    truth = parse(as_formula(str(row[column])), forms, parsing_timeout=None)
    if not truth:
        raise ValueError(f"column {column!r} of a row for math_answer can't be read as mathematics: {row[column]!r:.200}; '1/2' works")
    answer = last_boxed(response) or answer_tag(response)
    if answer is None and stated:
        return 0.0
    found = parse(response if answer is None else as_formula(answer), forms, parsing_timeout=None)
    return float(verify(truth, found, timeout_seconds=None))


def as_formula(text: str) -> str:
    r"""A short answer between dollars, where math-verify reads it as a formula: the part after ####, or in \boxed, or all."""
    text = (last_boxed(text) or text.rpartition("####")[2]).replace("\\$", "").strip()  # an amount of money is no formula's end
    return text if "$" in text or "\\(" in text or "\\[" in text else f"${text}$"


def boxed(row: dict[str, Any], response: str, *, column: str = "answer") -> float:
    r"""The response's last \boxed{...} holds the row's answer, character by character but for spaces."""
    found = last_boxed(response)
    truth = str(row[column])
    return float(found is not None and without_spaces(found) == without_spaces(last_boxed(truth) or truth))


def without_spaces(text: str) -> str:
    return "".join(text.split())


# --- text


def exact_match(row: dict[str, Any], response: str, *, column: str = "answer", ignore_case: bool = False) -> float:
    """The final answer, in <answer></answer> or the whole response, is the row's, but for spaces around it."""
    found, truth = final_answer(response), str(row[column]).strip()
    return float(found.casefold() == truth.casefold() if ignore_case else found == truth)


def pattern_problems(*, pattern: str = "", **_: Any) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"pattern={pattern!r} is not a regular expression: {error}; '^yes' works"]
    return []


@requires(check=pattern_problems)
def regex_match(row: dict[str, Any], response: str, *, pattern: str, whole: bool = False) -> float:
    """The regular expression matches somewhere in the response, or all of it with `whole`; a dot matches line breaks too."""
    search = re.fullmatch if whole else re.search
    return float(search(pattern, response, re.DOTALL) is not None)


# --- procedural tasks


@requires("reasoning_gym")
def reasoning_gym(row: dict[str, Any], response: str, *, column: str = "entry", tagged: bool = False) -> float:
    """The task's own scorer on the final answer: 0 to 1, between them where a task gives partial credit.

    row[column] is reasoning_gym's entry (question, answer, metadata), whose metadata names its data set. The final answer
    is what stands in <answer></answer>, else the whole response; with `tagged` a response without tags gets 0. An empty
    answer gets 0, where some scorers give a little. Scorers are made with their data set's default sizes.
    """
    entry = row[column]
    answer = answer_tag(response) or "" if tagged else final_answer(response)
    if not answer:
        return 0.0
    return min(1.0, max(0.0, float(scorer(entry["metadata"]["source_dataset"])(answer=answer, entry=entry))))


@cache
def scorer(name: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(name)


# --- form

THOUGHT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_format(row: dict[str, Any], response: str, *, opened: bool = False) -> float:
    """The response is <think>...</think> <answer>...</answer> and nothing else, each tag once, neither part empty.

    `opened` is for prompts that end with <think>, so that responses begin after it (DeepSeek-R1, arXiv 2501.12948, table 1).
    """
    text = ("<think>" if opened else "") + response
    match = THOUGHT.fullmatch(text.lstrip())
    return float(match is not None and all(map(str.strip, match.groups())) and all(text.count(tag) == 1 for tag in TAGS))
