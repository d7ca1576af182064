"""KTO as a stage: the baseline over the global batch, without gradient; the same numbers for any packing and any ranks; what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, replace, to_json
from posttrain.data.chat import Chat
from posttrain.data.sampler import Sampler
from posttrain.data.tokenized import judgement_trees
from posttrain.models.loading import load_causal_lm
from posttrain.packing import Tree, forest
from posttrain.stages.dpo import DPOConfig, plan, preview, train
from tests.pairs import run_pair
from tests.runs import LINEAR, close, gradient, logged, metrics, run_stage, same, weights, write_rows
from tests.stages.test_dpo import STAGE, STEADY
from tests.stages.worlds import judgements
from tests.tiny import tiny_folder


@pytest.fixture
def config(tmp_path) -> DPOConfig:
    """17 ragged judgements; three steps of 5."""
    return DPOConfig(
        model=ModelConfig(path=str(tiny_folder(tmp_path / "start"))),
        data=write_rows(tmp_path / "train.jsonl", judgements(17)),
        validation=write_rows(tmp_path / "held_out.jsonl", judgements(9, seed=1)),
        losses=("kto",),
        desirable_weight=1.2,
        optimizer=STEADY,
        batch_size=5,
        max_length=120,
        evaluate_every=2,
        max_tokens_per_micro_batch=4096,
    )


def logprobs_of(folder: Path, trees: list[Tree]) -> torch.Tensor:
    """Sums (B,) of log pi, one conversation at a time."""
    module = load_causal_lm(ModelConfig(path=str(folder))).eval()
    with torch.no_grad():
        return torch.cat([row.sum_by_response(module(row, ("logprobs",))["logprobs"]) for row in (forest([tree]) for tree in trees)])


# --- the baseline


@pytest.mark.parametrize(("good", "is_clamped"), [(8, False), (1, True)])
def test_the_baseline_of_the_second_step_by_hand(config, tmp_path, good, is_clamped):
    """From the weights after the first step: each prompt with the response of the row before it in the batch."""
    pool = judgements(100, seed=4)
    rows = [row for row in pool if row["desirable"]][:good] + [row for row in pool if not row["desirable"]][: 10 - good]
    config = replace(
        config, data=write_rows(tmp_path / "ten.jsonl", rows), validation=DataConfig(path=""), optimizer=replace(LINEAR, lr=LINEAR.lr * 20)
    )
    after_one = run_stage(train, replace(config, epochs=0.5), tmp_path / "one")
    lines = metrics(run_stage(train, config, tmp_path / "two").parent)
    chat = Chat.load(config.model.path)
    second = [rows[i] for i in Sampler(10, 5, 0).order(0)[5:]]
    swapped = [{**row, "response": before["response"]} for row, before in zip(second, [second[-1], *second[:-1]])]
    longest = max(len(chat.prompt(row["prompt"])) + len(chat.response(row["response"])) for row in rows)
    trees, _ = judgement_trees(swapped, chat, 1000)
    trees = [cut(tree, longest) for tree in trees]
    log_ratios = logprobs_of(after_one, trees) - logprobs_of(Path(config.model.path), trees)
    assert abs(log_ratios.mean()) > 0.05 and (log_ratios.mean() < 0) == is_clamped and lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[1]["kl"] == pytest.approx(max(0.0, float(log_ratios.mean())), rel=1e-4, abs=1e-6)
    assert lines[1]["kl_tokens"] == sum(tree.num_tokens for tree in trees)


def cut(tree: Tree, longest: int) -> Tree:
    from posttrain.packing import segment

    ids = tree.children[0].input_ids[: longest - len(tree.root)].tolist()
    return Tree(tree.root, (segment(ids, True),), ranks=tree.ranks)


def test_the_baseline_has_no_gradient(config, tmp_path):
    """The gradient of the first step is that of the losses alone, the baseline a number: it is 0 there, at the clamp's edge."""
    rows = judgements(6, seed=2)
    config = replace(config, data=write_rows(tmp_path / "six.jsonl", rows), validation=DataConfig(path=""), optimizer=LINEAR, batch_size=6)
    trained = run_stage(train, config, tmp_path / "kto")
    module = load_causal_lm(config.model).eval()
    trees, _ = judgement_trees(rows, Chat.load(config.model.path), 120)
    logprobs = torch.cat([row.sum_by_response(module(row, ("logprobs",))["logprobs"]) for row in (forest([tree]) for tree in trees)])
    log_ratios = logprobs - logprobs.detach()
    losses = [
        1.2 * (1 - torch.sigmoid(0.1 * ratio)) if row["desirable"] else 1 - torch.sigmoid(-0.1 * ratio)
        for row, ratio in zip(rows, log_ratios)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    [line] = metrics(trained.parent)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: value.grad for name, value in module.hf.state_dict(keep_vars=True).items() if value.grad is not None}
    found = gradient(weights(Path(config.model.path)), weights(trained))
    close(found, {name: expected[name] for name in found}, rtol=1e-4, atol=4e-6)


