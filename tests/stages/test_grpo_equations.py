"""GRPO's equations, one at a time: against slow loops on ragged groups, TRL's own loss, and a policy whose KL can be enumerated."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.config import replace
from posttrain.ops import kl_k3
from posttrain.packing import Tree, forest, segment
from posttrain.rollout.advantages import differs, group_mean, group_std, leave_one_out, over_batch
from posttrain.rollout.experience import Experience
from posttrain.rollout.groups import Judged, choose, gather_groups, join
from posttrain.rollout.local import Rollout
from posttrain.stages.grpo import (
    ADVANTAGES,
    ALGORITHMS,
    NORMALISATIONS,
    GRPOConfig,
    ObjectiveConfig,
    overlong_penalty,
    policy_loss,
    weigh_tokens,
)

LENGTHS = [3, 1, 7, 2, 5, 4, 6, 2, 3]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
T = sum(LENGTHS)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NO_PENALTY = torch.zeros(T, dtype=torch.float64)


# --- advantages


def by_response(advantages: Tensor) -> list[float]:
    parts = advantages.split(LENGTHS)
    assert all(bool((part == part[0]).all()) for part in parts)
    return [part[0].item() for part in parts]


def test_rule_17_advantages_of_ragged_groups_are_those_by_hand():
    scores, kl = numbers(1, 9), 0.1 * numbers(2, T)
    totals = [s - k.sum().item() for s, k in zip(scores.tolist(), kl.split(LENGTHS))]
    for group in range(3):
        mine = totals[3 * group : 3 * group + 3]
        mean, std = np.mean(mine), np.std(mine, ddof=1)
        where = slice(3 * group, 3 * group + 3)
        assert by_response(group_std(scores, kl, GROUPS, LENGTHS))[where] == pytest.approx([(r - mean) / (std + 1e-4) for r in mine])
        assert by_response(group_mean(scores, kl, GROUPS, LENGTHS))[where] == pytest.approx([r - mean for r in mine])
        others = [r - (sum(mine) - r) / 2 for r in mine]
        assert by_response(leave_one_out(scores, kl, GROUPS, LENGTHS))[where] == pytest.approx(others)


def test_reinforce_plus_plus_pays_what_is_still_to_come():
    """A slow loop over tokens: the score minus the penalties from here on, whitened over all tokens."""
    scores, kl = numbers(3, 9), 0.3 * numbers(4, T)
    to_go = [s - sum(part[t:]) for s, part in zip(scores.tolist(), (p.tolist() for p in kl.split(LENGTHS))) for t in range(len(part))]
    expected = (np.array(to_go) - np.mean(to_go)) / math.sqrt(np.var(to_go) + 1e-8)
    np.testing.assert_allclose(over_batch(scores, kl, GROUPS, LENGTHS).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_rule_17_advantages_go_by_group_and_not_by_position(name):
    scores, kl = numbers(5, 9), 0.1 * numbers(6, T)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    rename = torch.tensor([2, 0, 1])  # and groups may have any number
    parts = kl.split(LENGTHS)
    shuffled = ADVANTAGES[name](scores[order], torch.cat([parts[i] for i in order]), rename[GROUPS[order]], [LENGTHS[i] for i in order])
    plain = ADVANTAGES[name](scores, kl, GROUPS, LENGTHS).split(LENGTHS)
    torch.testing.assert_close(shuffled, torch.cat([plain[i] for i in order]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("group_std", "group_mean", "leave_one_out"))
def test_rule_17_a_group_without_variance_gives_exactly_0(name):
    scores = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 1 / 3, 1 / 3, 1 / 3])  # in fp32 the mean of the last isn't 1/3
    found = ADVANTAGES[name](scores, torch.zeros(T), GROUPS, LENGTHS)
    assert found.isfinite().all() and found[:11].eq(0).all() and found[-11:].eq(0).all() and found[11:-11].ne(0).all()
    assert differs(scores, GROUPS).tolist() == [False, True, False]


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_rule_18_unscored_responses_are_left_out_of_the_baselines(name):
    scores = numbers(7, 9)
    scores[[1, 4, 5, 6, 7, 8]] = math.nan  # one of three; two of three; all
    found = ADVANTAGES[name](scores, NO_PENALTY, GROUPS, LENGTHS)
    first = [scores[0], scores[2]]
    alone = ADVANTAGES[name](torch.stack([*first, scores[3]]), torch.zeros(3 + 7 + 2).double(), torch.tensor([0, 0, 1]), [3, 7, 2])
    parts = found.split(LENGTHS)
    torch.testing.assert_close(torch.cat([parts[0], parts[2], parts[3]]), alone)
    assert all(bool(parts[i].eq(0).all()) for i in (1, 4, 5, 6, 7, 8))


# --- losses


def packed(fields: dict[str, Tensor]) -> Any:
    """The responses as children of one root; `fields` (T,) go along."""
    parts = {name: values.split(LENGTHS) for name, values in fields.items()}
    children = tuple(segment([7] * n, True, **{name: part[i] for name, part in parts.items()}) for i, n in enumerate(LENGTHS))
    return forest([Tree(segment([5, 6]), children, response_ids=tuple(range(9)))])


def ours(goal: ObjectiveConfig, logprobs: Tensor, fields: dict[str, Tensor], longest: int = 10) -> Tensor:
    """The loss as the stage takes it: the packed row's sum by the sum of the denominators."""
    weights, counts = NORMALISATIONS[goal.normalisation](torch.tensor(LENGTHS).double(), longest)
    micro = packed({**fields, "weights": weights.repeat_interleave(torch.tensor(LENGTHS))})
    laid = torch.cat([logprobs.new_zeros(2), logprobs])  # the prompt's tokens have none
    return policy_loss(laid, micro, goal)[0] / counts.sum()


