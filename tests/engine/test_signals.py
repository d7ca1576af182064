"""A run that is told to stop: by SIGTERM, by Ctrl-C, by the death of its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.engine.signals import StopFlag
from tests.pairs import ROOT

WAITS = """
import sys, time
from posttrain.engine.signals import StopFlag
flag = StopFlag(orphan_seconds=2.0)
print("ready", flush=True)
while not flag.signal_number or "deaf" in sys.argv:
    time.sleep(0.05)
open(sys.argv[1], "w").write(str(flag.signal_number))
"""
LAUNCHES = "import subprocess, sys, time; subprocess.Popen([sys.executable, *sys.argv[1:]]); time.sleep(60)"


def wait_until(condition, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def flag():
    flag = StopFlag()
    yield flag
    flag.close()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_rule_24_a_signal_sets_the_flag(flag, number):
    assert flag.signal_number == 0 and flag.seconds_ago == 0
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # launchers pass one Ctrl-C on twice
    assert flag.signal_number == number
    time.sleep(0.01)
    assert 0 < flag.seconds_ago < 1


def test_a_second_ctrl_c_ends_at_once(flag):
    os.kill(os.getpid(), signal.SIGINT)
    flag._since -= 10
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def test_closing_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    flag = StopFlag()
    assert signal.getsignal(signal.SIGTERM) != before
    flag.close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("deaf", (False, True))
def test_rule_24_a_worker_whose_launcher_dies_stops_and_leaves_no_orphan(tmp_path, deaf):
    told = tmp_path / "told"
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    command = [sys.executable, "-c", LAUNCHES, str(script), str(told), *(["deaf"] if deaf else [])]
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    assert wait_until(lambda: not any(alive(int(pid)) for pid in children))
    assert told.exists() != deaf
    if not deaf:
        assert told.read_text() == str(int(signal.SIGTERM))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
