"""Where a response states its answer, and the numbers in it."""

from __future__ import annotations

import re
from decimal import Decimal

ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
GSM8K_MARK = re.compile(r"####(.*)")
GSM8K_LINE = re.compile(r"^A:(.*)", re.MULTILINE)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's annotations: <<48/2=24>>
# thousands are grouped by commas in threes; a minus belongs to the number unless something is subtracted from
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def answer_tag(text: str) -> str | None:
    """What stands in the last <answer></answer>, stripped; None without one."""
    found = ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, braces balanced, stripped; None without one."""
    for mark in reversed(list(BOXED.finditer(text))):
        end = closing_brace(text, mark.end())
        if end is not None:
            return text[mark.end() : end].strip()
    return None


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace that is open at `start` closes; \{ and \} are signs, not braces."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return start + brace.start()
    return None


def final_answer(text: str) -> str:
    """A response's answer where its form is free: the last <answer></answer>, else the whole text, stripped."""
    tagged = answer_tag(text)
    return text.strip() if tagged is None else tagged


def numbers(text: str) -> list[Decimal]:
    """All numbers in a text, in order: 1,080 is one number, "1, 2" are two, the full stop of "18." belongs to the sentence."""
    for sign, plain in (("{,}", ","), ("\\$", ""), ("$", ""), ("\\!", ""), ("\\,", ""), ("−", "-")):
        text = text.replace(sign, plain)
    return [Decimal(number.replace(",", "")) for number in NUMBER.findall(text)]


def stated_number(text: str, fallback: bool = True) -> Decimal | None:
    r"""The number that a text gives as its answer, by GSM8K's forms and \boxed.

    The statement that begins last counts, of `#### 18`, a line `A: 18`, `\boxed{18}` and `<answer>18</answer>`. It must
    hold exactly one number, whatever the words around it: two are no answer. Without a statement, the last number of the
    text counts if `fallback`, calculator annotations left out. None where there is no number.
    """
    text = CALCULATOR.sub("", text)
    statements = [(match.start(), match.group(1)) for form in (GSM8K_MARK, GSM8K_LINE, ANSWER_TAG) for match in form.finditer(text)]
    boxes = [(match.start(), match.end(), closing_brace(text, match.end())) for match in BOXED.finditer(text)]
    statements += [(start, text[begin:end]) for start, begin, end in boxes if end is not None]
    found = numbers(max(statements)[1]) if statements else numbers(text)[-1:] if fallback else []
    return found[0] if len(found) == 1 else None
