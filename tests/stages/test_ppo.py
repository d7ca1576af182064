"""PPO-ptx: a whole iteration by hand, both gradients in one step, its start, and exact resume."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.config import CheckpointConfig, ModelConfig, OptimizerConfig, SamplingConfig, gather_problems, replace, to_json
from posttrain.data.chat import Chat
from posttrain.data.sampler import Sampler
from posttrain.engine.inference import infer
from posttrain.models.loading import Calibration, load_causal_lm, read_calibration
from posttrain.models.model import set_dropout
from posttrain.ops import whiten
from posttrain.rollout.local import Rollout, sample
from posttrain.rollout.start_checks import FirstStep
from posttrain.rollout.trees import response_trees
from posttrain.run import Stopped
from posttrain.stages.ppo import PPOConfig, ScoreConfig, policy_loss, train
from tests.engine.adapter_jobs import LORA, export_reward_model
from tests.engine.jobs import alone
from tests.pairs import BACKENDS, run_pair
from tests.runs import LINEAR, STEP, close, logged, metrics, nearly, open_run, reward_folder, run_stage, same, weights, write_rows
from tests.stages.test_ppo_equations import slow_gae
from tests.stages.worlds import prompts, texts
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer

STEADY = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1, schedule="constant")
STAGE = "posttrain.stages.ppo:train"


def policy_folder(folder: Path, family: str = "llama", inclination: float = 4.0) -> Path:
    """A random policy that ends its turn now and then: its head likes the mean hidden state to be followed by an end of turn."""
    model = tiny_model(family)
    ids = torch.randint(5, 300, (8, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = model.get_decoder()(ids).last_hidden_state.mean((0, 1))
        model.get_output_embeddings().weight[4] = inclination * mean / mean.square().sum()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path) -> PPOConfig:
    """Eight ragged prompts, all of them in each rollout; one minibatch of them all; texts in ragged windows."""
    return PPOConfig(
        policy=ModelConfig(path=str(policy_folder(tmp_path / "policy"))),
        reward_model=ModelConfig(path=str(reward_folder(tmp_path / "judge", calibration=Calibration(bias=0.3, mean=0.1, std=1.7)))),
        prompts=write_rows(tmp_path / "prompts.jsonl", prompts(8)),
        pretraining=write_rows(tmp_path / "texts.jsonl", texts(6)),
        policy_optimizer=LINEAR,
        critic_optimizer=LINEAR,
        sampling=SamplingConfig(max_new_tokens=9),
        num_iterations=1,
        rollout_batch_size=8,
        minibatch_size=8,
        ptx_coef=0.0,
        ptx_batch_size=1,
        ptx_window=40,
        max_prompt_length=60,
        max_tokens_per_micro_batch=100,
    )


# --- one iteration by hand


def rollout_of(config: PPOConfig, folder: Path, seed: int = 0) -> Rollout:
    """What the stage samples in its first iteration."""
    chat = Chat.load(config.policy.path)
    asked = [chat.prompt(row["prompt"]) for row in map(json.loads, Path(config.prompts.path).read_text().splitlines())]
    order = Sampler(len(asked), config.rollout_batch_size, seed).take()
    with open_run(folder) as run:
        policy = run.engine.freeze(load_causal_lm(config.policy, chat.tokenizer), name="policy")
        ends = chat.end_of_turn_ids
        return sample(policy, [asked[i] for i in order], config.sampling, world=run.engine.world, seed=seed, stop_ids=ends)


def plain_models(config: PPOConfig) -> tuple[Any, Any]:
    """Policy and reward model as transformers loads them."""
    policy = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32)
    return policy.eval(), AutoModelForSequenceClassification.from_pretrained(config.reward_model.path, dtype=torch.float32).eval()


def slow_logprobs(policy: Any, rollout: Rollout, temperature: float) -> Tensor:
    """(T,), one response at a time."""
    found = []
    for b, response in enumerate(rollout.responses):
        prompt = rollout.prompts[int(rollout.prompt_of[b])]
        distribution = (policy(torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)
        found += [distribution[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    return torch.stack(found)


def slow_values(critic: Any, rollout: Rollout, bias: float, scale: float) -> tuple[Tensor, list[float]]:
    """Values (T,) before each token, and the score after the last one of each response."""
    values, scores = [], []
    for b, response in enumerate(rollout.responses):
        prompt = rollout.prompts[int(rollout.prompt_of[b])]
        hidden = critic.model(torch.tensor([prompt + response])).last_hidden_state[0]
        calibrated = (critic.score(hidden).squeeze(-1) - bias) / scale
        values.append(calibrated[len(prompt) - 1 : -1])
        scores.append(calibrated[-1].item())
    return torch.cat(values), scores


def slow_targets(config: PPOConfig, rollout: Rollout, values: Tensor, scores: list[float]) -> tuple[Tensor, Tensor]:
    """Whitened advantages (T,) and returns (T,) of a first iteration, in which the KL is 0."""
    advantages: list[float] = []
    for b, mine in enumerate(values.split([len(response) for response in rollout.responses])):
        score = min(max(scores[b], -config.score.clip), config.score.clip) if config.score.clip else scores[b]
        rewards = [0.0] * (len(mine) - 1) + [score if rollout.finished[b] else config.score.missing_eos_score]
        advantages += slow_gae(rewards, mine.tolist(), config.gamma, config.lam)
    found = np.array(advantages)
    returns = torch.tensor(found, dtype=torch.float32) + values.detach()
    return torch.tensor((found - found.mean()) / np.sqrt(found.var() + 1e-8), dtype=torch.float32), returns


def slow_iteration(config: PPOConfig, rollout: Rollout, scale: float = 1.0) -> dict[str, Any]:
    """The gradients of both models at the first step, by plain transformers: ratios are 1, values are the old ones."""
    policy, critic = plain_models(config)
    logprobs = slow_logprobs(policy, rollout, config.sampling.temperature)
    values, scores = slow_values(critic, rollout, read_calibration(config.reward_model.path).bias, scale)
    advantages, returns = slow_targets(config, rollout, values, scores)
    (-(advantages * logprobs).mean()).backward()
    critic_loss = 0.5 * (values - returns).square().mean()
    critic_loss.backward()
    return {
        "policy": {name: p.grad for name, p in policy.named_parameters()},
        "critic": {name: p.grad for name, p in critic.named_parameters()},
        "critic_loss": critic_loss.item(),
        "scores": scores,
    }


def moved(before: str | Path, after: Path) -> dict[str, Tensor]:
    """The gradient that a LINEAR step followed."""
    start, end = weights(Path(before)), weights(after)
    return {name: (start[name] - end[name]) / STEP for name in start}


@pytest.mark.parametrize("scaling", ("none", "calibration"))
def test_rule_15_one_iteration_is_the_one_by_hand(config, tmp_path, scaling):
    config = replace(config, score=ScoreConfig(scaling=scaling, clip=1.0, missing_eos_score=-2.0), gamma=0.97)
    config = replace(config, sampling=replace(config.sampling, temperature=0.8))
    rollout = rollout_of(config, tmp_path / "sampling")
    assert {True, False} == set(rollout.finished) and len(set(map(len, rollout.responses))) > 3
    expected = slow_iteration(config, rollout, scale=1.7 if scaling == "calibration" else 1.0)
    trained = run_stage(train, config, tmp_path / "ppo")
    close(moved(config.policy.path, trained), expected["policy"], rtol=1e-4, atol=3e-6)
    close(moved(config.reward_model.path, tmp_path / "ppo" / "critic"), expected["critic"], rtol=1e-4, atol=1e-5)
    [line] = metrics(tmp_path / "ppo")
    shaped = np.clip(expected["scores"], -1, 1)
    shaped[~np.array(rollout.finished)] = -2.0
    assert line["score"] == pytest.approx(np.mean(expected["scores"]), rel=1e-5)
    assert line["shaped_score"] == line["reward"] == pytest.approx(shaped.mean(), rel=1e-5)
    assert line["critic_loss"] == pytest.approx(expected["critic_loss"], rel=1e-4)
    assert line["share_finished"] == np.mean(rollout.finished)
    assert line["response_length"] == pytest.approx(np.mean([len(r) for r in rollout.responses]))


def test_three_epochs_are_clipped_around_the_policy_and_values_of_the_rollout(config, tmp_path):
    """Three steps of plain gradient descent on one rollout, by hand; ratios and values leave the clip range on the way."""
    descent = replace(LINEAR, betas=(0.0, 0.0))
    gentle = replace(descent, lr=0.2 * descent.lr)  # at the full step values overshoot, and rounding grows with them
    config = replace(config, num_epochs=3, clip_range=0.1, value_clip_range=0.1, policy_optimizer=descent, critic_optimizer=gentle)
    rollout = rollout_of(config, tmp_path / "sampling")
    policy, critic = plain_models(config)
    bias = read_calibration(config.reward_model.path).bias
    old = slow_logprobs(policy, rollout, 1.0).detach()
    old_values, scores = slow_values(critic, rollout, bias, 1.0)
    old_values = old_values.detach()
    advantages, returns = slow_targets(config, rollout, old_values, scores)
    outside = outside_values = 0
    for _ in range(3):
        ratio = (slow_logprobs(policy, rollout, 1.0) - old).exp()
        bound = ratio.clamp(0.9, 1.1)
        (-torch.minimum(ratio * advantages, bound * advantages).mean()).backward()
        values, _ = slow_values(critic, rollout, bias, 1.0)
        near = old_values + (values - old_values).clamp(-0.1, 0.1)
        (0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()).backward()
        outside += int((ratio * advantages > bound * advantages).sum())
        outside_values += int(((near - returns) ** 2 > (values - returns) ** 2).sum())
        with torch.no_grad():
            for model, step in ((policy, STEP), (critic, 0.2 * STEP)):
                for parameter in model.parameters():
                    parameter.sub_(step * parameter.grad)
                    parameter.grad = None
    run_stage(train, config, tmp_path / "ppo")
    assert outside > 5 and outside_values > 5
    close(weights(tmp_path / "ppo" / "model"), dict(policy.named_parameters()), rtol=1e-4, atol=1e-5)
    close(weights(tmp_path / "ppo" / "critic"), dict(critic.named_parameters()), rtol=1e-4, atol=1e-5)
    [line] = metrics(tmp_path / "ppo")
    assert line["clip_fraction"] == pytest.approx(outside / (3 * rollout.num_tokens), abs=1e-6)


def test_rule_15_running_scaling_comes_before_the_clip(config, tmp_path):
    config = replace(config, score=ScoreConfig(scaling="running", clip=0.5))
    rollout = rollout_of(config, tmp_path / "sampling")
    scores = np.array(slow_iteration(config, rollout)["scores"])
    shaped = np.clip((scores - scores.mean()) / scores.std(), -0.5, 0.5)
    shaped[~np.array(rollout.finished)] = -1.0
    run_stage(train, config, tmp_path / "ppo")
    assert metrics(tmp_path / "ppo")[0]["shaped_score"] == pytest.approx(shaped.mean(), abs=1e-5)


def test_rule_15_no_response_that_ends_all_scores_replaced(config, tmp_path):
    never = tiny_folder(tmp_path / "never")
    run_stage(train, replace(config, policy=ModelConfig(path=str(never)), sampling=SamplingConfig(max_new_tokens=3)), tmp_path / "ppo")
    [line] = metrics(tmp_path / "ppo")
    assert line["share_finished"] == 0 and line["shaped_score"] == line["reward"] == -1.0 and line["score"] != -1.0


# --- the ptx term


def text_gradient(config: PPOConfig) -> tuple[float, dict[str, Tensor], int]:
    """Mean NLL over all windows of the texts, its gradient, and how many windows there are."""
    tokenizer = tiny_tokenizer()
    rows = map(json.loads, Path(config.pretraining.path).read_text().splitlines())
    stream = [i for row in rows for i in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    windows = [stream[i : i + config.ptx_window] for i in range(0, len(stream), config.ptx_window)]
    model = AutoModelForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32)
    ids = [torch.tensor([window]) for window in windows]
    assert min(len(window) for window in windows) > 1
    mean = sum(model(input_ids=i, labels=i).loss * (i.shape[1] - 1) for i in ids) / sum(len(window) - 1 for window in windows)
    mean.backward()
    return mean.item(), {name: p.grad for name, p in model.named_parameters()}, len(windows)


@pytest.mark.parametrize("backend", ("plain", *BACKENDS))
def test_rule_14_one_step_follows_the_sum_of_both_gradients(config, tmp_path, backend):
    """Gradient of the step == grad(ppo) + c grad(ptx), each of them by plain transformers; the critic's is its own."""
    loss, ptx, count = text_gradient(config)
    config = replace(config, ptx_coef=0.7, ptx_batch_size=count)
    by_hand = slow_iteration(config, rollout_of(config, tmp_path / "sampling"))
    expected = {name: by_hand["policy"][name] + 0.7 * ptx[name] for name in ptx}
    if backend == "plain":
        run_stage(train, config, tmp_path / "ppo")
    else:
        run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / "ppo"))
    close(moved(config.policy.path, tmp_path / "ppo" / "model"), expected, rtol=1e-4, atol=3e-6)
    close(moved(config.reward_model.path, tmp_path / "ppo" / "critic"), by_hand["critic"], rtol=1e-4, atol=1e-5)
    [line] = metrics(tmp_path / "ppo")
    assert line["ptx_loss"] == pytest.approx(loss, rel=1e-5)
    norms = {"policy": norm(by_hand["policy"]), "ptx": 0.7 * norm(ptx)}
    assert {name: line[f"{name}_grad_norm"] for name in norms} == pytest.approx(norms, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def several(config: PPOConfig, **changes: Any) -> PPOConfig:
    """Two epochs of two minibatches, with texts, under a usual optimizer."""
    optimizers = {"policy_optimizer": STEADY, "critic_optimizer": replace(STEADY, lr=2e-2)}
    return replace(config, **{**optimizers, "minibatch_size": 4, "num_epochs": 2, "ptx_coef": 0.5, "ptx_batch_size": 2, **changes})


def test_rule_14_without_its_coefficient_ptx_is_plain_ppo_bit_for_bit(config, tmp_path):
    config = several(config, ptx_coef=0.0, num_iterations=2)
    with_texts = run_stage(train, config, tmp_path / "with_texts")
    plain = run_stage(train, replace(config, pretraining=replace(config.pretraining, path="")), tmp_path / "plain")
    assert metrics(with_texts.parent) == metrics(plain.parent)
    assert same(weights(with_texts), weights(plain)) and "ptx_loss" not in metrics(plain.parent)[0]
    mixed = run_stage(train, replace(config, ptx_coef=0.1), tmp_path / "mixed")
    assert not same(weights(mixed), weights(plain)) and "ptx_loss" in metrics(mixed.parent)[0]


# --- partition invariance on a given rollout


def test_rule_01_nothing_depends_on_the_micro_batches(config, tmp_path):
    config = several(config)
    expected = run_stage(train, replace(config, max_tokens_per_micro_batch=4096), tmp_path / "one_row")
    for budget in (72, 131):
        found = run_stage(train, replace(config, max_tokens_per_micro_batch=budget), tmp_path / f"rows_of_{budget}")
        alike(found.parent, expected.parent)


def test_rule_13_an_update_that_is_refused_is_told_and_left_out(config, tmp_path, monkeypatch, capsys):
    """The loss of the second of four updates isn't finite: three steps are made and counted, and their means are logged."""
    config, calls = several(config, ptx_coef=0.0, max_tokens_per_micro_batch=4096), []

    def now_and_then(*args: Any) -> Any:
        calls.append(args)
        loss, stats = policy_loss(*args)
        return (loss * math.nan, {name: x * math.nan for name, x in stats.items()}) if len(calls) == 2 else (loss, stats)

    monkeypatch.setattr("posttrain.stages.ppo.policy_loss", now_and_then)
    with open_run(tmp_path / "ppo", checkpoint=CheckpointConfig()) as run:
        train(config, run)
        assert run.counters.optimizer_steps == 3 and len(run.warnings) == 1
    [line] = metrics(tmp_path / "ppo")
    assert line["skipped_steps"] == 1 and all(math.isfinite(line[name]) for name in ("policy_loss", "grad_norm", "ratio", "clip_fraction"))
    assert "1 of 4 updates of policy were refused" in capsys.readouterr().out


@pytest.mark.parametrize("std", (0.0, math.nan))
def test_calibration_needs_a_spread(config, tmp_path, std):
    judge = reward_folder(tmp_path / "flat", calibration=Calibration(std=std))
    config = replace(config, reward_model=ModelConfig(path=str(judge)), score=ScoreConfig(scaling="calibration"))
    with pytest.raises(ValueError, match=rf"which is {std} in '.*flat'; scaling='running' works"):
        run_stage(train, config, tmp_path / "ppo")
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists() or not metrics(tmp_path / "ppo")


def test_too_many_prompts_that_are_too_long_stop_the_run(config, tmp_path):
    with pytest.raises(ValueError, match=r"above max_dropped_fraction=0\.2"):
        run_stage(train, replace(config, max_prompt_length=20, max_dropped_fraction=0.2), tmp_path / "ppo")
    run_stage(train, replace(config, max_prompt_length=20, max_dropped_fraction=0.9), tmp_path / "ppo")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_01_nothing_depends_on_the_ranks(config, tmp_path, backend):
    config = several(config)
    expected = run_stage(train, config, tmp_path / "alone")
    run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / backend))
    alike(tmp_path / backend, expected.parent)


