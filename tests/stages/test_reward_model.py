"""Reward model: the K-wise loss by a slow loop and by TRL, scores that survive export, calibration, and that it learns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config import CheckpointConfig, ModelConfig, OptimizerConfig, replace, to_json
from posttrain.data.chat import Chat
from posttrain.evaluation.pairs import pair_accuracy
from posttrain.models.loading import load_scalar_model, read_calibration
from posttrain.packing import Tree, forest, segment
from posttrain.stages.reward_model import RewardModelConfig, bradley_terry, degenerate_probes, train
from tests.pairs import ROOT, run_pair
from tests.runs import LINEAR, close, gradient, logged, metrics, nearly, run_stage, same, weights, write_rows
from tests.stages.worlds import conversations, rankings
from tests.tiny import tiny_folder

STEADY = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1)


@pytest.fixture
def config(tmp_path) -> RewardModelConfig:
    """17 ragged comparisons of 2 to 4 responses, with ties; three steps."""
    return RewardModelConfig(
        model=ModelConfig(path=str(tiny_folder(tmp_path / "start"))),
        data=write_rows(tmp_path / "train.jsonl", rankings(17)),
        validation=write_rows(tmp_path / "held_out.jsonl", rankings(9, seed=1)),
        demonstrations=write_rows(tmp_path / "demonstrations.jsonl", conversations(7)),
        optimizer=STEADY,
        batch_size=5,
        max_length=160,
        max_tokens_per_micro_batch=4096,
    )


# --- the loss


def slow_loss(scores: torch.Tensor, ranks: list[int], margin: float, centering_coef: float) -> torch.Tensor:
    """InstructGPT's equation 1 written out: every pair of the K responses once, ties dropped, over C(K,2)."""
    total = torch.zeros((), dtype=scores.dtype)
    pairs = list(combinations(range(len(ranks)), 2))
    for i, j in pairs:
        if ranks[i] == ranks[j]:
            continue
        w, l = (i, j) if ranks[i] < ranks[j] else (j, i)  # noqa: E741
        lead = scores[w] - scores[l] - margin * (ranks[l] - ranks[w])
        total = total + torch.log1p(torch.exp(-lead)) + centering_coef * (scores[w] + scores[l]) ** 2
    return total / len(pairs)


@pytest.mark.parametrize("k", range(2, 10))
@pytest.mark.parametrize(("margin", "centering_coef"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.01), (0.5, 0.1)])
def test_the_loss_of_k_responses_is_a_loop_over_their_pairs(k, margin, centering_coef):
    draw = torch.Generator().manual_seed(k)
    for ranks in (list(range(k)), list(range(k))[::-1], torch.randint(0, max(2, k // 2), (k,), generator=draw).tolist()):
        one, other = (torch.randn(k, generator=draw.manual_seed(k), dtype=torch.float64).requires_grad_() for _ in range(2))
        found, expected = bradley_terry(one, ranks, margin, centering_coef), slow_loss(other, ranks, margin, centering_coef)
        (found * 1.0).backward()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
        if expected.requires_grad:
            expected.backward()
        torch.testing.assert_close(one.grad, torch.zeros(k).double() if other.grad is None else other.grad, rtol=1e-6, atol=1e-12)


def test_the_loss_of_two_equal_scores_is_ln_2_and_one_of_only_ties_is_0():
    assert bradley_terry(torch.zeros(2), (0, 1)).item() == pytest.approx(math.log(2), abs=1e-6)
    assert bradley_terry(torch.randn(4), (1, 1, 1, 1)).item() == 0
    # one of the two pairs of three responses that differ, each weighing 1/3: the tie keeps its share of the weight
    assert bradley_terry(torch.zeros(3), (0, 1, 1)).item() == pytest.approx(math.log(2) * 2 / 3, abs=1e-6)


def test_accuracy_counts_pairs_without_ties_and_equal_scores_as_wrong():
    trees = [comparison(ranks) for ranks in ((0, 1, 2), (0, 0, 1), (1, 0))]
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 1.0]), torch.tensor([5.0, 5.0])]
    result = pair_accuracy(scores, trees, seed=0)
    assert (result["pair_accuracy"], result["n_pairs"]) == (pytest.approx((2 + 1 + 0) / (3 + 2 + 1)), 6)


def comparison(ranks: tuple[int, ...]) -> Tree:
    return Tree(segment([5, 6]), tuple(segment([7 + i], True) for i in range(len(ranks))), ranks=ranks)


# --- against TRL


