from __future__ import annotations

import io
import json
import math
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from posttrain import tracking
from posttrain.progress import Progress, duration, number, telling
from posttrain.tracking import Tracker, cut_after, read_lines


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key from this machine's user, no settings of his, no mode in the environment."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def records(run_folder: Path) -> list:
    """What wandb wrote for its server: a 7-byte head, then LevelDB's log format (blocks of 32 KiB; crc, length, type)."""
    (path,) = run_folder.glob("run-*.wandb")
    end = time.monotonic() + 10
    while not (found := parse(path.read_bytes())) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, "the run was not finished"
        time.sleep(0.02)  # wandb's own process writes the file, and is a little behind
    return found


def parse(data: bytes) -> list:
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole, found = 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(run_folder: Path) -> list[dict]:
    lines = [record.history for record in records(run_folder) if record.HasField("history")]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item} for line in lines]


class FakeRun:
    """Stands where wandb's run stands and remembers what it is told; `broken` names the calls that raise."""

    offline, url = False, "here"

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken, self.steps, self.exit_code = broken, [], None

    def log(self, values: dict, step: int) -> None:
        if "log" in self.broken:
            raise RuntimeError("the log is broken")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if "finish" in self.broken:
            raise RuntimeError("the end is broken")


def with_fake(monkeypatch, run: FakeRun) -> None:
    monkeypatch.setattr(tracking._Board, "_open", lambda self: run)


# ---- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_rule_13_a_number_that_is_not_finite_is_never_written_as_one(tmp_path):
    with Tracker(tmp_path, mode="disabled") as tracker:
        tracker.log(1, {"loss": math.nan, "kl": math.inf, "lr": 0.1})
    (line,) = [json.loads(text, parse_constant=pytest.fail) for text in tracker.metrics_path.read_text().splitlines()]
    assert line["loss"] is None and line["kl"] is None and line["lr"] == 0.1
    assert line["nonfinite"] == ["loss", "kl"]


def test_tensors_are_written_as_numbers(tmp_path):
    import torch

    with Tracker(tmp_path, mode="disabled") as tracker:
        tracker.log(1, {"loss": torch.tensor(0.5), "bad": torch.tensor(math.nan)})
    (line,) = read_lines(tracker.metrics_path)
    assert (line["step"], line["loss"], line["bad"]) == (1, 0.5, None)


