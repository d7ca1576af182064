"""Where time goes: every second is booked once, under the phase that it passed in."""

from __future__ import annotations

import json
import time

import pytest

from posttrain.clock import Clock, between
from posttrain.engine import Engine
from posttrain.engine.inference import infer
from tests.engine.jobs import LINEAR, nll, packed, rows
from tests.engine.writing_jobs import disk
from tests.run_jobs import STEPS, new_run, train
from tests.tiny import tiny_tokenizer


def test_every_second_is_booked_once_and_a_phase_inside_another_is_part_of_it():
    now = [0.0]
    clock = Clock(lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    passes(1)
    clock.rest = "loading"
    passes(2)
    with clock.phase("evaluation"):
        passes(4)
        with clock.phase("scoring"):
            passes(8)
        passes(16)
        middle = clock.read()
        passes(32)
    clock.rest = "other"
    passes(64)
    with pytest.raises(KeyError), clock.phase("update"):
        passes(128)
        raise KeyError
    passes(256)
    found = clock.read()
    assert found == {"other": 1 + 64 + 256, "loading": 2, "evaluation": 4 + 8 + 16 + 32, "update": 128}
    assert sum(found.values()) == now[0]
    assert between(middle, found) == {"other": 64 + 256, "evaluation": 32, "update": 128}


def test_what_the_engine_does_is_told_apart(tmp_path, monkeypatch):
    engine = Engine()
    model = engine.train(packed(), LINEAR, 3, name="policy")

    def grows(*phases: str) -> bool:
        nonlocal before
        added, before = between(before, engine.world.clock.read()), engine.world.clock.read()
        return all(added.pop(phase) > 0 for phase in phases) and set(added) <= {"other"}

    before = engine.world.clock.read()
    nll(engine, model, rows())
    assert grows("update")
    infer(engine, model, rows(), ("logprobs",), 24)
    assert grows("scoring")
    with model.gathered():
        time.sleep(0.001)
    assert grows("sampling")
    engine.save(tmp_path / "step_000001", {"policy": model}, {}, {}, background=True)
    assert grows("saving")
    engine.settle()
    assert grows("saving")
    engine.export(model, tmp_path / "model", tiny_tokenizer())
    assert grows("exporting")
    engine.close()


def test_a_run_logs_where_each_steps_time_went_and_sums_it_up(tmp_path):
    engine = Engine()
    began = time.monotonic()
    run = new_run(engine, tmp_path, every=1, background=False)
    time.sleep(0.2)
    with disk(lambda path: time.sleep(0.02)):  # 4 files
        train(run)
    engine.close()
    run.count_time()
    took = time.monotonic() - began
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    spent = [{name.removeprefix("time/"): seconds for name, seconds in line.items() if name.startswith("time/")} for line in lines]
    assert len(spent) == STEPS and all({"update", "other"} <= set(line) for line in spent)
    assert spent[0]["loading"] > 0.2 and not any("loading" in line for line in spent[1:])
    assert "saving" not in spent[0] and all(line["saving"] > 0.08 for line in spent[1:]), "said in the line after it"
    total = run.counters.phases
    assert sum(total.values()) == pytest.approx(run.counters.seconds) == pytest.approx(took, abs=0.05)
    for phase in ("loading", "update"):
        assert total[phase] == pytest.approx(sum(line.get(phase, 0.0) for line in spent), abs=0.002)
    assert total["saving"] > 0.08 * STEPS
    assert not any(name.startswith("time/") for name in run.metrics), "they are no results"
