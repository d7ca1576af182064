"""What JSON says about a model must be what the loaded model would say."""

from __future__ import annotations

import json

import peft
import pytest
from transformers import AutoConfig

from posttrain.config import ModelConfig
from posttrain.models.described import CAUSAL, REWARD, Description, describe, same_tokens, template_problem
from posttrain.models.trust import longest_row
from tests.runs import reward_folder
from tests.tiny import CHATML, SHAPES, tiny_config, tiny_folder, tiny_tokenizer

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("family", [*SHAPES, "phi3_longrope", "mistral_window", "qwen2_window_off", "gemma3_text"])
def test_the_context_is_what_the_loaded_config_gives(family, tmp_path):
    windows = {
        "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
        "mistral_window": ("mistral", {"sliding_window": 100}),
        "qwen2_window_off": ("qwen2", {"use_sliding_window": False, "sliding_window": 32}),
        "gemma3_text": ("gemma3_text", {"sliding_window": 48, "head_dim": 8}),
    }
    name, changes = windows.get(family, (family, {}))
    tiny_config(name, **changes).save_pretrained(tmp_path)
    described = describe(ModelConfig(path=str(tmp_path)))
    assert described.context == longest_row(AutoConfig.from_pretrained(tmp_path))


def test_the_kind_is_read_from_the_architecture(tmp_path):
    assert describe(ModelConfig(path=str(tiny_folder(tmp_path / "lm")))) == Description(256, CAUSAL)
    assert describe(ModelConfig(path=str(reward_folder(tmp_path / "judge")))) == Description(256, REWARD)


@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", CAUSAL), ("SEQ_CLS", REWARD)])
def test_an_adapter_has_the_context_of_its_base_and_its_own_head(task, kind, tmp_path):
    base, folder = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    peft.LoraConfig(task_type=task, base_model_name_or_path=str(base), r=2).save_pretrained(str(folder))
    assert describe(ModelConfig(path=str(folder))) == Description(256, kind)


def test_a_stages_folder_is_told_from_its_model(tmp_path):
    tiny_folder(tmp_path / "sft" / "model")
    with pytest.raises(ValueError, match=r"sft' has no config.json, so it is no model folder; '.*/sft/model' works"):
        describe(ModelConfig(path=str(tmp_path / "sft")))


def test_rule_12_tokenizers_are_compared_by_what_they_make_of_a_text(tmp_path):
    one, again = (ModelConfig(path=str(tiny_folder(tmp_path / name))) for name in ("one", "again"))
    assert same_tokens(one, "auto", again, "auto") and not same_tokens(one, "auto", again, "raw")
    other = ModelConfig(path=str(tiny_folder(tmp_path / "other", chat_template=CHATML.replace("<|im_start|>", "<bos>"))))
    assert not same_tokens(one, "auto", other, "auto")
    # another file, the same tokenizer: padding is no part of it
    tokenizer = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps({**tokenizer, "padding": None, "truncation": None}, indent=4))
    assert same_tokens(one, "auto", again, "auto")


def test_a_tokenizer_without_eos_is_named_where_one_is_needed(tmp_path):
    tokenizer = tiny_tokenizer(CHATML)
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    without.chat_template = CHATML
    without.save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    assert "without EOS" in template_problem(model, "auto", True)
    assert "template='raw' ends a turn with the EOS token" in template_problem(model, "raw", False)
    assert template_problem(model, "auto", False) == "" == template_problem(model, "chatml", True)
    assert "'nope' is neither auto" in template_problem(ModelConfig(), "nope", False)


def test_json_is_enough_for_a_healthy_folder(tmp_path, monkeypatch):
    """transformers takes seconds to import, so it is asked in doubt only."""
    one, two = (ModelConfig(path=str(tiny_folder(tmp_path / name))) for name in ("one", "two"))
    monkeypatch.setattr("posttrain.data.chat.Chat.load", lambda *args, **kwargs: pytest.fail("the tokenizer was loaded"))
    assert same_tokens(one, "auto", two, "auto") and template_problem(one, "raw", True) == ""
