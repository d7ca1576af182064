"""What SFT and the reward model say before they run: numbers, a look at the rows, the stage in small."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import estimates
from posttrain.config import DataConfig, ModelConfig, OptimizerConfig
from posttrain.stages import reward_model, sft
from posttrain.stages.reward_model import RewardModelConfig
from posttrain.stages.sft import SFTConfig
from tests.runs import metrics, run_stage, write_rows
from tests.tiny import tiny_folder

ROWS = 200
GREEN = re.compile(r"\x1b\[32m(.*?)\x1b\[0m", re.S)


def turns(n: int) -> list[dict]:
    return [{"role": "user", "content": f"what is {n} + 30?"}, {"role": "assistant", "content": f"the answer is {n + 30}."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("companions")
    tiny_folder(folder / "model")
    write_rows(folder / "demonstrations.jsonl", [{"messages": turns(n)} for n in range(ROWS)])
    write_rows(folder / "texts.jsonl", [{"text": f"the sum of three and {n} is {n + 3}"} for n in range(ROWS)])
    ranks = [1, 0, 1]
    rows = [{"prompt": f"sort {n} words", "responses": ["pear", f"apple fig {n}", "fig"], "ranks": ranks} for n in range(ROWS)]
    write_rows(folder / "comparisons.jsonl", rows)
    return folder


def sft_config(place: Path, **changes) -> SFTConfig:
    config = SFTConfig(
        model=ModelConfig(path=str(place / "model")),
        data=DataConfig(path=str(place / "demonstrations.jsonl")),
        optimizer=OptimizerConfig(lr=1e-3),
        epochs=1.5,
        batch_size=20,
        max_length=64,
    )
    return replace(config, **changes)


def judge_config(place: Path, **changes) -> RewardModelConfig:
    data = DataConfig(path=str(place / "comparisons.jsonl"))
    config = RewardModelConfig(model=ModelConfig(path=str(place / "model")), data=data, batch_size=20, epochs=3, max_length=64)
    return replace(config, **changes)


def tokens_of(place: Path, texts: list[str]) -> int:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def read(place: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


def test_sft_plans_its_rows_tokens_steps_and_parameters(place):
    size = sft.plan(sft_config(place))
    words = tokens_of(place, [turn["content"] for row in read(place, "demonstrations") for turn in row["messages"]])
    assert size["rows"] == ROWS and size["tokens"] == pytest.approx(words, rel=0.02) and size["optimizer steps"] == 15
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    assert size["parameters"] == model.num_parameters()
    assert " in one process: " in size["memory"] and "min on one device" in size["time"] and "warning" not in size


def test_sft_plans_text_by_its_windows(place):
    size = sft.plan(sft_config(place, data=DataConfig(path=str(place / "texts.jsonl")), row_type="text", max_length=16))
    words = tokens_of(place, [row["text"] for row in read(place, "texts")])
    assert size["rows"] == ROWS and size["optimizer steps"] == pytest.approx(1.5 * words / 16 / 20, rel=0.05)


def test_a_plan_of_rows_that_another_stage_will_make_says_so(place):
    assert sft.plan(sft_config(place, data=DataConfig(path="@world/text")))["rows"] == "known when @world/text has run"
    assert reward_model.plan(judge_config(place, data=DataConfig(path="@labels")))["rows"] == "known when @labels has run"


def test_the_reward_model_plans_its_rows_and_steps(place):
    size = reward_model.plan(judge_config(place))
    words = tokens_of(place, [text for row in read(place, "comparisons") for text in (row["prompt"], *row["responses"])])
    assert size["rows"] == ROWS and size["optimizer steps"] == 30 and size["tokens"] == pytest.approx(words, rel=0.05)


def test_sfts_preview_shows_the_rows_with_what_is_trained_in_green(place):
    shown = sft.preview(sft_config(place))
    assert GREEN.findall(shown) == [f"the answer is {n + 30}.<|im_end|>" for n in range(3)]
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    assert all(f"<|im_start|>user\nwhat is {n} + 30?<|im_end|>\n<|im_start|>assistant\n" in plain for n in range(3))
    texts = sft.preview(sft_config(place, data=DataConfig(path=str(place / "texts.jsonl")), row_type="text"))
    assert GREEN.findall(texts) == [f"the sum of three and {n} is {n + 3}" for n in range(3)]
    assert "when @base has run" in sft.preview(sft_config(place, model=ModelConfig(path="@base")))


def test_the_reward_models_preview_shows_the_best_response_first_and_green(place):
    shown = reward_model.preview(judge_config(place))
    assert GREEN.findall(shown) == [f"apple fig {n}<|im_end|>" for n in range(3)]
    assert [line[:3] for line in shown.splitlines() if line.startswith("[")] == ["[0]", "[1]", "[1]"] * 3
    assert "<|im_start|>user\nsort 0 words<|im_end|>" in shown


def test_smoke_is_two_steps_of_the_same_stage(place, tmp_path):
    held_out = DataConfig(path=str(place / "demonstrations.jsonl"), split="train[150:]")
    small = sft.smoke(sft_config(place, validation=held_out, patience=3))
    run_stage(sft.train, small, tmp_path / "sft")
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2] and (tmp_path / "sft" / "model" / "config.json").exists()
    demonstrations = DataConfig(path=str(place / "demonstrations.jsonl"))
    judge = reward_model.smoke(judge_config(place, demonstrations=demonstrations))
    assert (judge.data.limit, judge.demonstrations.limit) == (64, 64)
    run_stage(reward_model.train, judge, tmp_path / "judge")
    assert [line["step"] for line in metrics(tmp_path / "judge")] == [1, 2] and (tmp_path / "judge" / "model" / "config.json").exists()


def test_the_check_says_of_the_largest_comparison_what_training_would_end_with(place, tmp_path):
    rows = [{"prompt": "sort the words", "responses": ["pear apple fig " * n, *["fig " * n] * 5]} for n in (1, 4, 3, 40)]
    config = judge_config(place, data=write_rows(tmp_path / "rows.jsonl", rows), max_length=60, max_dropped_fraction=0.5)
    narrow = replace(config, max_tokens_per_micro_batch=60)
    [problem] = reward_model.check(narrow)
    assert "below row 2 of" in problem and "6 responses have" in problem, "the last one is dropped as too long"
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch=60 is below comparison 2") as ended:
        run_stage(reward_model.train, narrow, tmp_path / "run")
    assert problem.split()[-2] == str(ended.value).split()[-2]
    works = int(problem.split()[-2])
    assert reward_model.check(replace(config, max_tokens_per_micro_batch=works)) == []
    assert reward_model.check(replace(config, max_tokens_per_micro_batch=works - 1)) != []


def test_what_is_not_known_in_seconds_is_left_to_the_stage(place, tmp_path, monkeypatch):
    config = judge_config(place, max_length=2, max_tokens_per_micro_batch=2)
    assert reward_model.check(replace(config, model=ModelConfig(path="@sft"))) == []
    assert reward_model.check(replace(config, data=DataConfig(path="someone/rows"))) == []
    monkeypatch.setattr(estimates, "READ_BYTES", 10)
    monkeypatch.setattr("posttrain.data.rows.read_rows", lambda *a: pytest.fail("read"))
    assert reward_model.check(config) == []
