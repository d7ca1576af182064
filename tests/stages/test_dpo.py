"""DPO as a stage: it starts at ln 2, however the reference is come by; the same numbers for any packing and any ranks; exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import AdapterConfig, CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, replace, to_json
from posttrain.controllers import Fall
from posttrain.data.chat import Chat
from posttrain.data.tokenized import comparison_trees
from posttrain.engine import kept
from posttrain.models.loading import load_causal_lm
from posttrain.packing import forest
from posttrain.stages.dpo import DPOConfig, check, plan, preview, smoke, train, uses, warn_of_drop
from tests.pairs import run_pair
from tests.runs import LINEAR, close, gradient, logged, metrics, open_run, run_stage, same, weights, write_rows
from tests.stages.test_dpo_losses import slow_loss
from tests.stages.worlds import rankings
from tests.tiny import tiny_folder

STEADY = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1)
PREFERENCES = Path(__file__).parents[3] / "shared" / "data" / "preference" / "dpo_en_demo.json"
STAGE = "posttrain.stages.dpo:train"


@pytest.fixture
def config(tmp_path) -> DPOConfig:
    """17 ragged comparisons of 2 to 4 responses, with ties; three steps."""
    return DPOConfig(
        model=ModelConfig(path=str(tiny_folder(tmp_path / "start"))),
        data=write_rows(tmp_path / "train.jsonl", rankings(17)),
        validation=write_rows(tmp_path / "held_out.jsonl", rankings(9, seed=1)),
        optimizer=STEADY,
        batch_size=5,
        max_length=160,
        evaluate_every=2,
        max_tokens_per_micro_batch=4096,
    )


# --- where it starts


@pytest.mark.parametrize("reference", ("live", "cached"))
@pytest.mark.parametrize("budget", (4096, 201, 160))
def test_rule_04_dpo_starts_at_ln_2_with_margins_0(config, tmp_path, reference, budget):
    """Whatever the packing of the policy's pass; the cache was filled under another packing."""
    run_stage(train, replace(config, reference=reference, max_tokens_per_micro_batch=333), tmp_path / "first")
    trained = run_stage(train, replace(config, reference=reference, max_tokens_per_micro_batch=budget), tmp_path / "second")
    line = metrics(trained.parent)[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["sigmoid_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(line[name]) < 1e-6 for name in ("margin", "chosen_rewards", "rejected_rewards"))
    assert line["grad_norm"] > 0.1


def test_rule_16_both_references_are_the_starting_policy_to_the_end(config, tmp_path):
    """The rewards at every step, by plain models: the log-probs of the exported start against those of the last checkpoint."""
    live = run_stage(train, config, tmp_path / "live")
    cached = run_stage(train, replace(config, reference="cached"), tmp_path / "cached")
    assert logged(cached.parent) == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in logged(live.parent)]
    close(weights(cached), weights(live))
    step = replace(config, data=config.validation, optimizer=replace(STEADY, lr=0.0), evaluate_every=1, batch_size=9)
    [line] = metrics(run_stage(train, replace(step, reference="cached"), tmp_path / "still").parent)
    assert line["validation_margin"] == pytest.approx(0, abs=1e-6) and line["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("reference", ("live", "cached"))
def test_rule_04_rule_16_the_reference_of_an_adapter_is_how_it_started(config, tmp_path, reference):
    """A fresh adapter starts as its base, and one that is continued as itself; both stay where they were to the end."""
    lora = AdapterConfig(rank=4, alpha=8.0, merge=False)
    config = replace(config, model=replace(config.model, adapter=lora), reference=reference, evaluate_every=1)
    first = run_stage(train, config, tmp_path / "first")
    second_start = replace(config, model=replace(config.model, path=str(first)))
    second = run_stage(train, second_start, tmp_path / "second")
    trees, _ = comparison_trees(rankings(9, seed=1), Chat.load(config.model.path), 160)
    base, after_first, after_second = (all_logprobs(folder, trees) for folder in (Path(config.model.path), first, second))
    assert float((after_first - base).abs().max()) > 0.1
    for folder, start, end in ((first, base, after_first), (second, after_first, after_second)):
        line, *_ = lines = metrics(folder.parent)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(line["margin"]) < 1e-6
        best = min(lines, key=lambda line: line["validation_loss"])
        assert best["validation_loss"] == pytest.approx(slow_loss(config, trees, end, start).item(), rel=1e-5)


def test_the_held_out_numbers_are_those_of_the_exported_model(config, tmp_path):
    """Loss, margin and accuracy of the last evaluation, from the folders that were written and read."""
    config = replace(config, beta=0.4, nll_coef=0.3, epochs=2.0, best_by="accuracy", evaluate_every=1)
    trained = run_stage(train, config, tmp_path / "dpo")
    best = max(metrics(trained.parent), key=lambda line: line["validation_accuracy"])  # the first of the highest
    trees, _ = comparison_trees(rankings(9, seed=1), Chat.load(config.model.path), 160)
    policy, reference = (all_logprobs(folder, trees) for folder in (trained, Path(config.model.path)))
    expected = slow_loss(config, trees, policy, reference)
    assert best["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)
    rewards = (0.4 * (policy - reference)).split([len(tree.children) for tree in trees])
    accuracies, margins = [], []
    for tree, own in zip(trees, rewards):
        leads = [float(own[i] - own[j]) for i, a in enumerate(tree.ranks) for j, b in enumerate(tree.ranks) if a < b]
        accuracies.append(sum(lead > 0 for lead in leads) / len(leads))
        margins.append(sum(leads) / len(leads))
    assert best["validation_accuracy"] == pytest.approx(sum(accuracies) / 9) and best["validation_accuracy"] > 0.6
    assert best["validation_margin"] == pytest.approx(sum(margins) / 9, rel=1e-4)


def all_logprobs(folder: Path, trees: list) -> torch.Tensor:
    module = load_causal_lm(ModelConfig(path=str(folder))).eval()
    rows = [forest([tree]) for tree in trees]
    with torch.no_grad():
        return torch.cat([row.sum_by_response(module(row, ("logprobs",))["logprobs"].double()) for row in rows])


@pytest.mark.parametrize(
    ("losses", "settings"),
    [(("simpo",), {"beta": 2.0}), (("orpo",), {"nll_coef": 1.0}), (("cpo",), {"nll_coef": 1.0})],
)
def test_without_a_reference_none_is_loaded(config, tmp_path, monkeypatch, losses, settings):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody reads a reference")

    monkeypatch.setattr("posttrain.engine.engine.Engine.reference", refuse)
    monkeypatch.setattr(kept, "kept_logprobs", refuse)
    trained = run_stage(train, replace(config, losses=losses, **settings), tmp_path / "free")
    lines = metrics(trained.parent)
    assert lines[0]["chosen_rewards"] < -0.1 and lines[-1]["validation_loss"] < lines[1]["validation_loss"] + 0.5


def test_the_cached_reference_is_no_second_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.engine.engine.Engine.reference", lambda *args: pytest.fail("a second model was loaded"))
    run_stage(train, replace(config, reference="cached"), tmp_path / "cached")


# --- the cache


def test_an_interrupted_precompute_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    """Parts of 4 rows; the pass dies in its third part, and goes on there."""
    monkeypatch.setattr(kept, "PART", 4)
    config = replace(config, reference="cached", validation=DataConfig(path=""))
    expected = run_stage(train, config, tmp_path / "straight" / "dpo")
    computed: list[int] = []
    infer = kept.infer

    def mortal(engine: Any, model: Any, trees: Any, *rest: Any, **options: Any) -> Any:
        if len(computed) == 2:
            computed.append(-1)
            raise KeyboardInterrupt
        computed.append(len(trees))
        return infer(engine, model, trees, *rest, **options)

    monkeypatch.setattr(kept, "infer", mortal)
    with pytest.raises(KeyboardInterrupt):
        run_stage(train, config, tmp_path / "killed" / "dpo")
    kept_files = {file.name for file in (tmp_path / "killed" / "cache").glob("logprobs-*")}
    assert len(kept_files) == 2 and not list((tmp_path / "killed" / "cache").glob("*.tmp"))
    resumed = run_stage(train, config, tmp_path / "killed" / "dpo")
    assert computed == [4, 4, -1, 4, 4, 1]
    assert metrics(resumed.parent) == metrics(expected.parent) and same(weights(resumed), weights(expected))


def test_the_cache_knows_weights_and_tokens_apart_and_nothing_else(config, tmp_path):
    def files(**changes: Any) -> set[str]:
        run_stage(
            train, replace(config, reference="cached", validation=DataConfig(path=""), **changes), tmp_path / "dpo" / "x", seed=len(changes)
        )
        found = {file.name for file in (tmp_path / "dpo" / "cache").glob("logprobs-*")}
        for folder in ("checkpoints", "model"):
            for file in sorted((tmp_path / "dpo" / "x").glob(f"{folder}/**/*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
        return found

    first = files()
    assert len(first) == 1
    assert files(beta=0.7, losses=("hinge",), batch_size=3, max_tokens_per_micro_batch=160) == first
    other_rows = files(data=config.validation)
    assert len(other_rows) == 2
    other_model = files(model=ModelConfig(path=str(tiny_folder(tmp_path / "other", seed=5))))
    assert len(other_model) == 3
    assert len(files(template="raw")) == 4


# --- partition invariance


@pytest.mark.parametrize("reference", ("live", "cached"))
def test_rule_01_nothing_depends_on_the_micro_batches(config, tmp_path, reference):
    config = replace(config, reference=reference, losses=("sigmoid", "ipo"), loss_weights=(1.0, 0.1), nll_coef=0.2)
    expected = run_stage(train, config, tmp_path / "a" / "one_row")
    for budget in (160, 233):
        found = run_stage(train, replace(config, max_tokens_per_micro_batch=budget), tmp_path / "b" / f"rows_of_{budget}")
        assert logged(found.parent) == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in logged(expected.parent)]
        close(weights(found), weights(expected))


@pytest.mark.parametrize(
    ("backend", "reference", "rank"),
    [("ddp", "cached", 0), ("zero2", "live", 0), ("zero3", "live", 0), ("zero3", "live", 4), ("zero3", "cached", 4)],
)
def test_rule_01_nothing_depends_on_the_ranks(config, tmp_path, backend, reference, rank):
    """All weights, and an adapter of that rank over a sharded base."""
    model = replace(config.model, adapter=AdapterConfig(rank=rank, alpha=8.0))
    config = replace(config, model=model, reference=reference, nll_coef=0.2)
    expected = run_stage(train, config, tmp_path / "alone" / "dpo")
    config = replace(config, max_tokens_per_micro_batch=200)
    run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / backend / "dpo"))
    assert logged(tmp_path / backend / "dpo") == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in logged(expected.parent)]
    close(weights(tmp_path / backend / "dpo" / "model"), weights(expected))


def test_the_gradient_of_the_first_step_is_that_of_a_slow_loop(config, tmp_path):
    """Through the stage: reading rows, packing, the update and the export."""
    rows = rankings(6)
    config = replace(config, data=write_rows(tmp_path / "rows.jsonl", rows), batch_size=6, optimizer=LINEAR, nll_coef=0.5, beta=0.3)
    config = replace(config, max_tokens_per_micro_batch=220, validation=DataConfig(path=""))
    trained = run_stage(train, config, tmp_path / "dpo")
    module = load_causal_lm(config.model).eval()
    trees, _ = comparison_trees(rows, Chat.load(config.model.path), 160)
    rows_of_one = [forest([tree]) for tree in trees]
    logprobs = torch.cat([row.sum_by_response(module(row, ("logprobs",))["logprobs"]) for row in rows_of_one])
    loss = slow_loss(config, trees, logprobs, logprobs.detach())
    loss.backward()
    [line] = metrics(trained.parent)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: value.grad for name, value in module.hf.state_dict(keep_vars=True).items() if value.grad is not None}
    found = gradient(weights(Path(config.model.path)), weights(trained))
    close(found, {name: expected[name] for name in found}, rtol=1e-4, atol=2e-6)


