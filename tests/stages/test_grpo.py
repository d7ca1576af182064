"""GRPO and its family: a whole iteration by hand, groups, refills, hostile rewards, mixed-in rows, start and exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.config import (
    AdapterConfig,
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    gather_problems,
    replace,
    to_json,
)
from posttrain.data.chat import Chat
from posttrain.data.sampler import Sampler
from posttrain.engine import inference
from posttrain.models.loading import load_causal_lm
from posttrain.rewards.config import RewardConfig, RewardsConfig
from posttrain.rollout.local import Rollout, sample
from posttrain.stages.grpo import ALGORITHMS, GRPOConfig, ObjectiveConfig, smoke, train
from tests.pairs import run_pair
from tests.runs import LINEAR, close, metrics, open_run, reward_folder, run_stage, same, weights, write_rows
from tests.stages import reward_functions
from tests.stages.test_ppo import alike, identical, moved, norm, policy_folder, slow_logprobs, stop_while_sampling, text_gradient
from tests.stages.worlds import conversations, prompts, texts
from tests.tiny import tiny_folder

STEADY = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1, schedule="constant")
STAGE = "posttrain.stages.grpo:train"
ONE = ("model",)  # what the stage writes


def reward(*names: str, failing: float = 0.0, **options: Any) -> RewardsConfig:
    functions = tuple(RewardConfig(function=f"tests.stages.reward_functions:{name}", **options) for name in names)
    return RewardsConfig(functions=functions, workers=1, max_failed_fraction=failing)


@pytest.fixture
def config(tmp_path) -> GRPOConfig:
    """Four groups of four ragged responses, one minibatch of them all."""
    return GRPOConfig(
        policy=ModelConfig(path=str(policy_folder(tmp_path / "policy"))),
        prompts=write_rows(tmp_path / "prompts.jsonl", prompts(6)),
        pretraining=write_rows(tmp_path / "texts.jsonl", texts(6)),
        rewards=reward("length"),
        optimizer=LINEAR,
        sampling=SamplingConfig(max_new_tokens=9),
        num_iterations=1,
        rollout_batch_size=16,
        group_size=4,
        minibatch_size=16,
        ptx_batch_size=1,
        ptx_window=40,
        max_prompt_length=60,
        max_tokens_per_micro_batch=120,
    )


def objective(config: GRPOConfig, **changes: Any) -> GRPOConfig:
    return replace(config, objective=replace(config.objective, **changes))


# --- one iteration by hand


def rollout_of(config: GRPOConfig, folder: Path, seed: int = 0) -> tuple[Rollout, np.ndarray]:
    """What the stage samples in its first iteration, and its rewards (groups, members)."""
    chat = Chat.load(config.policy.path)
    rows = [json.loads(line) for line in Path(config.prompts.path).read_text().splitlines()]
    order = Sampler(len(rows), config.prompts_per_iteration, seed).take()
    asked = [chat.prompt(rows[i]["prompt"]) for i in order]
    with open_run(folder) as run:
        policy = run.engine.freeze(load_causal_lm(config.policy, chat.tokenizer), name="policy")
        options = dict(world=run.engine.world, seed=seed, stop_ids=chat.end_of_turn_ids, samples_per_prompt=config.group_size)
        rollout = sample(policy, asked, config.sampling, **options)
    scores = [reward_functions.length({}, chat.decode_response(response)) for response in rollout.responses]
    return rollout, np.array(scores).reshape(-1, config.group_size)


def advantages_by_hand(name: str, scores: np.ndarray, lengths: list[int]) -> np.ndarray:
    """(B,): what each response's tokens get in a first iteration, in which the KL is 0."""
    centred = scores - scores.mean(1, keepdims=True)
    if name == "group_std":
        return (centred / (scores.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()
    if name == "group_mean":
        return centred.ravel()
    if name == "leave_one_out":
        others = [[(row.sum() - mine) / (len(row) - 1) for mine in row] for row in scores]
        return (scores - np.array(others)).ravel()
    tokens = np.repeat(scores.ravel(), lengths)
    return (scores.ravel() - tokens.mean()) / math.sqrt(tokens.var() + 1e-8)


def mean_by_hand(name: str, per_token: Tensor, lengths: list[int], longest: int) -> Tensor:
    parts = per_token.split(lengths)
    return {
        "sequence_mean": lambda: sum(part.mean() for part in parts) / len(parts),
        "token_mean": per_token.mean,
        "sequence_sum": lambda: per_token.sum() / len(parts),
        "constant": lambda: per_token.sum() / (len(parts) * longest),
    }[name]()


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_one_step_of_every_algorithm_follows_the_gradient_by_hand(config, tmp_path, algorithm):
    """At the first step every ratio is 1 and every KL has gradient 0, so all of them are policy gradients with their own weights."""
    config = replace(config, objective=ALGORITHMS[algorithm], sampling=replace(config.sampling, temperature=0.8))
    goal = config.objective
    rollout, scores = rollout_of(config, tmp_path / "sampling")
    lengths = [len(response) for response in rollout.responses]
    assert len(set(lengths)) > 3 and len(set(scores.ravel())) > 3
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32).eval()
    logprobs = slow_logprobs(policy, rollout, 0.8)
    advantages = torch.tensor(np.repeat(advantages_by_hand(goal.advantage, scores, lengths), lengths), dtype=torch.float32)
    mean_by_hand(goal.normalisation, -advantages * logprobs, lengths, config.sampling.max_new_tokens).backward()
    trained = run_stage(train, config, tmp_path / "grpo")
    close(moved(config.policy.path, trained), {name: p.grad for name, p in policy.named_parameters()}, rtol=1e-4, atol=3e-6)
    [line] = metrics(tmp_path / "grpo")
    assert line["score"] == line["reward/length"] == pytest.approx(scores.mean(), rel=1e-5)
    assert line["share_finished"] == np.mean(rollout.finished) and line["response_length"] == np.mean(lengths)
    assert line["zero_variance_groups"] == sum(len(set(row)) == 1 for row in scores)


@pytest.mark.parametrize("algorithm", ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"))
def test_three_steps_on_one_rollout_by_hand(config, tmp_path, algorithm):
    """Plain gradient descent; ratios leave the clip range on the way, and k3 pulls back."""
    step = 0.1 if algorithm == "dr_grpo" else 0.01
    descent = replace(LINEAR, lr=step * 1e8, betas=(0.0, 0.0))
    goal = replace(ALGORITHMS[algorithm], clip_low=0.05, clip_high=0.07)
    config = replace(config, objective=goal, num_epochs=3, optimizer=descent)
    rollout, scores = rollout_of(config, tmp_path / "sampling")
    lengths = [len(response) for response in rollout.responses]
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32).eval()
    old = slow_logprobs(policy, rollout, 1.0).detach()
    each = advantages_by_hand(goal.advantage, scores, lengths)
    outside = 0
    for _ in range(3):
        losses = []
        for mine, before, advantage in zip(slow_logprobs(policy, rollout, 1.0).split(lengths), old.split(lengths), each.tolist()):
            ratio = (mine - before).exp()
            if goal.loss == "sequence":
                ratio = (mine - before).mean().exp().expand(len(mine))
            bound = ratio.clamp(0.95, 1.07)
            if goal.loss == "cispo":
                outside += int((ratio > 1.07).sum())
                losses.append(-torch.clamp(ratio, max=1.07).detach() * advantage * mine)
                continue
            outside += int((ratio * advantage > bound * advantage).sum())
            k3 = (before - mine).exp() - (before - mine) - 1  # the reference is the policy that sampled
            losses.append(-torch.minimum(ratio * advantage, bound * advantage) + (goal.kl_coef * k3 if goal.kl == "loss" else 0))
        mean_by_hand(goal.normalisation, torch.cat(losses), lengths, 9).backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.sub_(step * parameter.grad)
                parameter.grad = None
    run_stage(train, config, tmp_path / "grpo")
    close(weights(tmp_path / "grpo" / "model"), dict(policy.named_parameters()), rtol=1e-4, atol=1e-5)
    [line] = metrics(tmp_path / "grpo")
    assert outside > 0 and line["clip_fraction"] == pytest.approx(outside / (3 * rollout.num_tokens), abs=1e-6)


def test_truncated_responses_are_not_trained_but_compared_with(config, tmp_path):
    config = replace(config, mask_truncated=True)
    rollout, scores = rollout_of(config, tmp_path / "sampling")
    lengths = [len(response) for response in rollout.responses]
    assert {True, False} == set(rollout.finished)
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32).eval()
    parts = slow_logprobs(policy, rollout, 1.0).split(lengths)
    each = advantages_by_hand("group_std", scores, lengths).tolist()
    kept = [-advantage * part.mean() for advantage, part, ended in zip(each, parts, rollout.finished) if ended]
    (sum(kept) / len(kept)).backward()
    trained = run_stage(train, config, tmp_path / "grpo")
    close(moved(config.policy.path, trained), {name: p.grad for name, p in policy.named_parameters()}, rtol=1e-4, atol=3e-6)