def test_resuming_cuts_what_comes_after_the_resumed_step(tmp_path):
    with Tracker(tmp_path, mode="disabled") as tracker:
        for step in range(1, 6):
            tracker.log(step, {"session": 1})
    with tracker.metrics_path.open("a") as file:
        file.write('{"step": 6, "ses')  # killed while writing
    with Tracker(tmp_path, mode="disabled") as tracker:
        tracker.rewind(3)
        tracker.log(4, {"session": 2})
    assert [(line["step"], line["session"]) for line in read_lines(tracker.metrics_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_session_without_a_checkpoint_starts_over(tmp_path):
    for session in (1, 2):
        with Tracker(tmp_path, mode="disabled") as tracker:
            tracker.log(1, {"session": session})
    assert [line["session"] for line in read_lines(tracker.metrics_path)] == [2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        cut_after(path, 3)


def test_a_full_disk_does_not_stop_training(tmp_path, capsys):
    tracker = Tracker(tmp_path, mode="disabled")
    tracker.metrics_path.mkdir()  # cannot be written
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("tracking:") == 1


# ---- W&B --------------------------------------------------------------------------------------------------------------


def test_rule_23_one_run_per_stage_grouped_with_the_same_id_after_resume(tmp_path):
    def session(steps: range, stage: str, run_id: str, resumed: int = 0) -> None:
        settings = dict(project="p", name=f"demo/{stage}", group="demo", job_type=stage, run_id=run_id, config={"lr": 0.1})
        with Tracker(tmp_path / stage, **settings) as tracker:
            tracker.rewind(resumed)
            for step in steps:
                tracker.log(step, {"loss": 1 / step})
            tracker.table("samples", [{"prompt": "p", "score": 1.0}])

    session(range(1, 5), "sft", "id-sft")
    session(range(3, 7), "sft", "id-sft", resumed=2)  # had reached 4; 3 and 4 come again
    session(range(6, 8), "sft", "id-sft", resumed=5)
    session(range(1, 3), "ppo", "id-ppo")

    runs = {
        stage: [next(r.run for r in records(path) if r.HasField("run")) for path in offline_runs(tmp_path / stage)]
        for stage in ("sft", "ppo")
    }
    assert [len(runs["sft"]), len(runs["ppo"])] == [3, 1]
    assert {run.run_id for run in runs["sft"]} == {"id-sft"} and runs["ppo"][0].run_id == "id-ppo"
    for stage, found in runs.items():
        assert {(run.project, run.run_group, run.job_type, run.display_name) for run in found} == {("p", "demo", stage, f"demo/{stage}")}

    steps = [line["_step"] for path in offline_runs(tmp_path / "sft") for line in history(path)]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in read_lines(tmp_path / "sft" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_rule_23_always_finished_also_when_the_stage_raises(tmp_path, monkeypatch):
    for problem, code in ((None, 0), (RuntimeError("out of memory"), 1), (SystemExit(143), 143)):
        run = FakeRun()
        with_fake(monkeypatch, run)
        try:
            with Tracker(tmp_path, mode="online") as tracker:
                tracker.log(1, {"loss": 1.0})
                if problem:
                    raise problem
        except (RuntimeError, SystemExit) as seen:
            assert seen is problem
        assert run.exit_code == code


def test_rule_23_offline_run_ends_with_an_exit_record(tmp_path):
    with Tracker(tmp_path, run_id="a") as tracker:
        tracker.log(1, {"loss": 1.0})
    (path,) = offline_runs(tmp_path)
    assert [record.exit.exit_code for record in records(path) if record.HasField("exit")] == [0]


def test_rule_23_rank_0_only(tmp_path):
    with Tracker(tmp_path / "rank1", is_main=False) as tracker:
        tracker.rewind(3)
        tracker.log(1, {"loss": 1.0})
        tracker.table("samples", [{"a": 1}], step=1)
        tracker.link_output("sft", tmp_path, "d")
    assert not (tmp_path / "rank1").exists()


def test_rule_23_steps_only_increase(tmp_path):
    with Tracker(tmp_path, mode="disabled") as tracker:
        tracker.log(5, {"loss": 1.0})
        tracker.log(5, {"eval_loss": 1.0})
        with pytest.raises(AssertionError, match="steps only increase: 4 after 5"):
            tracker.log(4, {"loss": 1.0})


@pytest.mark.parametrize("broken", [("log",), ("finish",), ("log", "finish")])
def test_rule_23_a_tracker_that_fails_never_stops_training(tmp_path, monkeypatch, capsys, broken):
    with_fake(monkeypatch, FakeRun(broken))
    with Tracker(tmp_path, mode="online") as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0})
        tracker.table("samples", [{"a": object()}])
    assert len(read_lines(tracker.metrics_path)) == 3
    assert capsys.readouterr().err.count("tracking:") == 1


def test_rule_23_wandb_that_does_not_start(tmp_path, monkeypatch, capsys):
    def no_wandb() -> None:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setattr(tracking, "_wandb", no_wandb)
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert "No module named 'wandb'" in capsys.readouterr().err
    assert len(read_lines(tracker.metrics_path)) == 1


def test_rule_23_a_server_that_refuses_costs_no_training_time(tmp_path, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    monkeypatch.setattr(tracking, "INIT_SECONDS", 3.0)
    began = time.monotonic()
    with Tracker(tmp_path, run_id="a") as tracker:
        tracker.log(1, {"loss": 1.0})
        assert time.monotonic() - began < 1.0
    assert time.monotonic() - began < 30
    assert "can't be reached" in capsys.readouterr().err
    (path,) = offline_runs(tmp_path)
    assert [line["loss"] for line in history(path)] == [1.0]


def test_rule_23_a_wandb_that_hangs_is_left_behind(tmp_path, monkeypatch, capsys):
    never = threading.Event()
    monkeypatch.setattr(tracking._Board, "_open", lambda self: never.wait())
    monkeypatch.setattr(tracking, "INIT_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert "doesn't answer" in capsys.readouterr().err
    never.set()


def test_lineage_is_kept_in_the_config_and_as_artifacts_offline(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("w")
    with Tracker(tmp_path / "ppo", group="demo", run_id="a") as tracker:
        tracker.link_input("sft", model, "sha-in")
        tracker.link_input("hub", "org/model", "commit")
        tracker.link_output("ppo", model, "sha-out")
        tracker.log(1, {"loss": 1.0})
    (path,) = offline_runs(tmp_path / "ppo")
    found = records(path)
    config = {i.key: json.loads(i.value_json) for r in found for i in [*r.run.config.update, *r.config.update]}
    assert config["lineage/inputs/sft"] == {"path": str(model), "digest": "sha-in", "kind": "model"}
    assert config["lineage/inputs/hub"]["digest"] == "commit" and config["lineage/outputs/ppo"]["digest"] == "sha-out"
    (artifact,) = [r.request.log_artifact.artifact if r.HasField("request") else r.artifact for r in found if r.HasField("artifact")]
    assert artifact.name == "demo-ppo" and "sha-out" in artifact.metadata
    assert any(entry.ref == (model / "weights").as_uri() for entry in artifact.manifest.contents)


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_disabled_by_the_environment(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with Tracker(tmp_path, mode="online") as tracker:
        tracker.log(1, {"loss": 1.0})
    assert not (tmp_path / "wandb").exists() and len(read_lines(tracker.metrics_path)) == 1


def test_an_unknown_mode_says_which_there_are(tmp_path):
    with pytest.raises(ValueError, match="mode='ofline' is none of auto, online, offline, disabled"):
        Tracker(tmp_path, mode="ofline")


def test_importing_it_is_cheap():
    code = "import sys, posttrain.tracking, posttrain.progress; sys.exit(bool({'wandb', 'torch', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- progress ---------------------------------------------------------------------------------------------------------


def lines(**changes) -> list[str]:
    output, now = io.StringIO(), [0.0]
    with Progress("sft", 200, console=Console(file=output, width=200), clock=lambda: now[0], **changes) as progress:
        for step in (10, 20):
            now[0] += 5.0
            progress.update(step - 5)
            progress.update(step, {"lr": 3e-4, "train/loss": 1.2341, "name": "x", "episodes": 9, "tokens": 12000}, tokens=6000)
    return output.getvalue().splitlines()


def test_one_line_per_log_step_without_a_terminal():
    assert lines() == [
        "sft 10/200  loss 1.234  lr 3e-4  episodes 9  1.2k tok/s  ETA 1:35",
        "sft 20/200  loss 1.234  lr 3e-4  episodes 9  1.2k tok/s  ETA 1:30",
    ]
    assert lines(is_main=False) == []


def test_a_resumed_run_does_not_count_the_steps_it_did_not_do():
    assert lines(start=5)[0].endswith("ETA 3:10")  # 5 steps in 5 s, not 10


def test_a_live_bar_on_a_terminal():
    output = io.StringIO()
    with Progress("ppo", 4, unit="iteration", console=Console(file=output, width=120, force_terminal=True)) as progress:
        progress.note("sampling 3/8")
        progress.update(2, {"score": 0.5, "kl": 0.01})
    assert "2/4" in output.getvalue() and "score 0.500" in output.getvalue() and "ETA" in output.getvalue()


def test_numbers_are_short():
    values = [0, 1, 0.5, 1.23456, 42.123, 999.9, 1234, 1.5e6, 2.5e-5, -0.25, 7, None, math.nan, 1e20]
    shown = ["0", "1", "0.500", "1.235", "42.1", "999.9", "1.23k", "1.5M", "2.5e-5", "-0.250", "7", "-", "nan", "1.00e+20"]
    assert [number(value) for value in values] == shown
    assert number(0.01, "lr") == "1e-2"
    assert [duration(s) for s in (0, 42, 725, 11400)] == ["0:00", "0:42", "12:05", "3:10:00"]
    assert [name for name, _ in telling({"zebra": 1, "lr": 1, "val/loss": 2}, 2)] == ["loss", "lr"]
