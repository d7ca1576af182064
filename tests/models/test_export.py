"""What is written is a plain Hugging Face folder, and is proven to be before it gets its name."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config import ModelConfig
from posttrain.models import export
from posttrain.models.export import content_digest, tokenizer_digest, write_model
from posttrain.models.loading import load_causal_lm, load_scalar_model
from tests.tiny import tiny_config, tiny_folder, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gpt_neox", "gemma"])
def test_rule_09_plain_transformers_reads_an_export_and_gives_equal_logits(family, tmp_path) -> None:
    model = load_causal_lm(ModelConfig(path=str(tiny_folder(tmp_path / "base", family))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    digest = write_model(model.hf, None, tiny_tokenizer(), tmp_path / "out", {"note.txt": "hello"})
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = tiny_model(family)
    expected.load_state_dict(model.hf.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(plain(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    manifest = json.loads((tmp_path / "out" / "export.json").read_text())
    assert manifest["digest"] == digest == content_digest(tmp_path / "out")
    assert manifest["tokenizer"] == tokenizer_digest(tmp_path / "out")
    assert (tmp_path / "out" / "note.txt").read_text() == "hello"
    assert "posttrain" not in (tmp_path / "out" / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_rule_09_weights_come_from_the_state_dict_not_from_the_modules_shell(tmp_path) -> None:
    """A sharded backend leaves empty parameters in the module; the gathered state dict has the numbers."""
    full = tiny_model("llama", seed=3)
    shell = tiny_model("llama", seed=1)
    for parameter in shell.parameters():
        parameter.data = torch.empty(0)
    write_model(shell, full.state_dict(), tiny_tokenizer(), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in full.state_dict().items())


def test_a_reward_model_without_pad_token_reads_back_and_scores_batches(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "base", pad_token_id=None)
    model = load_scalar_model(ModelConfig(path=str(folder)), fresh_head=True)
    assert model.hf.config.pad_token_id is None
    write_model(model.hf, None, tiny_tokenizer(), tmp_path / "rm")
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(info.values())
    assert plain(input_ids=torch.tensor([[5, 6, 7], [5, 6, 0]])).logits.shape == (2, 1)


@pytest.mark.parametrize(("damage", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (None, "is empty")])
def test_rule_09_an_empty_or_non_finite_tensor_is_never_written(damage, message, tmp_path) -> None:
    write_model(tiny_model(seed=1), None, tiny_tokenizer(), tmp_path / "out")
    before = content_digest(tmp_path / "out")
    weights = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    name = "model.layers.1.self_attn.k_proj.weight"
    if damage is None:
        weights[name] = torch.empty(0)
    else:
        weights[name][3, 2] = damage
    with pytest.raises(ValueError, match=f"{name} is {message}|{name} {message}"):
        write_model(tiny_model(), weights, tiny_tokenizer(), tmp_path / "out")
    assert content_digest(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_rule_09_a_missing_or_unknown_tensor_is_never_written(tmp_path) -> None:
    weights = dict(tiny_model().state_dict())
    short = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing keys: lm_head\.weight"):
        write_model(tiny_model(), short, tiny_tokenizer(), tmp_path / "out")
    with pytest.raises(ValueError, match="unexpected keys: extra"):
        write_model(tiny_model(), dict(weights, extra=torch.ones(1)), tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_older_folder_and_nothing_else(tmp_path, monkeypatch) -> None:
    write_model(tiny_model(seed=1), None, tiny_tokenizer(), tmp_path / "out")
    before = content_digest(tmp_path / "out")

    def full(*paths) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(tiny_model(seed=2), None, tiny_tokenizer(), tmp_path / "out")
    assert content_digest(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_reads_back_otherwise_is_never_given_its_name(tmp_path, monkeypatch) -> None:
    original = export._verify

    def damaged(folder, plain) -> None:
        file = folder / "model.safetensors"
        with file.open("r+b") as stream:
            stream.seek(-3, os.SEEK_END)
            stream.write(b"\x12")
        original(folder, plain)

    monkeypatch.setattr(export, "_verify", damaged)
    with pytest.raises(ValueError, match="was not read back as it was written"):
        write_model(tiny_model(), None, tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_temperature_without_sampling_in_a_hub_config_does_not_stop_the_export(tmp_path) -> None:
    hf = tiny_model()
    hf.generation_config.temperature = 0.6
    write_model(hf, None, tiny_tokenizer(), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_digests_follow_content_and_nothing_else(tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "config.json", (1, 1))
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")
    (tmp_path / "b" / "config.json").rename(tmp_path / "b" / "other.json")
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")
    assert tokenizer_digest(tmp_path / "a") == tokenizer_digest(tmp_path / "b")
