"""Run: steps that go on where they stopped, numbers that stay right, checkpoints that are due, stopping in good order."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from posttrain.config import CheckpointConfig, ModelConfig, replace
from posttrain.engine import Engine
from posttrain.run import Stopped, command_line, write_text
from posttrain.stages import sft
from posttrain.stages.sft import SFTConfig
from tests.pairs import run_pair
from tests.pipeline.stages_for_tests import Total
from tests.run_jobs import STEPS, new_run, same, start, train
from tests.runs import logged, run_stage, tells_time, weights, write_rows
from tests.tiny import tiny_folder


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
        assert [{k: v for k, v in line.items() if not tells_time(k)} for line in ours] == [
            {k: v for k, v in line.items() if not tells_time(k)} for line in theirs
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


def test_a_damaged_best_checkpoint_is_named_and_the_newest_weights_stay(engine, tmp_path, capsys):
    run = new_run(engine, tmp_path, every=1)
    train(run, scores=[-3.0, -1.0, -2.0, -4.0, -5.0, -6.0])
    model, _ = start(run := new_run(fresh(engine), tmp_path))
    newest = model.state_dict_full()
    (tmp_path / "checkpoints" / "step_000002" / "policy.weights.pt").write_bytes(b"torn")
    assert run.restore_best({"policy": model}) == STEPS and same(model.state_dict_full(), newest)
    said = capsys.readouterr().out
    assert "step_000002, is damaged (policy.weights.pt is not what was written); the weights stay those of step 6" in said
    assert any("is damaged" in text for text in run.warnings)


def test_warnings_survive_a_resume(engine, tmp_path):
    run = new_run(engine, tmp_path)
    run.warn("two rows are too long")
    assert train(run, interrupt_at=3) and run.step == 3
    run = new_run(fresh(engine), tmp_path)
    run.warn("something else")
    run.warn("two rows are too long")  # rows are read again, before the checkpoint is
    start(run)
    assert run.warnings == ["two rows are too long", "something else"]


def test_a_stage_that_keeps_its_own_results_goes_on_with_what_it_has_used(engine, tmp_path):
    run = new_run(engine, tmp_path)
    run.resume_after(0)
    for _ in run.steps(2):
        run.log({"x": 1.0}, tokens=10)
        run.checkpoint()
    again = new_run(fresh(engine), tmp_path)
    again.resume_after(2)
    assert again.counters == run.counters and again.counters.tokens == 20 and again.counters.seconds > 0
    anew = new_run(fresh(engine), tmp_path)
    anew.resume_after(0)
    assert anew.counters.tokens == 0


def test_rule_24_a_long_pass_stops_when_it_cannot_end_in_the_grace_time(engine, tmp_path):
    run = new_run(engine, tmp_path, every=1)
    start(run)
    for _ in run.steps(2):
        if run.step == 2:
            progress = run.pace(1000)
            progress(1)  # nobody has asked
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)  # at least 0.05 s for 2 of 1000: 25 s are not enough
            with pytest.raises(Stopped) as stopped:
                progress(1)
            assert "step_000001" in stopped.value.message and steps_saved(tmp_path) == [1]
            run.pace(2)(2)  # whose end has come goes on to its own checkpoint
            return
        run.checkpoint()


def test_rule_24_a_held_out_evaluation_heeds_a_stop_and_the_step_is_done_again(tmp_path, monkeypatch):
    """Resumed, the stage ends with the weights that it would have had."""
    turns = [{"role": "user", "content": "the sum?"}, {"role": "assistant", "content": "three and four is seven"}]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    model = ModelConfig(path=str(tiny_folder(tmp_path / "base")))
    config = SFTConfig(
        model=model, data=data, validation=data, batch_size=4, epochs=2, evaluate_every=1, max_length=64, max_tokens_per_micro_batch=64
    )
    straight = run_stage(sft.train, config, tmp_path / "straight")
    evaluate, calls = sft.held_out_loss, iter(range(100))

    def with_a_signal(policy, trees, run, max_tokens):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(policy, trees, run, max_tokens)

    monkeypatch.setattr(sft, "held_out_loss", with_a_signal)
    config = replace(config, checkpoint=CheckpointConfig(every=1, grace_seconds=1e-9))
    with pytest.raises(Stopped) as stopped:
        run_stage(sft.train, config, tmp_path / "stopped")
    assert "step_000002" in stopped.value.message, "the third step is given up"
    resumed = run_stage(sft.train, config, tmp_path / "stopped")
    assert same(weights(resumed), weights(straight))
    assert logged(tmp_path / "stopped", "validation_loss") == logged(tmp_path / "straight", "validation_loss")


def test_what_trains_nothing_goes_on_under_another_number_of_ranks(engine, tmp_path):
    run = new_run(engine, tmp_path)
    run.resume({}, total=(total := Total()))
    for step in run.steps(3):
        total.value += step
        run.checkpoint()
    assert run_pair("ddp", "tests.run_jobs:go_on_without_models", folder=str(tmp_path)) == [(3, 3), (3, 3)]


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
    run = new_run(fresh(engine), tmp_path)
    run.restart_optimizer = True
    assert run.find_checkpoint()


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
