"""vLLM behind the sampler's function: the protocol, weights, ends and errors, against a server that a transformers model answers for."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig, SamplingConfig, VLLMConfig, gather_problems
from posttrain.data.chat import Chat
from posttrain.engine import Engine
from posttrain.models.loading import load_causal_lm
from posttrain.rollout import vllm_server
from posttrain.rollout.experience import sample_responses
from posttrain.rollout.local import Ending, Rollout, SamplingInterrupted
from posttrain.rollout.vllm import cut, sample, sampling_problems
from posttrain.rollout.vllm_server import VLLMError
from posttrain.run import Run, Stopped
from tests.pairs import free_port, run_pair
from tests.rollout.vllm_stub import Stub, serving
from tests.runs import open_run
from tests.stages.test_ppo import policy_folder
from tests.tiny import tiny_folder

PROMPTS = [[5, 6, 7], [9, 9, 20, 31, 8], [40], [11, 12, 13, 14]]
STOP = (4,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("vllm") / "policy")


@pytest.fixture(autouse=True)
def no_connection_outlives_its_test(monkeypatch):
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.05)
    yield
    vllm_server.open_server.cache_clear()


def by_vllm(stub: Stub, **changes: Any) -> SamplingConfig:
    return SamplingConfig(**{"max_new_tokens": 9, "vllm": VLLMConfig(mode="server", url=stub.url), **changes})


def ask(run: Run, model: Any, config: SamplingConfig, **options: Any) -> Rollout:
    chat = Chat.load(str(options.pop("template_of")))
    options = {"samples_per_prompt": 3, "stop_ids": STOP, "decode": chat.decode_response, **options}
    return sample(model, PROMPTS, config, world=run.engine.world, seed=1, **options)


def frozen(run: Run, folder: Path) -> Any:
    return run.engine.freeze(load_causal_lm(ModelConfig(path=str(folder)), Chat.load(str(folder)).tokenizer), name="policy")


def by_hand(folder: Path, rollout: Rollout, temperature: float = 1.0) -> list[Tensor]:
    """Log-probabilities of each response, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for b, response in enumerate(rollout.responses):
        prompt = rollout.prompts[int(rollout.prompt_of[b])]
        with torch.no_grad():
            rows = (model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        found.append(rows[range(len(response)), response])
    return found


# --- the rollout


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_rule_20_a_rollout_is_the_local_samplers_in_form_and_distribution(folder, tmp_path, temperature):
    with serving(folder) as stub, open_run(tmp_path) as run:
        rollout = ask(run, frozen(run, folder), by_vllm(stub, temperature=temperature), template_of=folder)
    assert rollout.prompts == PROMPTS and rollout.prompt_of.tolist() == [p for p in range(4) for _ in range(3)]
    assert len(set(map(len, rollout.responses))) > 3 and {True, False} == set(rollout.finished)
    for told, response, finished, expected in zip(
        rollout.logprobs, rollout.responses, rollout.finished, by_hand(folder, rollout, temperature)
    ):
        assert told.dtype == torch.float32 and finished == (response[-1] == 4) and 4 not in response[:-1]
        assert finished or len(response) == 9
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)
    assert {body["model"] for body in stub.asked} == {"the-model"} and {body["temperature"] for body in stub.asked} == {temperature}


def test_every_prompt_has_its_own_seed_and_keeps_it(folder, tmp_path):
    with serving(folder) as stub, open_run(tmp_path) as run:
        model, config = frozen(run, folder), by_vllm(stub)
        first, again = (ask(run, model, config, template_of=folder) for _ in range(2))
        ask(run, model, config, template_of=folder, iteration=1)
        ask(run, model, config, template_of=folder, first_prompt=4)
        assert first.responses == again.responses
        seeds = {(body["prompt"][0][0], body["seed"]) for body in stub.asked}
        assert len(stub.asked) == 16 and len(seeds) == 12 and all(0 <= seed < 2**62 for _, seed in seeds)
        assert sorted(stub.calls)[0] == "/collective_rpc" and stub.calls.count("/collective_rpc") == 1, "the weights didn't change"


