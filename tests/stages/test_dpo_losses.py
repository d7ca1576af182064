"""Preference losses: TRL's numbers and gradients on the same weights and rows, closed forms, and a slow loop for K > 2."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import AdapterConfig, DataConfig, ModelConfig, gather_problems
from posttrain.data.chat import Chat
from posttrain.data.tokenized import comparison_trees, judgement_trees
from posttrain.models.loading import load_causal_lm
from posttrain.packing import Tree, pack, segment
from posttrain.preferences import Pairs, Responses, mismatched, summary
from posttrain.stages.dpo import LOSSES, DPOConfig, kl_baseline, kto, log_odds, objective_of, unpaired_objective
from tests.runs import close
from tests.stages.worlds import judgements, rankings
from tests.tiny import CHATML, tiny_folder

TURN_ENDS = CHATML.replace("<|im_end|>' + '\\n'", "<|im_end|>'")  # TRL trains what a template puts after the end of turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A policy and a reference that is another model."""
    place = tmp_path_factory.mktemp("models")
    return tuple(tiny_folder(place / name, seed=seed, chat_template=TURN_ENDS) for name, seed in (("policy", 0), ("reference", 1)))


def config_of(*losses: str, **settings: Any) -> DPOConfig:
    settings = {"loss_weights": (1.0,) * len(losses), "beta": 0.3, **settings}
    config = DPOConfig(model=ModelConfig(path="model"), data=DataConfig(path="rows"), losses=losses, **settings)
    assert gather_problems(config) == []
    return config


def loss_and_gradient(
    folders: tuple[Path, Path], trees: list[Tree], config: DPOConfig, log_ratios: torch.Tensor | None = None, budget: int = 300
) -> tuple[float, dict[str, torch.Tensor]]:
    """What the stage's functions make of the rows, in several packed rows."""
    policy, reference = (load_causal_lm(ModelConfig(path=str(folder))).eval() for folder in folders)
    objective = objective_of(config, trees, torch.zeros(0) if log_ratios is None else log_ratios)
    total = 0.0
    for micro in pack(trees, budget).micro_batches():
        with torch.no_grad():
            ref_logprobs = micro.sum_by_response(reference(micro, ("logprobs",))["logprobs"].double())
        logprobs = micro.sum_by_response(policy(micro, ("logprobs",))["logprobs"].double())
        lengths = micro.sum_by_response(micro.trainable.double())
        loss, _ = objective(Responses(logprobs, ref_logprobs * config.needs_reference, lengths, micro.groups))
        (loss.float() / len(trees)).backward()
        total += loss.item() / len(trees)
    return total, {name: value.grad for name, value in policy.hf.state_dict(keep_vars=True).items() if value.grad is not None}


# --- TRL's trainers


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return rankings(8, most=2)


@pytest.fixture(scope="module")
def dpo_trainer(folders, pairs, tmp_path_factory) -> Any:
    import trl

    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["responses"][row["ranks"].index(0)]}],
            "rejected": [{"role": "assistant", "content": row["responses"][row["ranks"].index(1)]}],
        }
        for row in pairs
    ]
    arguments = trl.DPOConfig(**trl_settings(tmp_path_factory.mktemp("trl"), len(rows)))
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def trl_settings(folder: Path, batch_size: int) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch_size,
        disable_tqdm=True,
    )


def trl_loss_and_gradient(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        (("sigmoid",), {}),
        (("robust",), {"label_smoothing": 0.1}),
        (("hinge",), {}),
        (("ipo",), {}),
        (("exo_pair",), {"label_smoothing": 0.05}),
        (("nca_pair",), {}),
        (("apo_zero",), {}),
        (("apo_down",), {}),
        (("sigmoid_norm",), {"beta": 3.0}),
        (("sigmoid", "hinge", "apo_zero"), {"loss_weights": (0.5, 0.25, 2.0)}),
        (("sigmoid",), {"nll_coef": 0.7}),
    ],
)
def test_losses_and_gradients_are_those_of_trl(folders, pairs, dpo_trainer, losses, settings):
    config = config_of(*losses, **settings)
    theirs = (*losses, "sft") if config.nll_coef else losses
    weights = [*config.loss_weights, config.nll_coef][: len(theirs)]
    dpo_trainer.loss_types, dpo_trainer.loss_weights = list(theirs), weights
    dpo_trainer.beta, dpo_trainer.label_smoothing = config.beta, config.label_smoothing
    loss, expected = trl_loss_and_gradient(dpo_trainer)
    trees, _ = comparison_trees(pairs, Chat.load(str(folders[0])), 300)
    found, gradient = loss_and_gradient(folders, trees, config)
    assert found == pytest.approx(loss, abs=1e-5)
    close(gradient, expected, rtol=1e-4, atol=2e-6)
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3


