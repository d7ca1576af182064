"""Adapters under the engine: the same steps on every backend, exact resume, the reference of a stage, four roles over one base."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig
from posttrain.engine import Engine
from posttrain.models.adapters import layers, trained_parameters
from posttrain.models.loading import load_causal_lm, load_roles
from posttrain.packing import forest
from tests.engine import adapter_jobs as jobs
from tests.engine.adapter_jobs import base_folder, on
from tests.engine.jobs import alone, close, nll, rows
from tests.tiny import tiny_folder

SHARDED = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(base_folder(tmp_path_factory.mktemp("adapters")))


@cache
def trained(base: str, backend: str, checkpointing: bool) -> dict:
    return on(backend, jobs.train, folder=base, checkpointing=checkpointing)[0]


@pytest.fixture(scope="module")
def expected(base) -> dict:
    return trained(base, "plain", False)


@pytest.mark.parametrize(("backend", "checkpointing"), [("plain", True), *((name, True) for name in SHARDED), ("zero3", False)])
def test_rule_21_every_backend_takes_the_same_steps_of_an_adapter(backend, checkpointing, base, expected):
    found = trained(base, backend, checkpointing)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    close(found["weights"], expected["weights"])
    close(found["ema"], expected["ema"])
    torch.testing.assert_close(found["sampled"], expected["sampled"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("ddp", "zero3"))
def test_a_4_bit_base_gives_the_same_steps_on_every_backend(backend, base, expected):
    pytest.importorskip("bitsandbytes")
    alone_ = alone(jobs.train, folder=base, quantize="nf4")
    found = on(backend, jobs.train, folder=base, quantize="nf4", checkpointing=True)[0]
    assert found["losses"] == pytest.approx(alone_["losses"], rel=1e-5)
    assert found["losses"] != pytest.approx(expected["losses"], rel=1e-4)
    close(found["weights"], alone_["weights"])


@pytest.mark.parametrize("backend", ("plain", "zero3"))
def test_rule_21_below_a_bf16_base_the_adapter_has_fp32_masters(backend, base, expected):
    found = on(backend, jobs.train, folder=base, dtype="bf16")[0]
    assert found["masters"] == {torch.float32} and {value.dtype for value in found["weights"].values()} == {torch.bfloat16}
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-2)
    assert found["norms"] == pytest.approx(expected["norms"], rel=5e-2)


def test_an_adapter_learns_what_a_hand_written_loop_over_the_merged_weights_learns(base):
    """LoRA by functional_call on plain weights W + alpha / r B A, AdamW by torch, against the engine's."""
    config = ModelConfig(path=base, adapter=jobs.LORA)
    engine = Engine()
    module = load_causal_lm(config, seed=3)
    pairs = {
        name: [layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()]
        for name, layer in layers(module.hf).items()
    }
    plain = load_causal_lm(ModelConfig(path=base)).requires_grad_(False)
    trained = [t.requires_grad_() for pair in pairs.values() for t in pair]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    model = engine.train(module, jobs.OPTIMIZER, 3, name="policy")
    for step in range(3):
        nll(engine, model, rows(seed=step))
        optimizer.zero_grad()
        count = sum(tree.num_trainable for tree in rows(seed=step))
        weights = {f"hf.{name}.weight": plain.hf.get_submodule(name).weight + 2.0 * b @ a for name, (a, b) in pairs.items()}
        row = forest(rows(seed=step))
        (-torch.func.functional_call(plain, weights, (row, ("logprobs",)))["logprobs"].sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    final = {f"{name}.weight": plain.hf.get_submodule(name).weight + 2.0 * b @ a for name, (a, b) in pairs.items()}
    found = model.state_dict_full()
    engine.close()
    for name, value in final.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ("plain", *SHARDED))
def test_rule_16_the_reference_of_a_fresh_adapter_is_the_base_and_never_moves(backend, base):
    found = trained(base, backend, True)
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in found["frozen"].items():
        assert torch.equal(value, plain[name]) and torch.equal(found["start"][name], value), name
    assert any(not torch.equal(found["weights"][name], value) for name, value in plain.items())
    untouched = [name for name in plain if "proj" not in name]
    assert untouched and all(torch.equal(found["weights"][name], plain[name]) for name in untouched)


