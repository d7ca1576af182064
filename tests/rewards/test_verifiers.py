"""Every verifier accepts what is right in all the forms it is given in, and rejects what only looks right."""

from __future__ import annotations

import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym as gym
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from posttrain.config import gather_problems
from posttrain.rewards.answers import last_boxed, numbers, stated_number
from posttrain.rewards.config import RewardConfig
from posttrain.rewards.text import length_penalty, repetition_penalty
from posttrain.rewards.verifiers import boxed, exact_match, gsm8k, math_answer, reasoning_gym, regex_match, think_format

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]


# --- GSM8K


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", ["18"]),
        ("18.", ["18"]),
        ("It is 18. Or so.", ["18"]),
        ("1,080", ["1080"]),
        ("$1,080.50 and $2", ["1080.50", "2"]),
        (r"1{,}080 \$ 3", ["1080", "3"]),
        ("12,345,678,", ["12345678"]),
        ("1, 2,3", ["1", "2", "3"]),
        ("70,00", ["70", "0"]),
        ("-5, −6, -$7, x=-.5", ["-5", "-6", "-7", "-0.5"]),
        ("7-5 and (2)-1", ["7", "5", "2", "1"]),
        ("none", []),
    ],
)
def test_numbers_of_a_text(text, expected):
    assert numbers(text) == [Decimal(number) for number in expected]


@pytest.mark.parametrize(
    ("answer", "response", "score", "stated"),
    [
        ("So 9 * 2 = $<<9*2=18>>18.\n#### 18", "... #### 18", 1, 1),
        ("#### 18", "#### 18.", 1, 1),  # the data set's own pattern takes the full stop and says no
        ("#### 18", "#### $18.00", 1, 1),
        ("#### 1,080", "A: 1080", 1, 1),
        ("#### 1080", r"so \boxed{1{,}080 \text{ dollars}}", 1, 1),
        ("#### 18", "<think>7 + 11</think>\n<answer>\n18 eggs\n</answer>", 1, 1),
        ("#### -3", "#### -3", 1, 1),
        ("18", "She makes $18 every day.", 1, 0),
        ("18", "6 * 3 = <<6*3=18>>18", 1, 0),
        ("18", "It is 19, and then <<1+17=18>> nothing", 0, 0),  # an annotation is no answer
        ("18", "A: 19\nNo, wait.\nA: 18", 1, 1),
        ("18", "#### 19 of 18", 0, 0),  # two numbers
        ("18", "A: 18 or 19", 0, 0),
        ("18", r"\boxed{18}, so the answer is #### 17", 0, 0),
        ("18", "A: 17\nThat is less than 18", 0, 0),  # what is stated counts, not what comes last
        ("18", "18 is 3 * 6", 0, 0),
        ("#### 18", "#### 181", 0, 0),
        ("#### 18", "#### 1.8", 0, 0),
        ("#### 18", "#### -18", 0, 0),
        ("#### 18", "####", 0, 0),
        ("#### 18", "no idea", 0, 0),
        ("#### 18", "", 0, 0),
        ("#### 18", r"\boxed{18", 1, 0),  # cut off: the last number all the same
    ],
)
def test_gsm8k(answer, response, score, stated):
    assert gsm8k({"answer": answer}, response) == score
    assert gsm8k({"answer": answer}, response, stated=True) == stated


def test_gsm8k_rows_without_an_answer_are_no_wrong_responses():
    with pytest.raises(KeyError):
        gsm8k({"solution": "#### 18"}, "#### 18")
    with pytest.raises(ValueError, match="'#### 18' works"):
        gsm8k({"answer": "eighteen"}, "#### 18")


@needs_gsm8k
def test_gsm8k_agrees_with_every_recorded_flag():
    """The four models' real solutions, of which the repository's data holds the first two thirds: 879 questions."""
    agreed, right, total = 0, Counter(), Counter()
    for row in read("example_model_solutions"):
        for model in MODELS:
            score = gsm8k(row, row[model]["solution"], column="ground_truth")
            agreed += score == row[model]["is_correct"]
            right[model] += int(score)
            total[model] += 1
    assert agreed == sum(total.values()) == 4 * 879
    assert right == {"6b_finetuning": 189, "6b_verification": 347, "175b_finetuning": 302, "175b_verification": 499}