def test_kto_loss_and_gradient_are_those_of_trl(folders, tmp_path):
    """With weights, and a baseline above 0: the policy is far from its reference."""
    import trl

    rows = judgements(9)
    arguments = trl.KTOConfig(
        **trl_settings(tmp_path, len(rows)), beta=0.05, desirable_weight=1.3, undesirable_weight=0.8, dataloader_drop_last=False
    )
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
            "label": row["desirable"],
        }
        for row in rows
    ]
    chat = Chat.load(str(folders[0]))
    trees, _ = judgement_trees(rows, chat, 300)
    signs = set()
    for policy, reference in (folders, folders[::-1]):
        model, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (policy, reference))
        tokenizer = AutoTokenizer.from_pretrained(policy)
        dataset = Dataset.from_list(conversations)
        trainer = trl.KTOTrainer(model=model, ref_model=other, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        loss, expected = trl_loss_and_gradient(trainer)
        log_ratios = by_hand((policy, reference), mismatched(trees, 300))
        config = config_of("kto", beta=0.05, desirable_weight=1.3, undesirable_weight=0.8)
        found, gradient = loss_and_gradient((policy, reference), trees, config, log_ratios)
        assert kl_baseline(log_ratios) == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-4)
        assert found == pytest.approx(loss, abs=1e-5)
        close(gradient, expected, rtol=1e-4, atol=2e-6)
        signs.add(float(log_ratios.mean()) > 0)
    assert signs == {True, False}, "one of the two baselines is clamped at 0"


def by_hand(folders: tuple[Path, Path], trees: list[Tree]) -> torch.Tensor:
    """Log-ratios (B,) of each response, from plain transformers, one conversation at a time."""
    with torch.no_grad():
        return response_logprobs(folders[0], trees) - response_logprobs(folders[1], trees)


def response_logprobs(folder: Path, trees: list[Tree]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for tree in trees:
        for child in tree.children:
            ids = torch.cat([tree.root.input_ids, child.input_ids])
            logits = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(logits[len(tree.root) - 1 : -1].gather(1, child.input_ids[:, None]).sum())
    return torch.stack(sums)


# --- closed forms


def some_pairs(count: int = 7, seed: int = 0) -> Pairs:
    """Sums of log-probabilities as responses of 3 to 40 tokens have them, in fp64, with gradients."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (2, count), generator=draw).double()
    sums = -lengths * (0.2 + torch.rand(2, count, generator=draw, dtype=torch.float64) * 2)
    ref = sums + torch.randn(2, count, generator=draw, dtype=torch.float64)
    chosen, rejected = (part.clone().requires_grad_() for part in sums)
    return Pairs(chosen, rejected, *ref, *lengths)


def logistic(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def test_label_smoothing_of_dpo_is_the_expected_loss_under_flipped_labels():
    config, pairs = config_of("sigmoid", label_smoothing=0.2), some_pairs()
    lead = 0.3 * ((pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected))
    expected = -0.8 * torch.log(logistic(lead)) - 0.2 * torch.log(logistic(-lead))
    torch.testing.assert_close(LOSSES["sigmoid"](pairs, config), expected)


def test_robust_dpo_is_unbiased_under_wrong_labels():
    """(1 - e) robust(label) + e robust(flipped label) is DPO's loss of the true label."""
    config, pairs = config_of("robust", label_smoothing=0.3), some_pairs()
    flipped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen, pairs.rejected_lengths, pairs.chosen_lengths)
    mean = 0.7 * LOSSES["robust"](pairs, config) + 0.3 * LOSSES["robust"](flipped, config)
    torch.testing.assert_close(mean, LOSSES["sigmoid"](pairs, config_of("sigmoid")))


