"""Run: steps that go on where they stopped, numbers that stay right, checkpoints that are due, stopping in good order."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from posttrain.engine import Engine
from posttrain.run import Stopped, command_line, write_text
from tests.pairs import run_pair
from tests.run_jobs import STEPS, new_run, same, start, train


@pytest.fixture
def engine():
    engine = Engine()
    assert not engine.stop.signal_number  # installs the handlers
    yield engine
    engine.close()


def fresh(engine: Engine) -> Engine:
    """The engine of the next launch: nothing trained, nobody asked to stop."""
    for model in engine.models:
        model.close()
    engine.models.clear()
    engine.stop.signal_number = 0
    return engine


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rule_08_stopping_and_going_on_twice_is_the_same_as_going_straight_through(engine, tmp_path):
    straight = train(new_run(engine, tmp_path / "straight"))
    for at in (2, 5):
        stopped = train(new_run(fresh(engine), tmp_path / "stopped"), interrupt_at=at)
        assert stopped["code"] == 128 + signal.SIGTERM and stopped["step"] == at
        assert f"step_{at:06d}" in stopped["message"] and "run the same command again" in stopped["message"]
    run = new_run(fresh(engine), tmp_path / "stopped")
    assert same(train(run)["weights"], straight["weights"])
    for file in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = records(tmp_path / "stopped" / file), records(tmp_path / "straight" / file)
        assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
        timing = ("time", "tokens_per_second")
        assert [{k: v for k, v in line.items() if k not in timing} for line in ours] == [
            {k: v for k, v in line.items() if k not in timing} for line in theirs
        ]
    assert run.counters.tokens == 100 * STEPS and run.counters.optimizer_steps == STEPS
    # a finished loop has nothing left to do, whatever comes after it
    again = new_run(fresh(engine), tmp_path / "stopped")
    assert same(train(again)["weights"], straight["weights"]) and again.step == STEPS


def test_checkpoints_are_saved_when_due_and_the_newest_are_kept(engine, tmp_path):
    train(new_run(engine, tmp_path / "every", every=2, keep=2))
    assert steps_saved(tmp_path / "every") == [4, 6]
    train(new_run(fresh(engine), tmp_path / "end"))
    assert steps_saved(tmp_path / "end") == [6]


def test_the_best_checkpoint_is_kept_beside_the_newest_and_restored(engine, tmp_path):
    scores = [-3.0, -1.0, -2.0, float("nan"), -1.0, -5.0]
    run = new_run(engine, tmp_path, every=1, keep=2)
    best = train(run, scores=scores)["weights"]
    assert steps_saved(tmp_path) == [2, 5, 6]
    model, _ = start(run := new_run(fresh(engine), tmp_path))
    assert run.step == STEPS and not same(model.state_dict_full(), best)
    assert run.restore_best({"policy": model}) == 2
    assert same(model.state_dict_full(), best)


def test_without_scores_the_last_weights_are_the_best(engine, tmp_path):
    run = new_run(engine, tmp_path)
    train(run)
    assert run.restore_best({}) == STEPS


def test_rule_24_a_damaged_checkpoint_is_passed_over_by_name(engine, tmp_path, capsys):
    train(new_run(engine, tmp_path, every=2))
    (tmp_path / "checkpoints" / "step_000006" / "policy.weights.pt").write_bytes(b"torn")
    run = new_run(fresh(engine), tmp_path, every=2)
    start(run)
    said = capsys.readouterr().out
    assert run.step == 4 and "step_000006" in said and "resumes at step 4" in said
    assert records(tmp_path / "metrics.jsonl")[-1]["step"] == 4


def test_a_stop_before_the_first_update_saves_what_the_step_began_with(engine, tmp_path):
    straight = train(new_run(engine, tmp_path / "straight"))
    for at in (1, 4):  # also in the very first step
        stopped = train(new_run(fresh(engine), tmp_path / "stopped"), interrupt_at=at, heed="unchanged")
        assert steps_saved(tmp_path / "stopped")[-1] == at - 1 and f"step_{at - 1:06d}" in stopped["message"]
    assert same(train(new_run(fresh(engine), tmp_path / "stopped"))["weights"], straight["weights"])


def test_a_stop_between_updates_finishes_the_step_only_if_there_is_time(engine, tmp_path):
    stopped = train(new_run(engine, tmp_path / "long", every=1), interrupt_at=3, heed="long")
    assert steps_saved(tmp_path / "long") == [1, 2] and "step_000002" in stopped["message"] and stopped["step"] == 3
    stopped = train(new_run(fresh(engine), tmp_path / "short", every=1), interrupt_at=3, heed="short")
    assert steps_saved(tmp_path / "short") == [2, 3] and "step_000003" in stopped["message"]


def test_a_stage_that_registers_nothing_stops_too_and_begins_its_samples_anew(engine, tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 0, "response": "of an earlier launch"}\n')
    run = new_run(engine, tmp_path)
    run.samples([{"response": "new"}])
    run.samples([{"response": "newer"}])
    assert [line["response"] for line in records(tmp_path / "samples.jsonl")] == ["new", "newer"]
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run.checkpoint()
    assert stopped.value.code == 130 and "what it wrote is kept" in stopped.value.message
    assert not (tmp_path / "checkpoints").exists()


def test_nonfinite_numbers_are_no_stages_results(engine, tmp_path):
    run = new_run(engine, tmp_path)
    run.log({"loss": 1.0})
    run.log({"loss": float("nan")})
    assert run.metrics == {"loss": 1.0} and records(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_rule_24_ranks_stop_together_when_one_is_asked_to_and_go_on_exactly(tmp_path):
    first, second = run_pair("zero2", "tests.run_jobs:stop_and_go", folder=str(tmp_path))
    assert first["stopped"]["step"] == second["stopped"]["step"] == 3 and first["stopped"]["code"] == second["stopped"]["code"] == 143
    assert first["digests"][0] == first["digests"][1]


def test_another_launch_is_refused_with_the_command_that_works_before_a_model_is_loaded(engine, tmp_path):
    train(new_run(engine, tmp_path))
    for text in run_pair("zero2", "tests.run_jobs:refuse_on_every_rank", folder=str(tmp_path)):
        assert "written by single" in text and "--restart-optimizer" in text
    assert new_run(fresh(engine), tmp_path, restart_optimizer=True).find_checkpoint()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_text(path, "one")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        write_text(path, "two")
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_the_command_to_go_on_leaves_out_redo(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/sft.py", "tiny", "--redo", "sft", "reward model", "--seed", "3"])
    assert command_line() == "python recipes/sft.py tiny --seed 3"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert command_line().startswith("accelerate launch ")