def padded(values: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(LENGTHS)), batch_first=True)


TRL = {  # name -> TRL's loss_type
    "grpo": "grpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "gspo": "grpo",
    "cispo": "cispo",
}


@pytest.mark.parametrize("name", list(TRL))
def test_losses_and_gradients_are_trls(name):
    """TRL 1.16's `GRPOTrainer._compute_loss` itself, on padded rows, with the numbers that it would get from its model."""
    from trl import GRPOTrainer

    goal = replace(ALGORITHMS[name], clip_low=0.1, clip_high=0.15)
    old, ref, logprobs = -numbers(8, T).abs(), -numbers(9, T).abs(), (-numbers(8, T).abs() + 0.2 * numbers(10, T)).requires_grad_()
    each = numbers(11, 9)
    theirs = logprobs.detach().clone().requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(theirs), torch.zeros_like(padded(theirs)), None),
        accelerator=same,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        beta=goal.kl_coef if goal.kl == "loss" else 0.0,
        epsilon_low=goal.clip_low,
        epsilon_high=1 + goal.clip_high if name == "cispo" else goal.clip_high,  # its CISPO takes the bound itself
        importance_sampling_level="sequence" if name == "gspo" else "token",
        loss_type=TRL[name],
        max_completion_length=10,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    mask = padded(torch.ones(T).double())
    inputs = {
        "prompt_ids": torch.zeros(9, 2).long(),
        "prompt_mask": torch.ones(9, 2).long(),
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": each,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(ref),
        "num_items_in_batch": mask.sum(),
    }
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()
    fields = {"old_logprobs": old, "ref_logprobs": ref, "advantages": each.repeat_interleave(torch.tensor(LENGTHS))}
    found = ours(goal, logprobs, fields)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logprobs.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_at_equal_lengths_means_over_sequences_and_tokens_are_one(monkeypatch):
    monkeypatch.setattr(f"{__name__}.LENGTHS", [4] * 9)
    old, logprobs = -numbers(12, 36).abs(), (-numbers(12, 36).abs() + 0.1 * numbers(13, 36)).requires_grad_()
    fields = {"old_logprobs": old, "ref_logprobs": old, "advantages": numbers(14, 9).repeat_interleave(4)}
    gradients = {}
    for name in NORMALISATIONS:
        goal = ObjectiveConfig(normalisation=name, kl="none")
        gradients[name] = torch.autograd.grad(ours(goal, logprobs, fields), logprobs)[0]
    torch.testing.assert_close(gradients["sequence_mean"], gradients["token_mean"])
    torch.testing.assert_close(gradients["sequence_sum"], 4 * gradients["token_mean"])
    torch.testing.assert_close(gradients["constant"], gradients["token_mean"] * 4 / 10)  # 10 is what they could have had