def test_an_iteration_without_a_response_to_learn_from_changes_nothing_and_says_so(config, tmp_path, capsys):
    never = tiny_folder(tmp_path / "never")
    config = replace(config, policy=ModelConfig(path=str(never)), sampling=SamplingConfig(max_new_tokens=3), mask_truncated=True)
    still = run_stage(train, several(config, num_iterations=2), tmp_path / "grpo")
    assert same(weights(still), weights(never)) and "no response to learn from" in capsys.readouterr().out
    assert [line["share_finished"] for line in metrics(tmp_path / "grpo")] == [0, 0]


# --- rewards


def test_rule_17_groups_that_score_alike_teach_nothing_and_are_counted(config, tmp_path):
    config = objective(replace(config, rewards=reward("constant"), optimizer=STEADY), kl="none")
    config = replace(config, optimizer=replace(STEADY, weight_decay=0.0), num_iterations=2)
    still = run_stage(train, config, tmp_path / "grpo")
    assert same(weights(still), weights(Path(config.policy.path)))
    for line in metrics(tmp_path / "grpo"):
        assert line["zero_variance_groups"] == 4 and line["share_informative"] == 0 and line["grad_norm"] == 0
        assert line["score"] == pytest.approx(0.3) and line["policy_loss"] == 0


def test_rule_18_a_reward_that_raises_or_is_no_number_costs_its_rows_only(config, tmp_path):
    config = objective(replace(config, rewards=reward("sometimes", failing=0.9)), advantage="group_mean")
    rollout, _ = rollout_of(config, tmp_path / "sampling")
    chat = Chat.load(config.policy.path)
    found = [chat.decode_response(response) for response in rollout.responses]
    scores = np.array([math.nan if len(text) % 4 < 2 else reward_functions.length({}, text) for text in found]).reshape(4, 4)
    assert np.isnan(scores).any() and (~np.isnan(scores)).sum() > 4
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32).eval()
    parts = slow_logprobs(policy, rollout, 1.0).split([len(response) for response in rollout.responses])
    total: Any = 0.0
    for row, chunk in zip(scores, (parts[i : i + 4] for i in range(0, 16, 4))):
        seen = row[~np.isnan(row)]
        total += sum(-(mine - seen.mean()) * part.mean() for mine, part in zip(row.tolist(), chunk) if not math.isnan(mine))
    (total / int((~np.isnan(scores)).sum())).backward()
    trained = run_stage(train, config, tmp_path / "grpo")
    close(moved(config.policy.path, trained), {name: p.grad for name, p in policy.named_parameters()}, rtol=1e-4, atol=3e-6)
    [line] = metrics(tmp_path / "grpo")
    assert line["unscored"] == np.isnan(scores).sum() and line["score"] == pytest.approx(np.nanmean(scores), rel=1e-5)