def test_at_temperature_0_the_likeliest_token_is_taken(folder, tmp_path):
    with serving(folder) as stub, open_run(tmp_path) as run:
        rollout = ask(run, frozen(run, folder), by_vllm(stub, temperature=0.0), template_of=folder, samples_per_prompt=2)
    assert {body["n"] for body in stub.asked} == {1} and rollout.responses[::2] == rollout.responses[1::2]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, response, told, expected in zip(PROMPTS, rollout.responses[::2], rollout.logprobs[::2], by_hand(folder, rollout)[::2]):
        ids = torch.tensor([prompt])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=4)
        assert response == generated[0, len(prompt) :].tolist()
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)


def test_stop_strings_end_a_response_where_the_local_sampler_would(folder, tmp_path):
    chat = Chat.load(str(folder))
    with serving(folder) as stub, open_run(tmp_path) as run:
        rollout = ask(run, frozen(run, folder), by_vllm(stub, stop=("a", "e"), max_new_tokens=30), template_of=folder)
        assert stub.asked[0]["stop"] == ["a", "e"]
    ends = Ending(STOP, ("a", "e"), chat.decode_response)
    assert sum(rollout.finished) > 6
    for response, finished in zip(rollout.responses, rollout.finished):
        assert ends(response) == finished and not any(ends(response[:n]) for n in range(1, len(response)))


def test_what_comes_after_the_end_is_cut_and_an_early_end_is_refused():
    chat_end = Ending((4,), (), None)
    tokens, logprobs, finished = cut(([7, 4, 9], [-1.0, -2.0, -3.0]), chat_end, SamplingConfig(max_new_tokens=3))
    assert tokens == [7, 4] and logprobs.tolist() == [-1.0, -2.0] and finished
    assert cut(([7, 8, 9], [-1.0] * 3), chat_end, SamplingConfig(max_new_tokens=3))[2] is False
    with pytest.raises(VLLMError, match=r"after 2 of max_new_tokens=3 tokens.*--generation-config vllm"):
        cut(([7, 8], [-1.0] * 2), chat_end, SamplingConfig(max_new_tokens=3))


def test_each_response_is_told_of_and_progress_counts_them(folder, tmp_path):
    heard, seen = {}, []
    with serving(folder) as stub, open_run(tmp_path) as run:
        options = dict(on_response=heard.__setitem__, progress=seen.append)
        rollout = ask(run, frozen(run, folder), by_vllm(stub), template_of=folder, **options)
    assert [heard[b] for b in range(12)] == rollout.responses
    assert seen[-1].responses_done == seen[-1].responses == 12 and seen[-1].tokens == rollout.num_tokens and seen[-1].seconds_left == 0


# --- weights


def test_weights_go_to_the_server_before_the_first_sample_and_after_every_step(folder, tmp_path):
    with serving(folder) as stub, open_run(tmp_path) as run:
        for parameter in stub.model.parameters():
            parameter.data.zero_()  # whatever the server holds at first
        chat = Chat.load(str(folder))
        policy = run.engine.train(load_causal_lm(ModelConfig(path=str(folder)), chat.tokenizer), OptimizerConfig(lr=0.1), 5, name="policy")
        for round_ in range(2):
            rollout = ask(run, policy, by_vllm(stub), template_of=folder)
            assert len(stub.loaded) == round_ + 1 and stub.calls.index("/reset_prefix_cache") == 1
            run.engine.export(policy, tmp_path / f"model{round_}", chat.tokenizer)
            for told, expected in zip(rollout.logprobs, by_hand(tmp_path / f"model{round_}", rollout)):
                torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)
            with run.engine.update(policy) as update:
                for parameter in policy.module.parameters():
                    update.backward(parameter.square().sum(), over=1)
    assert any(not torch.equal(stub.loaded[0][name], stub.loaded[1][name]) for name in stub.loaded[0])


@pytest.mark.parametrize("family", ("llama", "llama_tied", "qwen2"))
def test_an_adapter_is_merged_on_its_way_and_names_are_those_of_a_plain_folder(tmp_path, family):
    folder = tiny_folder(tmp_path / "base", family)
    chat = Chat.load(str(folder))
    with serving(folder) as stub, open_run(tmp_path / "run") as run:
        config = ModelConfig(path=str(folder), adapter=AdapterConfig(rank=4))
        policy = run.engine.train(load_causal_lm(config, chat.tokenizer), OptimizerConfig(lr=0.1), 5, name="policy")
        with torch.no_grad():
            for parameter in policy.backend.masters():
                parameter.add_(0.05)
        rollout = ask(run, policy, by_vllm(stub), template_of=folder)
        run.engine.export(policy, tmp_path / "merged", chat.tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert set(stub.loaded[0]) <= set(plain) and all(torch.equal(tensor, plain[name]) for name, tensor in stub.loaded[0].items())
    for told, expected in zip(rollout.logprobs, by_hand(tmp_path / "merged", rollout)):
        torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)


