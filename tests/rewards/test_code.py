"""Code against tests: what passes and what does not, and that a hostile program gets at nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from posttrain.config import gather_problems
from posttrain.rewards import sandbox
from posttrain.rewards.code import Limits, Ran, program_of, python_tests, run_program
from posttrain.rewards.config import RewardConfig, RewardsConfig
from posttrain.rewards.pool import Rewards

HUMANEVAL = Path(__file__).parents[3] / "shared/data/humaneval/humaneval.jsonl"
LIMITS = Limits(seconds=30.0, memory=512 << 20, output=64 << 10)
SHORT = Limits(seconds=1.0, memory=512 << 20, output=64 << 10)
PYTHON_TESTS = "posttrain.rewards.code:python_tests"

pytestmark = pytest.mark.skipif(bool(sandbox.missing_protections()), reason="this machine can't confine programs")


def attempt(deed: str, limits: Limits = LIMITS) -> Ran:
    """Runs `deed` inside a program that prints "done", or the name of the error that stopped it."""
    lines = "\n".join(f"    {line}" for line in deed.splitlines())
    setting = "import ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading, time"
    return run_program(f"{setting}\ntry:\n{lines}\n    print('done')\nexcept BaseException as error:\n    print(repr(error))", [], limits)


# --- what passes

ADD = "def add(a, b):\n    return a + b\n"
FORGE = "import os\nfor n in range(64):\n    try: os.write(n, b'confined\\n 0\\n')\n    except OSError: pass"
SCRIPT = f"{ADD}if __name__ == '__main__':\n    print(add(*map(int, input().split())))"
ECHO = "for line in open(0):\n    print(line.strip()[::-1] + ' ')\n"


@pytest.mark.parametrize(
    ("response", "tests", "score", "share"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], 1.0, 1.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert subtract(1, 2)", "assert add(0, 0) == 0"], 0.0, 0.5),
        (f"Here it is:\n```python\n{ADD}```\nThat adds.", ["assert add(1, 2) == 3"], 1.0, 1.0),
        (f"Wrong first\n```py\ndef add(a, b): return 0\n```\nno,\n```\n{ADD}```", ["assert add(1, 2) == 3"], 1.0, 1.0),
        ("I would add the numbers.", ["assert add(1, 2) == 3"], 0.0, 0.0),
        ("", ["assert True"], 1.0, 1.0),
        ("import sys\nsys.exit(0)", ["assert False", "assert True"], 0.0, 0.0),
        ("import os\nos._exit(0)", ["assert False"], 0.0, 0.0),
        (FORGE, ["assert False"], 0.0, 0.0),
        ("def add(a, b): raise SystemExit(0)", ["assert add(1, 2) == 3"], 0.0, 0.0),
        ("def add(a, b):\n    while True: pass", ["assert add(1, 2) == 3"], 0.0, 0.0),
        (ECHO, [{"input": "ab\ncd\n", "output": "ba\ndc"}], 1.0, 1.0),
        (ECHO, [{"input": "ab\n", "output": "ba\n\n"}, {"input": "ab", "output": "ab"}], 0.0, 0.5),
        (f"{ECHO}raise ValueError", [{"input": "ab", "output": "ba"}], 0.0, 0.0),
        (f"{ECHO}import sys; sys.exit()", [{"input": "ab", "output": "ba"}], 1.0, 1.0),
        (SCRIPT, [{"input": "1 2", "output": "3"}, "assert add(1, 1) == 2"], 1.0, 1.0),
    ],
)
def test_programs_pass_what_they_should(response, tests, score, share):
    seconds = 2.0 if "while True" in response else 30.0
    assert python_tests({"tests": tests}, response, seconds=seconds) == score
    assert python_tests({"tests": tests}, response, seconds=seconds, partial=True) == share


def test_what_ordinary_programs_do_works():
    ran = run_program(
        "import threading, sys, time, random, decimal, dataclasses, collections, heapq, re, tempfile\n"
        "threading.stack_size(1 << 26)\n"
        "sys.setrecursionlimit(10**6)\n"
        "def deep(n): return 0 if n == 0 else 1 + deep(n - 1)\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(deep(20000))); thread.start(); thread.join()\n"
        "with open('notes.txt', 'w') as file: file.write(input())\n"
        "with tempfile.TemporaryFile('w+') as file: file.write('x')\n"
        "@dataclasses.dataclass\nclass Point:\n    x: 'int'\n"
        "time.sleep(0.01)\n"
        "import numpy\n"
        "print(found, open('notes.txt').read(), Point(1), numpy.ones((8, 8)).sum())",
        [],
        LIMITS,
        "größe",
    )
    assert (ran.exit_code, ran.output) == (0, "[20000] größe Point(x=1) 64.0\n")


def test_the_program_is_the_last_block_of_python():
    assert program_of("a\n```python\nx = 1\n```\nb\n```json\n{}\n```") == "x = 1\n"
    assert program_of("```\nx = 1\n```") == "x = 1\n" and program_of("x = 1") == "x = 1"
    assert program_of("```python\r\nx = 1\r\n```") == "x = 1\r\n"


@pytest.mark.parametrize("row", [{}, {"tests": []}, {"tests": [3]}, {"tests": [{"input": "2"}]}])
def test_a_row_without_tests_is_said(row):
    with pytest.raises(ValueError, match=r"no tests; .* works"):
        python_tests(row, ADD)


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not here")
def test_humaneval_solutions_pass_and_empty_ones_do_not():
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()][::12]
    assert [python_tests(row, row["prompt"] + row["canonical_solution"], seconds=30.0) for row in rows] == [1.0] * len(rows)
    assert not any(python_tests(row, row["prompt"] + "    pass", seconds=30.0) for row in rows[::4])


# --- what a hostile program gets at

SYSCALL = "ctypes.set_errno(0); libc = ctypes.CDLL(None, use_errno=True)\nif libc.syscall({}) < 0: raise OSError(ctypes.get_errno(), '')"


@pytest.mark.parametrize(
    "deed",
    [
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "os.listdir('/')",
        "os.listdir('..')",
        f"open({str(Path(__file__).resolve())!r}).read()",
        f"open({str(Path.home() / 'posttrain_was_here')!r}, 'w')",
        "open('/tmp/posttrain_was_here', 'w')",
        "open('/dev/shm/posttrain_was_here', 'w')",
        f"open({sysconfig.get_path('purelib')!r} + '/posttrain_was_here.py', 'w')",
        "os.mkdir('folder')",
        "os.symlink('/etc', 'link')",
        "os.link(VICTIM, 'link')",
        "os.mkfifo('pipe')",
        "os.chmod(VICTIM, 0o666)",
        "os.chown('.', 1, 1)",
        "os.utime(VICTIM)",
        "os.rename(VICTIM, 'mine')",
        "os.remove(VICTIM)",
        "os.truncate(VICTIM, 0)",
        "open(VICTIM, 'a')",
        "os.chroot('.')",
        "socket.socket()",
        "socket.socketpair()",
        "socket.socket(socket.AF_UNIX)",
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.killpg(0, 0)",
        "os.kill(-1, 0)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "os.setsid()",
        "os.setuid(1)",
        "os.nice(-5)",
        "os.sched_setaffinity(0, {0})",
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        "fcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, 0)",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "os.memfd_create('more')",
        "os.pipe()",
        "x = bytearray(10 << 30)",
        "x = [bytearray(1 << 20) for _ in range(10 << 10)]",
        "open('large', 'wb').write(bytes(1 << 20))",
        "x = [open(f'{n}', 'w') for n in range(200)]",
        SYSCALL.format("101, 0, 0, 0, 0") + "  # ptrace",
        SYSCALL.format("435, 0, 0") + "  # clone3",
        SYSCALL.format("56, 17, 0, 0, 0, 0") + "  # clone",
        SYSCALL.format("425, 1, 0") + "  # io_uring_setup",
        SYSCALL.format("321, 0, 0, 0") + "  # bpf",
        SYSCALL.format("272, 0x10000000") + "  # unshare",
        SYSCALL.format("304, -100, 0, 0") + "  # open_by_handle_at",
        SYSCALL.format("0x40000000 + 41, 2, 1, 0") + "  # socket, as x32 numbers it",
    ],
)
def test_a_hostile_program_gets_at_nothing(deed, tmp_path):
    """By deeds that would do no harm here if they succeeded: signal 0 instead of SIGKILL, a file of the test's own as the victim."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    if "syscall" in deed and os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    ran = attempt(deed.replace("VICTIM", repr(str(victim))))
    assert victim.read_text() == "whole" and victim.stat().st_nlink == 1
    assert ran.report[:1] == [sandbox.CONFINED] and ran.exit_code == 0
    assert ran.output.startswith(("PermissionError", "MemoryError", "OSError(27", "OSError(24", "OSError(38")), ran.output