# --- exact resume


def test_rule_08_killed_and_resumed_twice_is_bitwise_the_run_in_one_go(config, tmp_path):
    config = replace(config, epochs=2.0, losses=("simpo", "sigmoid"), loss_weights=(0.3, 1.0), checkpoint=CheckpointConfig(every=2))
    for reference in ("live", "cached"):
        place, one = tmp_path / reference, replace(config, reference=reference)
        straight = run_stage(train, one, place / "straight")
        for dies_at in (3, 5):
            run_stage(train, one, place / "killed", dies_at=dies_at)
            assert not (place / "killed" / "model").exists()
        resumed = run_stage(train, one, place / "killed")
        assert metrics(resumed.parent) == metrics(straight.parent) and len(metrics(resumed.parent)) == 7
        assert same(weights(resumed), weights(straight))


def test_rule_08_a_resumed_run_still_knows_where_it_started_without_its_cache(config, tmp_path):
    """The reference is computed again, from the starting weights and not from those of the checkpoint."""
    config = replace(config, epochs=2.0, reference="cached", checkpoint=CheckpointConfig(every=2))
    straight = run_stage(train, config, tmp_path / "a" / "straight")
    run_stage(train, config, tmp_path / "b" / "killed", dies_at=5)
    for file in (tmp_path / "b" / "cache").glob("logprobs-*"):
        file.unlink()
    resumed = run_stage(train, config, tmp_path / "b" / "killed")
    assert metrics(resumed.parent) == metrics(straight.parent) and same(weights(resumed), weights(straight))


