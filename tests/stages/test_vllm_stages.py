"""GRPO and PPO with vLLM as the sampler: what each token weighs, what is logged, weights in time, and checks before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.config import DataConfig, ModelConfig, SamplingConfig, VLLMConfig, replace
from posttrain.rollout import experience as rollout_experience
from posttrain.rollout import vllm_server
from posttrain.rollout.experience import Experience, importance_weights
from posttrain.rollout.generate import GenerateConfig, generate
from posttrain.rollout.generate import check as generate_check
from posttrain.rollout.local import Rollout
from posttrain.stages import grpo, ppo
from posttrain.stages.grpo import GRPOConfig
from posttrain.stages.ppo import PPOConfig
from tests.pairs import free_port
from tests.rollout.vllm_stub import Stub, serving
from tests.runs import LINEAR, close, metrics, reward_folder, run_stage, same, weights, write_rows
from tests.stages.test_grpo import reward
from tests.stages.test_ppo import moved, policy_folder
from tests.stages.worlds import prompts

CHANCE = math.log(1.25)  # how much likelier a stub says that its tokens were: ratios are then 0.8 everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("stages") / "policy")


@pytest.fixture(autouse=True)
def no_connection_outlives_its_test():
    yield
    vllm_server.open_server.cache_clear()


def grpo_config(folder: Path, place: Path, **changes: Any) -> GRPOConfig:
    """Two iterations of two groups, one LINEAR step each."""
    config = GRPOConfig(
        policy=ModelConfig(path=str(folder)),
        prompts=write_rows(place / "prompts.jsonl", prompts(4)),
        rewards=reward("length"),
        optimizer=LINEAR,
        sampling=SamplingConfig(max_new_tokens=7, temperature=0.9),
        num_iterations=1,
        rollout_batch_size=8,
        group_size=4,
        minibatch_size=8,
        max_prompt_length=60,
        max_tokens_per_micro_batch=120,
    )
    return replace(config, **changes)


def ppo_config(folder: Path, place: Path, **changes: Any) -> PPOConfig:
    config = PPOConfig(
        policy=ModelConfig(path=str(folder)),
        reward_model=ModelConfig(path=str(reward_folder(place / "judge"))),
        prompts=write_rows(place / "prompts.jsonl", prompts(6)),
        policy_optimizer=LINEAR,
        critic_optimizer=LINEAR,
        sampling=SamplingConfig(max_new_tokens=7),
        num_iterations=1,
        rollout_batch_size=6,
        minibatch_size=6,
        ptx_coef=0.0,
        max_prompt_length=60,
        max_tokens_per_micro_batch=120,
    )
    return replace(config, **changes)


CONFIGS = {"grpo": grpo_config, "ppo": ppo_config}
STAGES = {"grpo": grpo.train, "ppo": ppo.train}


def trained(name: str, folder: Path, place: Path, *, off: float = 0.0, cap: float = 2.0, **changes: Any) -> tuple[Path, Stub]:
    """The stage with a stub for a sampler, whose log-probabilities are `off`; a server of its own, that begins with other weights."""
    with serving(folder, off=off) as stub:
        for parameter in stub.model.parameters():
            parameter.data.zero_()
        config = CONFIGS[name](folder, place, **changes)
        config = replace(config, sampling=replace(config.sampling, vllm=VLLMConfig(mode="server", url=stub.url, importance_cap=cap)))
        return run_stage(STAGES[name], config, place / name), stub


# --- what a token weighs


def experience(sampled: list[float], trainer: list[float]) -> Experience:
    rollout = Rollout([[5]], [[7] * len(sampled)], torch.tensor([0]), [torch.tensor(sampled)], [True])
    logprobs = torch.tensor(trainer)
    return Experience(rollout, [len(sampled)], torch.tensor([True]), logprobs, torch.zeros(0), torch.zeros(len(sampled)))


def test_tokens_weigh_the_ratio_up_to_the_cap_and_the_mismatch_is_told():
    sampled, trainer = [-1.0, -2.0, -0.5, -3.0], [-1.5, -2.0, -0.25, -1.0]
    found, told = importance_weights(experience(sampled, trainer), 2.0)
    ratios = [math.exp(t - s) for s, t in zip(sampled, trainer)]
    assert found.tolist() == pytest.approx([min(ratio, 2.0) for ratio in ratios])
    gaps = [s - t for s, t in zip(sampled, trainer)]
    assert told == pytest.approx(
        {
            "sampler_ratio": sum(ratios) / 4,
            "sampler_ratio_max": max(ratios),
            "sampler_ratio_capped": 1 / 4,
            "sampler_gap": sum(map(abs, gaps)) / 4,
            "sampler_kl": sum(gaps) / 4,
            "sampler_kl_k3": sum(ratio - 1 + gap for ratio, gap in zip(ratios, gaps)) / 4,
        }
    )
    ones, told = importance_weights(experience(sampled, trainer), 0.0)
    assert ones.tolist() == [1.0] * 4 and set(told) == {"sampler_ratio", "sampler_ratio_max"}


def test_without_vllm_nothing_is_weighed():
    assert SamplingConfig().importance_cap == 0 and SamplingConfig(vllm=VLLMConfig(importance_cap=3.0)).importance_cap == 0
    assert SamplingConfig(vllm=VLLMConfig(mode="server")).importance_cap == 2


@pytest.mark.parametrize("name", ("grpo", "ppo"))
def test_the_policys_gradient_is_weighed_and_capped_and_nothing_else_is(folder, tmp_path, name):
    """Where every ratio is one number, the gradient is that number times the one without weights."""
    plain, _ = trained(name, folder, tmp_path / "plain", cap=0.0)
    weighed, _ = trained(name, folder, tmp_path / "weighed", off=0.05)
    capped, _ = trained(name, folder, tmp_path / "capped", off=-0.08, cap=1.05)
    expected = moved(folder, plain)
    for model, factor in ((weighed, math.exp(-0.05)), (capped, 1.05)):
        close(moved(folder, model), {key: factor * g for key, g in expected.items()}, rtol=1e-3, atol=2e-5)
    [line] = metrics(weighed.parent)
    assert line["sampler_gap"] == pytest.approx(0.05, abs=1e-5) and line["sampler_kl"] == pytest.approx(0.05, abs=1e-5)
    assert line["sampler_ratio_capped"] == 0 and metrics(capped.parent)[0]["sampler_ratio_capped"] == 1
    if name == "ppo":
        assert same(weights(plain.parent / "critic"), weights(weighed.parent / "critic"))


@pytest.mark.parametrize("name", ("grpo", "ppo"))
def test_two_iterations_learn_as_with_exact_ratios_each_from_its_own_weights(folder, tmp_path, name):
    """Weights arrive before each rollout: else the ratios of the second would be those of another policy."""
    settings = {"num_iterations": 2}
    found, stub = trained(name, folder, tmp_path / "weighed", **settings)
    exact, _ = trained(name, folder, tmp_path / "exact", cap=0.0, **settings)
    close(weights(found), weights(exact), rtol=1e-3, atol=1e-5)
    lines = metrics(found.parent)
    assert [line["sampler_gap"] < 1e-5 for line in lines] == [True, True] and all(line["sampler_ratio_capped"] == 0 for line in lines)
    assert [call for call in stub.calls if call != "/v1/completions"] == ["/collective_rpc", "/reset_prefix_cache"] * 2
    start: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert same(stub.loaded[0], start), "the first rollout is the starting policy's"
    assert any(not torch.equal(stub.loaded[1][key], start[key]) for key in start)


def test_a_server_that_keeps_its_weights_shows_in_what_is_logged_and_is_warned_of(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout_experience, "TOO_FAR", 1e-3)
    with serving(folder, deaf=True) as stub:
        config = grpo_config(folder, tmp_path, num_iterations=2)
        config = replace(config, sampling=replace(config.sampling, vllm=VLLMConfig(mode="server", url=stub.url)))
        run_stage(grpo.train, config, tmp_path / "grpo")
    first, second = metrics(tmp_path / "grpo")
    assert first["sampler_gap"] < 1e-5 and second["sampler_gap"] > 1e-3
    assert capsys.readouterr().out.count("does vLLM hold all of the policy's weights") == 1


def test_rule_20_a_server_of_another_distribution_stops_the_run_before_its_first_step(folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"before the first step the sampler and policy differ by .* not below 1e-01"):
        trained("grpo", folder, tmp_path, off=CHANCE)


# --- around the stages


def test_generate_asks_vllm_too(folder, tmp_path):
    with serving(folder) as stub:
        config = GenerateConfig(
            model=ModelConfig(path=str(folder)),
            prompts=write_rows(tmp_path / "prompts.jsonl", prompts(3)),
            samples_per_prompt=2,
            sampling=SamplingConfig(max_new_tokens=6, vllm=VLLMConfig(mode="server", url=stub.url)),
            max_prompt_length=60,
            chunk_size=2,
        )
        rows = [json.loads(line) for line in run_stage(generate, config, tmp_path / "generate").read_text().splitlines()]
        assert generate_check(config) == []
    assert len(rows) == 3 and all(len(row["responses"]) == len(row["finished"]) == 2 for row in rows)
    assert stub.calls.count("/collective_rpc") == 1 and len(stub.asked) == 3


def test_rule_10_a_server_that_is_not_there_is_a_problem_of_the_stage(folder, tmp_path):
    gone = VLLMConfig(mode="server", url=f"http://127.0.0.1:{free_port()}")
    for config, check in ((grpo_config(folder, tmp_path), grpo.check), (ppo_config(folder, tmp_path), ppo.check)):
        assert check(config) == []
        [found] = check(replace(config, sampling=replace(config.sampling, vllm=gone)))
        assert found.startswith("sampling.vllm.url=") and "no vLLM server answers" in found
    rows = DataConfig(path=str(tmp_path / "prompts.jsonl"))
    [found] = generate_check(GenerateConfig(model=ModelConfig(path=str(folder)), prompts=rows, sampling=SamplingConfig(vllm=gone)))
    assert "no vLLM server answers" in found
