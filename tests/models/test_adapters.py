"""LoRA and QLoRA in one process: nothing changes at the start, merging is exact, folders are peft's, and what can't work is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AddedToken, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.__main__ import main
from posttrain.config import AdapterConfig, ModelConfig
from posttrain.models import adapter_files
from posttrain.models.adapter_files import base_digest, read_adapter, write_adapter
from posttrain.models.adapters import BaseModel, layers, merged, trained_parameters, weights
from posttrain.models.loading import load_causal_lm, load_scalar_model
from posttrain.models.model import set_dropout
from posttrain.models.quantized import NF4Linear, quantize_problems
from tests.models.test_loading import ROW
from tests.tiny import VOCABULARY, tiny_folder, tiny_tokenizer

FAMILIES = ("llama", "llama_tied", "gpt2", "opt", "gpt_neox", "qwen3")
# table of the paper, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def at(path, rank: int = 4, **changes) -> ModelConfig:
    return ModelConfig(path=str(path), adapter=AdapterConfig(rank=rank, alpha=12.0, **changes))


def logprobs(model) -> torch.Tensor:
    return model(ROW, ("logprobs",))["logprobs"]


def disturbed(model):
    """The adapter, and a scalar head, as if they had been trained."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def write(model, folder) -> Path:
    head = {"score.weight": model.head.weight} if model.is_scalar else {}
    extra = {"reward_calibration.json": '{"bias": 0.25, "mean": 0.0, "std": 1.0}'} if head else None
    write_adapter(model.adapter, model.hf, weights(model.hf, "default"), head, tiny_tokenizer(), folder, extra)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(family, tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m", family)
    plain, model = load_causal_lm(ModelConfig(path=str(folder))), load_causal_lm(at(folder))
    assert torch.equal(logprobs(model), logprobs(plain))
    linear = {name for name, module in plain.hf.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert set(layers(model.hf)) == linear and not any("lm_head" in name or "embed_out" in name for name in linear)
    trained = trained_parameters(model)
    assert len(trained) == 2 * len(linear) and {p.dtype for p in trained.values()} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert model.longest_row == plain.longest_row


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_adds_alpha_over_rank_b_a(family, tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m", family)
    model = disturbed(load_causal_lm(at(folder)))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    found = merged(model.hf.state_dict(), model.hf, "default")
    assert found.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        layer = layers(model.hf).get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(found[name], weight), name
            continue
        change = torch.zeros(layer.out_features, layer.in_features)
        for r in range(4):  # one outer product at a time
            change += 3.0 * torch.outer(layer.lora_B["default"].weight[:, r], layer.lora_A["default"].weight[r])
        change = change.T if family == "gpt2" else change
        torch.testing.assert_close(found[name], weight + change, rtol=1e-6, atol=1e-6)
    assert (logprobs(model) - logprobs(load_causal_lm(ModelConfig(path=str(folder))))).abs().max() > 1e-2
    plain.load_state_dict(found)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = plain(input_ids=ids).logits[0, 2:4].log_softmax(-1)[torch.arange(2), ids[0, 3:]]
    torch.testing.assert_close(logprobs(model)[3:5], expected, rtol=1e-5, atol=1e-5)


def test_targets_are_names_of_layers_and_what_matches_nothing_is_an_error(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m")
    model = load_causal_lm(at(folder, targets=("q_proj", "layers.1.mlp.up_proj")))
    assert sorted(layers(model.hf)) == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"'c_attn' is no linear layer of LlamaForCausalLM; it has down_proj, gate_proj, k_proj"):
        load_causal_lm(at(folder, targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match="'lm_head' is no linear layer"):
        load_causal_lm(at(folder, targets=("lm_head",)))


def test_the_seed_draws_the_adapter_whatever_the_global_random_numbers_are(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m")
    found = []
    for seed, state in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(state)
        found.append(weights(load_causal_lm(at(folder), seed=seed).hf, "default"))
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0]) and not torch.equal(found[0][name], found[2][name])
    limit = 32**-0.5  # Kaiming-uniform with a = sqrt(5) over 32 inputs
    assert 0.9 * limit < float(found[0][name].detach().abs().max()) <= limit


def test_a_bf16_base_has_an_fp32_adapter_and_head(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m")
    config = ModelConfig(path=str(folder), dtype="bf16", adapter=AdapterConfig(rank=4))
    for model in (load_causal_lm(config), load_scalar_model(config, fresh_head=True)):
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {value.dtype for value in merged(model.hf.state_dict(), model.hf, "default").values()} == {torch.bfloat16}


def test_gradient_checkpointing_gives_the_same_gradient_also_when_another_adapter_is_on_by_then(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m")
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(path=str(folder), gradient_checkpointing=checkpointing, adapter=AdapterConfig(rank=4))
        model = disturbed(load_causal_lm(config)).train()
        loss = logprobs(model).sum()
        with model.adapter.switch.to(""):
            loss.backward()
        gradients.append({name: p.grad for name, p in trained_parameters(model).items()})
    assert all(p is not None and bool(p.any()) for p in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_adapters_dropout_is_its_own(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m", "gpt2")
    model = disturbed(load_causal_lm(at(folder, dropout=0.5))).train()
    set_dropout(model, 0.0)
    assert not torch.equal(logprobs(model), logprobs(model))
    model.eval()
    assert torch.equal(logprobs(model), logprobs(model))


def test_new_tokens_under_a_frozen_base_are_refused(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(f"<|new_{i}|>") for i in range(VOCABULARY + 1 - len(tokenizer))]}
    )
    with pytest.raises(ValueError, match=rf"{VOCABULARY + 1} tokens.*{VOCABULARY} embeddings.*adapter\.rank=0"):
        load_causal_lm(at(folder), tokenizer)


# --- folders


@pytest.mark.parametrize("family", ("llama", "llama_tied", "gpt2"))
def test_peft_reads_an_adapter_folder(family, tmp_path) -> None:
    base = tiny_folder(tmp_path / "base", family)
    model = disturbed(load_causal_lm(at(base)))
    folder = write(model, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = logprobs(model)[3:5]
    for read in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
    ):
        found = read(input_ids=ids).logits[0, 2:4].log_softmax(-1)[torch.arange(2), ids[0, 3:]]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["base"]["path"] == str(base) and manifest["base"]["digest"] == base_digest(BaseModel(path=str(base)))
    assert not any(
        "base" in name or "embed" in name
        for name in (n.removeprefix("base_model.model.") for n in load_file(folder / "adapter_model.safetensors"))
    )


def test_peft_reads_a_reward_models_adapter_with_its_head(tmp_path) -> None:
    model = disturbed(load_scalar_model(at(tiny_folder(tmp_path / "base")), fresh_head=True, seed=1))
    folder = write(model, tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    found = PeftModel.from_pretrained(plain, folder)(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 0]
    torch.testing.assert_close(found, model(ROW, ("scores",))["scores"][0], rtol=1e-5, atol=1e-5)


def test_an_adapter_folder_is_read_merged_or_continued(tmp_path) -> None:
    base = tiny_folder(tmp_path / "base")
    model = disturbed(load_causal_lm(at(base)))
    folder = write(model, tmp_path / "adapter")
    plain, continued = load_causal_lm(ModelConfig(path=str(folder))), load_causal_lm(at(folder))
    assert plain.adapter is None and not layers(plain.hf) and all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(logprobs(plain), logprobs(model), rtol=1e-6, atol=1e-5)
    assert torch.equal(logprobs(continued), logprobs(model))
    assert continued.adapter.start and continued.adapter.base.path == str(base)
    again = write(continued, tmp_path / "again")
    assert read_adapter(str(again)).base.path == str(base)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(rank=8), r"rank=8 \(the folder has 4\)"),
        (dict(alpha=16.0), r"alpha=16\.0 \(the folder has 12\.0\)"),
        (dict(targets=("q_proj",)), r"targets=\('q_proj',\), which are q_proj \(the folder has down_proj, gate_proj"),
    ],
)
def test_an_adapter_of_another_shape_is_not_continued(asked, message, tmp_path) -> None:
    folder = write(load_causal_lm(at(tiny_folder(tmp_path / "base"))), tmp_path / "adapter")
    config = ModelConfig(path=str(folder), adapter=AdapterConfig(**{"rank": 4, "alpha": 12.0, **asked}))
    with pytest.raises(ValueError, match=rf"{message}.*python -m posttrain merge {folder}"):
        load_causal_lm(config)


def test_an_adapter_whose_base_has_changed_or_gone_is_refused(tmp_path) -> None:
    base = tiny_folder(tmp_path / "base")
    folder = write(load_causal_lm(at(base)), tmp_path / "adapter")
    tiny_folder(base, seed=3)
    for config in (at(folder), ModelConfig(path=str(folder))):
        with pytest.raises(ValueError, match=r"with the digest [0-9a-f]{16}, but the weights there have [0-9a-f]{16} now"):
            load_causal_lm(config)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"which does not exist; put the base back.*base_model_name_or_path"):
        load_causal_lm(at(folder))


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("use_rslora", True), ("peft_type", "IA3"), ("rank_pattern", {"q_proj": 2})]
)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(key, value, tmp_path) -> None:
    folder = write(load_causal_lm(at(tiny_folder(tmp_path / "base"))), tmp_path / "adapter")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, key: value}))
    with pytest.raises(ValueError, match=f"has {key}=.*only plain LoRA"):
        load_causal_lm(at(folder))


