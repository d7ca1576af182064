"""Checkpoints written in the background: the same files, the same guarantees, and training that goes on meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from posttrain.engine import Engine
from posttrain.engine.checkpoint import newest_good, read_manifest
from posttrain.engine.writing import HashedFile, on_host
from tests.engine import jobs, writing_jobs
from tests.engine.jobs import alone, packed
from tests.engine.writing_jobs import disk
from tests.pairs import ROOT, free_port, launch_environment, run_pair
from tests.run_jobs import new_run, start


def on(backend: str, job: str, **kwargs):
    """Every rank's result of a job of writing_jobs.py."""
    if backend == "plain":
        return [alone(getattr(writing_jobs, job), **kwargs)]
    return run_pair(backend, f"tests.engine.writing_jobs:{job}", **kwargs)


@pytest.mark.parametrize("backend", ("plain", "ddp", "zero2", "zero3"))
def test_rule_24_the_background_writes_byte_for_byte_what_a_save_in_place_writes(backend, tmp_path):
    """Although the models, the state and the random numbers have gone on before a byte was written."""
    for found in on(backend, "two_ways", folder=str(tmp_path)):
        assert found["early"] == [".step_000002.writing", "step_000001"] and found["late"] == ["step_000001", "step_000002"]
    first, second = tmp_path / "step_000001", tmp_path / "step_000002"
    assert writing_jobs.names(first) == writing_jobs.names(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    state = torch.load(second / "state.pt")["state"]
    assert state["cursor"].tolist() == [0, 1, 2] and state["list"] == [1]


@pytest.mark.parametrize("backend", ("plain", "ddp", "zero2"))
def test_rule_19_a_checkpoint_counts_when_the_slowest_rank_has_written(backend, tmp_path):
    for found in on(backend, "one_rank_is_slow", folder=str(tmp_path)):
        assert found["early"] == ([".step_000001.writing"], []) and found["late"] == (["step_000001"], 1)


@pytest.mark.parametrize(("backend", "rank"), (("plain", 0), ("ddp", 0), ("zero2", 1)))
def test_rule_24_a_disk_that_fills_up_in_the_background_ends_all_ranks_at_the_same_border(backend, rank, tmp_path):
    answers = on(backend, "full_at", folder=str(tmp_path), rank=rank, step=3)
    for answer in answers:
        assert f"step_000003 could not be written, earlier checkpoints are untouched: rank {rank}" in answer["error"]
        assert "No space left" in answer["error"] and answer["step"] == 4
        assert answer["left"] == ["step_000001", "step_000002"]
    assert len({answer["error"] for answer in answers}) == 1


@pytest.mark.parametrize("backend", ("plain", "zero2"))
def test_rule_24_a_stop_waits_for_what_is_being_written(backend, tmp_path):
    for found in on(backend, "stopped_while_it_writes", folder=str(tmp_path / "saves")):
        assert found["code"] == 128 + signal.SIGTERM and "saved in" in found["message"] and "step_000003" in found["message"]
        assert found["left"] == ["step_000002", "step_000003"]
    for found in on(backend, "stopped_while_it_writes", folder=str(tmp_path / "no_time"), heed="long"):
        assert "step_000002" in found["message"] and found["left"] == ["step_000002"]


@pytest.mark.parametrize("backend", ("plain", "zero2"))
def test_rule_08_killed_while_a_checkpoint_is_written_the_run_goes_on_from_the_last_complete_one(backend, tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.engine.writing_jobs", str(killed)]
    port = free_port()
    environments = [None] if backend == "plain" else [launch_environment(backend, rank, port) for rank in range(2)]
    killed.mkdir()
    ranks = [subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for env in environments]
    try:
        assert ranks[-1].wait(timeout=150) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) >= 5, "training went on while the checkpoint was written"
    assert newest_good(killed / "checkpoints") == killed / "checkpoints" / "step_000002"
    for is_same, found in on(backend, "straight_and_resumed", folder=str(tmp_path / "straight"), killed=str(killed)):
        assert is_same and found == [".step_000004.writing", "step_000002"]
    assert writing_jobs.names(killed / "checkpoints") == ["step_000004", "step_000006"], "what the kill left is gone"


def test_rule_24_what_the_newest_complete_checkpoint_needs_stays_until_a_newer_one_is_complete(tmp_path):
    """Its best one included, although a better one is known by then."""
    early, late = alone(writing_jobs.best_while_writing, folder=str(tmp_path))
    assert early == [".step_000003.writing", "step_000001", "step_000002"] and late == ["step_000003"]


def test_a_save_in_the_background_takes_the_time_of_a_copy(tmp_path):
    engine, seconds = Engine(), {}
    model = engine.train(packed(), jobs.LINEAR, 1, name="policy")
    with disk(lambda path: time.sleep(0.2)):
        for background in (False, True):
            began = time.monotonic()
            engine.save(tmp_path / f"step_00000{int(background)}", {"policy": model}, {}, {}, background=background)
            seconds[background] = time.monotonic() - began
        engine.close()
    assert seconds[False] > 0.8 and seconds[True] < 0.4
    assert newest_good(tmp_path) == tmp_path / "step_000001"


def test_in_place_a_run_has_its_checkpoint_when_the_step_ends(tmp_path):
    engine = Engine()
    run = new_run(engine, tmp_path, every=1, background=False)
    start(run)
    with disk(lambda path: time.sleep(0.05)):
        for step in run.steps(2):
            run.checkpoint()
            assert newest_good(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"step_{step + 1:06d}"
    engine.close()


def test_rule_24_a_file_that_reads_back_otherwise_is_no_checkpoint(tmp_path, monkeypatch):
    """A disk that loses a byte without a word: the earlier checkpoint stays the newest."""
    engine = Engine()
    model = engine.train(packed(), jobs.LINEAR, 1, name="policy")
    engine.save(tmp_path / "step_000001", {"policy": model}, {}, {})
    monkeypatch.setattr(HashedFile, "write", lossy(HashedFile.write))
    engine.save(tmp_path / "step_000002", {"policy": model}, {}, {}, background=True)
    with pytest.raises(OSError, match="reads back as something else"):
        engine.settle()
    assert newest_good(tmp_path) == tmp_path / "step_000001" and len(list(tmp_path.iterdir())) == 1
    assert read_manifest(tmp_path / "step_000001")["files"]
    engine.close()


def lossy(write):
    def other(self: HashedFile, data) -> int:
        before = self.file.tell()
        count = write(self, data)
        if before == 0:
            self.file.seek(0)
            self.file.write(b"\0")
            self.file.seek(count)
        return count

    return other


def test_what_goes_to_the_host_keeps_its_ties_and_loses_what_it_is_a_part_of():
    shared, large = torch.ones(3), torch.arange(1000.0)
    value = {"a": shared, "b": [shared, (1, "x")], "part": large[:2]}
    for copy in (False, True):
        made = on_host(value, copy)
        assert made["a"] is made["b"][0] and made["b"][1] == (1, "x")
        assert made["part"].untyped_storage().nbytes() == 8 and made["part"].tolist() == [0.0, 1.0]
        assert (made["a"].data_ptr() == shared.data_ptr()) is not copy
