"""Chunked log-probabilities equal the naive ones, and never hold a vocabulary-sized number for every token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from posttrain.models import logprobs as module
from posttrain.models.logprobs import LogitTransform, TokenLogprobs

TOKENS, WIDTH, WORDS = 37, 12, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * WORDS * 5})  # five tokens
    monkeypatch.setattr(module, "KEPT_BYTES", {"cpu": 4 * WORDS * 12})  # the first two chunks


def inputs(bias: bool = False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=bias)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    return head, hidden, torch.randint(0, WORDS, (TOKENS,)), torch.randn(TOKENS)


def naive(head: nn.Linear, hidden: torch.Tensor, transform: LogitTransform, temperature: float) -> torch.Tensor:
    logits = head(hidden) * transform.scale
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=3.0, softcap=2.0)])
def test_rule_25_chunked_equals_naive_with_gradients(transform, bias, temperature) -> None:
    head, hidden, targets, weights = inputs(bias)
    table = naive(head, hidden, transform, temperature)
    expected = table.gather(-1, targets[:, None]).squeeze(-1)
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, *head.parameters()])

    chunked = TokenLogprobs.take_over(head, transform)
    got, entropy = chunked(hidden, targets, temperature, entropy=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), [hidden, *head.parameters()]), wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_tensor_has_a_vocabulary_per_token() -> None:
    head, hidden, targets, weights = inputs()
    chunked = TokenLogprobs.take_over(head, LogitTransform())
    with Largest() as largest:
        got, _ = chunked(hidden, targets, 1.0, entropy=True)
        (got * weights).sum().backward()
    assert largest.size < TOKENS * WORDS
    assert largest.size == WIDTH * WORDS  # the head's own gradient


def test_frozen_parts_get_no_gradient() -> None:
    head, hidden, targets, weights = inputs(bias=True)
    chunked = TokenLogprobs.take_over(head.requires_grad_(False), LogitTransform())
    (chunked(hidden, targets)[0] * weights).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None

    head.requires_grad_(True)
    chunked(hidden.detach(), targets)[0].sum().backward()
    assert head.weight.grad is not None


def test_a_weight_that_is_away_between_forward_and_backward_gives_the_same_gradient() -> None:
    """What a sharded backend does: the parameter's storage is emptied after the forward and filled before the backward."""
    head, hidden, targets, weights = inputs()
    chunked = TokenLogprobs.take_over(head, LogitTransform())
    loss = (chunked(hidden, targets)[0] * weights).sum()
    expected = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)

    full = head.weight.data
    loss = (chunked(hidden, targets)[0] * weights).sum()
    head.weight.data = torch.empty(0)
    head.weight.data = full.clone()
    full.zero_()
    for mine, theirs in zip(torch.autograd.grad(loss, [hidden, head.weight]), expected):
        torch.testing.assert_close(mine, theirs)


def test_the_head_shares_its_parameters_and_is_still_a_head() -> None:
    head, hidden, *_ = inputs(bias=True)
    chunked = TokenLogprobs.take_over(head, LogitTransform(scale=2.0))
    assert chunked.weight is head.weight
    assert chunked.bias is head.bias
    torch.testing.assert_close(chunked(hidden), head(hidden))
    torch.testing.assert_close(chunked.logits(hidden), 2 * head(hidden))


def test_bf16_weights_give_fp32_logprobs_and_fp32_normalizers() -> None:
    head, hidden, targets, weights = inputs()
    expected = naive(head, hidden, LogitTransform(), 1.0).gather(-1, targets[:, None]).squeeze(-1)
    low, chunked = hidden.detach().bfloat16().requires_grad_(), TokenLogprobs.take_over(head.bfloat16(), LogitTransform())
    got, _ = chunked(low, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-2)
    (got * weights).sum().backward()
    assert low.grad.dtype == head.weight.grad.dtype == torch.bfloat16


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients() -> None:
    head, hidden, targets, _ = inputs()
    chunked = TokenLogprobs.take_over(head, LogitTransform())
    exact, _ = chunked(hidden, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = chunked(hidden, targets)
    assert 0 < (exact - rough).abs().max() < 3e-2
    rough.sum().backward()
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(scale=3.0, softcap=2.0)])
@pytest.mark.parametrize("chunk_tokens", [5, TOKENS])
def test_the_sum_equals_the_naive_one_with_gradients(transform, bias, chunk_tokens, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * WORDS * chunk_tokens})
    head, hidden, targets, _ = inputs(bias)
    counted = torch.arange(TOKENS) % 3 > 0
    expected = -naive(head, hidden, transform, 1.0).gather(-1, targets[:, None]).squeeze(-1)[counted].sum()
    wanted = torch.autograd.grad(0.3 * expected, [hidden, *head.parameters()])

    got = TokenLogprobs.take_over(head, transform)(hidden, targets, counted=counted)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(0.3 * got, [hidden, *head.parameters()]), wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_sum_costs_one_product_less(monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", {"cpu": 0})
    head, hidden, targets, _ = inputs()
    chunked = TokenLogprobs.take_over(head, LogitTransform())
    everything = torch.ones(TOKENS, dtype=torch.bool)
    counts = []
    for loss in (lambda: -chunked(hidden, targets)[0].sum(), lambda: chunked(hidden, targets, counted=everything)):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
            loss().backward()
        counts.append(counter.get_total_flops() / (2 * TOKENS * WIDTH * WORDS))
    assert counts == [4, 3]


def added_product(_, left, right, *__, **___) -> int:
    return 2 * left[0] * left[1] * right[1]


def test_a_sum_without_gradient_needs_no_second_product() -> None:
    head, hidden, targets, _ = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TokenLogprobs.take_over(head, LogitTransform())(hidden, targets, counted=torch.ones(TOKENS, dtype=torch.bool))
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * WORDS


@pytest.mark.parametrize(("chunk_tokens", "kept_tokens", "computed_again"), [(TOKENS, TOKENS, 0), (5, 0, 37), (5, 12, 27), (5, 36, 4)])
def test_kept_logits_are_computed_once_and_can_be_differentiated_twice(chunk_tokens, kept_tokens, computed_again, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * WORDS * chunk_tokens})
    monkeypatch.setattr(module, "KEPT_BYTES", {"cpu": 4 * WORDS * kept_tokens})
    head, hidden, targets, weights = inputs()
    loss = (TokenLogprobs.take_over(head, LogitTransform())(hidden, targets)[0] * weights).sum()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    assert counter.get_total_flops() == 2 * (2 * TOKENS + computed_again) * WIDTH * WORDS
    for again, once in zip(torch.autograd.grad(loss, [hidden, head.weight]), first):
        assert torch.equal(again, once)


def test_what_is_not_counted_may_be_anything() -> None:
    head, hidden, targets, _ = inputs()
    hidden = hidden.detach()
    counted = torch.arange(TOKENS) > 3
    clean = TokenLogprobs.take_over(head, LogitTransform())(hidden, targets, counted=counted)
    other = hidden.clone()
    other[:4] = torch.randn(4, WIDTH)
    assert torch.equal(TokenLogprobs.take_over(head, LogitTransform())(other, targets, counted=counted), clean)
