"""Checkpoints: exact resume on every backend, all or nothing on the disk, and clear refusals."""

from __future__ import annotations

import json

import pytest
import torch

from posttrain.engine import Engine
from posttrain.engine.checkpoint import prune
from tests.engine import jobs
from tests.engine.jobs import alone, on
from tests.pairs import BACKENDS, run_pair


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("backend", ("plain", *BACKENDS))
def test_rule_08_resuming_twice_equals_going_through_bit_for_bit(backend, tmp_path):
    ranks = on(backend, "resume", folder=str(tmp_path))
    for whole, first, second, third in ranks:
        assert first["losses"] == whole["losses"][:3]  # saving disturbs nothing
        assert second["losses"] == whole["losses"][2:4]
        assert third["losses"] == whole["losses"][4:]
        for name in ("policy", "critic", "ema", "draws", "steps"):
            assert same(third[name], whole[name]), name
    if len(ranks) == 2:
        assert ranks[0][0]["draws"] != ranks[1][0]["draws"]  # every rank has random numbers of its own


@pytest.mark.parametrize("backend", ("plain", *BACKENDS))
def test_the_best_checkpoint_loads_into_models_that_trained_on(backend, tmp_path):
    folder = str(tmp_path)
    assert (
        alone(jobs.back_to_best, folder=folder)
        if backend == "plain"
        else all(run_pair(backend, "tests.engine.jobs:back_to_best", folder=folder))
    )


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints of one process."""
    engine = Engine()
    model = engine.train(jobs.packed(), jobs.LINEAR, 4, name="policy", ema_decay=0.5)
    for step in (1, 2, 3):
        jobs.nll(engine, model, jobs.rows(seed=step))
        engine.save(tmp_path / f"step_{step:06d}", {"policy": model}, {"step": step}, {"stage": "sft"})
    weights = model.state_dict_full()
    engine.close()
    return tmp_path, weights


@pytest.mark.parametrize("backend", ("ddp", "zero2", "zero3"))
def test_rule_24_another_backend_is_refused_with_the_command_that_works(backend, saved):
    folder, weights = saved
    refused = run_pair(backend, "tests.engine.jobs:try_load", folder=str(folder / "step_000003"))
    for answer in refused:
        assert "was written by single with 1 process(es)" in answer["error"] and f"this launch is {backend} with 2" in answer["error"]
        assert "`python ...`" in answer["error"] and "--restart-optimizer" in answer["error"]
    taken = run_pair(backend, "tests.engine.jobs:try_load", folder=str(folder / "step_000003"), restart_optimizer=True)[0]
    assert same(taken["weights"], weights)
    assert taken["state"] == {"step": 3} and taken["steps"] == 1
    fresh = alone(jobs.try_load, folder=str(folder / "step_000003"), restart_optimizer=True)
    assert taken["norm"] == pytest.approx(fresh["norm"], rel=1e-4)
    torch.testing.assert_close(taken["ema"], fresh["ema"], rtol=1e-5, atol=2e-6)


def test_rule_24_weights_of_a_sharded_checkpoint_start_any_backend(tmp_path):
    run_pair("zero3", "tests.engine.jobs:back_to_best", folder=str(tmp_path))
    command = "accelerate launch --config_file accelerate_configs/cpu_zero3.yaml --num_processes 2"
    assert command in alone(jobs.try_load, folder=str(tmp_path / "step_000001"))["error"]
    taken = alone(jobs.try_load, folder=str(tmp_path / "step_000001"), restart_optimizer=True)
    assert taken["state"] == {} and taken["norm"] > 0


def test_rule_24_a_damaged_checkpoint_is_named_and_passed_over(saved, capsys):
    folder, _ = saved
    engine = Engine()
    assert engine.newest_good(folder) == folder / "step_000003"
    with (folder / "step_000003" / "policy.weights.pt").open("r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    assert engine.newest_good(folder) == folder / "step_000002"
    assert "step_000003 is damaged and passed over: policy.weights.pt is not what was written" in capsys.readouterr().out
    (folder / "step_000002" / "rng.rank0.pt").unlink()
    assert engine.newest_good(folder) == folder / "step_000001"
    assert "rng.rank0.pt is missing" in capsys.readouterr().out
    (folder / "step_000001" / "manifest.json").write_text("{")
    assert engine.newest_good(folder) is None
    assert engine.newest_good(folder / "nothing") is None
    engine.close()


def test_old_checkpoints_go_only_when_the_newest_is_good(saved):
    folder, _ = saved
    (folder / "step_000003" / "state.pt").write_bytes(b"")
    prune(folder, keep=1)
    assert len(list(folder.iterdir())) == 3
    (folder / "step_000003" / "manifest.json").unlink()
    engine = Engine()
    model = engine.train(jobs.packed(), jobs.LINEAR, 4, name="policy")
    engine.save(folder / "step_000004", {"policy": model}, {}, {})
    engine.prune(folder, keep=1, also=[folder / "step_000001"])
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001", "step_000004"]
    engine.close()


def test_rule_24_the_manifest_says_who_wrote_what(saved):
    folder, _ = saved
    manifest = json.loads((folder / "step_000001" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("stage", "backend", "zero_stage", "world_size", "models")} == {
        "stage": "sft",
        "backend": "single",
        "zero_stage": 0,
        "world_size": 1,
        "models": ["policy"],
    }
    assert sorted(manifest["files"]) == ["policy.rank0.pt", "policy.weights.pt", "rng.rank0.pt", "state.pt"]
    with pytest.raises(ValueError, match="has the models policy, not critic"):
        engine = Engine()
        engine.load(folder / "step_000001", {"critic": engine.train(jobs.scalar(), jobs.LINEAR, 1, name="critic")})


@pytest.mark.parametrize("background", (False, True))
@pytest.mark.parametrize("backend", ("plain", "ddp", "zero3"))
def test_rule_24_a_full_disk_leaves_the_last_good_checkpoint(backend, background, tmp_path):
    answers = on(backend, "full_disk", folder=str(tmp_path), rank=1 if backend == "zero3" else 0, background=background)
    for answer in answers:
        assert "step_000002 could not be written, earlier checkpoints are untouched: rank" in answer["error"]
        assert answer["left"] == ["step_000001"] and answer["good"] == tmp_path / "step_000001"
        assert answer["steps"] == 1


@pytest.mark.parametrize("backend", ("plain", "zero2", "zero3"))
def test_rule_13_weights_that_are_not_finite_are_never_saved(backend, tmp_path):
    folder = str(tmp_path)
    answers = (
        [alone(jobs.broken_weights, folder=folder)]
        if backend == "plain"
        else run_pair(backend, "tests.engine.jobs:broken_weights", folder=folder)
    )
    assert all("policy has weights that aren't finite after 0 steps" in answer for answer in answers)
    assert not list(tmp_path.iterdir())