def test_rule_18_too_many_failures_stop_the_run_with_the_traceback(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"16 of 16 responses could not be scored[\s\S]*nobody can tell"):
        run_stage(train, replace(config, rewards=reward("never", failing=0.5)), tmp_path / "grpo")


def test_parts_are_weighed_and_a_reward_model_is_one_of_them(config, tmp_path):
    judge = ModelConfig(path=str(reward_folder(tmp_path / "judge")))
    parts = replace(
        reward("length", "favourite"), functions=(*reward("length", weight=2.0).functions, *reward("favourite", weight=0.0).functions)
    )
    run_stage(train, replace(config, rewards=parts, reward_model=judge, reward_model_weight=0.5), tmp_path / "both")
    [line] = metrics(tmp_path / "both")
    assert line["score"] == pytest.approx(2 * line["reward/length"] + 0.5 * line["reward/reward_model"], rel=1e-5)
    run_stage(train, replace(config, rewards=RewardsConfig(), reward_model=judge), tmp_path / "alone")
    assert metrics(tmp_path / "alone")[0]["score"] == line["reward/reward_model"]
    template = Path(judge.path) / "chat_template.jinja"
    template.write_text(template.read_text().replace("\\n", " "))
    with pytest.raises(ValueError, match=r"has another tokenizer or template"):
        run_stage(train, replace(config, reward_model=judge), tmp_path / "other")


