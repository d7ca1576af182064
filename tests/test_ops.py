"""Shared tensor maths against loops, numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posttrain.controllers import KLController, RunningScale
from posttrain.ops import kl_k1, kl_k3, ordered_pairs, sum_by_length, whiten

DRAW = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def test_whitening_is_the_biased_variance_over_all_tokens():
    values = numbers(50) * 3 + 7
    x = values.numpy()
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    np.testing.assert_allclose(whiten(values).numpy(), expected, rtol=1e-12)
    assert whiten(values).mean().item() == pytest.approx(0, abs=1e-12) and whiten(values).var(correction=0).item() == pytest.approx(1)


def test_whitening_leaves_the_order_and_gives_0_for_constants():
    values = numbers(20)
    assert torch.equal(whiten(values).argsort(), values.argsort())
    assert torch.equal(whiten(torch.full((5,), 3.0)), torch.zeros(5)) and torch.equal(whiten(torch.tensor([2.0])), torch.zeros(1))


def test_both_kl_estimates_have_the_exact_kl_as_their_mean():
    """Over all tokens of a small vocabulary, weighted by pi: sum of p k1 = sum of p k3 = KL(p || q)."""
    logp, logq = numbers(2, 30).log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum()
    for estimate in (kl_k1, kl_k3):
        assert (logp.exp() * estimate(logp, logq)).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    assert (kl_k3(logp, logq) >= 0).all() and (kl_k1(logp, logq) < 0).any()
    assert torch.equal(kl_k3(logp, logp), torch.zeros(30).double())
    # near 0 it is d^2 / 2, also in fp32, where exp(d) - d - 1 would be rounding errors
    assert kl_k3(torch.tensor([1e-3]), torch.zeros(1)).item() == pytest.approx(0.5e-6, rel=1e-2)


def test_sums_by_length_are_those_of_a_loop():
    lengths = [3, 1, 5, 2]
    values = numbers(11)
    expected, start = [], 0
    for length in lengths:
        expected.append(values[start : start + length].sum())
        start += length
    torch.testing.assert_close(sum_by_length(values, lengths), torch.stack(expected))
    assert sum_by_length(torch.ones(0), []).shape == (0,)


def test_ordered_pairs_leave_ties_out():
    assert ordered_pairs([0, 1, 2]) == [(0, 1), (0, 2), (1, 2)]
    assert sorted(ordered_pairs([1, 0, 1])) == [(1, 0), (1, 2)]
    assert ordered_pairs([4, 4]) == [] and ordered_pairs([7]) == []
    for k in range(2, 10):
        assert len(ordered_pairs(list(range(k)))) == math.comb(k, 2)


# --- controllers


def test_the_kl_coefficient_follows_its_closed_form():
    """Ziegler 2019: n responses multiply it by 1 + n / horizon * clip(kl / target - 1, -0.2, 0.2)."""
    control = KLController(0.1, target=6.0, horizon=1000)
    expected = 0.1
    for kl, responses in ((6.0, 64), (6.6, 64), (60.0, 100), (3.0, 10), (-2.0, 500)):
        control.update(kl, responses)
        expected *= 1 + responses / 1000 * float(np.clip(kl / 6.0 - 1, -0.2, 0.2))
        assert control.coef == pytest.approx(expected, rel=1e-12)
    again = KLController(9.9, target=6.0, horizon=1000)
    again.load_state_dict(control.state_dict())
    assert again.coef == control.coef


def test_without_a_target_the_kl_coefficient_stays():
    control = KLController(0.02, target=0.0)
    control.update(100.0, 512)
    assert control.coef == 0.02


def test_the_running_scale_is_numpy_on_everything_seen():
    scale, seen = RunningScale(), []
    for size in (5, 1, 17, 3):
        batch = numbers(size) * 4 + 100
        seen.append(batch)
        everything = torch.cat(seen).numpy()
        expected = (batch.numpy() - everything.mean()) / everything.std()
        np.testing.assert_allclose(scale(batch).numpy(), expected, rtol=1e-6)
    again = RunningScale()
    again.load_state_dict(scale.state_dict())
    batch = numbers(4)
    assert torch.equal(again(batch), scale(batch))


def test_rule_13_scores_that_are_not_finite_leave_the_running_scale_alone():
    scale, clean = RunningScale(), RunningScale()
    batch = torch.tensor([1.0, math.nan, 3.0, math.inf, 5.0])
    found, expected = scale(batch), clean(batch[batch.isfinite()])
    assert scale.state_dict() == clean.state_dict() and torch.equal(found[[0, 2, 4]], expected)
    assert not RunningScale()(torch.tensor([math.nan])).isfinite().any()


def test_the_running_scale_of_constant_scores_is_0():
    assert torch.equal(RunningScale()(torch.full((4,), 2.5)), torch.zeros(4))