def test_dr_grpo_is_grpo_without_its_two_weights():
    """Per response: GRPO's gradient has 1 / L and 1 / std where Dr.GRPO's has 1 / longest (arXiv 2503.20783)."""
    scores, old = numbers(15, 9), -numbers(16, T).abs()
    logprobs = old.clone().requires_grad_()
    found = {}
    for name in ("grpo", "dr_grpo"):
        advantages = ADVANTAGES[ALGORITHMS[name].advantage](scores, NO_PENALTY, GROUPS, LENGTHS)
        fields = {"old_logprobs": old, "ref_logprobs": old, "advantages": advantages}
        found[name] = torch.autograd.grad(ours(ALGORITHMS[name], logprobs, fields), logprobs)[0].split(LENGTHS)
    for i, (one, other) in enumerate(zip(found["grpo"], found["dr_grpo"])):
        std = scores[GROUPS[i] == GROUPS].std() + 1e-4
        torch.testing.assert_close(one * LENGTHS[i] * std, other * 10)


def test_on_policy_clip_cispo_and_reinforce_have_one_gradient():
    old = -numbers(17, T).abs()
    logprobs = old.clone().requires_grad_()
    fields = {"old_logprobs": old, "ref_logprobs": old, "advantages": numbers(18, T)}
    goals = [ObjectiveConfig(loss=loss, normalisation="token_mean") for loss in ("clip", "cispo", "reinforce")]
    one, *others = (torch.autograd.grad(ours(goal, logprobs, fields), logprobs)[0] for goal in goals)
    for other in others:
        torch.testing.assert_close(one, other)


def test_the_kl_term_is_kl_of_policy_to_reference_and_not_the_other_way():
    """A policy over 4 tokens: the mean of k3 over its own samples is KL(pi || ref), enumerated; the swapped direction is another number."""
    pi, ref = (numbers(seed, 4).softmax(0) for seed in (19, 20))
    exact, swapped = ((p * (p / q).log()).sum().item() for p, q in ((pi, ref), (ref, pi)))
    assert (pi * kl_k3(pi.log(), ref.log())).sum().item() == pytest.approx(exact)
    assert abs(exact - swapped) > 0.05
    # two-token sequences: the sum over tokens is the sequence's KL
    pairs = list(itertools.product(range(4), repeat=2))
    total = sum((pi[a] * pi[b] * (kl_k3(pi[a].log(), ref[a].log()) + kl_k3(pi[b].log(), ref[b].log()))).item() for a, b in pairs)
    assert total == pytest.approx(2 * exact)


def test_the_kl_term_of_the_loss_has_its_coefficient():
    old, ref = -numbers(21, T).abs(), -numbers(22, T).abs()
    fields = {"old_logprobs": old, "ref_logprobs": ref, "advantages": torch.zeros(T).double()}
    goal = ObjectiveConfig(normalisation="token_mean", kl_coef=0.3)
    slow = sum(math.exp(r - p) - (r - p) - 1 for r, p in zip(ref.tolist(), old.tolist())) / T
    assert ours(goal, old, fields).item() == pytest.approx(0.3 * slow)
    assert ours(replace(goal, kl="none"), old, fields).item() == ours(replace(goal, kl="reward"), old, fields).item() == 0.0


# --- penalties and weights


def test_the_overlong_penalty_at_its_four_borders():
    """Equation 13 with Lmax 20, Lcache 8: 0 up to 12, then (12 - |y|) / 8, and -1 from 20 on."""
    lengths = torch.tensor([1.0, 12.0, 13.0, 16.0, 19.0, 20.0, 25.0])
    assert overlong_penalty(lengths, 20, 8).tolist() == [0, 0, -1 / 8, -4 / 8, -7 / 8, -1, -1]
    assert overlong_penalty(lengths, 20, 0).eq(0).all()