def test_dynamic_sampling_refills_until_every_group_is_informative(config, tmp_path, capsys):
    rows = [{**row, "rewarded": n % 3 == 0} for n, row in enumerate(prompts(24))]
    config = replace(
        config, prompts=write_rows(tmp_path / "some.jsonl", rows), rewards=reward("of_row"), sampling_rounds=20, num_iterations=2
    )
    run_stage(train, config, tmp_path / "grpo")
    for line in metrics(tmp_path / "grpo"):
        assert line["learnt_groups"] == 4 < line["sampled_groups"] and line["sampled_groups"] % 4 == 0
        assert 0 < line["share_informative"] < 1 and line["zero_variance_groups"] == line["sampled_groups"] * (
            1 - line["share_informative"]
        )
    assert "fewer than" not in capsys.readouterr().out
    short = run_stage(train, replace(config, sampling_rounds=1, num_iterations=1), tmp_path / "short")
    [line] = metrics(short.parent)
    assert line["learnt_groups"] < 4 == line["sampled_groups"] and "fewer than 4 groups" in capsys.readouterr().out
    none = replace(config, rewards=reward("constant"), sampling_rounds=3)
    run_stage(train, none, tmp_path / "none")
    assert [line["sampled_groups"] for line in metrics(tmp_path / "none")] == [12, 12]