def trl_loss_and_gradient(start: Path, rows: list[dict[str, Any]], output: Path, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    import trl

    tokenizer = AutoTokenizer.from_pretrained(start)
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["responses"][row["ranks"].index(0)]}],
            "rejected": [{"role": "assistant", "content": row["responses"][row["ranks"].index(1)]}],
        }
        for row in rows
    ]
    arguments = trl.RewardConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(rows),
        **settings,
    )
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def starting_weights(config: RewardModelConfig, folder: Path, seed: int = 0) -> Path:
    """What the stage starts from: the model with the fresh head that this seed draws, as a folder."""
    module = load_scalar_model(config.model, fresh_head=True, seed=seed)
    module.hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model.path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("centering_coef", (0.0, 0.05))
def test_loss_and_gradient_are_those_of_trl(config, tmp_path, monkeypatch, centering_coef):
    # the template ends a turn with a newline, which TRL scores and the policy never writes: both get one without
    rows = rankings(8, most=2)
    folder = Path(config.model.path)
    template = (folder / "chat_template.jinja").read_text().replace("<|im_end|>' + '\\n'", "<|im_end|>'")
    (folder / "chat_template.jinja").write_text(template)
    start = starting_weights(config, tmp_path / "with_head")
    settings = {"center_rewards_coefficient": centering_coef} if centering_coef else {}
    loss, expected = trl_loss_and_gradient(start, rows, tmp_path / "trl", **settings)
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    config = replace(config, data=data, optimizer=LINEAR, batch_size=len(rows), centering_coef=centering_coef)
    trained = run_stage(train, replace(config, max_tokens_per_micro_batch=260), tmp_path / "rm")
    [line] = metrics(trained.parent)
    assert line["loss"] == pytest.approx(loss, abs=1e-5)
    found = gradient(weights(start), weights(trained))
    close(found, {name: expected[name] for name in found}, rtol=1e-4, atol=2e-6)
    assert found.keys() == expected.keys() and "score.weight" in found


# --- partition invariance


