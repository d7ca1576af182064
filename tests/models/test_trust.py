"""Models that packing would silently break are refused by name; each of those failures is shown to be one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.models import model as model_module
from posttrain.models import trust
from posttrain.models.attention import NAME
from posttrain.models.logprobs import LogitTransform
from posttrain.models.model import PackedModel
from posttrain.models.trust import check_config, disagreement, longest_row, probe, shrink
from posttrain.packing import Tree, forest, segment
from tests.tiny import SHAPES, tiny_config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def model_class(config) -> type:
    return AutoModelForCausalLM._model_mapping[type(config)]


@pytest.mark.parametrize("family", [*SHAPES, "gemma3_text", "cohere", "phi", "phi3", "starcoder2", "smollm3", "olmo"])
def test_published_shapes_of_these_families_are_trusted(family) -> None:
    for config in ([tiny_config(family)] if family in SHAPES else []) + [AutoConfig.for_model(family.removesuffix("_tied"))]:
        check_config(config, model_class(config))
        probe(config)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("bloom", {}, "attention interface"),
        ("falcon", {"alibi": True}, "alibi"),
        ("mixtral", {}, "experts"),
        ("gpt_oss", {}, "experts"),
        ("mamba", {}, "recurrent"),
        ("rwkv", {}, "recurrent"),
        ("recurrent_gemma", {}, "recurrent"),
        ("gemma2", {}, "attn_logit_softcapping=50"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
    ],
)
def test_families_that_cannot_be_packed_are_refused_by_name(family, changes, reason) -> None:
    config = AutoConfig.for_model(family, **changes)
    with pytest.raises(ValueError, match=f"(?s){model_class(config).__name__}.*{reason}"):
        check_config(config, model_class(config))


def test_longest_row_is_the_smallest_of_context_window_and_rope() -> None:
    assert longest_row(tiny_config("llama")) == 256
    assert longest_row(tiny_config("mistral", sliding_window=64)) == 64
    assert longest_row(tiny_config("qwen2", sliding_window=64, use_sliding_window=False)) == 256
    assert longest_row(tiny_config("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=0)) == 64
    assert longest_row(tiny_config("gemma3_text", sliding_window=32)) == 32
    assert longest_row(AutoConfig.for_model("llama", max_position_embeddings=131072, rope_parameters=LONGROPE)) == 4096
    assert longest_row(AutoConfig.for_model("llama", rope_parameters=DYNAMIC)) == 2048


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_that_looks_at_the_longest_position_is_exact_up_to_its_limit_and_wrong_beyond(rope) -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=131072 if rope is LONGROPE else 2048, rope_parameters=rope)
    probe(config)
    small = shrink(config)
    with torch.random.fork_rng(), torch.no_grad():
        assert disagreement(small, longest_row(small)) == ""
        assert "beside a long one differ" in disagreement(small, longest_row(small) + 40)


def test_an_active_window_is_refused_at_its_first_long_row() -> None:
    config = tiny_config("mistral", sliding_window=16)
    probe(config)
    model = PackedModel(AutoModelForCausalLM.from_config(config, attn_implementation=NAME), longest_row=longest_row(config))
    model(forest([Tree(segment([5] * 16, [False] + [True] * 15)), Tree(segment([6] * 16))]), ("logprobs",))
    row = forest([Tree(segment([5] * 17, [False] + [True] * 16))])
    with pytest.raises(ValueError, match="17 tokens is longer than the 16"):
        model(row, ("logprobs",))
    model.longest_row = None  # the attention function stands guard by itself, too
    with pytest.raises(ValueError, match="sliding_window=16"):
        model(row, ("logprobs",))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25}), ("gemma2", {"attn_logit_softcapping": None})],
)
def test_the_probe_catches_a_head_that_forgets_the_familys_logit_transform(family, changes, monkeypatch) -> None:
    small = shrink(AutoConfig.for_model(family, **changes))
    with torch.random.fork_rng(), torch.no_grad():
        assert disagreement(small, longest_row(small)) == ""
        monkeypatch.setattr(model_module, "logit_transform", lambda config: LogitTransform())
        assert "two responses differ" in disagreement(small, longest_row(small))


def test_the_probe_catches_a_model_that_ignores_the_attention_interface() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="bloom can't be packed"):
        probe(config)


def test_the_probe_catches_a_leak_between_rows(monkeypatch) -> None:
    """An attention that is causal over the whole row: what a packed model without boundaries computes."""

    class Leaky:
        longest = 1

        def attend(self, layer, query, key, value, scaling):
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)

    monkeypatch.setattr(model_module, "structure_for", lambda forest, kind: Leaky())
    small = shrink(tiny_config("llama"))
    with torch.random.fork_rng(), torch.no_grad():
        assert "differ" in disagreement(small, longest_row(small))


def test_the_probe_runs_once_per_config_and_leaves_the_random_state_alone(monkeypatch) -> None:
    config = tiny_config("llama", rms_norm_eps=3e-6)
    calls = []
    original = trust.disagreement
    monkeypatch.setattr(trust, "disagreement", lambda *args: calls.append(1) or original(*args))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe(config)
    probe(tiny_config("llama", rms_norm_eps=3e-6))
    assert len(calls) == 1
    assert torch.equal(torch.rand(3), expected)