def test_refills_draw_other_random_numbers(config, tmp_path):
    """One prompt, asked in every round: its responses differ from round to round."""
    config = replace(config, prompts=write_rows(tmp_path / "one.jsonl", prompts(1)), rollout_batch_size=4, minibatch_size=4)
    run_stage(train, replace(config, rewards=reward("constant"), sampling_rounds=3), tmp_path / "grpo")
    third = [row["response"] for row in map(json.loads, (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines())]
    run_stage(train, replace(config, rewards=reward("constant")), tmp_path / "first")
    first = [row["response"] for row in map(json.loads, (tmp_path / "first" / "samples.jsonl").read_text().splitlines())]
    assert len(third) == len(first) == 4 and third != first


# --- mixed-in rows


def test_rule_14_ptx_adds_its_gradient_to_the_same_step(config, tmp_path):
    loss, ptx, count = text_gradient(config)
    alone = moved(config.policy.path, run_stage(train, config, tmp_path / "alone"))
    both = run_stage(train, replace(config, ptx_coef=0.7, ptx_batch_size=count), tmp_path / "both")
    close(moved(config.policy.path, both), {name: alone[name] + 0.7 * ptx[name] for name in ptx}, rtol=1e-4, atol=3e-6)
    [line] = metrics(tmp_path / "both")
    assert line["ptx_loss"] == pytest.approx(loss, rel=1e-5)
    assert line["ptx_grad_norm"] == pytest.approx(0.7 * norm(ptx), rel=1e-4)


def test_rule_14_without_its_coefficient_ptx_is_plain_grpo_bit_for_bit(config, tmp_path):
    config = several(config, ptx_coef=0.0, num_iterations=2)
    one = run_stage(train, config, tmp_path / "one")
    other = run_stage(train, replace(config, pretraining=replace(config.pretraining, path="")), tmp_path / "other")
    assert same(weights(one), weights(other)) and metrics(one.parent) == metrics(other.parent)


def test_demonstrations_can_be_mixed_in(config, tmp_path):
    rows = write_rows(tmp_path / "demonstrations.jsonl", conversations(3, most_turns=1))
    config = replace(config, pretraining=rows, pretraining_type="demonstration", ptx_coef=1.0, ptx_batch_size=3, ptx_window=100)
    run_stage(train, config, tmp_path / "grpo")
    chat = Chat.load(config.policy.path)
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in map(json.loads, Path(rows.path).read_text().splitlines()):
        prompt, answer = chat.prompt(row["messages"][:-1]), chat.response(row["messages"][-1]["content"])
        distribution = policy(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(distribution[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))
        count += len(answer)
    assert metrics(tmp_path / "grpo")[0]["ptx_loss"] == pytest.approx(total / count, rel=1e-4)


# --- partition invariance, start, exact resume


def several(config: GRPOConfig, **changes: Any) -> GRPOConfig:
    """Two epochs of two minibatches, mixed-in text, under a usual optimizer."""
    return replace(config, **{"optimizer": STEADY, "minibatch_size": 8, "num_epochs": 2, "ptx_coef": 0.5, "ptx_batch_size": 2, **changes})


@pytest.mark.parametrize("algorithm", ("grpo", "dapo", "gspo"))
def test_rule_01_nothing_depends_on_the_micro_batches(config, tmp_path, algorithm):
    config = several(replace(config, objective=ALGORITHMS[algorithm], mask_truncated=algorithm == "dapo"))
    expected = run_stage(train, replace(config, max_tokens_per_micro_batch=4096), tmp_path / "one_row")
    for budget in (72, 131):
        found = run_stage(train, replace(config, max_tokens_per_micro_batch=budget), tmp_path / f"rows_of_{budget}")
        alike(found.parent, expected.parent, ONE)


def test_what_was_drawn_with_stands_for_the_policys_own_pass(config, tmp_path, monkeypatch):
    passes, infer = [], inference.infer

    def counted(engine, model, *rest, **options):
        passes.append(model.name)
        return infer(engine, model, *rest, **options)

    monkeypatch.setattr(inference, "infer", counted)
    config = several(replace(config, num_iterations=2))
    asked_again = run_stage(train, config, tmp_path / "asked_again")
    assert passes == ["policy", "reference"] * 2
    passes.clear()
    reused = run_stage(train, replace(config, sampling=replace(config.sampling, reuse_logprobs=True)), tmp_path / "reused")
    assert passes == ["reference"] * 2
    close(weights(reused), weights(asked_again), rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(metrics(reused.parent), metrics(asked_again.parent), strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], abs=1e-5) and mine["ratio"] == pytest.approx(theirs["ratio"], abs=1e-5)
        assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=0.3)  # of some hundred tokens


@pytest.mark.parametrize("backend", ("ddp", "zero2", "zero3"))
def test_rule_01_17_nothing_depends_on_the_ranks(config, tmp_path, backend):
    config = several(replace(config, rewards=reward("sometimes", failing=0.9)))
    expected = run_stage(train, config, tmp_path / "alone")
    run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / backend))
    alike(tmp_path / backend, expected.parent, ONE)


def test_rule_05_a_run_starts_with_ratio_1_and_kl_0(config, tmp_path):
    run_stage(train, config, tmp_path / "grpo")
    [line] = metrics(tmp_path / "grpo")
    assert line["kl"] == 0 and line["kl_k3"] == 0 and line["clip_fraction"] == 0
    assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["sampler_ratio"] == pytest.approx(1, abs=1e-4)


def test_rule_05_a_first_step_without_a_signal_is_no_mistake(config, tmp_path):
    """Its groups all score alike; the check waits for the first minibatch that has something to teach."""
    config = objective(replace(config, rewards=reward("constant")), kl="none")
    run_stage(train, config, tmp_path / "grpo")
    assert metrics(tmp_path / "grpo")[0]["grad_norm"] == 0


def test_rule_20_importance_weights_are_1_where_sampler_and_trainer_agree(config, tmp_path):
    plain = run_stage(train, config, tmp_path / "plain")
    weighed = run_stage(train, objective(config, importance_cap=2.0), tmp_path / "weighed")
    close(weights(weighed), weights(plain), rtol=1e-4, atol=1e-5)
    capped = run_stage(train, objective(config, importance_cap=0.5), tmp_path / "capped")
    gradient, half = moved(config.policy.path, plain), moved(config.policy.path, capped)
    close(half, {name: 0.5 * g for name, g in gradient.items()}, rtol=1e-3, atol=1e-5)
    assert metrics(tmp_path / "capped")[0]["sampler_ratio_capped"] == 1.0


