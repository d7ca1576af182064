from __future__ import annotations

import json
from itertools import islice
from random import Random
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import tiny_world
from recipes.tiny_world import SPLITS, TASKS, BaseConfig

GENERATORS = (tiny_world.prompts, tiny_world.labelling, tiny_world.demonstrations, tiny_world.text)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_world.make_base(BaseConfig(tokenizer_rows=300), SimpleNamespace(folder=tmp_path_factory.mktemp("base"), seed=3))


def problem(row: dict) -> str:
    task = next(task for task in TASKS if task.name == row["task"])
    return f"{task.name} {task.identity(row['entry']['metadata'])}"


@pytest.mark.parametrize("generator", GENERATORS)
def test_rows_are_json_and_the_same_every_time(generator):
    for split in SPLITS:
        rows = list(islice(generator(split), 40))
        assert rows == list(islice(generator(split), 40))
        assert rows == json.loads(json.dumps(rows))


def test_no_problem_stands_in_two_splits():
    train, validation, test = ({problem(row) for row in tiny_world.prompts(split)} for split in SPLITS)
    assert not train & validation and not train & test and not validation & test
    assert len(test) > 150


def test_no_held_out_problem_is_demonstrated_labelled_or_stated():
    """Every purpose draws from `asked` or `problems`, which keep to their split."""
    held_out = {problem(row) for row in tiny_world.prompts("test")}
    assert not held_out & {problem(row) for row in tiny_world.labelling("train")}
    assert not held_out & {problem(row) for row, _ in tiny_world.asked("train", "demonstrations", 2000)}
    for task in TASKS:
        stated = {
            tiny_world.split_of(f"{task.name} {task.identity(e['metadata'])}")
            for e, _ in islice(tiny_world.problems(task, "train", "text"), 300)
        }
        assert stated == {"train"}


def test_prompts_are_many_different_and_short():
    rows = list(tiny_world.prompts("test"))
    assert len({row["prompt"] for row in rows}) == len(rows) >= 200
    assert max(len(row["prompt"]) for row in rows) < 60


def test_the_verifier_gives_one_to_the_answer_and_nothing_to_nothing():
    for row in tiny_world.prompts("validation"):
        assert tiny_world.score(row, f" {row['answer']} \n") == 1.0
        assert tiny_world.score(row, " ") == 0.0
        assert 0.0 <= tiny_world.score(row, "!") < 0.5


def test_chat_around_an_answer_and_slips_cost_something():
    rng = Random(0)
    for row in tiny_world.prompts("validation"):
        assert all(tiny_world.score(row, chat.format(answer=row["answer"])) < 1.0 for chat in tiny_world.CHAT)
    separators = {task.name: task.separator for task in TASKS}
    scores = [tiny_world.score(row, tiny_world.slip(row["answer"], separators[row["task"]], rng)) for row in tiny_world.prompts("test")]
    assert sum(scores) / len(scores) < 0.7


def test_most_demonstrations_are_right_and_terse():
    rows = tiny_world.demonstrations("train")
    asked = {row["prompt"]: row for row in tiny_world.prompts("train")}
    known = [
        (asked[question["content"]], answer["content"])
        for row in rows
        for question, answer in [row["messages"]]
        if question["content"] in asked
    ]
    right = [tiny_world.score(row, answer) == 1.0 for row, answer in known]
    assert len(right) > 100 and 0.5 < sum(right) / len(right) < 0.9


def test_the_base_model_is_a_plain_folder(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert 0.7e6 < model.num_parameters() < 3e6 and next(model.parameters()).dtype.itemsize == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and model.config.vocab_size == len(tokenizer)


def test_letters_that_spell_are_single_tokens(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in islice(tiny_world.prompts("test"), 60):
        for text in (row["prompt"], row["answer"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        if row["answer"].isupper():
            assert len(tokenizer.encode(row["answer"])) == len(row["answer"])


def test_what_is_wrong_with_a_base_config_is_said():
    assert BaseConfig().problems() == []
    assert "vocabulary=100" in BaseConfig(vocabulary=100).problems()[0]
    assert "hidden_size=130" in BaseConfig(hidden_size=130).problems()[0]