def test_rule_08_on_zero2(config, tmp_path):
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    job = dict(stage=STAGE, config=to_json(config))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "straight"))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "killed"), deaths=[3, 0])
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight") and len(metrics(tmp_path / "killed")) == 3
    assert same(weights(tmp_path / "killed" / "model"), weights(tmp_path / "straight" / "model"))


# --- what is said


def test_a_fall_of_the_chosen_responses_is_said_once_in_words(config, tmp_path, capsys):
    """The rejected fall faster, so the loss goes down, and so do the chosen ones."""
    config = replace(config, optimizer=OptimizerConfig(lr=3e-2), epochs=4.0, losses=("apo_down",), chosen_drop_warning=5.0)
    trained = run_stage(train, config, tmp_path / "dpo")
    drops = [-line["chosen_log_ratio"] for line in metrics(trained.parent)]
    assert max(drops) > 5
    said = capsys.readouterr().out
    assert said.count("the chosen responses' mean log-probability is more than 5.0 nats below where it began") == 1
    assert "no bug" in said and "nll_coef=1" in said
    run_stage(train, replace(config, chosen_drop_warning=0.0), tmp_path / "quiet")
    assert "nats below" not in capsys.readouterr().out


def test_without_a_reference_the_fall_is_that_from_the_first_steps_to_the_last(config, tmp_path, capsys):
    level, free = Fall(), replace(config, losses=("simpo",), chosen_drop_warning=21.0)
    with open_run(tmp_path / "x") as run:
        for value in [-1.0] * 10 + [math.nan] + [-1.5] * 10:
            warn_of_drop(free, {"chosen_logprobs_per_token": value, "chosen_length": 40.0}, level, run)
        assert not run.warnings  # half a nat per token, 20 per response
        again = Fall()
        again.load_state_dict(json.loads(json.dumps(level.state_dict())))
        warn_of_drop(free, {"chosen_logprobs_per_token": -2.5, "chosen_length": 40.0}, again, run)
        assert len(run.warnings) == 1 and "more than 21.0 nats below" in run.warnings[0]
        assert level.update(-2.5) == pytest.approx(0.6)