def alike(found: Path, expected: Path, models: tuple[str, ...] = ("model", "critic")) -> None:
    tiny = ("kl", "kl_k3", "approx_kl", "policy_loss")  # 0 but for rounding
    ours, theirs = ([{n: x for n, x in line.items() if n not in tiny} for line in logged(folder)] for folder in (found, expected))
    assert ours == nearly(theirs)
    for name in tiny:
        assert logged(found, name)[0] == pytest.approx(logged(expected, name)[0], rel=1e-5, abs=2e-6)
    for model in models:
        close(weights(found / model), weights(expected / model), rtol=1e-5, atol=1e-5)


# --- the start of a run


def test_rule_05_a_run_starts_with_ratio_1_and_kl_0(config, tmp_path):
    run_stage(train, config, tmp_path / "ppo")
    [line] = metrics(tmp_path / "ppo")
    assert line["kl"] == 0 and line["kl_k3"] == 0 and line["clip_fraction"] == 0
    assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["approx_kl"] == pytest.approx(0, abs=1e-5)


def first_step(config: PPOConfig, folder: Path, *, dropout: float = 0.0, temperature: float = 1.0, what: str = "") -> None:
    """The checks around a first update on the policy's own samples; `what` names the wire that is cut."""
    rollout = rollout_of(config, folder / "sampling")
    chat = Chat.load(config.policy.path)
    with open_run(folder) as run:
        engine = run.engine
        module = load_causal_lm(config.policy, chat.tokenizer)
        policy = engine.train(module, OptimizerConfig(lr=1e-3), 5, name="policy")
        old = torch.cat(infer(engine, policy, response_trees(rollout), ("logprobs",), 500)["logprobs"])
        set_dropout(module, dropout)
        batch = engine.pack(response_trees(rollout, fields={"old_logprobs": old}), 500)
        check = FirstStep(policy, SamplingConfig(temperature=temperature))
        check.before(batch)
        with engine.update(policy) as update:
            for micro in batch.micro_batches():
                loss = -policy.logprobs(micro).sum()
                update.backward(loss * 0 if what == "gradient" else loss, over=batch.num_tokens)
        if what == "optimizer":  # as if the step had gone to other weights
            with torch.no_grad():
                for parameter, start in zip(module.parameters(), load_causal_lm(config.policy, chat.tokenizer).parameters()):
                    parameter.copy_(start)
        check.after(update.grad_norm, update.lr, update.stepped)
        assert not check.is_due