def test_rule_09_a_broken_adapter_is_never_written(tmp_path) -> None:
    model = load_causal_lm(at(tiny_folder(tmp_path / "base")))
    next(iter(weights(model.hf, "default").values())).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite"):
        write(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_rule_07_a_reward_models_adapter_scores_bit_equal_in_a_fresh_process(tmp_path) -> None:
    model = disturbed(load_scalar_model(at(tiny_folder(tmp_path / "base")), fresh_head=True, seed=1))
    folder = write(model, tmp_path / "rm")
    expected = model(ROW, ("scores",))["scores"].detach() - 0.25
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    script = (
        "import sys, json; from tests.models.test_adapters import *\n"
        "found = [load_scalar_model(config, fresh_head=False)(ROW, ('scores',))['scores'].tolist()\n"
        "         for config in (at(sys.argv[1]), ModelConfig(path=sys.argv[1]), ModelConfig(path=sys.argv[2]))]\n"
        "print(json.dumps(found))"
    )
    out = subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "merged")], capture_output=True, text=True, check=True)
    alone, folded, read = map(torch.tensor, json.loads(out.stdout.splitlines()[-1]))
    assert torch.equal(alone, expected)
    torch.testing.assert_close(folded, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(folded, read)


def test_rule_07_a_missing_or_mis_shaped_head_of_an_adapter_raises(tmp_path) -> None:
    base = tiny_folder(tmp_path / "base")
    policy, judge = load_causal_lm(at(base)), load_scalar_model(at(base), fresh_head=True)
    with pytest.raises(ValueError, match=r"score\.weight is missing"):
        load_scalar_model(at(write(policy, tmp_path / "policy")), fresh_head=False)
    with pytest.raises(ValueError, match="is a reward model's adapter"):
        load_causal_lm(at(write(judge, tmp_path / "judge")))
    judge.hf.score.weight.data = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"has the shape \(2, 32\), not \(1, 32\)"):
        load_scalar_model(at(write(judge, tmp_path / "judge")), fresh_head=False)