def test_simpo_and_cpo_are_their_equations_and_trls():
    from trl.experimental.cpo import CPOTrainer

    pairs = some_pairs()
    averages = [pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths]
    for name, settings, sums in (
        ("simpo", {"beta": 2.0, "target_margin": 0.9}, averages),
        ("cpo", {"nll_coef": 1.0}, [pairs.chosen, pairs.rejected]),
    ):
        config = config_of(name, **settings)
        stand_in = SimpleNamespace(
            alpha=0.0,
            beta=config.beta,
            simpo_gamma=config.target_margin,
            label_smoothing=0.0,
            loss_type="simpo" if name == "simpo" else "sigmoid",
            accelerator=SimpleNamespace(device="cpu"),
        )
        losses, *_ = CPOTrainer.cpo_loss(stand_in, *sums)
        found = LOSSES[name](pairs, config)
        torch.testing.assert_close(found, losses)
        margin = config.target_margin if name == "simpo" else 0.0
        torch.testing.assert_close(found, -torch.log(logistic(config.beta * (sums[0] - sums[1]) - margin)))


def test_orpo_is_its_equation_and_trls():
    from trl.experimental.orpo import ORPOTrainer

    pairs, config = some_pairs(), config_of("orpo", beta=0.1, nll_coef=1.0)
    stand_in = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    means = (pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(stand_in, *means)
    found = LOSSES["orpo"](pairs, config)
    torch.testing.assert_close(found, -theirs.double(), rtol=1e-5, atol=1e-6)
    odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in means]
    torch.testing.assert_close(found, -0.1 * torch.log(logistic(torch.log(odds[0] / odds[1]))))
    [gradient] = torch.autograd.grad(found.sum(), pairs.chosen, retain_graph=True)
    [expected] = torch.autograd.grad(-theirs.sum(), pairs.chosen)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_log_odds_of_what_is_certain_and_of_what_is_impossible_are_finite():
    logprobs = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -700.0, -1e4], dtype=torch.float64, requires_grad=True)
    odds = log_odds(logprobs)
    torch.testing.assert_close(odds[2:5], torch.log(torch.exp(logprobs[2:5]) / (1 - torch.exp(logprobs[2:5]))))
    odds.sum().backward()
    assert bool(torch.isfinite(odds).all()) and bool(torch.isfinite(logprobs.grad).all())