def test_rule_05_a_healthy_first_step_passes(config, tmp_path):
    first_step(config, tmp_path)


def test_rule_05_what_is_trained_must_be_what_was_sampled_from(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"before the first step policy's mean \|log ratio\| to its own samples"):
        first_step(config, tmp_path / "temperature", temperature=0.7)
    gpt2 = replace(config, policy=ModelConfig(path=str(tiny_folder(tmp_path / "gpt2", "gpt2"))))
    with pytest.raises(RuntimeError, match="what is trained is not what was sampled from"):
        first_step(gpt2, tmp_path / "dropout", dropout=0.1)


def test_rule_05_the_first_step_must_arrive(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"had gradient norm 0\.0"):
        first_step(config, tmp_path / "gradient", what="gradient")
    with pytest.raises(RuntimeError, match="changed no weight: the optimizer is not connected"):
        first_step(config, tmp_path / "optimizer", what="optimizer")


def test_rule_05_a_learning_rate_of_0_is_no_mistake(config, tmp_path):
    still = run_stage(train, replace(config, policy_optimizer=OptimizerConfig(lr=0.0)), tmp_path / "ppo")
    assert same(weights(still), weights(Path(config.policy.path)))


def test_rule_12_a_reward_model_with_other_tokens_is_refused(config, tmp_path):
    judge = Path(config.reward_model.path)
    (judge / "chat_template.jinja").write_text((judge / "chat_template.jinja").read_text().replace("\\n", " "))
    with pytest.raises(ValueError, match=r"has another tokenizer or template than policy\.path"):
        run_stage(train, config, tmp_path / "ppo")