@needs_gsm8k
@pytest.mark.parametrize("form", [r"#### \1.", r"So it is \\boxed{\\$\1}.", r"<answer>\1</answer> I am sure.", r"The answer is \1."])
def test_gsm8k_agrees_however_the_answer_is_stated(form):
    for row in read("example_model_solutions")[::8]:
        for model in MODELS:
            solution = re.sub(r"^A: *(.*)$", form, row[model]["solution"], flags=re.MULTILINE)
            assert gsm8k(row, solution, column="ground_truth") == row[model]["is_correct"], solution


@needs_gsm8k
def test_gsm8k_golds_are_what_the_data_sets_own_pattern_reads():
    rows = read("train")
    for row in rows:
        gold = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])
        assert gold and stated_number(row["answer"]) == Decimal(gold.group(1).replace(",", "")), row
    assert len(rows) == 7473


# --- mathematics


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        (r"\frac{1}{2}", r"So \boxed{0.5}.", 1),
        ("1/2", r"The answer is $\frac{2}{4}$.", 1),
        ("0.5", "The answer is 1/2.", 1),
        ("18", r"\boxed{18.}", 1),
        ("18", r"\boxed{\$18}", 1),
        ("#### 1,080", r"\boxed{1080}", 1),
        (r"\boxed{x^2 + 2x + 1}", r"\boxed{(x+1)^2}", 1),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
        ("(1, 2)", r"\boxed{(1, 2)}", 1),
        (r"\pi", "<think>3.14</think><answer>\\pi</answer>", 1),
        ("18", r"first \boxed{17}, then \boxed{18}", 1),
        ("18", r"first \boxed{18}, then \boxed{17}", 0),
        ("18", r"\boxed{18 \text{ or } 19}", 0),
        ("(1, 2)", r"\boxed{(2, 1)}", 0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", 0),
        ("18", r"\boxed{}", 0),
        ("18", r"\boxed{\frac{}", 0),
        ("18", "no idea", 0),
        ("18", "", 0),
    ],
)
def test_math_answer(answer, response, score):
    assert math_answer({"answer": answer}, response) == score


def test_math_answer_can_ask_for_a_stated_form():
    assert math_answer({"answer": "18"}, "It is 18.", stated=True) == 0.0
    assert math_answer({"answer": "18"}, "<answer>18</answer>", stated=True) == 1.0


def test_math_answer_rows_that_cannot_be_read_are_no_wrong_responses():
    with pytest.raises(ValueError, match="can't be read as mathematics"):
        math_answer({"answer": ""}, "18")


@needs_gsm8k
def test_math_answer_agrees_with_the_recorded_flags():
    for row in read("example_model_solutions")[:40]:
        truth = row["ground_truth"].rpartition("A:")[2].strip()
        for model in MODELS:
            solution = re.sub(r"^A: *(.*)$", r"\\boxed{\1}", row[model]["solution"].replace("$", ""), flags=re.MULTILINE)
            assert math_answer({"answer": truth}, solution) == row[model]["is_correct"], solution


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("x + 1", r"\boxed{x+1}", 1),
        (r"\boxed{\frac{1}{2}}", r"is $\boxed{ \frac{1}{2} }$.", 1),
        (r"\{a\}", r"\boxed{\{a\}}", 1),
        ("b", r"\boxed{a} \boxed {b}", 1),
        ("b", r"\boxed{b} \boxed{a}", 0),
        ("1/2", r"\boxed{\frac{1}{2}}", 0),
        ("x", "x", 0),
        ("x", r"\boxed{x", 0),
    ],
)
def test_boxed(answer, response, score):
    assert boxed({"answer": answer}, response) == score


def test_a_box_ends_where_its_braces_balance():
    assert last_boxed(r"\boxed{\text{a}{b}} c}") == r"\text{a}{b}"
    assert last_boxed(r"\boxed{a} and \boxed{b") == "a"
    assert last_boxed(r"\boxed{a \} b}") == r"a \} b"
    assert last_boxed("boxed{a}") is None


# --- text


@pytest.mark.parametrize(
    ("response", "options", "score"),
    [
        (" Paris\n", {}, 1),
        ("<think>Rome? Paris!</think><answer> Paris </answer>", {}, 1),
        ("<answer>Rome</answer><answer>Paris</answer>", {}, 1),
        ("<answer>Paris</answer><answer>Rome</answer>", {}, 0),
        ("<answer>Rome <answer>Paris</answer>", {}, 1),
        ("paris", {}, 0),
        ("paris", {"ignore_case": True}, 1),
        ("Paris.", {}, 0),
        ("It is Paris", {}, 0),
        ("", {}, 0),
    ],
)
def test_exact_match(response, options, score):
    assert exact_match({"answer": "Paris"}, response, **options) == score