def test_exo_is_a_kl_divergence():
    """Between the policy's preference and the smoothed label, 0 where they agree."""
    config, pairs = config_of("exo_pair", label_smoothing=0.1), some_pairs()
    lead = config.beta * ((pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected))
    policy = torch.stack([logistic(lead), logistic(-lead)])
    label = torch.tensor([0.9, 0.1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(LOSSES["exo_pair"](pairs, config), (policy * (policy / label).log()).sum(0))
    zero, agreed = torch.zeros(1, dtype=torch.float64), math.log(9) / config.beta
    assert LOSSES["exo_pair"](Pairs(zero + agreed, zero, zero, zero, zero + 1, zero + 1), config).item() == pytest.approx(0, abs=1e-12)


def test_kto_by_hand():
    config = config_of("kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    found = kto(torch.tensor([1.0, 1.0, -2.0]), torch.tensor([True, False, False]), 0.4, config)
    expected = [2 * (1 - 1 / (1 + math.exp(-0.3))), 3 * (1 - 1 / (1 + math.exp(0.3))), 3 * (1 - 1 / (1 + math.exp(-1.2)))]
    assert found.tolist() == pytest.approx(expected)
    assert math.isnan(kl_baseline(torch.tensor([1.0, math.nan])))  # and not 0, which would hide it
    assert kl_baseline(torch.tensor([1.0, -3.0])) == 0 and kl_baseline(torch.tensor([1.0, -0.5])) == pytest.approx(0.25)


# --- K responses


def slow_loss(config: DPOConfig, trees: list[Tree], logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Every pair of every element by itself: the mean over an element's pairs, ties dropped; NLL of the best over all its tokens."""
    first, losses, nll, tokens = 0, [], 0.0, 0
    for tree in trees:
        own = range(len(tree.children))
        pair_losses = []
        for i, j in combinations(own, 2):
            if tree.ranks[i] == tree.ranks[j]:
                continue
            w, l = (i, j) if tree.ranks[i] < tree.ranks[j] else (j, i)  # noqa: E741
            lead = (logprobs[first + w] - ref_logprobs[first + w]) - (logprobs[first + l] - ref_logprobs[first + l])
            pair_losses.append(-F.logsigmoid(config.beta * lead))
        losses.append(torch.stack(pair_losses).mean())
        best = min(own, key=lambda i, tree=tree: (tree.ranks[i], i))
        nll, tokens = nll - logprobs[first + best], tokens + len(tree.children[best])
        first += len(tree.children)
    return torch.stack(losses).mean() + config.nll_coef * nll / tokens


def test_k_ranked_responses_are_the_mean_over_their_pairs(folders):
    config = config_of("sigmoid", nll_coef=0.4)
    trees, _ = comparison_trees(rankings(9, most=5), Chat.load(str(folders[0])), 300)
    assert max(len(tree.children) for tree in trees) == 5 and any(len(set(tree.ranks)) < len(tree.ranks) for tree in trees)
    found, gradient = loss_and_gradient(folders, trees, config)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    sums = []
    for tree in trees:
        for child in tree.children:
            ids = torch.cat([tree.root.input_ids, child.input_ids])
            logits = model(ids[None]).logits[0].log_softmax(-1)
            sums.append(logits[len(tree.root) - 1 : -1].gather(1, child.input_ids[:, None]).sum())
    expected = slow_loss(config, trees, torch.stack(sums), response_logprobs(folders[1], trees).detach())
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    close(gradient, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-4, atol=2e-6)


def test_a_dummy_row_adds_nothing_and_keeps_its_graph():
    for config in (config_of("sigmoid", "ipo", nll_coef=0.5), config_of("kto")):
        logprobs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        zeros = torch.zeros(2, dtype=torch.float64)
        tree = Tree(
            segment([1]),
            (segment([2], True), segment([3], True))[: 1 if config.is_unpaired else 2],
            ranks=(0, 1)[: 1 if config.is_unpaired else 2],
        )
        loss, _ = objective_of(config, [tree], torch.zeros(1))(Responses(logprobs, zeros, zeros + 1, []))
        loss.backward()
        assert loss.item() == 0 and logprobs.grad.tolist() == [0, 0]


# --- what is logged


def test_what_is_logged_by_hand():
    """Two elements, of 3 and of 2 responses; every pair's share is one over its element's pairs."""
    config = config_of("sigmoid", beta=0.5)
    trees = [
        Tree(segment([1]), tuple(segment([2] * n, True) for n in (2, 4, 5)), ranks=(1, 0, 1)),
        Tree(segment([1]), tuple(segment([2] * n, True) for n in (1, 3)), ranks=(0, 1)),
    ]
    logprobs = torch.tensor([-4.0, -6.0, -9.0, -3.0, -7.0], dtype=torch.float64)
    ref = torch.tensor([-5.0, -9.0, -3.0, -2.0, -7.0], dtype=torch.float64)
    responses = Responses(
        logprobs, ref, torch.tensor([2.0, 4.0, 5.0, 1.0, 3.0]).double(), [(trees[0], slice(0, 3)), (trees[1], slice(3, 5))]
    )
    loss, sums = objective_of(config, trees, torch.zeros(0))(responses)
    found = summary({name: float(value) for name, value in sums.items()})
    assert found["chosen_logprobs"] == (-6 - 3) / 2 and found["rejected_logprobs"] == ((-4 - 9) / 2 - 7) / 2
    assert found["chosen_logprobs_per_token"] == (-6 / 4 - 3) / 2
    assert found["rejected_logprobs_per_token"] == pytest.approx(((-4 / 2 - 9 / 5) / 2 - 7 / 3) / 2)
    assert found["chosen_rewards"] == 0.5 * (3 - 1) / 2 and found["rejected_rewards"] == 0.5 * ((1 - 6) / 2 + 0) / 2
    assert found["margin"] == found["chosen_rewards"] - found["rejected_rewards"]
    assert found["accuracy"] == 0.5 and found["nll_loss"] == (6 + 3) / (4 + 1)
    lead = torch.tensor([3 - 1.0, 3 + 6.0, -1 - 0.0])
    own = -F.logsigmoid(0.5 * lead)
    assert loss.item() / 2 == pytest.approx(((own[0] + own[1]) / 2 + own[2]).item() / 2) and found["sigmoid_loss"] == pytest.approx(
        loss.item() / 2
    )


def test_what_is_logged_of_judgements_by_hand():
    config = config_of("kto", beta=0.5)
    trees = [Tree(segment([1]), (segment([2] * 2, True),), ranks=(rank,)) for rank in (0, 1, 1, 0)]
    log_ratios = torch.tensor([2.0, 1.0, -1.0, 0.1], dtype=torch.float64)
    groups = [(tree, slice(n, n + 1)) for n, tree in enumerate(trees)]
    responses = Responses(log_ratios - 3, torch.full((4,), -3.0).double(), torch.full((4,), 2.0).double(), groups)
    _, sums = unpaired_objective(responses, config, 0.5)
    found = summary({name: float(value) for name, value in sums.items()})
    assert found["accuracy"] == 0.5  # against the baseline 0.5: right, wrong, right, wrong
    assert found["chosen_rewards"] == pytest.approx(0.5 * 2.1 / 2) and found["rejected_rewards"] == 0
    assert found["chosen_logprobs"] == pytest.approx((-1 - 2.9) / 2) and found["rejected_logprobs_per_token"] == (-2 - 4) / 4
    alone = summary(
        {
            name: float(value)
            for name, value in unpaired_objective(
                Responses(responses.logprobs, responses.ref_logprobs, responses.lengths, groups[:1]), config, 0.5
            )[1].items()
        }
    )
    assert math.isnan(alone["rejected_rewards"]) and math.isnan(alone["margin"]) and alone["chosen_rewards"] == 1.0


# --- the config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"losses": ("sigmiod",)}, "losses=('sigmiod',) has 'sigmiod'; did you mean 'sigmoid'?"),
        ({"losses": ("kto", "sigmoid"), "loss_weights": (1.0, 1.0)}, "kto judges single responses; ('kto',) works"),
        ({"losses": ("sigmoid", "ipo")}, "loss_weights=(1.0,) must hold one weight per loss; (1.0, 1.0) works"),
        ({"losses": ("orpo",)}, "nll_coef=0 leaves out the NLL that orpo is made of; nll_coef=1 is the paper's"),
        ({"losses": ("kto",), "nll_coef": 1.0}, "nll_coef=1.0 has no chosen responses with kto"),
        ({"losses": ("kto",), "batch_size": 1}, "batch_size=1 leaves kto without a mismatched response; 2 works"),
        ({"losses": ("exo_pair",)}, "label_smoothing=0 makes exo_pair infinite; 1e-3 is the paper's"),
        ({"losses": ("hinge",), "label_smoothing": 0.1}, "label_smoothing=0.1 is read by sigmoid, robust and exo_pair alone"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must lie in [0, 0.5)"),
        ({"reference": "disk"}, "reference='disk' must be live or cached"),
        ({"losses": ()}, "losses=() must name one loss or more"),
        (
            {"model": ModelConfig(path="model", adapter=AdapterConfig(rank=4, dropout=0.1))},
            "model.adapter.dropout=0.1 is noise in every log-ratio; 0 works",
        ),
        ({"beta": 0.0}, "beta=0.0 must be positive; 0.1 works"),
        ({"max_tokens_per_micro_batch": 100}, "max_tokens_per_micro_batch=100 must be at least max_length=2048"),
    ],
)
def test_problems(settings, expected):
    config = DPOConfig(**{"model": ModelConfig(path="model"), "data": DataConfig(path="rows"), **settings})
    assert any(expected in text for text in gather_problems(config)), gather_problems(config)