# --- nothing depends on how it is run


@pytest.mark.parametrize("reference", ("live", "cached"))
def test_rule_01_rule_04_nothing_depends_on_the_micro_batches_and_the_margin_starts_at_0(config, tmp_path, reference):
    expected = run_stage(train, config, tmp_path / "one" / "row")
    config = replace(config, reference=reference)
    for budget in (120, 190):
        found = run_stage(train, replace(config, max_tokens_per_micro_batch=budget), tmp_path / "more" / f"rows_of_{budget}")
        first, *_ = lines = logged(found.parent)
        assert abs(first["margin"]) < 1e-6 and abs(first["kl"]) < 1e-5
        assert lines == [pytest.approx(line, rel=1e-5, abs=2e-6) for line in logged(expected.parent)]
        close(weights(found), weights(expected))


@pytest.mark.parametrize(("backend", "reference"), [("ddp", "live"), ("zero2", "cached")])
def test_rule_01_nothing_depends_on_the_ranks(config, tmp_path, backend, reference):
    """Rows far apart in the batch, and on different ranks, are each other's mismatches."""
    expected = run_stage(train, config, tmp_path / "alone" / "kto")
    assert max(line["kl"] for line in metrics(expected.parent)) > 0.01
    config = replace(config, max_tokens_per_micro_batch=130, reference=reference)
    run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / backend / "kto"))
    assert logged(tmp_path / backend / "kto") == [pytest.approx(line, rel=1e-5, abs=2e-6) for line in logged(expected.parent)]
    close(weights(tmp_path / backend / "kto" / "model"), weights(expected))


def test_rule_08_killed_and_resumed_twice_is_bitwise_the_run_in_one_go(config, tmp_path):
    config = replace(config, epochs=2.0, checkpoint=CheckpointConfig(every=2))
    for reference in ("live", "cached"):
        one = replace(config, reference=reference)
        straight = run_stage(train, one, tmp_path / reference / "straight")
        for dies_at in (3, 5):
            run_stage(train, one, tmp_path / reference / "killed", dies_at=dies_at)
        resumed = run_stage(train, one, tmp_path / reference / "killed")
        assert metrics(resumed.parent) == metrics(straight.parent) and len(metrics(resumed.parent)) == 7
        assert same(weights(resumed), weights(straight))


# --- what is said


@pytest.mark.parametrize(("good", "bad", "ratio"), [(8, 8, ""), (8, 6, ""), (8, 5, "1.6"), (6, 8, "0.75"), (8, 0, "inf")])
def test_weights_out_of_the_papers_range_are_warned_of(config, tmp_path, capsys, good, bad, ratio):
    rows = judgements(200, seed=7)
    chosen = [row for row in rows if row["desirable"]][:good] + [row for row in rows if not row["desirable"]][:bad]
    config = replace(config, data=write_rows(tmp_path / "rows.jsonl", chosen), validation=DataConfig(path=""), desirable_weight=1.0)
    run_stage(train, replace(config, epochs=0.1), tmp_path / "kto")
    said = capsys.readouterr().out
    assert ("outside KTO's range [1, 4/3]" in said) == bool(ratio)
    if ratio:
        assert f"{good} desirable rows of weight 1.0 and {bad} undesirable ones of weight 1.0 have the ratio {ratio}," in said
        assert (f"undesirable_weight={good / bad:.4g} makes it 1" in said) if bad else True


def test_plan_and_preview(config):
    assert plan(config)["rows"] == 17 and plan(config)["optimizer steps"] == 3
    rows = judgements(3)
    shown = preview(config)
    for row in rows:
        assert f"\x1b[{32 if row['desirable'] else 31}m{row['response']}" in shown


def test_it_learns_what_is_desirable(config, tmp_path):
    config = replace(
        config,
        data=write_rows(tmp_path / "many.jsonl", judgements(240, seed=2)),
        validation=write_rows(tmp_path / "other.jsonl", judgements(80, seed=3)),
        optimizer=OptimizerConfig(lr=3e-3),
        batch_size=16,
        epochs=4.0,
        evaluate_every=10,
    )
    lines = metrics(run_stage(train, config, tmp_path / "kto").parent)
    evaluated = [line for line in lines if "validation_loss" in line]
    assert evaluated[-1]["validation_accuracy"] > 0.75 and evaluated[-1]["validation_margin"] > 0.1
    assert evaluated[-1]["validation_loss"] < evaluated[0]["validation_loss"] and all(line["kl"] >= 0 for line in lines)
