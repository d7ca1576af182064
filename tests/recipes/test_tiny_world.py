from __future__ import annotations

import json
from itertools import islice
from random import Random
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import DataConfig
from posttrain.data.rows import read_rows
from recipes import tiny_world
from recipes.tiny_world import ROWS, SPLITS, TASKS, WorldConfig

CONFIG = WorldConfig(rows=600)
KINDS = {"text": "text", "demonstrations": "demonstration", "labelling": "prompt", "prompts": "prompt"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    alone = SimpleNamespace(world=SimpleNamespace(is_main=True, barrier=lambda phase: None))
    return tiny_world.make_world(CONFIG, SimpleNamespace(folder=tmp_path_factory.mktemp("world"), seed=3, engine=alone))


def rows(world, kind, split):
    return read_rows(DataConfig(path=str(world / kind), split=split), KINDS[kind])


def identity(row):
    task = next(task for task in TASKS if task.name == row["task"])
    return f"{task.name} {task.identity(row['entry']['metadata'])}"


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_the_same_json_rows_every_time(kind, split):
    first, again, other = (list(ROWS[kind](split, 40, Random(seed))) for seed in (5, 5, 6))
    assert first == again == json.loads(json.dumps(first)) and first != other


def test_the_world_is_written_as_rows_that_stages_read(world):
    for kind in KINDS:
        assert [len(rows(world, kind, split)) for split in SPLITS] == [600, 30, 30]


def test_a_problem_belongs_to_one_split_whatever_its_wording():
    """The seeds differ, so that nothing but the digest keeps the splits apart."""
    found = {split: {identity(row) for row in tiny_world.asked(split, 1000, Random(split))} for split in SPLITS}
    assert not found["train"] & (found["validation"] | found["test"]) and not found["validation"] & found["test"]
    assert all(len(problems) > 300 for problems in found.values())


def test_no_held_out_problem_is_stated_in_training_text():
    stated = " ".join(row["text"] for row in tiny_world.text("train", 2000, Random(0)))
    held_out = [row for row in tiny_world.asked("test", 300, Random(1)) if row["task"] == "spell_backward"]
    words = [row["entry"]["metadata"]["word"].upper() for row in held_out]
    assert not [word for word in words if f" {word} backward is" in stated]
    seen = [
        row["entry"]["metadata"]["word"].upper() for row in tiny_world.asked("train", 300, Random(1)) if "word" in row["entry"]["metadata"]
    ]
    assert [word for word in seen if f" {word} backward is" in stated], "the same search finds training problems"


def test_prompts_are_different_and_short():
    asked = list(tiny_world.asked("test", 300, Random(0)))
    assert len({row["prompt"] for row in asked}) == 300
    assert {row["task"] for row in asked} == {task.name for task in TASKS}
    assert max(len(row["prompt"]) for row in asked) < 60


def test_the_verifier_gives_one_to_the_answer_and_nothing_to_nothing():
    for row in tiny_world.asked("validation", 300, Random(0)):
        assert tiny_world.score(row, f" {row['answer']} \n") == 1.0
        assert tiny_world.score(row, " ") == 0.0
        assert 0.0 <= tiny_world.score(row, "!") < 0.1


def test_chat_around_an_answer_and_slips_cost_something():
    rng = Random(0)
    separators = {task.name: task.separator for task in TASKS}
    asked = list(tiny_world.asked("test", 300, rng))
    assert all(tiny_world.score(row, chat.format(answer=row["answer"])) < 1.0 for row in asked for chat in tiny_world.CHAT)
    slips = [tiny_world.score(row, tiny_world.slip(row["answer"], separators[row["task"]], rng)) for row in asked]
    assert 0.2 < sum(slips) / len(slips) < 0.7


def test_most_demonstrations_are_right_and_terse():
    asked = {row["prompt"]: row for row in tiny_world.asked("train", 4000, Random(0))}
    turns = [row["messages"] for row in tiny_world.demonstrations("train", 4000, Random(1))]
    known = [(asked[question["content"]], answer["content"]) for question, answer in turns if question["content"] in asked]
    right = [tiny_world.score(row, answer) == 1.0 for row, answer in known]
    assert len(right) > 100
    assert tiny_world.TERSE - 0.1 < sum(right) / len(right) < tiny_world.TERSE + 0.2


def test_the_blank_model_is_a_plain_folder(world):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world / "model"), AutoTokenizer.from_pretrained(world / "model")
    assert 0.7e6 < model.num_parameters() < 3e6 and next(model.parameters()).dtype.itemsize == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and model.config.vocab_size == len(tokenizer)


def test_letters_that_spell_are_single_tokens(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for row in islice(rows(world, "prompts", "train"), 60):
        for text in (row["prompt"], row["answer"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        if row["answer"].isupper():
            assert len(tokenizer.encode(row["answer"])) == len(row["answer"])


def test_what_is_wrong_with_a_config_is_said():
    assert WorldConfig().problems() == []
    wrong = WorldConfig(vocabulary=100, hidden_size=130, context=8, rows=3).problems()
    assert [problem.split("=")[0] for problem in wrong] == ["vocabulary", "hidden_size", "context", "rows"]
