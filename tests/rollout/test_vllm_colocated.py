"""vLLM inside the training processes: TRL's engine with a stand-in for vLLM, which a transformers model answers for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config import ModelConfig, OptimizerConfig, SamplingConfig, VLLMConfig
from posttrain.data.chat import Chat
from posttrain.models.loading import load_causal_lm
from posttrain.rollout import vllm_server
from posttrain.rollout.vllm import sampling_problems
from tests.rollout.test_vllm import ask, by_vllm, frozen
from tests.rollout.vllm_stub import Stub, serving
from tests.runs import open_run
from tests.stages.test_ppo import policy_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return policy_folder(tmp_path / "policy")


@pytest.fixture
def fake_engine(monkeypatch):
    """vLLM's LLM as TRL makes and uses it, answered for by the stub's model."""
    from trl.generation import vllm_generation

    made: list[Any] = []

    class Engine:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.resets = settings, 0
            self.stub = Stub(AutoModelForCausalLM.from_pretrained(settings["model"]).eval(), None)
            self.loaded: list[str] = []
            model = SimpleNamespace(load_weights=self.load_weights)
            runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
            made.append(self)

        def load_weights(self, named: Any) -> None:
            for name, tensor in named:
                self.loaded.append(name)
                self.stub.model.get_parameter(name).data.copy_(tensor)

        def reset_prefix_cache(self) -> None:
            self.resets += 1

        def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
            return [self.output(p["prompt_token_ids"], how) for p, how in zip(prompts, sampling_params)]

        def output(self, prompt: list[int], how: dict) -> Any:
            plain = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, **how, "stop": how["stop"] or ()}
            choices = [self.stub.choice(prompt, plain, n) for n in range(how["n"])]
            outputs = [
                SimpleNamespace(
                    token_ids=choice["token_ids"],
                    logprobs=[
                        {token: SimpleNamespace(rank=1, logprob=logprob)}
                        for token, logprob in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"])
                    ],
                )
                for choice in choices
            ]
            return SimpleNamespace(prompt_token_ids=prompt, outputs=outputs)

    stand_in = ModuleType("vllm")
    stand_in.SamplingParams = lambda **settings: settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    environment = dict(os.environ)  # TRL writes RANK and the like
    yield made
    vllm_server.open_server.cache_clear()
    os.environ.clear()
    os.environ.update(environment)


def test_a_colocated_engine_samples_as_a_server_does(folder, tmp_path, fake_engine):
    config = SamplingConfig(max_new_tokens=9, vllm=VLLMConfig(mode="colocate", gpu_memory_utilization=0.2, max_model_len=64, concurrency=3))
    with serving(folder) as stub, open_run(tmp_path / "run") as run:
        expected = ask(run, frozen(run, folder), by_vllm(stub), template_of=folder)
        chat = Chat.load(str(folder))
        policy = run.engine.train(load_causal_lm(ModelConfig(path=str(folder)), chat.tokenizer), OptimizerConfig(lr=0.1), 5, name="trained")
        found = ask(run, policy, config, template_of=folder)
        assert found.responses == expected.responses and found.finished == expected.finished
        assert all(torch.equal(a, b) for a, b in zip(found.logprobs, expected.logprobs))
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.mul_(0.5)
        policy.steps += 1
        ask(run, policy, config, template_of=folder)
        run.engine.export(policy, tmp_path / "halved", chat.tokenizer)
    [engine] = fake_engine
    names = dict(engine.stub.model.named_parameters())
    assert engine.settings["logprobs_mode"] == "processed_logprobs" and engine.settings["max_model_len"] == 64
    assert engine.resets == 2 and engine.loaded == [*names, *names]
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "halved").state_dict()
    assert all(torch.equal(tensor, halved[name]) for name, tensor in engine.stub.model.state_dict().items())


def test_a_colocated_engine_needs_what_is_not_here():
    def problems(**changes: Any) -> str:
        [found] = sampling_problems(SamplingConfig(max_new_tokens=100, vllm=VLLMConfig(mode="colocate", **changes)), 60)
        return found

    assert "mode='colocate' needs vLLM in the trainer's own environment" in problems() and "mode='server' works" in problems()
    assert "max_model_len=100 is below the longest row, 160 tokens" in problems(max_model_len=100)