@pytest.mark.parametrize("backend", ("plain", *SHARDED))
def test_rule_08_an_adapter_resumes_bit_for_bit_and_its_checkpoint_is_small(backend, base, tmp_path):
    whole, half, rest = on(backend, jobs.save_and_resume, folder=base, place=str(tmp_path / "step_000002"))[0]
    assert half["losses"] + rest["losses"] == whole["losses"]
    for key in ("weights", "ema"):
        assert all(torch.equal(rest[key][name], value) for name, value in whole[key].items())
    assert torch.equal(rest["reference"], whole["reference"])
    saved = torch.load(tmp_path / "step_000002" / "policy.weights.pt")
    assert saved and all(".lora_" in name for name in saved)


@pytest.mark.parametrize("backend", ("plain", "zero2", "zero3"))
def test_rule_16_the_reference_of_a_continued_adapter_is_what_the_stage_began_with_also_after_a_resume(backend, base, tmp_path):
    alone(jobs.export, folder=base, out=str(tmp_path / "sft"), merge=False)
    found = on(backend, jobs.continue_adapter, folder=str(tmp_path / "sft"), place=str(tmp_path / "step_000001"))[0]
    first, resumed = found["first"], found["resumed"]
    assert torch.equal(first["reference"], first["before"]) and torch.equal(resumed["reference"], first["reference"])
    assert torch.equal(resumed["before"], first["after"])
    for state in (first, resumed):
        assert (state["after"] - state["reference"]).abs().max() > 1e-3
    off = torch.cat(load_logprobs(ModelConfig(path=base)))
    assert (first["reference"] - off).abs().max() > 1e-3


def load_logprobs(config: ModelConfig) -> list[Tensor]:
    from posttrain.engine.inference import infer

    engine = Engine()
    found = infer(engine, engine.freeze(load_causal_lm(config), name="plain"), rows(), ("logprobs",), 24)["logprobs"]
    engine.close()
    return found


def test_an_exception_leaves_no_adapter_off(base):
    engine = Engine()
    model = engine.train(load_causal_lm(ModelConfig(path=base, adapter=jobs.LORA)), OptimizerConfig(lr=1e-1), 2, name="policy")
    reference = engine.reference(model, lambda: None)
    nll(engine, model, rows())
    with model.evaluating():
        expected = model.logprobs(forest(rows()))
    reference.module.longest_row = 3
    with pytest.raises(ValueError, match="longer than the 3"):
        reference.logprobs(forest(rows()))
    reference.module.longest_row = None
    broken = forest(rows())
    broken.input_ids[3] = 100_000
    with pytest.raises(IndexError):
        reference.logprobs(broken)
    assert model.module.adapter.switch.on == ["default"] and model.module.training and model.module.hf.training
    with model.evaluating():
        assert torch.equal(model.logprobs(forest(rows())), expected)
    engine.close()


# --- export


@pytest.mark.parametrize("backend", ("plain", "zero2", "zero3"))
@pytest.mark.parametrize("merge", (True, False))
def test_rule_09_an_adapter_leaves_merged_or_alone(backend, merge, base, tmp_path):
    expected = on(backend, jobs.export, folder=base, out=str(tmp_path / "model"), merge=merge)[0]
    if merge:
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not any(info.values())
        assert not list((tmp_path / "model").glob("adapter*"))
    for name in ("model", "model_ema"):
        live = load_causal_lm(ModelConfig(path=str(tmp_path / name)))(forest(rows()), ("logprobs",))["logprobs"]
        (torch.testing.assert_close if name == "model" else differs)(live, expected, rtol=1e-5, atol=1e-5)


def differs(one: Tensor, other: Tensor, **_: float) -> None:
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("backend", ("plain", "zero2", "zero3"))
def test_rule_07_a_reward_models_adapter_scores_alike_after_its_export(backend, base, tmp_path):
    merged = on(backend, jobs.export_reward_model, folder=base, out=str(tmp_path / "merged"), merge=True)[0]
    alone_ = on(backend, jobs.export_reward_model, folder=base, out=str(tmp_path / "alone"), merge=False)[0]
    torch.testing.assert_close(merged, alone_, rtol=0, atol=0)
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and plain.config.num_labels == 1
    from posttrain.models.loading import load_scalar_model

    for folder, adapter in (("merged", AdapterConfig()), ("alone", AdapterConfig()), ("alone", jobs.LORA)):
        model = load_scalar_model(ModelConfig(path=str(tmp_path / folder), adapter=adapter), fresh_head=False)
        torch.testing.assert_close(model(forest(rows()), ("scores",))["scores"].detach(), merged, rtol=1e-6, atol=1e-6)


