"""PPO's equations on ragged responses, one by one, against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.rollout.local import Rollout
from posttrain.rollout.trees import minibatches
from posttrain.stages.ppo import explained_variance, gae, policy_loss, shape_rewards, shape_scores, value_loss

LENGTHS = [3, 1, 7, 2, 5]
T = sum(LENGTHS)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float) -> list[list[float]]:
    """Equation 2: -beta (log pi - log pi_ref) at every token, the score at the last."""
    rewards, at = [], 0
    for score, length in zip(scores.tolist(), LENGTHS):
        row = [-kl_coef * float(logprobs[at + t] - ref_logprobs[at + t]) for t in range(length)]
        row[-1] += score
        rewards.append(row)
        at += length
    return rewards


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The sum of definition: A_t = sum over l of (gamma lam)^l delta_{t+l}, with no value behind the last token."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def test_rule_15_rewards_are_kl_at_every_token_and_the_score_at_the_last():
    scores, logprobs, ref_logprobs = numbers(0, 5), numbers(1, T), numbers(2, T)
    expected = [x for row in slow_rewards(scores, logprobs, ref_logprobs, 0.3) for x in row]
    found = shape_rewards(scores, logprobs, ref_logprobs, LENGTHS, 0.3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    only_scores = shape_rewards(scores, logprobs, logprobs, LENGTHS, 0.3)
    places = (np.cumsum(LENGTHS) - 1).tolist()
    assert only_scores.nonzero().flatten().tolist() == places and torch.equal(only_scores[places], scores)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_rule_15_advantages_are_the_sum_of_their_definition_on_ragged_responses(gamma, lam):
    rewards, values = numbers(3, T), numbers(4, T)
    expected = [slow_gae(r.tolist(), v.tolist(), gamma, lam) for r, v in zip(rewards.split(LENGTHS), values.split(LENGTHS))]
    advantages, returns = gae(rewards, values, LENGTHS, gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor([x for row in expected for x in row], dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)
    # a response's advantages ignore its neighbours
    for one, mine, r, v in zip(LENGTHS, advantages.split(LENGTHS), rewards.split(LENGTHS), values.split(LENGTHS)):
        torch.testing.assert_close(gae(r, v, [one], gamma, lam)[0], mine)
    if (gamma, lam) == (1.0, 1.0):  # Monte Carlo: the return is the sum of what is still to come
        torch.testing.assert_close(returns, torch.cat([r.flip(0).cumsum(0).flip(0) for r in rewards.split(LENGTHS)]))


def test_rule_15_a_response_without_its_end_has_its_score_replaced_once_after_clipping():
    scores, finished = torch.tensor([9.0, -9.0, 0.5, 9.0]), torch.tensor([True, True, True, False])
    assert shape_scores(scores, finished, 5.0, -1.0).tolist() == [5.0, -5.0, 0.5, -1.0]
    assert shape_scores(scores, finished, 0.0, -7.0).tolist() == [9.0, -9.0, 0.5, -7.0]
    assert shape_scores(scores, finished, 2.0, -7.0).tolist() == [2.0, -2.0, 0.5, -7.0]  # what replaces isn't clipped


def test_the_policy_loss_and_its_gradient_are_a_loop_over_tokens():
    old, advantages = numbers(5, T) - 3, numbers(6, T)
    new = (old + 0.3 * numbers(7, T)).requires_grad_()
    mask = torch.ones(T, dtype=torch.bool)
    mask[[0, 4, 9]] = False
    clip, total, clipped, gradient = 0.2, 0.0, 0, torch.zeros(T, dtype=torch.float64)
    for t in range(T):
        if not mask[t]:
            continue
        ratio, advantage = math.exp(float(new.detach()[t] - old[t])), float(advantages[t])
        bound = min(max(ratio, 1 - clip), 1 + clip)
        total += -min(ratio * advantage, bound * advantage)
        outside = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
        clipped += outside
        gradient[t] = 0 if outside else -advantage * ratio
    loss, stats = policy_loss(new, old, advantages, mask, clip)
    loss.backward()
    assert loss.item() == pytest.approx(total) and int(stats["clip_fraction"]) == clipped > 2
    torch.testing.assert_close(new.grad, gradient)
    ratios = [math.exp(float(new.detach()[t] - old[t])) for t in range(T) if mask[t]]
    assert stats["ratio"].item() == pytest.approx(sum(ratios))
    assert stats["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))


@pytest.mark.parametrize("clip", (0.2, 0.0))
def test_the_value_loss_and_its_gradient_are_a_loop_over_tokens(clip):
    old, returns = numbers(8, T), numbers(9, T)
    new = (old + 0.4 * numbers(10, T)).requires_grad_()
    mask = torch.ones(T, dtype=torch.bool)
    mask[[1, 10]] = False
    total, gradient = 0.0, torch.zeros(T, dtype=torch.float64)
    for t in range(T):
        if not mask[t]:
            continue
        v, r, o = float(new.detach()[t]), float(returns[t]), float(old[t])
        near = min(max(v, o - clip), o + clip) if clip else v
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        gradient[t] = v - r if near == v or (v - r) ** 2 > (near - r) ** 2 else 0.0
    loss = value_loss(new, old, returns, mask, clip)
    loss.backward()
    assert loss.item() == pytest.approx(total)
    torch.testing.assert_close(new.grad, gradient)


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    returns = numbers(11, T)
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(T).double(), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(T)) == 0.0


def test_rule_13_explained_variance_of_what_is_not_finite_is_no_number():
    returns = numbers(11, T)
    for bad in (math.nan, math.inf):
        broken = returns.clone()
        broken[3] = bad
        assert math.isnan(explained_variance(broken, returns)) and math.isnan(explained_variance(returns, broken))


def test_every_response_is_in_one_minibatch_of_every_epoch():
    lengths = [3, 1, 4, 2, 5, 2]
    rollout = Rollout(
        prompts=[[5], [6, 7], [8]],
        responses=[list(range(10 * b, 10 * b + n)) for b, n in enumerate(lengths, 1)],
        prompt_of=torch.tensor([0, 0, 1, 1, 2, 2]),
        logprobs=[torch.zeros(n) for n in lengths],
        finished=[True] * 6,
    )
    fields = {"place": torch.arange(sum(lengths)).float()}
    made = list(minibatches(rollout, fields, 3, 3, (7, 0)))
    assert len(made) == 9
    orders = []
    for epoch in range(3):
        seen = [i for trees in made[3 * epoch : 3 * epoch + 3] for tree in trees for i in tree.response_ids]
        assert sorted(seen) == list(range(6))
        orders.append(seen)
    assert len({tuple(order) for order in orders}) > 1
    starts = np.cumsum([0, *lengths])
    for trees in made:
        for tree in trees:
            assert tree.root.input_ids.tolist() == rollout.prompts[tree.index]
            for i, child in zip(tree.response_ids, tree.children):
                assert child.input_ids.tolist() == rollout.responses[i] and child.trainable.all()
                assert child.fields["place"].tolist() == list(range(starts[i], starts[i + 1]))
    again = list(minibatches(rollout, fields, 3, 3, (7, 0)))
    other = list(minibatches(rollout, fields, 3, 3, (7, 1)))

    def ids(batches):
        return [[tree.response_ids for tree in trees] for trees in batches]

    assert ids(again) == ids(made) != ids(other)
