"""A pass without gradient over a global batch, and sums over micro-batches and ranks: the same on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.engine import Engine
from posttrain.engine.inference import infer, number_responses
from posttrain.engine.tally import Tally, UpdateLog, report
from posttrain.packing import Tree, segment
from tests.engine.jobs import packed, scalar
from tests.pairs import run_pair
from tests.runs import open_run
from tests.tiny import tiny_model


def trees(count: int = 7) -> list[Tree]:
    """Prompts with 1 to 4 ragged responses each."""
    draw = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(5, 300, (length,), generator=draw).tolist()

    return [Tree(segment(ids(2, 9)), tuple(segment(ids(1, 8), True) for _ in range(1 + n % 4)), index=n) for n in range(count)]


def paths() -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of every response, in order."""
    return [(tree.root.input_ids.tolist(), child.input_ids.tolist()) for tree in trees() for child in tree.children]


def slow_logprobs(temperature: float) -> list[Tensor]:
    model = tiny_model()
    result = []
    for prompt, response in paths():
        with torch.no_grad():
            distribution = (model(torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)
        result.append(torch.stack([distribution[len(prompt) - 1 + t, token] for t, token in enumerate(response)]))
    return result


def slow_values_and_scores() -> tuple[list[Tensor], list[Tensor]]:
    hf = scalar().hf.eval()
    hf.set_attn_implementation("eager")
    values, scores = [], []
    for prompt, response in paths():
        with torch.no_grad():
            raw = hf.score(hf.model(torch.tensor([prompt + response])).last_hidden_state[0]).squeeze(-1)
        values.append(raw[len(prompt) - 1 : -1])
        scores.append(raw[-1])
    return values, scores


def alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", (20, 33, 1000))
def test_rule_25_every_response_has_its_own_numbers_in_order_for_any_budget(tmp_path, budget):
    done: list[int] = []
    with open_run(tmp_path) as run:
        policy, judge = run.engine.freeze(packed(), name="policy"), run.engine.freeze(scalar(), name="judge")
        logprobs = infer(run.engine, policy, trees(), ("logprobs",), budget, temperature=0.7, progress=done.append)["logprobs"]
        read = infer(run.engine, judge, trees(), ("values", "scores"), budget)
    alike(logprobs, slow_logprobs(0.7))
    values, scores = slow_values_and_scores()
    alike(read["values"], values)
    alike(read["scores"], scores)
    assert sum(done) >= sum(tree.num_tokens for tree in trees()) and max(done) <= budget


@pytest.mark.parametrize("backend", ("ddp", "zero3"))
def test_rule_01_every_rank_gets_what_one_process_gets(backend):
    for found in run_pair(backend, "tests.engine.test_inference:passes"):
        alike(found["all"], slow_logprobs(1.0))
        alike(found["one"], slow_logprobs(1.0)[:1])  # one response for two ranks
        assert found["training"] and found["tally"] == {"a": 3.0, "b": 10.0} and found["again"] == {}


def passes(engine: Engine) -> dict[str, Any]:
    from posttrain.config import OptimizerConfig

    policy = engine.train(packed(), OptimizerConfig(lr=1e-2), 1, name="policy")
    tally = Tally()
    tally.add({"a": 1.0 + engine.world.rank, "b": torch.tensor(2.0)})
    tally.add({"b": 3})
    return {
        "all": infer(engine, policy, trees(), ("logprobs",), 40)["logprobs"],
        "one": infer(engine, policy, trees(1), ("logprobs",), 40)["logprobs"],
        "training": policy.module.training,
        "tally": tally.total(engine.world),
        "again": tally.total(engine.world),
    }


def test_responses_are_numbered_over_all_trees():
    numbered = number_responses(trees(4))
    assert [tree.response_ids for tree in numbered] == [(0,), (1, 2), (3, 4, 5), (6, 7, 8, 9)]


@dataclass
class Said:
    """What an update leaves behind."""

    model: Any = field(default_factory=lambda: SimpleNamespace(name="policy"))
    grad_norm: float | None = 2.0
    lr: float = 0.1
    stepped: bool = True
    skipped_steps: int = 0
    terms: dict[str, float] = field(default_factory=lambda: {"loss": 4.0})
    term_norms: dict[str, float] = field(default_factory=dict)


def test_rule_13_what_a_refused_update_says_is_no_number():
    good = Said()
    assert report(good) == {"loss": 4.0, "grad_norm": 2.0, "lr": 0.1}  # type: ignore[arg-type]
    bad = report(Said(grad_norm=None, stepped=False, skipped_steps=2), "critic_")  # type: ignore[arg-type]
    assert math.isnan(bad["critic_loss"]) and math.isnan(bad["critic_grad_norm"]) and bad["critic_lr"] == 0.1
    assert bad["critic_skipped_steps"] == 2


def test_an_update_log_means_what_several_updates_say():
    log = UpdateLog()
    for n in range(3):
        log.add(Said(terms={"policy": float(n), "ptx": 1.0}, term_norms={"policy": 1.0, "ptx": 4.0}))  # type: ignore[arg-type]
    critic = SimpleNamespace(name="critic")
    log.add(Said(model=critic, terms={"loss": 7.0}), "critic_")  # type: ignore[arg-type]
    means = log.means()
    assert means["policy_loss"] == 1.0 and means["ptx_loss"] == 1.0 and means["ptx_grad_norm"] == 4.0
    assert means["critic_loss"] == 7.0 and means["critic_grad_norm"] == means["grad_norm"] == 2.0
    assert log.steps == 3 and log.warnings() == []


def test_rule_13_refused_updates_are_counted_and_left_out_of_the_means():
    log = UpdateLog()
    log.add(Said(terms={"policy": 3.0}))  # type: ignore[arg-type]
    log.add(Said(terms={"policy": 9.0}, grad_norm=None, stepped=False, skipped_steps=4))  # type: ignore[arg-type]
    assert log.means() == {"policy_loss": 3.0, "grad_norm": 2.0, "lr": 0.1, "skipped_steps": 4.0} and log.steps == 1
    assert log.warnings()[0].startswith("1 of 2 updates of policy were refused")
    none = UpdateLog()
    none.add(Said(grad_norm=None, stepped=False, skipped_steps=1))  # type: ignore[arg-type]
    assert math.isnan(none.means()["loss"]) and math.isnan(none.means()["grad_norm"]) and none.steps == 0


def test_rule_13_what_a_refused_update_tallied_is_forgotten():
    engine = Engine()
    tally = Tally()
    tally.add({"tokens": 3})
    tally.settle(True)
    tally.add({"tokens": math.nan})
    tally.settle(False)
    tally.add({"tokens": 4})
    assert tally.total(engine.world) == {"tokens": 7.0} and tally.total(engine.world) == {}
    engine.close()