# --- exact resume


def everything(config: PPOConfig) -> PPOConfig:
    """All that a future can depend on: two optimizers with warm-up, EMA, adaptive KL, running scale, ptx stream, epochs."""
    warming = replace(STEADY, warmup_steps=3, eps=1e-8)
    return several(
        config,
        policy_optimizer=warming,
        critic_optimizer=replace(warming, lr=2e-2),
        num_iterations=4,
        rollout_batch_size=6,  # of 8 prompts: iterations cross the ends of epochs
        minibatch_size=3,
        ptx_batch_size=3,
        score=ScoreConfig(scaling="running", clip=2.0),
        kl_target=0.01,
        ema_decay=0.9,
        critic_warmup_iterations=1,
        checkpoint=CheckpointConfig(every=1),
    )


def identical(killed: Path, straight: Path, steps: int, models: tuple[str, ...] = ("model", "critic")) -> None:
    assert metrics(killed) == metrics(straight) and len(metrics(killed)) == steps
    for model in models:
        assert same(weights(killed / model), weights(straight / model)), model
    assert (killed / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_rule_08_killed_and_resumed_twice_is_bitwise_the_run_in_one_go(config, tmp_path):
    config = everything(config)
    run_stage(train, config, tmp_path / "straight")
    for dies_at in (2, 4):
        run_stage(train, config, tmp_path / "killed", dies_at=dies_at)
        assert len(metrics(tmp_path / "killed")) == dies_at and not (tmp_path / "killed" / "model").exists()
    run_stage(train, config, tmp_path / "killed")
    identical(tmp_path / "killed", tmp_path / "straight", 4)
    lines = metrics(tmp_path / "straight")
    assert lines[0]["kl_coef"] != lines[-1]["kl_coef"] and "policy_loss" not in lines[0] and "policy_loss" in lines[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_08_on_every_backend(config, tmp_path, backend):
    config = replace(everything(config), num_iterations=3)
    job = dict(stage=STAGE, config=to_json(config))
    run_pair(backend, "tests.runs:run_job", **job, folder=str(tmp_path / "straight"))
    run_pair(backend, "tests.runs:run_job", **job, folder=str(tmp_path / "killed"), deaths=[2, 3, 0])
    identical(tmp_path / "killed", tmp_path / "straight", 3)


def stop_while_sampling(stage: Callable, config: Any, folder: Path) -> tuple[Path, Path]:
    """The folders of a run that is told to stop in its first rollout and begun again, and of one in one go."""
    straight = run_stage(stage, config, folder / "straight")
    with open_run(folder / "stopped") as run:
        assert not run.engine.stop.signal_number  # from here on the signal is a flag
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stage(config, run)
    assert stopped.value.code == 143 and "step_000000" in stopped.value.message
    return run_stage(stage, config, folder / "stopped").parent, straight.parent


def test_rule_24_a_stop_while_sampling_saves_the_iterations_start(config, tmp_path):
    identical(*stop_while_sampling(train, replace(several(config), num_iterations=2), tmp_path), 2)


# --- adapters


def adapted(config: PPOConfig, place: Path) -> PPOConfig:
    """LoRA policy and critic; the reward model is an adapter of the policy's base, trained a little."""
    alone(export_reward_model, folder=config.policy.path, out=str(place), merge=False)
    return replace(config, policy=replace(config.policy, adapter=LORA), reward_model=ModelConfig(path=str(place), adapter=LORA))


def test_rule_16_four_models_over_one_base_start_as_one_policy_and_leave_the_base_alone(config, tmp_path):
    config = adapted(several(config, num_iterations=3), tmp_path / "judge")
    trained = run_stage(train, config, tmp_path / "ppo")
    lines = metrics(tmp_path / "ppo")
    assert lines[0]["kl"] == 0 and lines[-1]["kl_k3"] > 1e-4  # the reference has stayed where it was
    start, end = weights(Path(config.policy.path)), weights(trained)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "_proj" in name}


def test_rule_08_with_adapters(config, tmp_path):
    config = replace(adapted(everything(config), tmp_path / "judge"), num_iterations=3)
    run_stage(train, config, tmp_path / "straight")
    run_stage(train, config, tmp_path / "killed", dies_at=2)
    run_stage(train, config, tmp_path / "killed")
    identical(tmp_path / "killed", tmp_path / "straight", 3)


@pytest.mark.parametrize("backend", ("zero2", "zero3"))
def test_rule_01_nothing_depends_on_the_ranks_with_adapters(config, tmp_path, backend):
    config = adapted(several(config), tmp_path / "judge")
    expected = run_stage(train, config, tmp_path / "alone")
    run_pair(backend, "tests.runs:run_job", stage=STAGE, config=to_json(config), folder=str(tmp_path / backend))
    alike(tmp_path / backend, expected.parent)


# --- options and the whole


def test_the_critic_warms_up_alone(config, tmp_path):
    config = several(config, num_iterations=2, critic_warmup_iterations=1)
    run_stage(train, config, tmp_path / "ppo")
    first, second = metrics(tmp_path / "ppo")
    assert "policy_loss" not in first and "ptx_loss" not in first and first["critic_loss"] > 0 and "policy_loss" in second
    assert second["kl"] == 0  # the policy hasn't moved before its first update


def test_the_average_of_the_policy_is_exported(config, tmp_path):
    """EMA after two steps from the weights after none, one and two of them."""
    config = replace(config, policy_optimizer=STEADY, num_iterations=2, ema_decay=0.75)
    averaged = weights(run_stage(train, config, tmp_path / "average"))
    plain = replace(config, ema_decay=0.0)
    trail = [weights(Path(config.policy.path))]
    trail += [weights(run_stage(train, replace(plain, num_iterations=n), tmp_path / f"after_{n}")) for n in (1, 2)]
    expected = {name: 0.75**2 * trail[0][name] + 0.25 * 0.75 * trail[1][name] + 0.25 * trail[2][name] for name in averaged}
    close(averaged, expected, atol=1e-6)


def test_whitening_can_be_left_out(config, tmp_path):
    plain = run_stage(train, replace(config, whiten_advantages=False), tmp_path / "plain")
    white = run_stage(train, config, tmp_path / "white")
    one, other = moved(config.policy.path, plain), moved(config.policy.path, white)
    assert norm({name: one[name] - other[name] for name in one}) > 0.05 * norm(one)
    assert same(weights(tmp_path / "plain" / "critic"), weights(tmp_path / "white" / "critic"))  # returns keep their scale
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])