def test_exact_match_compares_numbers_as_their_text():
    assert exact_match({"answer": 18}, "18") == 1.0 and exact_match({"answer": 18}, "18.") == 0.0


@pytest.mark.parametrize(
    ("response", "pattern", "whole", "score"),
    [
        ("well, yes", r"\byes\b", False, 1),
        ("yesterday", r"\byes\b", False, 0),
        ("a\nb", "a.b", True, 1),
        ("a\nb!", "a.b", True, 0),
        ("", "", True, 1),
    ],
)
def test_regex_match(response, pattern, whole, score):
    assert regex_match({}, response, pattern=pattern, whole=whole) == score


def test_a_pattern_is_checked_when_a_run_is_planned():
    name = "posttrain.rewards.verifiers:regex_match"
    assert gather_problems(RewardConfig(function=name, options=("pattern=^a=b$",))) == []
    assert "is not a regular expression" in gather_problems(RewardConfig(function=name, options=("pattern=(",)))[0]
    assert "'pattern'" in gather_problems(RewardConfig(function=name))[0]


@pytest.mark.parametrize("name", ["spell_backward", "word_sorting", "basic_arithmetic", "countdown"])
def test_reasoning_gym_scores_as_the_task_does(name):
    data = gym.create_dataset(name, seed=3, size=6)
    for entry, other in zip(data, list(data)[1:]):
        row = json.loads(json.dumps({"entry": entry}))  # as a row file gives it back
        right = other["answer"] if name == "countdown" else entry["answer"]
        for answer in (entry["answer"], right, other["answer"], f"{entry['answer']}, or so"):
            expected = min(1.0, max(0.0, data.score_answer(answer, entry)))
            assert reasoning_gym(row, answer) == expected
            assert reasoning_gym(row, f"<think>{other['answer']}</think> <answer>{answer}</answer>", tagged=True) == expected
        assert reasoning_gym(row, entry["answer"] if name != "countdown" else row["entry"]["metadata"]["expression"]) == 1.0
        assert reasoning_gym(row, entry["answer"], tagged=True) == reasoning_gym(row, " ") == reasoning_gym(row, "<answer></answer>") == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>two and two</think> <answer>4</answer>", 1),
        ("<think>\ntwo\n</think>\n\n<answer>\n4\n</answer>\n", 1),
        ("<think>two</think><answer>4</answer>", 1),
        ("<think>two</think> 4", 0),
        ("<think>two</think> so <answer>4</answer>", 0),
        ("Well: <think>two</think> <answer>4</answer>", 0),
        ("<think>two</think> <answer>4</answer> Done.", 0),
        ("<think></think> <answer>4</answer>", 0),
        ("<think>two</think> <answer> </answer>", 0),
        ("<think>a<think>b</think> <answer>4</answer>", 0),
        ("<think>a</think><think>b</think> <answer>4</answer>", 0),
        ("<think>a</think> <answer>4</answer><answer>5</answer>", 0),
        ("<answer>4</answer><think>two</think>", 0),
        ("<think>two <answer>4</answer></think>", 0),
        ("<Think>two</Think> <answer>4</answer>", 0),
        ("two</think> <answer>4</answer>", 0),
        ("", 0),
    ],
)
def test_think_format(response, score):
    assert think_format({}, response) == score
    if response.startswith("<think>"):
        assert think_format({}, response.removeprefix("<think>"), opened=True) == score


# --- penalties


def test_length_penalty_is_dapos_soft_punishment():
    reference = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=40)
    for length in (0, 1, 59, 60, 61, 80, 99, 100, 101, 1000):
        [expected] = reference([[0] * length])
        assert length_penalty({}, "x" * length, limit=100, buffer=40) == pytest.approx(expected)
    found = gather_problems(RewardConfig(function="posttrain.rewards.text:length_penalty", options=("limit=10", "buffer=20")))
    assert len(found) == 1 and "buffer=20" in found[0]


def test_repetition_penalty_is_the_papers_on_words():
    texts = ["", "a", "a b c d", "a a a a a", "a b a b a b a", "the end of the end of the end", "x y z " * 50]
    for n in (1, 2, 4):
        reference = get_repetition_penalty_reward(ngram_size=n)
        expected = reference([[hash(word) for word in text.split()] for text in texts])
        assert [repetition_penalty({}, text, n=n) for text in texts] == pytest.approx(expected)
    assert gather_problems(RewardConfig(function="posttrain.rewards.text:repetition_penalty", options=("n=0",)))