def test_rule_01_nothing_depends_on_the_micro_batches(config, tmp_path):
    config = replace(config, margin=0.1, centering_coef=0.01, evaluate_every=1)
    expected = run_stage(train, config, tmp_path / "one_row")
    for budget in (160, 233):
        found = run_stage(train, replace(config, max_tokens_per_micro_batch=budget), tmp_path / f"rows_of_{budget}")
        assert logged(found.parent) == nearly(logged(expected.parent))
        close(weights(found), weights(expected))
        assert calibration(found) == pytest.approx(calibration(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("backend", ("ddp", "zero2"))
def test_rule_01_nothing_depends_on_the_ranks(config, tmp_path, backend):
    expected = run_stage(train, config, tmp_path / "alone")
    config = replace(config, max_tokens_per_micro_batch=200)
    stage = "posttrain.stages.reward_model:train"
    run_pair(backend, "tests.runs:run_job", stage=stage, config=to_json(config), folder=str(tmp_path / backend))
    assert logged(tmp_path / backend) == nearly(logged(expected.parent))
    close(weights(tmp_path / backend / "model"), weights(expected))
    assert calibration(tmp_path / backend / "model") == pytest.approx(calibration(expected), rel=1e-4, abs=1e-5)


def calibration(folder: Path) -> dict[str, float]:
    return vars(read_calibration(folder))


def test_sharing_the_prompt_is_scoring_each_response_by_itself(config, tmp_path):
    """The loss of the first step, from plain transformers on one conversation at a time."""
    rows = rankings(6)
    config = replace(config, data=write_rows(tmp_path / "rows.jsonl", rows), batch_size=6)
    start = starting_weights(config, tmp_path / "with_head")
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32).eval()
    chat = Chat.load(config.model.path)
    losses = []
    for row in rows:
        ids = [chat.prompt(row["prompt"]) + chat.response(response) for response in row["responses"]]
        scores = torch.stack([model.score(model.model(torch.tensor([i])).last_hidden_state[0, -1]).squeeze() for i in ids])
        losses.append(slow_loss(scores, row["ranks"], 0.0, 0.0))
    trained = run_stage(train, config, tmp_path / "rm")
    assert metrics(trained.parent)[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


# --- scores that survive


SCORE = """
import json, sys, torch
from posttrain.config import ModelConfig
from posttrain.models.loading import load_scalar_model
from posttrain.packing import Tree, forest, segment
module = load_scalar_model(ModelConfig(path=sys.argv[1]), fresh_head=False).eval()
trees = [Tree(segment(ids)) for ids in json.loads(sys.argv[2])]
with torch.no_grad():
    print(json.dumps(module(forest(trees), ("scores",))["scores"].tolist()))
"""


def some_texts(config: RewardModelConfig) -> list[list[int]]:
    chat = Chat.load(config.model.path)
    return [chat.prompt(row["prompt"]) + chat.response(response) for row in rankings(3, seed=5) for response in row["responses"]]


def scores_of(folder: Path, texts: list[list[int]]) -> torch.Tensor:
    module = load_scalar_model(ModelConfig(path=str(folder)), fresh_head=False).eval()
    with torch.no_grad():
        return module(forest([Tree(segment(ids)) for ids in texts]), ("scores",))["scores"]


def test_rule_07_a_fresh_process_gives_bit_equal_scores(config, tmp_path):
    trained = run_stage(train, config, tmp_path / "rm")
    texts = some_texts(config)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCORE, str(trained), json.dumps(texts)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == scores_of(trained, texts).tolist()
    # what was measured at the end of the training, by the model in memory, is what the folder gives
    held_out = rankings(9, seed=1)
    chat = Chat.load(config.model.path)
    ids = [chat.prompt(row["prompt"]) + chat.response(response) for row in held_out for response in row["responses"]]
    scores = scores_of(trained, ids)
    assert calibration(trained)["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert calibration(trained)["std"] == pytest.approx(scores.std().item(), rel=1e-5)


def test_rule_06_a_score_does_not_depend_on_its_neighbours(config, tmp_path):
    trained = run_stage(train, config, tmp_path / "rm")
    texts = some_texts(config)
    together = scores_of(trained, texts)
    alone = torch.cat([scores_of(trained, [text]) for text in texts])
    backwards = scores_of(trained, texts[::-1]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)
    # transformers' own classifier, which pads and looks for the last token, agrees once the bias is taken off
    model = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32).eval()
    longest = max(map(len, texts))
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        theirs = model(input_ids=padded, attention_mask=mask).logits.squeeze(-1) - calibration(trained)["bias"]
    torch.testing.assert_close(together, theirs, rtol=0, atol=1e-5)


# --- calibration


def test_demonstrations_score_0_on_average_with_the_stored_bias(config, tmp_path):
    trained = run_stage(train, config, tmp_path / "rm")
    chat = Chat.load(config.model.path)
    kept = [row["messages"] for row in conversations(7)]
    scores = scores_of(trained, [chat.conversation(messages)[0] for messages in kept])
    assert abs(scores.mean().item()) < 1e-5
    raw = scores_of_without_bias(trained, [chat.conversation(messages)[0] for messages in kept])
    assert calibration(trained)["bias"] == pytest.approx(raw.mean().item(), abs=1e-5) and abs(raw.mean().item()) > 1e-3


def scores_of_without_bias(folder: Path, texts: list[list[int]]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).squeeze() for ids in texts])


def test_without_demonstrations_there_is_no_bias(config, tmp_path):
    trained = run_stage(train, replace(config, demonstrations=replace(config.demonstrations, path="")), tmp_path / "rm")
    assert calibration(trained)["bias"] == 0 and calibration(trained)["std"] > 0


def test_the_results_say_accuracy_interval_length_and_degenerate_probes(config, tmp_path):
    trained = run_stage(train, config, tmp_path / "rm")
    results = json.loads((trained.parent / "results.json").read_text())["reward_model"]
    held_out = rankings(9, seed=1)
    pairs = sum(a != b for row in held_out for a, b in combinations(row["ranks"], 2))
    chat = Chat.load(config.model.path)
    correct = 0
    for row in held_out:
        scores = scores_of(trained, [chat.prompt(row["prompt"]) + chat.response(response) for response in row["responses"]])
        for (a, rank_a), (b, rank_b) in combinations(list(zip(scores, row["ranks"])), 2):
            correct += rank_a != rank_b and bool((a > b) == (rank_a < rank_b))
    assert results["n_pairs"] == pairs and results["pair_accuracy"] == pytest.approx(correct / pairs)
    assert results["ci95"][0] < results["pair_accuracy"] < results["ci95"][1] and results["held_out"]
    assert -1 <= results["spearman_score_length"] <= 1
    assert set(results["degenerate_probes"]) == {"empty", "repeated_token", "echoed_prompt"}
    assert all(math.isfinite(score) for score in results["degenerate_probes"].values())