def sharded_job(engine: Engine, *, folder: str, url: str) -> dict[str, Any]:
    """Two rollouts, a step between them, and what each rank was told while it sampled."""
    chat, told = Chat.load(folder), []
    policy = engine.train(load_causal_lm(ModelConfig(path=folder), chat.tokenizer), OptimizerConfig(lr=0.1), 5, name="policy")
    config = SamplingConfig(max_new_tokens=9, vllm=VLLMConfig(mode="server", url=url))
    rollouts = []
    for _ in range(2):
        options: dict[str, Any] = dict(world=engine.world, seed=1, stop_ids=STOP, samples_per_prompt=3)
        rollouts.append(sample(policy, PROMPTS, config, **options, on_response=lambda b, _: told.append(b)))
        policy.steps += 1  # as if it had stepped
    return {"responses": [r.responses for r in rollouts], "told": told, "logprobs": [r.logprobs for r in rollouts]}


def test_under_zero_3_whole_weights_are_sent_once_and_every_rank_gets_everything(folder, tmp_path):
    with serving(folder) as stub:
        for parameter in stub.model.parameters():
            parameter.data.zero_()
        left, right = run_pair("zero3", "tests.rollout.test_vllm:sharded_job", folder=str(folder), url=stub.url)
    assert left["responses"] == right["responses"] and len(stub.loaded) == 2
    assert sorted(left["told"][:6] + right["told"][:6]) == list(range(12))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stub.loaded[0].items())
    rollout = Rollout(PROMPTS, left["responses"][0], torch.arange(4).repeat_interleave(3), left["logprobs"][0], [True] * 12)
    for told, by_transformers in zip(rollout.logprobs, by_hand(folder, rollout)):
        torch.testing.assert_close(told, by_transformers, rtol=0, atol=1e-5)


# --- what goes wrong


def failing(folder: Path, tmp_path: Path, **settings: Any) -> str:
    with serving(folder, **settings) as stub, open_run(tmp_path) as run, pytest.raises(VLLMError) as failure:
        ask(run, frozen(run, folder), by_vllm(stub), template_of=folder)
    return str(failure.value).replace(stub.url, "URL")


def test_answers_that_were_not_asked_for_are_refused(folder, tmp_path):
    def few(answer: dict) -> dict:
        return {"choices": answer["choices"][:2]}

    def silent(answer: dict) -> dict:
        return {"choices": [{**choice, "logprobs": None} for choice in answer["choices"]]}

    def other(answer: dict) -> dict:
        return {"choices": [{**choice, "prompt_token_ids": [1]} for choice in answer["choices"]]}

    def broken(answer: dict) -> dict:
        for choice in answer["choices"]:
            choice["logprobs"]["token_logprobs"][0] = float("nan")
            choice["logprobs"]["top_logprobs"][0] = {}
        return answer

    assert "gave 2 responses to a prompt, not the 3" in failing(folder, tmp_path / "few", change=few)
    assert "gave no log-probability" in failing(folder, tmp_path / "silent", change=silent)
    assert "as 1 others" in failing(folder, tmp_path / "other", change=other)
    assert "not finite" in failing(folder, tmp_path / "broken", change=broken)
    refused = failing(folder, tmp_path / "refused", change=lambda answer: (400, "the prompt is too long"))
    assert refused.startswith("the vLLM server at URL failed at sampling") and "400" in refused and "the prompt is too long" in refused


def test_a_server_that_goes_away_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "RETRIES", 0)
    with open_run(tmp_path) as run:
        with serving(folder) as stub:
            model = frozen(run, folder)
            ask(run, model, by_vllm(stub), template_of=folder)
        vllm_server.open_server(by_vllm(stub).vllm).client.session.close()  # connections that were kept open
        with pytest.raises(VLLMError, match=f"the vLLM server at {stub.url} failed at sampling: ConnectionError"):
            ask(run, model, by_vllm(stub), template_of=folder)


