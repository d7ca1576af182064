"""One update: the same gradient, loss and step on every backend, for any micro-batching and number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.config import OptimizerConfig
from posttrain.engine import Engine
from posttrain.packing import forest
from tests.engine import jobs
from tests.engine.jobs import alone, close
from tests.pairs import BACKENDS, run_pair


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def autograd_gradient(trees, over: float) -> tuple[dict[str, Tensor], float]:
    """The gradient of the mean NLL, one conversation at a time, without the engine."""
    module = jobs.packed().train()
    loss = sum(-module(forest([tree]), ("logprobs",))["logprobs"].sum() for tree in trees) / over
    loss.backward()
    return {name: p.grad for name, p in module.hf.named_parameters()}, loss.item()


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


MAIN, TEXT = jobs.rows(5), jobs.rows(3, seed=100)
COUNT = {id(trees): sum(tree.num_trainable for tree in trees) for trees in (MAIN, TEXT)}


def test_rule_01_gradient_does_not_depend_on_micro_batches():
    expected, loss = autograd_gradient(MAIN, COUNT[id(MAIN)])
    for max_tokens in (20, 33, 1000):
        found = alone(jobs.gradients, max_tokens=max_tokens)
        close(found["gradient"], expected)
        assert found["terms"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["norm"] == pytest.approx(norm(expected), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_01_gradient_does_not_depend_on_ranks(backend):
    expected, loss = autograd_gradient(MAIN, COUNT[id(MAIN)])
    for max_tokens in (20, 1000):
        first, second = run_pair(backend, "tests.engine.jobs:gradients", max_tokens=max_tokens)
        close(first["gradient"], expected)
        assert second["gradient"] == {}
        for found in (first, second):
            assert found["terms"]["loss"] == pytest.approx(loss, rel=1e-5)
            assert found["norm"] == pytest.approx(norm(expected), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_01_rule_19_a_rank_without_rows_runs_a_dummy(backend):
    trees = jobs.rows(1)
    expected, loss = autograd_gradient(trees, trees[0].num_trainable)
    found, other = run_pair(backend, "tests.engine.jobs:uneven")
    close(found["gradient"], expected)
    assert found["loss"] == other["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("backend", ("plain", *BACKENDS))
def test_rule_14_two_losses_are_one_step_on_the_sum_of_their_gradients(backend):
    coef = 0.7
    one, first_loss = autograd_gradient(MAIN, COUNT[id(MAIN)])
    other, second_loss = autograd_gradient(TEXT, COUNT[id(TEXT)])
    expected = {name: one[name] + coef * other[name] for name in one}
    found = (
        alone(jobs.gradients, ptx_coef=coef) if backend == "plain" else run_pair(backend, "tests.engine.jobs:gradients", ptx_coef=coef)[0]
    )
    close(found["gradient"], expected)
    assert found["terms"] == pytest.approx({"loss": first_loss, "ptx": coef * second_loss}, rel=1e-5)
    assert found["norms"] == pytest.approx({"loss": norm(one), "ptx": coef * norm(other)}, rel=1e-4)
    assert found["norm"] == pytest.approx(norm(expected), rel=1e-5)


def test_rule_14_no_second_loss_is_bitwise_no_change(engine):
    without = alone(jobs.train)
    again = alone(jobs.train, ptx_coef=0.0)
    assert without["history"] == again["history"]
    assert all(torch.equal(without["weights"][name], again["weights"][name]) for name in without["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_terms_whose_backwards_alternate(backend):
    expected = alone(jobs.interleaved)
    found, _ = run_pair(backend, "tests.engine.jobs:interleaved")
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.mark.parametrize("limit", (0.5, 100.0))
def test_rule_21_learning_rate_clipping_and_steps_equal_a_torch_loop(engine, limit):
    """A hand-written AdamW loop with torch's own clipping: matrices decay, vectors don't."""
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1, max_grad_norm=limit)
    model = engine.train(jobs.packed(), config, 6, name="policy")
    module = jobs.packed().train()
    matrices, vectors = ([p for p in module.parameters() if (p.ndim > 1) == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps, foreach=False)
    factors = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * p / 4)) / 2 for p in range(4)]
    for step, factor in enumerate(factors):
        trees = jobs.rows(seed=step)
        update = jobs.nll(engine, model, trees)
        optimizer.zero_grad()
        count = sum(tree.num_trainable for tree in trees)
        (sum(-module(forest([tree]), ("logprobs",))["logprobs"].sum() for tree in trees) / count).backward()
        unclipped = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
        assert update.lr == pytest.approx(1e-2 * factor, rel=1e-12)
        assert update.grad_norm == pytest.approx(float(unclipped), rel=1e-4) and 0.5 < update.grad_norm < 100
    assert model.steps == 6
    close(model.state_dict_full(), dict(module.hf.named_parameters()), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule_21_every_backend_takes_the_same_steps(backend):
    settings = dict(steps=4, ptx_coef=0.5, max_grad_norm=0.3, warmup_steps=2, eps=1e-4)
    expected = alone(jobs.train, **settings)
    found, other = run_pair(backend, "tests.engine.jobs:train", **settings)
    assert found["steps"] == other["steps"] == expected["steps"] == 4
    for mine, theirs in zip(expected["history"], found["history"], strict=True):
        assert mine["lr"] == theirs["lr"] and mine["norm"] > 0.3
        assert theirs["norm"] == pytest.approx(mine["norm"], rel=1e-4)
        assert theirs["terms"] == pytest.approx(mine["terms"], rel=1e-5)
    close(found["weights"], expected["weights"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ("plain", *BACKENDS))
def test_rule_13_nobody_steps_on_what_is_not_finite(backend):
    if backend == "plain":
        found = alone(jobs.refusals, spoil=0)
    else:
        found, other = run_pair(backend, "tests.engine.jobs:refusals", spoil=1)
        assert other["stepped"] == found["stepped"] and other["counts"] == found["counts"]
    assert found["stepped"] == [True, False, False, True]
    assert found["unmoved"]
    assert found["counts"] == (2, 2, 0)
    assert found["norms"][1] is None and found["norms"][2] is None and found["terms"][1] == {}
    clean = alone(two_updates)
    close(found["weights"], clean, rtol=1e-5, atol=2e-5)


def two_updates(engine: Engine) -> dict[str, Tensor]:
    """What is left of `jobs.refusals` without its refused updates."""
    model = engine.train(jobs.packed(), OptimizerConfig(lr=1e-2), 10, name="policy")
    jobs.nll(engine, model, jobs.rows(seed=0))
    jobs.nll(engine, model, jobs.rows(seed=2))
    return model.state_dict_full()


@pytest.mark.parametrize("backend", ("ddp", "zero3"))
def test_rule_13_the_run_ends_after_a_set_count(backend):
    for text in run_pair(backend, "tests.engine.jobs:always_infinite"):
        assert text.startswith("2 policy refused 3 updates in a row after 0 steps") and "the loss 'loss' is inf" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_an_update_leaves_alone_gets_no_stale_gradient(backend):
    torch.manual_seed(1)
    reference = jobs.TwoHeads()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in start.items()}
    for step, heads in enumerate(("ab", "b", "ba")):
        reference.zero_grad()
        sum(reference(x + rank, head).square().sum() for head in heads for rank in range(2)).div(8).backward()
        with torch.no_grad():  # AdamW in its linear range: moves by the bias-corrected mean of gradients
            for name, p in reference.named_parameters():
                momentum[name].lerp_(torch.zeros_like(p) if p.grad is None else p.grad, 0.1)
                p.sub_(jobs.STEP * momentum[name] / (1 - 0.9 ** (step + 1)))
    found, _ = run_pair(backend, "tests.engine.jobs:idle_head")
    close(found, dict(reference.named_parameters()), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ("plain", "zero1", "zero2", "zero3"))
def test_rule_21_bf16_models_have_fp32_masters(backend):
    if backend == "plain":
        found = alone(jobs.every_update_kind, dtype="bfloat16")
        losses = found["losses"]
        assert losses[1] is not None  # a single process has no rank 1 to spoil
    else:
        found, _ = run_pair(backend, "tests.engine.jobs:every_update_kind", dtype="bfloat16")
        losses = found["losses"]
        assert losses[1] is None and found["norms"][1] is None
    reference = alone(jobs.every_update_kind)
    assert found["masters"] == {torch.float32} and found["beyond_bf16"]
    assert {value.dtype for value in found["weights"].values()} == {torch.bfloat16}
    assert losses[0] == pytest.approx(reference["losses"][0], rel=2e-2)
    assert found["norms"][0] == pytest.approx(reference["norms"][0], rel=5e-2)


@pytest.mark.parametrize("backend", ("zero2", "zero3"))
def test_offload_to_the_host_changes_no_number(backend):
    expected, _ = run_pair(backend, "tests.engine.jobs:every_update_kind")
    found, _ = run_pair(backend, "tests.engine.jobs:every_update_kind", offload=True)
    assert found["losses"][1] is None and expected["losses"][1] is None
    for step in (0, 2, 3):
        assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=1e-6)
    close(found["weights"], expected["weights"], rtol=1e-6, atol=1e-6)


def test_an_update_on_nothing_is_an_error(engine):
    model = engine.train(jobs.packed(), OptimizerConfig(lr=1e-2), 1, name="policy")
    with pytest.raises(ValueError, match="over=0 must be positive"), engine.update(model) as update:
        update.backward(torch.zeros((), requires_grad=True), over=0)
    assert model.steps == 0


def test_the_plain_path_repeats_bit_for_bit():
    one, other = alone(jobs.train), alone(jobs.train)
    assert one["history"] == other["history"]
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