def everything(config: GRPOConfig) -> GRPOConfig:
    """All that a future can depend on: warm-up, EMA, refills, mixed-in rows, epochs that cross iterations."""
    rows = [{**row, "rewarded": n % 3 != 0} for n, row in enumerate(prompts(7))]
    warming = replace(STEADY, warmup_steps=3, eps=1e-8)
    return several(
        replace(config, prompts=write_rows(Path(config.prompts.path).with_name("seven.jsonl"), rows)),
        optimizer=warming,
        rewards=reward("of_row"),
        sampling_rounds=4,
        num_iterations=4,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every=1),
    )


def test_rule_08_killed_and_resumed_twice_is_bitwise_the_run_in_one_go(config, tmp_path):
    config = everything(config)
    run_stage(train, config, tmp_path / "straight")
    for dies_at in (2, 4):
        run_stage(train, config, tmp_path / "killed", dies_at=dies_at)
        assert len(metrics(tmp_path / "killed")) == dies_at and not (tmp_path / "killed" / "model").exists()
    run_stage(train, config, tmp_path / "killed")
    identical(tmp_path / "killed", tmp_path / "straight", 4, ONE)


def test_rule_08_on_zero2(config, tmp_path):
    config = replace(everything(config), num_iterations=3)
    job = dict(stage=STAGE, config=to_json(config))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "straight"))
    run_pair("zero2", "tests.runs:run_job", **job, folder=str(tmp_path / "killed"), deaths=[2, 3, 0])
    identical(tmp_path / "killed", tmp_path / "straight", 3, ONE)


def test_rule_16_a_lora_policy_starts_as_its_reference_and_resumes_bit_for_bit(config, tmp_path):
    config = everything(config)
    config = replace(config, policy=replace(config.policy, adapter=AdapterConfig(rank=4)), num_iterations=3)
    run_stage(train, config, tmp_path / "straight")
    lines = metrics(tmp_path / "straight")
    assert lines[0]["kl"] == 0 and lines[-1]["kl_k3"] > 1e-4
    run_stage(train, config, tmp_path / "killed", dies_at=2)
    run_stage(train, config, tmp_path / "killed")
    identical(tmp_path / "killed", tmp_path / "straight", 3, ONE)


def test_rule_24_a_stop_while_sampling_saves_the_iterations_start(config, tmp_path):
    identical(*stop_while_sampling(train, replace(several(config), num_iterations=2), tmp_path), 2, ONE)


# --- the whole


def test_the_reward_rises(config, tmp_path):
    config = replace(
        config,
        rewards=reward("favourite"),
        prompts=write_rows(tmp_path / "many.jsonl", prompts(32)),
        optimizer=OptimizerConfig(lr=5e-3, schedule="constant"),
        num_iterations=20,
        rollout_batch_size=32,
        minibatch_size=16,
        max_tokens_per_micro_batch=2048,
    )
    run_stage(train, config, tmp_path / "grpo")
    scores = [line["score"] for line in metrics(tmp_path / "grpo")]
    assert np.mean(scores[-4:]) > np.mean(scores[:4]) + 0.2
    assert metrics(tmp_path / "grpo")[-1]["kl"] > 0.05


def test_every_mistake_of_a_config_is_said_at_once(config):
    wrong = replace(config, group_size=3, minibatch_size=5, ptx_coef=-1.0, overlong_cache=10, rewards=RewardsConfig())
    wrong = objective(wrong, advantage="group_sdt", loss="reinforce", kl_coef=-1.0)
    found = "\n".join(gather_problems(wrong))
    assert "rollout_batch_size=16 must be a multiple of group_size=3; 15 works" in found
    assert "did you mean 'group_std'?" in found
    for field in ("minibatch_size", "ptx_coef", "overlong_cache", "objective.kl_coef", "rewards.functions", "objective.loss='reinforce'"):
        assert field in found


def test_the_defaults_need_only_their_inputs_and_smoke_has_no_problems():
    config = GRPOConfig(policy=ModelConfig(path="p"), rewards=reward("length"))
    config = replace(config, prompts=replace(config.prompts, path="rows.jsonl"))
    assert gather_problems(config) == [] and gather_problems(smoke(config)) == []
    for goal in ALGORITHMS.values():
        assert gather_problems(replace(config, objective=goal)) == [] and gather_problems(smoke(replace(config, objective=goal))) == []
    assert ALGORITHMS["grpo"] == ObjectiveConfig()