def test_the_merge_command_writes_a_plain_model(tmp_path, capsys) -> None:
    model = disturbed(load_causal_lm(at(tiny_folder(tmp_path / "base", "llama_tied"))))
    folder = write(model, tmp_path / "adapter")
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    expected = merged(model.hf.state_dict(), model.hf, "default")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "other")]) == 2
    assert "is no adapter folder" in capsys.readouterr().err


# --- 4 bits


def nf4(path, **changes) -> ModelConfig:
    return at(path, quantize="nf4", **changes)


def test_without_its_library_nf4_is_refused_before_any_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quantize_problems(AdapterConfig(rank=4)) == []
    assert "bitsandbytes, which is not installed" in quantize_problems(AdapterConfig(rank=4, quantize="nf4"))[0]


def test_nf4_is_refused_by_name_where_the_kernels_fail(monkeypatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    assert "don't run on this machine (RuntimeError: no kernel image)" in quantize_problems(AdapterConfig(rank=4, quantize="nf4"))[0]


def slow_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 64 divided by its largest size, each number to its nearest level, by the definition."""
    blocks = weight.flatten().view(-1, 64)
    scale = blocks.abs().max(1, keepdim=True).values
    levels = torch.tensor(NF4)
    return (levels[(blocks / scale)[..., None].sub(levels).abs().argmin(-1)] * scale).view_as(weight)


def test_nf4_is_the_papers_table_in_blocks_of_64_with_scales_of_an_eighth_of_a_bit() -> None:
    pytest.importorskip("bitsandbytes")
    assert quantize_problems(AdapterConfig(rank=4, quantize="nf4")) == []
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 512, bias=False)
    layer = NF4Linear(linear)
    assert torch.equal(layer.levels.view(torch.float32), torch.tensor(NF4))
    expected = slow_nf4(linear.weight.data)
    scale = linear.weight.data.flatten().view(-1, 64).abs().max(1).values
    # scales are rounded to 8 bits, which moves every number of a block by the same small share
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0.02 * float(scale.max()))
    assert ((layer.weight - expected).abs() < 2e-3).float().mean() > 0.95
    numbers = linear.weight.numel()
    scales = 8 * (layer.scales.numel() + layer.scales_of_scales.numel()) / numbers
    assert 8 * layer.packed.numel() / numbers == 4 and scales == pytest.approx(0.127, abs=5e-4)


def test_an_nf4_layer_is_the_product_with_its_weight_in_training_and_evaluation() -> None:
    pytest.importorskip("bitsandbytes")
    layer = NF4Linear(torch.nn.Linear(128, 64))
    x = torch.randn(5, 128, requires_grad=True)
    layer.bias.data.fill_(0.25)  # bf16 holds it exactly
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    for prepare in (layer.train, layer.eval, lambda: layer.to(torch.bfloat16).float()):
        module = prepare()
        torch.testing.assert_close(module(x), plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), x)[0], expected, rtol=1e-4, atol=1e-4)
    assert list(layer.state_dict()) == ["bias"]


def test_a_4_bit_base_trains_its_adapter_and_merges_into_what_was_trained(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny_folder(tmp_path / "m", hidden=64)
    model = disturbed(load_causal_lm(nf4(folder)))
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14 and type(model.head).__name__ == "TokenLogprobs"
    logprobs(model).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained_parameters(model).values())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.load_state_dict(merged(model.hf.state_dict(), model.hf, "default"))
    plain.save_pretrained(tmp_path / "plain")
    found = load_causal_lm(ModelConfig(path=str(tmp_path / "plain")))
    torch.testing.assert_close(logprobs(found), logprobs(model), rtol=1e-5, atol=1e-4)
    adapter = write(model, tmp_path / "adapter")
    assert torch.equal(logprobs(load_causal_lm(nf4(adapter))), logprobs(model))
    torch.testing.assert_close(logprobs(load_causal_lm(ModelConfig(path=str(adapter)))), logprobs(model), rtol=1e-5, atol=1e-4)
    assert adapter_files.read_adapter(str(adapter)).config.quantize == "nf4"
