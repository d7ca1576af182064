"""Ranks: collectives, and a watchdog that names who hangs where."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.engine import Engine, World
from tests.engine.jobs import on
from tests.pairs import ROOT, free_port, launch_environment, run_pair

HANGS = """
import time
from posttrain.engine import World
world = World.from_launch(hang_minutes=0.05)
world.barrier("first")
if world.rank == 1:
    time.sleep(3)  # outlives the other, whose end it would otherwise bring about
with world.phase("saving"):
    if world.rank == 0:
        world.sum(1.0, "counting sheep")
    else:
        time.sleep(60)
"""
JOINS_ALONE = """
from posttrain.engine import world
world.JOIN_MINUTES = 0.05
world.World.from_launch(hang_minutes=0)
"""


def test_collectives_of_one_process():
    (found,) = on("plain", "collectives")
    assert found == [{"rank": 0}, "invalid literal for int() with base 10: 'none'", ["r0"], False, False, 0.1, [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("backend", ("ddp", "zero2"))
def test_collectives_agree_on_every_rank(backend):
    first, second = run_pair(backend, "tests.engine.jobs:collectives")
    assert first == second
    assert first == [{"rank": 0}, "invalid literal for int() with base 10: 'none'", ["r0", "r1"], True, False, 0.2, [3.0, 3.0, 3.0]]


def test_rule_19_a_hang_names_rank_and_phase():
    port = free_port()
    workers = []
    for rank in range(2):
        env = launch_environment("ddp", rank, port)
        workers.append(subprocess.Popen([sys.executable, "-c", HANGS], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    _, error = workers[0].communicate(timeout=60)
    _, late = workers[1].communicate(timeout=60)
    assert workers[0].returncode == 70
    assert "rank 0 has waited 3 s in: saving > counting sheep; the run ends here" in error
    assert "all_reduce" in error  # the stack shows where
    assert workers[1].returncode == 70 and "rank 1 has waited 3 s in: saving" in late


def test_a_rank_whose_peers_never_start_does_not_wait_for_them_for_ever():
    env = launch_environment("ddp", 0, free_port())
    found = subprocess.run([sys.executable, "-c", JOINS_ALONE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 70
    assert "rank 0 has waited 3 s in: joining the other ranks; the run ends here" in found.stderr


def test_phases_are_named_after_an_error_too():
    world = World(hang_minutes=0)
    with pytest.raises(KeyError), world.phase("ppo", timed=False), world.phase("step of policy"):
        raise KeyError
    assert world._watchdog.where() == "ppo > step of policy"
    with world.phase("saving"):
        assert world._watchdog.where() == "saving"
    assert world._watchdog.where() == "its own work"
    world.close()


def share_a_folder(engine: Engine, *, folders: list[str]) -> str:
    """A job: what is wrong when each rank is told of its own of these folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.engine.hosts.SEEN_SECONDS", 0.3)
        try:
            engine.world.check_shared(Path(folders[engine.world.rank]))
        except ValueError as error:
            return str(error)
    return ""


def test_ranks_that_share_no_folder_are_refused_and_told_apart(tmp_path):
    (tmp_path / "second").mkdir()
    apart = [str(tmp_path / "first"), str(tmp_path / "second")]
    for folders, wrong in ((apart, "doesn't see what others write there"), ([apart[0], str(tmp_path / "none")], "can't write there")):
        first, second = run_pair("ddp", "tests.engine.test_world:share_a_folder", folders=folders)
        assert first.startswith(f"{folders[0]} isn't one folder that all ranks share") and "rank 1 on host" in first
        assert wrong in first and wrong in second
    assert run_pair("ddp", "tests.engine.test_world:share_a_folder", folders=[apart[0]] * 2) == ["", ""]
    assert [path.name for path in (tmp_path / "first").iterdir()] == []


def test_a_watchdog_of_no_minutes_waits_for_ever():
    running = {thread.name for thread in threading.enumerate()}
    world = World(hang_minutes=0)
    with world.phase("saving"):
        assert {thread.name for thread in threading.enumerate()} == running
    world.close()


def test_a_pair_reports_failures_with_the_stack_and_works_again():
    with pytest.raises(AssertionError, match=r"(?s)rank 0: Traceback.*has no attribute 'nothing'"):
        run_pair("ddp", "tests.engine.jobs:nothing")
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 gave no answer.*jobs\.py.*in stuck"):
        run_pair("ddp", "tests.engine.jobs:stuck", timeout=4)
    assert time.monotonic() - began < 20
    assert run_pair("ddp", "tests.engine.jobs:collectives")[0][2] == ["r0", "r1"]
