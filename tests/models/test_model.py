"""A packed row gives what separate rows through the plain transformers model give."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from posttrain.models import model as model_module
from posttrain.models.attention import TreeStructure
from posttrain.models.model import PackedModel, embedding_noise, set_dropout
from posttrain.packing import Forest, Tree, forest, segment
from tests.tiny import SHAPES, VOCABULARY, tiny_config, tiny_model

FAMILIES = [*SHAPES, "gemma3_text"]


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT, RESPONSES = tokens(9, 0), [tokens(5, 1), tokens(12, 2), tokens(3, 3)]
CONVERSATION, TRAINED = tokens(20, 4), [False] * 6 + [True] * 5 + [False] * 3 + [True] * 6


@functools.cache
def example() -> Forest:
    """A prompt with three responses beside a conversation with two trained turns."""
    shared = Tree(segment(PROMPT), tuple(segment(response, True) for response in RESPONSES))
    return forest([shared, Tree(segment(CONVERSATION, TRAINED))])


def separate_rows() -> list[tuple[list[int], list[bool]]]:
    rows = [(PROMPT + response, [False] * len(PROMPT) + [True] * len(response)) for response in RESPONSES]
    return [*rows, (CONVERSATION, TRAINED)]


def plain_logprobs(hf, temperature: float = 1.0) -> Tensor:
    """The model's own logits, row by row, in the order of the packed row's trainable tokens."""
    parts = []
    for row, trained in separate_rows():
        table = (hf(input_ids=torch.tensor([row])).logits[0].float() / temperature).log_softmax(-1)
        taken = table[:-1].gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)
        parts.append(taken[torch.tensor(trained[1:])])
    return torch.cat(parts)


def tiny_scorer(family: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    hf = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=1), dtype=torch.float32)
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return hf.eval()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_rule_25_packed_logprobs_and_gradients_equal_separate_rows(family) -> None:
    hf = tiny_model(family)
    weights = torch.linspace(-1, 1, int(example().trainable.sum()))
    expected = plain_logprobs(hf, temperature=0.8)
    (expected * weights).sum().backward()
    wanted = gradients(hf)

    model = PackedModel(hf)
    for attention in ("tree", "dense"):
        model.attention = attention
        result = model(example(), ("logprobs",), temperature=0.8)["logprobs"]
        torch.testing.assert_close(result[example().trainable], expected, rtol=1e-5, atol=1e-5)
        assert not result[~example().trainable].any()
        (result[example().trainable] * weights).sum().backward()
        assert_same_gradients(gradients(hf), wanted)


@torch.no_grad()
def test_rule_25_flex_attention_gives_the_same_logprobs() -> None:
    hf = tiny_model()
    expected = plain_logprobs(hf)
    result = PackedModel(hf, attention="flex")(example(), ("logprobs",))["logprobs"]
    torch.testing.assert_close(result[example().trainable], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gpt2"])
def test_rule_25_scores_values_and_gradients_equal_separate_rows(family) -> None:
    hf = tiny_scorer(family)
    scores = torch.cat([hf(input_ids=torch.tensor([row])).logits[0] for row, _ in separate_rows()])
    states = [hf.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row, _ in separate_rows()]
    before = [hf.score(h)[:-1, 0][torch.tensor(trained[1:])] for h, (_, trained) in zip(states, separate_rows())]
    values = torch.cat(before)
    ((scores * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum() + values.square().sum()).backward()
    wanted = gradients(hf)

    result = PackedModel(hf)(example(), ("scores", "values"))
    torch.testing.assert_close(result["scores"], scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["values"][example().trainable], values, rtol=1e-5, atol=1e-5)
    ((result["scores"] * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum() + result["values"].square().sum()).backward()
    assert_same_gradients(gradients(hf), wanted)


@torch.no_grad()
def test_rule_06_a_score_does_not_depend_on_its_neighbours() -> None:
    hf = tiny_scorer()
    model = PackedModel(hf)
    pad_is_eos = segment([*RESPONSES[1], 0, 0])  # trailing tokens that happen to be the pad token count like any other
    tree = Tree(segment(PROMPT), (segment(RESPONSES[0]), pad_is_eos))
    alone = model(forest([tree]), ("scores",))["scores"]
    for neighbours in ([Tree(segment(tokens(200, 7)))], [Tree(segment([0])), Tree(segment([0, 0, 4]))]):
        packed = model(forest([*neighbours, tree, *neighbours]), ("scores",))["scores"]
        torch.testing.assert_close(packed[len(neighbours) : len(neighbours) + 2], alone, rtol=1e-5, atol=1e-5)
    for i, child in enumerate(tree.children):
        single = forest([Tree(segment([*PROMPT, *child.input_ids.tolist()]))])
        torch.testing.assert_close(model(single, ("scores",))["scores"], alone[i : i + 1], rtol=1e-5, atol=1e-5)


def packed_model(family: str = "llama", **shape) -> PackedModel:
    hf = tiny_model(family, **shape)
    return PackedModel(hf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3"])
def test_gradient_checkpointing_changes_no_gradient(family, monkeypatch) -> None:
    calls = 0

    class Counting(TreeStructure):
        def attend(self, *args):
            nonlocal calls
            calls += 1
            return super().attend(*args)

    monkeypatch.setattr(model_module, "structure_for", lambda row, kind: Counting(row))
    model = packed_model(family).train()
    set_dropout(model.hf, 0.0)
    found, counts = [], []
    for on in (False, True):
        calls = 0
        model.set_gradient_checkpointing(on)
        model(example(), ("logprobs",))["logprobs"].sum().backward()
        counts.append(calls)
        found.append(gradients(model))
    assert counts == [2, 4], "two layers, and each runs again in the backward pass"
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("scalar", [False, True])
def test_a_dummy_row_keeps_every_parameter_in_the_graph_with_zero_gradient(scalar) -> None:
    if scalar:
        hf = tiny_scorer()
        model, want = PackedModel(hf), ("values", "scores")
    else:
        model, want = packed_model(), ("logprobs",)
    row = forest([Tree(segment(CONVERSATION, TRAINED))], dummy=True)
    result = model(row, want)
    (sum(x.sum() for x in result.values()) * 0.0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_calibration_shifts_and_scales_scores_and_values() -> None:
    hf = tiny_scorer()
    raw = PackedModel(hf)(example(), ("scores", "values"))
    calibrated = PackedModel(hf, calibration=(0.5, 2.0))(example(), ("scores", "values"))
    torch.testing.assert_close(calibrated["scores"], (raw["scores"] - 0.5) / 2)
    trained = example().trainable
    torch.testing.assert_close(calibrated["values"][trained], (raw["values"][trained] - 0.5) / 2)
    assert not calibrated["values"][~trained].any()


def test_a_head_is_asked_only_for_what_it_gives() -> None:
    with pytest.raises(ValueError, match="gives logprobs, entropy, nll, not scores"):
        packed_model()(example(), ("scores",))


def test_a_conversation_beyond_what_can_be_trusted_is_refused() -> None:
    model = packed_model()
    model.longest_row = 21  # the longest path is the prompt and its second response
    model(example(), ("logprobs",))
    model.longest_row = 20
    with pytest.raises(ValueError, match="21 tokens is longer than the 20"):
        model(example(), ("logprobs",))


def test_neftune_noise_has_the_papers_scale_and_only_in_training() -> None:
    noise = embedding_noise(example(), alpha=5.0)
    lengths = [len(PROMPT), *(len(PROMPT) + len(r) for r in RESPONSES), len(CONVERSATION)]
    expected = [5.0 / length**0.5 for length, size in zip(lengths, [9, 5, 12, 3, 20]) for _ in range(size)]
    torch.testing.assert_close(noise, torch.tensor(expected))

    model = packed_model(hidden=64)
    quiet = model(example(), ("logprobs",))["logprobs"]
    model.neftune_alpha = 5.0
    assert torch.equal(model(example(), ("logprobs",))["logprobs"], quiet), "evaluation has no noise"
    seen: list[Tensor] = []
    handle = model.trunk.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    model.train()(example(), ("logprobs",))
    handle.remove()
    added = seen[0] - model.hf.get_input_embeddings()(example().input_ids)
    relative = added / (noise[:, None] / 64**0.5)
    assert relative.abs().max() <= 1 + 1e-4
    assert relative.abs().max() > 0.99
    assert abs(float(relative.detach().std()) - 3**-0.5) < 0.02, "uniform on (-1, 1)"


def test_dropout_is_set_in_residuals_and_never_in_attention() -> None:
    model = packed_model("opt").train()
    set_dropout(model.hf, 0.5)
    first = model(example(), ("logprobs",))["logprobs"]
    assert not torch.equal(first, model(example(), ("logprobs",))["logprobs"])
    set_dropout(model.hf, 0.0)
    assert torch.equal(model(example(), ("logprobs",))["logprobs"], model.eval()(example(), ("logprobs",))["logprobs"])
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        set_dropout(packed_model("llama").hf, 0.1)
