"""The evaluation's numbers can be computed again from its samples, and by plain transformers."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.config import DataConfig, ModelConfig, SamplingConfig, gather_problems
from posttrain.data.chat import Chat
from posttrain.engine import Engine, World
from posttrain.evaluation import answers, comparison, tasks
from posttrain.evaluation.comparison import ComparisonConfig, evaluate
from posttrain.evaluation.statistics import bootstrap_difference, bootstrap_mean
from posttrain.evaluation.tasks import Measured, TaskConfig
from posttrain.run import Run, Stopped
from posttrain.tracking import Tracker
from tests.pairs import run_pair
from tests.tiny import tiny_folder, tiny_tokenizer

WORLD = World()


@pytest.fixture(scope="module", autouse=True)
def world_ends_with_the_module():
    yield
    WORLD.close()


def share_of_vowels(row: dict, response: str) -> float:
    return sum(letter in "aeiou" for letter in response) / (len(response) or 1) + 0.001 * row["level"]


def no_number(row: dict, response: str) -> float:
    return float("nan")


def scored(model: str, places: list[int], scores: list[float]) -> Measured:
    return Measured(model, "gold", places, {"score": [(score, 1.0) for score in scores]})


def run_in(folder: Path, engine: Engine | None = None) -> Run:
    engine = engine or Engine(WORLD)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder, mode="disabled", is_main=engine.world.is_main)
    return Run(name="evaluation", folder=folder, seed=3, engine=engine, tracker=tracker)


def write_rows(path: Path, rows: list[dict]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def reward_model_folder(folder: Path) -> Path:
    from tests.tiny import tiny_config

    torch.manual_seed(5)
    config = tiny_config("llama", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ComparisonConfig:
    folder = tmp_path_factory.mktemp("gold")
    prompts = [{"prompt": f"what is {n} + {n * n}?", "task": f"task{n % 2}", "level": n} for n in range(12)]
    texts = [{"text": "sort these words: pear apple fig " * (1 + n % 3)} for n in range(6)]
    comparisons = [{"prompt": f"sort {n}", "responses": ["apple fig", "fig", "pear " * n + "x"][: 2 + n % 2]} for n in range(7)]
    noisy = [{**row, "responses": row["responses"][::-1]} for row in comparisons]
    return ComparisonConfig(
        models=(
            ModelConfig(path=str(tiny_folder(folder / "one", seed=0))),
            ModelConfig(path=str(tiny_folder(folder / "two", "gpt2", seed=1))),
        ),
        names=("base", "sft"),
        prompts=write_rows(folder / "prompts.jsonl", prompts),
        score="tests.evaluation.test_comparison:share_of_vowels",
        sampling=SamplingConfig(max_new_tokens=12),
        samples_per_prompt=2,
        text=write_rows(folder / "text.jsonl", texts),
        text_window=32,
        reward_model=ModelConfig(path=str(reward_model_folder(folder / "reward"))),
        comparisons=write_rows(folder / "clean.jsonl", comparisons),
        noisy_comparisons=write_rows(folder / "noisy.jsonl", noisy),
        max_prompt_length=100,
    )


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("run")
    path = evaluate(config, run_in(folder))
    return json.loads(path.read_text()), [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_what_is_at_hand_ends_with_the_error_that_ends_the_stage():
    seen = []

    @contextmanager
    def thing(name):
        try:
            yield name
            seen.append(f"{name} done")
        except KeyError:
            seen.append(f"{name} failed")
            raise

    with pytest.raises(KeyError), answers.AtHand() as at_hand:
        assert [at_hand.get(name, partial(thing, name)) for name in ("a", "a", "b")] == ["a", "a", "b"]
        raise KeyError
    assert seen == ["a done", "b failed"], "before the engine is closed, not when the garbage is collected"


def test_every_number_follows_from_the_samples(evaluated):
    results, samples = evaluated
    assert len(samples) == 2 * 12 * 2
    means = {}
    for name in ("base", "sft"):
        own = [row for row in samples if row["model"] == name]
        assert [row["index"] for row in own] == [n for n in range(12) for _ in range(2)]
        assert all(row["score"] == pytest.approx(share_of_vowels(row, row["response"])) for row in own)
        assert all(row["task"] == f"task{row['level'] % 2}" and row["prompt"] and row["seed"] == 3 for row in own)
        means[name] = [(a["score"] + b["score"]) / 2 for a, b in zip(own[::2], own[1::2])]
        assert results["gold_score"][name] == bootstrap_mean(means[name], seed=3).to_json()
    difference = bootstrap_difference(means["base"], means["sft"], seed=3).to_json()
    assert results["gold_difference"] == {"sft - base": difference}
    assert set(results["gold_score_by_task"]) == {"task0", "task1"}
    even = [row["score"] for row in samples if row["model"] == "sft" and row["task"] == "task0"]
    assert results["gold_score_by_task"]["task0"]["sft"] == pytest.approx(sum(even) / len(even))


def test_differences_are_over_the_prompts_that_both_models_answered():
    one, two = scored("one", [0, 1, 3], [0.0, 0.5, 1.0]), scored("two", [1, 2, 3], [0.75, 9.0, 1.25])
    assert tasks.difference(one, two, "score", seed=0).to_json() == {"mean": 0.25, "ci95": [0.25, 0.25], "n": 2}


def test_the_text_loss_is_that_of_plain_transformers(config, evaluated):
    for name, source in zip(config.names, config.models):
        model, chat = AutoModelForCausalLM.from_pretrained(source.path), Chat.load(source.path)
        stream = [i for line in Path(config.text.path).read_text().splitlines() for i in chat.text(json.loads(line)["text"])]
        losses, tokens = 0.0, 0
        for start in range(0, len(stream), 32):
            window = torch.tensor([stream[start : start + 32]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    losses += float(model(window, labels=window).loss) * (window.shape[1] - 1)
                tokens += window.shape[1] - 1
        assert evaluated[0]["pretraining_loss"][name] == pytest.approx(losses / tokens, abs=1e-5)
        low, high = evaluated[0]["pretraining_loss_ci95"][name]
        assert low <= evaluated[0]["pretraining_loss"][name] <= high


def test_pair_accuracy_is_that_of_a_plain_classifier(config, evaluated):
    chat = Chat.load(config.reward_model.path)
    judge = AutoModelForSequenceClassification.from_pretrained(config.reward_model.path)
    correct, pairs = 0, 0
    for line in Path(config.comparisons.path).read_text().splitlines():
        row = json.loads(line)
        scores = []
        for response in row["responses"]:
            ids = torch.tensor([chat.prompt(row["prompt"]) + chat.response(response)])
            with torch.no_grad():
                hidden = judge.model(ids).last_hidden_state[0, -1]
                scores.append(float(judge.score(hidden)))
        orders = [scores[i] > scores[j] for i in range(len(scores)) for j in range(i + 1, len(scores))]
        correct, pairs = correct + sum(orders), pairs + len(orders)
    result = evaluated[0]["reward_model"]
    assert result["pair_accuracy"] == pytest.approx(correct / pairs) and result["n_pairs"] == pairs
    assert result["ci95"][0] <= result["pair_accuracy"] <= result["ci95"][1]
    assert result["noisy"]["pair_accuracy"] == pytest.approx(1 - correct / pairs), "every pair is the other way round there"


def noted(monkeypatch: pytest.MonkeyPatch, fails_at: tuple[str, str] = ("", "")) -> list[tuple[str, str]]:
    """Every (model, task) that is measured from here on; the first time that it is `fails_at`, the run is cut off."""
    done: list[tuple[str, str]] = []
    real = answers.measure

    def measure(run, student, task, *rest):
        if (student.name, task.name) == fails_at and "cut off" not in done:
            done.append("cut off")
            raise KeyboardInterrupt
        done.append((student.name, task.name))
        return real(run, student, task, *rest)

    monkeypatch.setattr(comparison, "measure", measure)
    return done


@pytest.mark.parametrize("task", ["gold", "pretraining"])
def test_an_interrupted_comparison_goes_on_with_the_next_task(config, evaluated, tmp_path, monkeypatch, task):
    done, run = noted(monkeypatch, fails_at=("sft", task)), run_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, run)
    run.engine.wait_for_files()  # as a process does before it ends
    path = evaluate(config, run_in(tmp_path))
    everything = [(name, task) for name in ("base", "sft") for task in ("gold", "pretraining")]
    place = everything.index(("sft", task))
    assert done == [*everything[:place], "cut off", *everything[place:]]
    assert json.loads(path.read_text()) == evaluated[0]
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == evaluated[1]


@pytest.mark.parametrize("stopped_in", ["text_loss", "judge_reward_model"])
def test_rule_24_an_evaluation_asked_to_stop_stops_in_a_pass_and_goes_on_from_the_last_task(
    config, evaluated, tmp_path, monkeypatch, stopped_in
):
    run = run_in(tmp_path)
    assert not run.stop_requested()  # from here on signals are looked for
    place = answers if stopped_in == "text_loss" else comparison
    pass_of, calls = getattr(place, stopped_in), []

    def with_a_signal(*arguments):
        calls.append(1)
        if len(calls) == 2 or stopped_in == "judge_reward_model":
            signal.raise_signal(signal.SIGTERM)
        return pass_of(*arguments)

    monkeypatch.setattr(place, stopped_in, with_a_signal)
    with pytest.raises(Stopped):
        evaluate(config, run)
    WORLD.stop.signal_number = 0
    monkeypatch.setattr(place, stopped_in, pass_of)
    done = noted(monkeypatch)
    assert json.loads(evaluate(config, run_in(tmp_path)).read_text()) == evaluated[0]
    assert done == ([("sft", "pretraining")] if stopped_in == "text_loss" else [])
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == evaluated[1]


def test_a_score_that_is_no_number_is_named(config, tmp_path):
    with pytest.raises(ValueError, match=r"test_comparison:no_number gave nan for row 0 and response"):
        evaluate(replace(config, score="tests.evaluation.test_comparison:no_number"), run_in(tmp_path))


def test_problems_are_all_reported():
    wrong = ComparisonConfig(
        models=(ModelConfig(path="@a"), ModelConfig()),
        names=("a",),
        samples_per_prompt=0,
        reward_model=ModelConfig(path="@c"),
        max_tokens_per_micro_batch=8,
    )
    found = "\n".join(gather_problems(wrong))
    for field in (
        "names=('a',)",
        "prompts.path",
        "score is empty",
        "samples_per_prompt=0",
        "reward_model.path='@c'",
        "paths ['@a', '']",
        "max_tokens_per_micro_batch=8",
    ):
        assert field in found


def pair_job(engine: Engine, config: ComparisonConfig, folder: str) -> str:
    return evaluate(config, run_in(Path(folder), engine)).read_text()


def test_two_ranks_find_what_one_finds(config, evaluated, tmp_path):
    for text in run_pair("ddp", "tests.evaluation.test_comparison:pair_job", config=config, folder=str(tmp_path)):
        results = json.loads(text)
        assert results["gold_score"] == evaluated[0]["gold_score"]
        assert results["reward_model"] == evaluated[0]["reward_model"]
        assert results["pretraining_loss"] == pytest.approx(evaluated[0]["pretraining_loss"], abs=1e-6)


def test_the_last_model_is_compared_with_all():
    measured = [scored(name, [0, 1], [score, score]) for name, score in (("a", 0.1), ("b", 0.4), ("c", 0.3))]
    differences = comparison.compare(measured, TaskConfig(name="gold"), [], 0)["differences"]
    assert {name: round(entry["mean"], 6) for name, entry in differences.items()} == {"b - a": 0.3, "c - b": -0.1, "c - a": 0.2}