def judged(scores: Tensor, lengths: list[int], groups: int, finished: list[bool], sampled: Tensor | None = None) -> Judged:
    sampled = torch.zeros(sum(lengths)) if sampled is None else sampled
    rollout = Rollout(
        prompts=[[5 + g] for g in range(groups)],
        responses=[[10 + b] * n for b, n in enumerate(lengths)],
        prompt_of=torch.arange(groups).repeat_interleave(len(lengths) // groups),
        logprobs=list(sampled.split(lengths)),
        finished=finished,
    )
    return Judged(rollout, {"one": scores}, scores)


def experience_of(item: Judged, logprobs: Tensor) -> Experience:
    lengths = [len(response) for response in item.rollout.responses]
    return Experience(item.rollout, lengths, torch.tensor(item.rollout.finished), logprobs, logprobs, torch.zeros(len(logprobs)))


def test_tokens_are_weighed_by_what_the_sampler_got_wrong():
    """min(pi_trainer / pi_sampler, cap) on every token's advantage; the clip is around the trainer's own ratio."""
    lengths, off = [2, 3, 1, 2], torch.tensor([0.0, 0.5, -0.5, 2.0, 0.0, 0.1, 0.0, -1.0])
    item = judged(torch.tensor([1.0, 0.0, 2.0, 0.0]), lengths, 2, [True] * 4, sampled=-torch.ones(8) - off)
    config = GRPOConfig(objective=ObjectiveConfig(advantage="group_mean", importance_cap=1.5))
    fields, counts, said = weigh_tokens(config, item, experience_of(item, -torch.ones(8)))
    expected = torch.tensor([0.5, 0.5, -0.5, -0.5, -0.5, 1.0, -1.0, -1.0]) * off.exp().clamp(max=1.5)
    torch.testing.assert_close(fields["advantages"], expected)
    assert counts.tolist() == [1, 1, 1, 1] and fields["old_logprobs"].eq(-1).all()
    assert said["sampler_ratio_max"] == pytest.approx(math.exp(2.0)) and said["sampler_ratio_capped"] == pytest.approx(2 / 8)


def test_what_is_not_trained_counts_in_no_denominator():
    lengths = [2, 3, 1, 2]
    item = judged(torch.tensor([1.0, 0.0, math.nan, 0.0]), lengths, 2, [True, False, True, True])
    config = GRPOConfig(objective=ObjectiveConfig(normalisation="token_mean"))
    everyone = experience_of(item, torch.zeros(8))
    assert weigh_tokens(config, item, everyone)[1].tolist() == [2, 3, 0, 2]
    masked, counts, _ = weigh_tokens(replace(config, mask_truncated=True), item, everyone)
    assert counts.tolist() == [2, 0, 0, 2]
    assert masked["advantages"][0] > 0  # the truncated one is still compared with


# --- rounds


def a_round(number: int, informative: list[bool]) -> Judged:
    scores = [s for n, yes in enumerate(informative) for s in (number + n, number + n + (0.5 if yes else 0.0))]
    return judged(torch.tensor(scores), [1] * len(scores), len(informative), [True] * len(scores))


class Warned(SimpleNamespace):
    def warn(self, text: str) -> None:
        self.texts.append(text)


def test_dynamic_sampling_keeps_the_first_informative_groups():
    plan = [[True, False, False, True], [False, False, False, True], [True, True, False, True]]
    run: Any = Warned(texts=[])
    kept, everything = gather_groups(lambda number: a_round(number, plan[number]), 4, 10, run)
    assert len(everything.rollout.prompts) == 12 and kept.scores[::2].tolist() == [0, 3, 4, 2] and kept.informative.all()
    assert kept.rollout.prompt_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and not run.texts
    few, _ = gather_groups(lambda number: a_round(number, plan[number]), 4, 2, run)
    assert few.scores[::2].tolist() == [0, 3, 4] and "fewer than 4 groups" in run.texts[0]
    none, everything = gather_groups(lambda number: a_round(number, [False] * 4), 4, 2, run)
    assert len(none.rollout.prompts) == 4 and len(everything.rollout.prompts) == 8
    plain, same = gather_groups(lambda number: a_round(number, plan[number]), 4, 0, run)
    assert plain is same and len(plain.rollout.prompts) == 4 and "scored alike" not in "".join(run.texts)


def test_an_iteration_in_which_all_score_alike_is_told():
    run: Any = Warned(texts=[])
    gather_groups(lambda number: a_round(number, [False] * 4), 4, 0, run)
    assert "every advantage was 0 and nothing was learnt" in run.texts[0]


def test_chosen_groups_keep_what_belongs_to_them():
    both = join([a_round(0, [True, False]), a_round(7, [True, True])])
    found = choose(both, [3, 0])
    assert found.scores.tolist() == [8.0, 8.5, 0.0, 0.5] and found.parts["one"].tolist() == found.scores.tolist()
    assert found.rollout.prompts == [[6], [5]] and found.rollout.responses == [[12], [13], [10], [11]]