def test_a_prompt_whose_responses_do_not_fit_in_a_row_is_named(config, tmp_path):
    rows = rankings(6)
    chat = Chat.load(config.model.path)
    sizes = [len(chat.prompt(row["prompt"])) + sum(len(chat.response(text)) for text in row["responses"]) for row in rows]
    largest = max(range(6), key=lambda n: sizes[n])
    config = replace(config, data=write_rows(tmp_path / "six.jsonl", rows), validation=DataConfig(path=""), max_length=max(sizes) - 1)
    message = f"max_tokens_per_micro_batch={max(sizes) - 1} is below comparison {largest + 1}, whose prompt .* {max(sizes)} works"
    small = replace(config, max_tokens_per_micro_batch=max(sizes) - 1)
    with pytest.raises(ValueError, match=message):
        run_stage(train, small, tmp_path / "dpo")
    assert (
        len(check(small)) == 1 and str(max(sizes)) in check(small)[0] and check(replace(small, max_tokens_per_micro_batch=max(sizes))) == []
    )
    [use] = uses(small)
    assert (use.field, use.becomes, dict(use.rows[0])) == ("model", "causal LM", {"max_length": max(sizes) - 1})


def test_plan_preview_and_smoke(config):
    size = plan(config)
    assert size["rows"] == 17 and size["optimizer steps"] == 3 and size["parameters"] > 0
    shown = preview(config)
    row = rankings(17)[0]
    best = row["responses"][row["ranks"].index(0)]
    assert f"\x1b[32m{best}" in shown and shown.count("\x1b[31m") >= 1 and row["prompt"] in shown
    small = smoke(config)
    assert (small.data.limit, small.validation.limit, small.batch_size) == (64, 64, 32)


# --- learning


def test_it_learns_what_is_better_and_keeps_the_best(config, tmp_path):
    """Responses ranked by how often they say "apple": held-out pairs."""
    config = replace(
        config,
        data=write_rows(tmp_path / "many.jsonl", rankings(200, seed=2)),
        validation=write_rows(tmp_path / "other.jsonl", rankings(60, seed=3)),
        optimizer=OptimizerConfig(lr=3e-3),
        batch_size=16,
        epochs=3.0,
        evaluate_every=6,
    )
    trained = run_stage(train, config, tmp_path / "dpo")
    evaluated = [line for line in metrics(trained.parent) if "validation_loss" in line]
    assert max(line["validation_accuracy"] for line in evaluated) > 0.85
    assert metrics(trained.parent)[-1]["loss"] < 0.6


@pytest.mark.skipif(not PREFERENCES.is_file(), reason="the real rows are not on this machine")
def test_margins_grow_on_real_preference_rows(config, tmp_path):
    model = ModelConfig(path=str(tiny_folder(tmp_path / "wide", max_position_embeddings=4096)))
    config = replace(config, model=model, data=DataConfig(path=str(PREFERENCES), limit=40), validation=DataConfig(path=""))
    config = replace(config, optimizer=OptimizerConfig(lr=3e-4), batch_size=8, epochs=6.0, max_length=1500, max_dropped_fraction=0.9)
    lines = metrics(run_stage(train, replace(config, max_tokens_per_micro_batch=3000), tmp_path / "real").parent)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5) and lines[-1]["margin"] > 0.5
    assert lines[-1]["accuracy"] > 0.8 and lines[-1]["loss"] < 0.6