def test_the_kl_of_later_iterations_is_in_the_reward(config, tmp_path):
    """reward = shaped score - kl_coef * KL, response by response, so also on average."""
    config = several(config, ptx_coef=0.0, num_iterations=3, kl_coef=0.3)
    run_stage(train, config, tmp_path / "ppo")
    for line in metrics(tmp_path / "ppo"):
        assert line["reward"] == pytest.approx(line["shaped_score"] - 0.3 * line["kl"], abs=1e-5)
    assert metrics(tmp_path / "ppo")[-1]["kl_k3"] > 1e-4


def test_the_score_rises(config, tmp_path):
    """Thirty iterations against a random reward model, texts mixed in."""
    config = replace(
        config,
        prompts=write_rows(tmp_path / "many.jsonl", prompts(64)),
        policy_optimizer=OptimizerConfig(lr=5e-3, schedule="constant"),
        critic_optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        score=ScoreConfig(scaling="calibration"),
        num_iterations=30,
        rollout_batch_size=32,
        minibatch_size=16,
        ptx_coef=0.1,
        ptx_batch_size=4,
        kl_coef=0.005,
        max_tokens_per_micro_batch=2048,
    )
    run_stage(train, config, tmp_path / "ppo")
    scores = [line["shaped_score"] for line in metrics(tmp_path / "ppo")]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.5
    assert metrics(tmp_path / "ppo")[-1]["kl"] > 0.1


def test_every_mistake_of_a_config_is_said_at_once(config):
    wrong = replace(config, minibatch_size=5, ptx_coef=-1.0, gamma=0.0, num_epochs=0, sampling=SamplingConfig(temperature=0.0))
    found = "\n".join(gather_problems(wrong))
    assert "minibatch_size=5 must divide rollout_batch_size=8; 4 works" in found
    for field in ("ptx_coef", "gamma", "num_epochs", "sampling.temperature"):
        assert field in found