def test_degenerate_probes_end_once_and_fit_where_the_responses_did(config):
    chat = Chat.load(config.model.path)
    end = chat.end_of_turn_ids[0]
    trees = [
        Tree(segment(chat.prompt(row["prompt"])), tuple(segment(chat.response(text), True) for text in row["responses"]))
        for row in rankings(6)
    ]
    probes = degenerate_probes(trees, chat)
    for name, made in probes.items():
        for tree, probe in zip(trees, made):
            ids = probe.children[0].input_ids.tolist()
            assert ids[-1] == end and ids.count(end) == 1, name
            assert torch.equal(probe.root.input_ids, tree.root.input_ids)
            assert len(ids) <= max(len(child) for child in tree.children), name
    assert all(len(probe.children[0]) == 1 for probe in probes["empty"])
    for tree, probe in zip(trees, probes["repeated_token"]):
        assert set(probe.children[0].input_ids.tolist()[:-1]) == {int(tree.children[0].input_ids[0])}
    for probe in probes["echoed_prompt"]:
        said = chat.decode_response(probe.children[0].input_ids.tolist())
        assert said and said.split()[0] in chat.decode(probe.root.input_ids.tolist())


def test_long_prompts_are_probed_within_the_budget(config, tmp_path):
    """A prompt of more than half of `max_length`: its echo would not fit, and the training would end with an error."""
    rows = [row | {"prompt": " ".join([row["prompt"]] * 8)[:150].strip()} for row in rankings(8)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    chat = Chat.load(config.model.path)
    longest = max(len(chat.prompt(row["prompt"])) + max(len(chat.response(r)) for r in row["responses"]) for row in rows)
    whole = max(len(chat.prompt(row["prompt"])) + sum(len(chat.response(r)) for r in row["responses"]) for row in rows)
    assert longest < whole
    config = replace(config, data=data, validation=data, max_length=longest, max_tokens_per_micro_batch=whole)
    config = replace(config, demonstrations=replace(config.demonstrations, path=""), batch_size=8)
    assert run_stage(train, config, tmp_path / "rm").is_dir()


# --- learning, and going on


def test_it_learns_what_is_better(config, tmp_path):
    """Responses ranked by how often they say "apple": more than 90 % of held-out pairs."""
    config = replace(
        config,
        data=write_rows(tmp_path / "many.jsonl", rankings(300, seed=2)),
        validation=write_rows(tmp_path / "other.jsonl", rankings(60, seed=3)),
        optimizer=OptimizerConfig(lr=5e-3),
        batch_size=16,
        epochs=3.0,
    )
    trained = run_stage(train, config, tmp_path / "rm")
    results = json.loads((trained.parent / "results.json").read_text())["reward_model"]
    assert results["pair_accuracy"] > 0.9 and results["ci95"][0] > 0.8
    assert metrics(trained.parent)[-1]["loss"] < 0.5 * metrics(trained.parent)[0]["loss"]


def test_rule_08_killed_and_resumed_twice_is_bitwise_the_run_in_one_go(config, tmp_path):
    config = replace(config, epochs=2.0, checkpoint=CheckpointConfig(every=2), evaluate_every=3)
    straight = run_stage(train, config, tmp_path / "straight")
    for dies_at in (3, 5):
        run_stage(train, config, tmp_path / "killed", dies_at=dies_at)
        assert not (tmp_path / "killed" / "model").exists()
    resumed = run_stage(train, config, tmp_path / "killed")
    assert metrics(resumed.parent) == metrics(straight.parent) and len(metrics(resumed.parent)) == 7
    assert same(weights(resumed), weights(straight)) and calibration(resumed) == calibration(straight)


def test_rule_07_rule_08_on_zero2_and_zero3(config, tmp_path):
    """Killed and resumed under ZeRO-2 bit for bit; the folders that ZeRO-2 and 3 write score alike."""
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    job = dict(stage="posttrain.stages.reward_model:train", config=to_json(config))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "straight"))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "killed"), deaths=[3, 0])
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    assert same(weights(tmp_path / "killed" / "model"), weights(tmp_path / "straight" / "model"))
    run_pair("zero3", "tests.runs:run_job", **job, folder=str(tmp_path / "zero3"))
    texts = some_texts(config)
    found, expected = (scores_of(tmp_path / name / "model", texts) for name in ("zero3", "straight"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rule_13_a_loss_that_is_not_finite_is_no_number(config, tmp_path):
    """A margin beyond what fp32 holds: the loss is infinite, no step is made, and the run says so and stops."""
    with pytest.raises(FloatingPointError, match="reward_model refused 5 updates in a row"):
        run_stage(train, replace(config, margin=1e39, batch_size=2), tmp_path / "rm")
    assert all(line["loss"] is None and line["grad_norm"] is None for line in metrics(tmp_path / "rm"))