def test_no_harm_was_left():
    places = [Path.home(), Path("/tmp"), Path("/dev/shm"), Path(sysconfig.get_path("purelib"))]
    assert not [place for place in places for _ in place.glob("posttrain_was_here*")]


@pytest.mark.parametrize(
    "deed",
    [
        "while True: print('x' * 1000)",
        "while True:\n    try: print('x' * 1000, flush=True)\n    except OSError: pass",
        "time.sleep(3600)",
        "while True: pass",
        "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals)); time.sleep(3600)",
        "os.closerange(0, 64); time.sleep(3600)",
        "for n in range(1000): threading.Thread(target=time.sleep, args=(3600,)).start()",
        "for n in range(1000): open(f'{n}', 'w').close()\ntime.sleep(3600)",
        "for n in range(9): open(f'{n}', 'wb').write(bytes(60 << 10))\ntime.sleep(3600)",
        "ctypes.string_at(0)",
        "os.abort()",
    ],
)
def test_a_program_that_takes_too_much_ends(deed):
    begun = time.monotonic()
    ran = attempt(deed, SHORT)
    assert time.monotonic() - begun < 10.0 and len(ran.output) <= SHORT.output
    assert ran.exit_code != 0 or ran.output.count("x") or "thread" in ran.output


def test_emptying_a_file_and_asking_for_signals_is_denied_without_landlock_too(tmp_path):
    (tmp_path / "kept").write_text("kept")
    program = (
        "import os, fcntl; from posttrain.rewards.sandbox import *\n"
        "libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0); filter_system_calls()\n"
        "for deed in (lambda: os.open('kept', os.O_RDONLY | os.O_TRUNC), lambda: fcntl.fcntl(0, fcntl.F_SETOWN, 1),\n"
        "             lambda: fcntl.fcntl(0, fcntl.F_GETFL), lambda: os.open('kept', os.O_RDONLY)):\n"
        "    try: print(deed() >= 0)\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["13", "13", "True", "True"] and (tmp_path / "kept").read_text() == "kept", done


def test_a_program_ends_with_the_worker_that_runs_it():
    config = RewardsConfig(functions=(RewardConfig(function=PYTHON_TESTS, options=("seconds=600",)),), workers=1, seconds_per_response=3.0)
    with Rewards(config) as rewards:
        rewards.submit(0, {"tests": ["pass"]}, "import time\ntime.sleep(3599)")
        assert math.isnan(rewards.collect()[0]["python_tests"]) and "timed out" in rewards.failures[0]
        deadline = time.monotonic() + 5
        while running() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not running()
        rewards.submit(0, {"tests": ["assert add(1, 1) == 2"]}, ADD)
        assert rewards.collect() == {0: {"python_tests": 1.0}}


def running() -> list[str]:
    """Confined programs on this machine whose scratch folder is in a pool's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if sandbox.__file__.encode() in (folder / "cmdline").read_bytes() and os.readlink(folder / "cwd").count("posttrain_") == 2:
                found.append(folder.name)
        except OSError:
            continue
    return found


# --- machines that can't, and options that won't do


def test_without_a_protection_nothing_runs_and_the_plan_says_so(monkeypatch):
    config = RewardConfig(function=PYTHON_TESTS)
    assert gather_problems(config) == []
    monkeypatch.setattr(sandbox, "landlock_version", lambda: -1)
    [text] = gather_problems(config)
    assert "python_tests" in text and "Landlock is missing" in text and "5.13" in text
    with pytest.raises(ValueError, match="Landlock"):
        Rewards(RewardsConfig(functions=(config,)))
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "mips")
    assert "x86_64 and aarch64 only" in gather_problems(config)[0]


def test_a_program_that_cannot_be_confined_is_not_run(monkeypatch, tmp_path):
    broken = Path(sandbox.__file__).read_text().replace("LANDLOCK_RESTRICT_SELF = 444, 445, 446", "LANDLOCK_RESTRICT_SELF = 444, 445, 4460")
    (tmp_path / "sandbox.py").write_text(broken)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(RuntimeError, match=r"(?s)was not run, as it can't be confined.*restricting files by Landlock"):
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')", [], LIMITS)
    assert not (tmp_path / "ran").exists()


def test_options_that_cannot_work_are_said():
    found = gather_problems(RewardConfig(function=PYTHON_TESTS, options=("seconds=0", "memory_mb=1", "output_kb=0")))
    assert len(found) == 3 and all("works" in text for text in found)
