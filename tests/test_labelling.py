"""The simulated labeler: ranks, honest mistakes at the asked rate, and prompts that are in one part only."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import gather_problems, replace
from posttrain.data.rows import read_rows
from posttrain.rewards.labelling import LabelConfig, is_validation, label, length, misjudge, ranks_of
from tests.pairs import run_pair
from tests.runs import run_stage, write_rows
from tests.stages.worlds import phrase


def apples(row: dict[str, Any], response: str) -> float:
    """A labeler who likes apples, and the prompt's own column."""
    return response.split().count("apple") + float(row.get("bonus", 0))


def outraged(row: dict[str, Any], response: str) -> float:
    raise RuntimeError("the labeler went home")


def responses(count: int, k: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"prompt": f"{n}: {phrase(draw)}", "responses": [phrase(draw, 2, 9) for _ in range(k)], "bonus": n} for n in range(count)]


def config_of(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> LabelConfig:
    return LabelConfig(responses=write_rows(tmp_path / "responses.jsonl", rows), score="tests.test_labelling:apples", **changes)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_ranks_are_competition_ranks():
    assert ranks_of([3.0, 1.0, 3.0, 2.0]) == [0, 3, 0, 2] and ranks_of([1.0]) == [0]


def test_clean_labels_order_responses_by_their_score(tmp_path):
    rows = responses(80)
    folder = run_stage(label, config_of(tmp_path, rows, validation_fraction=0.25), tmp_path / "labels")
    train, validation, clean = (read(folder, name) for name in ("train", "validation", "validation_clean"))
    assert validation == clean and train and validation
    by_prompt = {row["prompt"]: row for row in rows}
    for row in (*train, *validation):
        original = by_prompt[row["prompt"]]
        assert row["responses"] == original["responses"] and row["bonus"] == original["bonus"]
        scores = [apples(original, response) for response in row["responses"]]
        assert row["scores"] == scores
        for (a, rank_a), (b, rank_b) in combinations(list(zip(scores, row["ranks"])), 2):
            assert (a > b) == (rank_a < rank_b) and (a == b) == (rank_a == rank_b)
    labels = json.loads((folder.parent / "results.json").read_text())["labels"]
    tied = sum(len({apples(row, r) for r in row["responses"]}) == 1 for row in rows)
    assert labels["tied"] == tied == len(rows) - len(train) - len(validation) and labels["reversed_pairs"] == 0


def test_the_rows_are_comparisons_that_a_reward_model_reads(tmp_path):
    config = config_of(tmp_path, responses(40))
    folder = run_stage(label, config, tmp_path / "labels")
    rows = read_rows(replace(config.responses, path=str(folder / "train.jsonl")), "comparison")
    assert [row["ranks"] for row in rows] == [row["ranks"] for row in read(folder, "train")]


def test_no_prompt_is_in_both_parts_and_the_split_looks_at_the_prompt_only(tmp_path):
    rows = responses(200)
    rows += [row | {"responses": row["responses"][::-1]} for row in rows[:50]]  # the same prompts, answered again
    folders = [
        run_stage(label, config_of(tmp_path, part, noise=noise, validation_fraction=0.3), tmp_path / name)
        for name, part, noise in (("one", rows, 0.0), ("other", rows[::-1], 0.5))
    ]
    held_out = [{row["prompt"] for row in read(folder, "validation_clean")} for folder in folders]
    assert held_out[0] == held_out[1] and 30 < len(held_out[0]) < 90
    for folder, prompts in zip(folders, held_out):
        assert prompts.isdisjoint(row["prompt"] for row in read(folder, "train"))
    assert not any(is_validation(row["prompt"], 0.0) for row in rows)
    chat = [{"role": "user", "content": "hello"}]
    assert is_validation(chat, 1 - 1e-9) and is_validation([dict(reversed(chat[0].items()))], 0.5) == is_validation(chat, 0.5)


def test_a_mistake_is_another_responses_score_at_the_asked_rate():
    draw = random.Random(0)
    scores = [1.0, 2.0, 3.0, 4.0]
    changed = 0
    for _ in range(5000):
        noisy = misjudge(scores, 0.2, draw)
        assert set(noisy) <= set(scores)
        changed += sum(a != b for a, b in zip(noisy, scores))
    assert changed / 20000 == pytest.approx(0.2, abs=0.012)
    assert misjudge(scores, 0.0, draw) == scores and misjudge([1.0], 1.0, draw) == [1.0]
    assert all(a != b for a, b in zip(misjudge(scores, 1.0, draw), scores))


def test_noise_is_in_the_noisy_files_only_and_counted(tmp_path):
    rows = responses(150)
    folder = run_stage(label, config_of(tmp_path, rows, noise=0.4, validation_fraction=0.4), tmp_path / "labels")
    clean = read(folder, "validation_clean")
    assert all(row["ranks"] == ranks_of(row["scores"]) for row in clean)
    wrong = sum(row["ranks"] != ranks_of(row["scores"]) for row in read(folder, "validation"))
    assert wrong > 10 and any(row["ranks"] != ranks_of(row["scores"]) for row in read(folder, "train"))
    labels = json.loads((folder.parent / "results.json").read_text())["labels"]
    pairs = sum(a != b for row in rows for a, b in combinations([apples(row, r) for r in row["responses"]], 2))
    assert labels["pairs"] == pairs and 0.05 * pairs < labels["reversed_pairs"] < 0.5 * pairs
    again = run_stage(label, config_of(tmp_path, rows, noise=0.4, validation_fraction=0.4), tmp_path / "again")
    assert read(again, "train") == read(folder, "train")
    other = run_stage(label, config_of(tmp_path, rows, noise=0.4, validation_fraction=0.4), tmp_path / "other", seed=1)
    assert read(other, "train") != read(folder, "train")


def test_rule_19_a_labeler_who_raises_ends_every_rank_with_the_reason(tmp_path):
    config = config_of(tmp_path, responses(6))
    for text in run_pair("ddp", "tests.test_labelling:label_with_outrage", path=config.responses.path, folder=str(tmp_path / "labels")):
        assert text == "the labeler went home"


def label_with_outrage(engine: Any, *, path: str, folder: str) -> str:
    config = LabelConfig(responses=replace(LabelConfig().responses, path=path), score="tests.test_labelling:outraged")
    try:
        run_stage(label, config, Path(folder), world=engine.world)
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_cannot_be_a_label_config_is_said_at_once():
    found = gather_problems(LabelConfig(noise=2.0, validation_fraction=1.0))
    assert len(found) == 4 and all("works" in text or "errs" in text for text in found)


def test_the_smoke_labeler_counts_characters():
    assert length({}, "four") == 4.0


def test_judgements_are_one_row_per_response_and_follow_the_noisy_score(tmp_path):
    rows = responses(60)
    settings = {"kind": "judgement", "desirable_from": 2.0, "noise": 0.3, "validation_fraction": 0.25}
    folder = run_stage(label, config_of(tmp_path, [{**row, "bonus": 0} for row in rows], **settings), tmp_path / "labels")
    train, validation, clean = (read(folder, name) for name in ("train", "validation", "validation_clean"))
    assert len(train) + len(validation) == 60 * 4 and len(clean) == len(validation)
    assert folder.name == "judgements" and read_rows(replace(config_of(tmp_path, rows).responses, path=str(folder)), "judgement")
    for row in clean:
        assert row["desirable"] == (apples({}, row["response"]) >= 2) and row["score"] == apples({}, row["response"])
    flipped = sum(row["desirable"] != (row["score"] >= 2) for row in (*train, *validation))
    assert 0 < flipped < 0.3 * 240  # a misjudged response may still get a score on its own side