def test_what_is_wrong_is_said_before_a_model_is_loaded(folder, monkeypatch):
    def problems(**changes: Any) -> str:
        [found] = sampling_problems(SamplingConfig(max_new_tokens=100, vllm=VLLMConfig(mode="server", **changes)), 60)
        assert found.startswith("sampling.vllm.")
        return found

    nobody = f"http://127.0.0.1:{free_port()}"
    assert "no vLLM server answers there after 0 s" in problems(url=nobody) and "vllm serve MODEL" in problems(url=nobody)
    assert sampling_problems(SamplingConfig(), 60) == []
    with serving(folder) as stub:
        assert sampling_problems(by_vllm(stub), 60) == []
        stub.context = 159
        assert "takes 159 tokens, a row has up to 160; start it with --max-model-len 160" in problems(url=stub.url)
        stub.context, stub.settings = 256, {"model_config": {"logprobs_mode": "raw_logprobs"}}
        assert "--logprobs-mode processed_logprobs" in problems(url=stub.url)
        stub.settings = {}
        assert "VLLM_SERVER_DEV_MODE=1" in problems(url=stub.url)
    assert "transfer='folder' works" in problems(url=nobody, transfer="nccl") and "pip install" in problems(url=nobody, transfer="nccl")
    assert [text.split("=")[0] for text in gather_problems(VLLMConfig(mode="servr", url="x", concurrency=0, transfer="mail"))] == [
        "mode",
        "url",
        "concurrency",
        "transfer",
    ]


def test_a_server_that_is_still_starting_is_waited_for(folder):
    port = free_port()
    config = VLLMConfig(mode="server", url=f"http://127.0.0.1:{port}", connection_timeout=20)
    seen: list[str] = []

    class Late(threading.Thread):
        def run(self) -> None:
            import http.server

            time.sleep(0.3)
            handler = type("H", (http.server.BaseHTTPRequestHandler,), {"do_GET": lambda h: (seen.append(h.path), h.send_error(200))})
            self.server = http.server.HTTPServer(("127.0.0.1", port), handler)
            self.server.handle_request()
            self.server.server_close()

    late = Late(daemon=True)
    late.start()
    assert vllm_server._is_up(config) and seen == ["/health"]
    late.join()


def test_a_stop_ends_the_sampling_without_waiting_for_the_server(folder, tmp_path):
    def slow(answer: dict) -> dict:
        time.sleep(0.5)
        return answer

    with serving(folder, change=slow) as stub, open_run(tmp_path) as run:
        model = frozen(run, folder)
        with pytest.raises(SamplingInterrupted):
            ask(run, model, by_vllm(stub), template_of=folder, interrupted=lambda: True)
        assert not run.stop_requested()  # which begins to listen for signals
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            sample_responses(run, model, Chat.load(str(folder)), PROMPTS, by_vllm(stub), 0)


# --- transfer between GPUs, with stand-ins for what needs them


def test_nccl_announces_every_tensor_once_and_sends_it_in_that_order(tmp_path, monkeypatch):
    """TRL's client from the announcement to the end of the update; the GPU's group and its broadcast are stood in for."""
    from trl.generation import vllm_client

    folder, sent = tiny_folder(tmp_path / "tied", "llama_tied"), []

    class Group:
        trainer_send_weights = staticmethod(lambda iterator, trainer_args: sent.extend(iterator))

    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", Group, raising=False)
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", lambda **_: None, raising=False)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: setattr(self, "communicator", device))
    with serving(folder) as stub, open_run(tmp_path / "run") as run:
        ask(run, frozen(run, folder), by_vllm(stub, vllm=VLLMConfig(mode="server", url=stub.url, transfer="nccl")), template_of=folder)
    order = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/v1/completions"]
    assert stub.calls[:5] == order and not stub.loaded
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert {name for name, _ in sent} == set(expected) and len(sent) == len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent)


def test_nccl_on_a_cpu_is_refused_by_trl_in_its_words(folder, tmp_path):
    with serving(folder) as stub, open_run(tmp_path) as run, pytest.raises(VLLMError, match="failed at loading weights"):
        ask(run, frozen(run, folder), by_vllm(stub, vllm=VLLMConfig(mode="server", url=stub.url, transfer="nccl")), template_of=folder)