# --- four roles over one base


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> tuple[str, str]:
    """An SFT adapter and a reward model's adapter over the same base."""
    place = tmp_path_factory.mktemp("roles")
    alone(jobs.export, folder=base, out=str(place / "sft"), merge=False)
    alone(jobs.export_reward_model, folder=base, out=str(place / "rm"), merge=False)
    return str(place / "sft"), str(place / "rm")


@cache
def apart(policy: str, reward_model: str) -> dict:
    """The same with separate models in one process."""
    with TemporaryDirectory() as place:
        return alone(jobs.four_roles, policy=policy, reward_model=reward_model, shared=False, place=place)


@pytest.mark.parametrize(("backend", "start"), [("plain", "fresh"), *((name, "continued") for name in ("plain", *SHARDED))])
def test_four_roles_over_one_base_are_four_models(backend, start, base, folders, tmp_path):
    """With gradient checkpointing where the adapter is continued: another role has run by the time a layer is recomputed."""
    common = dict(policy=base if start == "fresh" else folders[0], reward_model=folders[1])
    checkpointing = start == "continued"
    found = on(backend, jobs.four_roles, **common, shared=True, place=str(tmp_path / "shared"), checkpointing=checkpointing)[0]
    expected = apart(**common)
    for name, weights in expected["weights"].items():
        close(found["weights"][name], weights, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found["trail"], expected["trail"], strict=True):
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-4)
    for before, after, moved in zip(found["trail"], found["trail"][1:], ("policy", "critic") * 3):
        for name in before:
            assert torch.equal(before[name], after[name]) is (name != moved), f"{name} in the update of {moved}"
    assert found["training"]
    for name in ("policy", "critic"):
        assert all(torch.equal(found["again"][name][key], value) for key, value in found["weights"][name].items())
    for folder, name in (("model", "policy"), ("critic", "critic")):
        kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
        written = kind.from_pretrained(tmp_path / "shared" / folder).state_dict()
        assert all(torch.equal(written[key], value) for key, value in found["weights"][name].items())


def test_four_roles_hold_the_base_once(base, folders):
    modules = list(load_roles(ModelConfig(path=folders[0], adapter=jobs.LORA), ModelConfig(path=folders[1])))
    assert modules[0].trunk is modules[1].trunk is modules[2].trunk
    total = sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())
    plain = sum(p.numel() for p in load_causal_lm(ModelConfig(path=base)).parameters())
    small = sum(p.numel() for m in modules for p in trained_parameters(m).values())
    assert total == plain + small
    assert not {id(p) for p in trained_parameters(modules[0]).values()} & {id(p) for p in trained_parameters(modules[1]).values()}


def test_roles_of_different_bases_are_refused_with_both_digests_and_the_merge_command(base, folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    other = tiny_folder(tmp_path / "other", "llama_tied", seed=5)
    with pytest.raises(ValueError, match=r"digest [0-9a-f]{16}.*with [0-9a-f]{16}.*python -m posttrain merge .*rm"):
        list(load_roles(ModelConfig(path=str(other), adapter=jobs.LORA), ModelConfig(path=folders[1])))
    asked = AdapterConfig(rank=4, alpha=8.0, quantize="nf4")
    with pytest.raises(ValueError, match=r"quantize='none', the policy has 'nf4'.*posttrain merge"):
        list(load_roles(ModelConfig(path=base, adapter=asked), ModelConfig(path=folders[1])))


def test_without_an_adapter_or_with_a_plain_reward_model_the_roles_are_separate(base, folders, tmp_path):
    from posttrain.models.adapter_files import merge

    merge(folders[1], tmp_path / "rm")
    adapted = ModelConfig(path=base, adapter=jobs.LORA)
    for policy, judge in ((adapted, tmp_path / "rm"), (ModelConfig(path=base), Path(folders[1]))):
        modules = list(load_roles(policy, ModelConfig(path=str(judge))))
        assert len({id(module.trunk) for module in modules}) == 3
        assert modules[1].adapter is None and modules[1].calibration == (0.25, 1.0)
