"""Code against tests: the program in a response, run in a process that the kernel confines (posttrain/rewards/sandbox.py).

What can be trusted: input/output tests are compared out here. Assertions run among the program's own names, as those of
HumanEval and MBPP must; ending early, printing or crashing passes none of them, but a response that sets out to cheat can
return an object that is equal to everything.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config import when
from posttrain.rewards import sandbox
from posttrain.rewards.config import requires

FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
WATCH_SECONDS = 0.05  # how often a running program's files and threads are counted
MAX_FILES, MAX_THREADS = 64, 32


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float
    """Wall time, and CPU time rounded up to whole seconds."""
    memory: int
    """Bytes of address space."""
    output: int
    """Bytes of each file, standard output included, and of all files in the scratch folder together."""


@dataclass(frozen=True)
class Ran:
    """What a program left behind."""

    output: str
    exit_code: int
    """0 is a normal end; negative is the signal that killed it, -SIGKILL at a limit."""
    report: list[str]


def check_machine(*, seconds: float = 5.0, memory_mb: int = 512, output_kb: int = 256, **_: Any) -> list[str]:
    """What keeps `python_tests` from running here, protected, with these options."""
    return sandbox.missing_protections() + when(
        (not 0 < seconds <= 3600, f"seconds={seconds} must lie in (0, 3600]; 5 works"),
        (memory_mb < 64, f"memory_mb={memory_mb} is too little to start Python in; 512 works"),
        (output_kb < 1, f"output_kb={output_kb} must be at least 1; 256 works"),
    )


@requires(check=check_machine)
def python_tests(
    row: dict[str, Any],
    response: str,
    *,
    column: str = "tests",
    partial: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 512,
    output_kb: int = 256,
) -> float:
    """1.0 if the response's Python program passes all of the row's tests, else 0.0; with `partial` the share that passes.

    row[column] is a list of tests: Python statements as text, such as "assert f(2) == 4", run among the program's names,
    or {"input": ..., "output": ...}, what the whole program prints for what it reads, compared line by line without
    trailing spaces. A HumanEval row is read too: its `test` defines check, which is called with its `entry_point`.
    The program is the response's last fenced block of Python, or the whole response. `seconds` is for all tests together
    and should stay below the pool's `seconds_per_response`: what ends here is a wrong program, what ends there is unscored.
    Raises ValueError for a row without tests, RuntimeError where the program can't be confined.
    """
    limits = Limits(seconds, memory_mb << 20, output_kb << 10)
    tests = tests_of(row, column)
    statements = [test for test in tests if isinstance(test, str)]
    passed = run_statements(program_of(response), statements, limits) if statements else 0
    ends = time.monotonic() + seconds
    for test in tests:
        if isinstance(test, dict) and (partial or passed == len(statements)) and time.monotonic() < ends:
            ran = run_program(program_of(response), [], Limits(ends - time.monotonic(), limits.memory, limits.output), test["input"])
            passed += ran.exit_code == 0 and same_lines(ran.output, test["output"])
    return passed / len(tests) if partial else float(passed == len(tests))


def tests_of(row: dict[str, Any], column: str) -> list[str | dict[str, str]]:
    """A row's tests. Raises ValueError where there are none."""
    tests = row.get(column)
    if tests is None and "test" in row and "entry_point" in row:
        tests = f"{row['test']}\ncheck({row['entry_point']})"
    tests = [tests] if isinstance(tests, str) else list(tests or [])
    if not tests or not all(isinstance(test, str) or (isinstance(test, dict) and {"input", "output"} <= test.keys()) for test in tests):
        works = '["assert f(2) == 4", {"input": "2", "output": "4"}] works'
        raise ValueError(f"column {column!r} of a row for python_tests holds {tests!r:.200}, which are no tests; {works}")
    return tests


def program_of(response: str) -> str:
    """The last fenced block of a response that is Python or says no language; the whole response where there is none."""
    blocks = FENCED.findall(response)
    return blocks[-1] if blocks else response


def same_lines(printed: str, expected: str) -> bool:
    """Equal but for spaces at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in printed.rstrip().splitlines()] == [line.rstrip() for line in expected.rstrip().splitlines()]


def run_statements(source: str, tests: Sequence[str], limits: Limits) -> int:
    """How many tests pass among the program's names."""
    token = secrets.token_hex(16)
    ran = run_program(source, tests, limits, token=token)
    return sum(f"{token} {number}" in ran.report for number in range(len(tests)))


def run_program(source: str, tests: Sequence[str], limits: Limits, text: str = "", token: str = "") -> Ran:
    """Runs a program in a process of its own, confined, in an empty folder. Raises RuntimeError where it can't be confined."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="posttrain_") as scratch:
        job = {
            "source": source,
            "tests": list(tests),
            "token": token,
            "parent": os.getpid(),
            "scratch": scratch,
            "seconds": int(-(-limits.seconds // 1)),
            "memory": limits.memory,
            "file_bytes": limits.output,
        }
        files = [memory_file(json.dumps(job)), memory_file(text), memory_file(), memory_file(), memory_file()]
        job_file, stdin, stdout, stderr, report = files
        try:
            # -s -P: nothing from the user's or the current folder shadows a module of the standard library
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", sandbox.__file__, str(job_file), str(report)],
                env=environment(scratch),
                cwd=scratch,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[job_file, report],
            )
            exit_code = watch(process, scratch, limits.output, begun + limits.seconds)
            lines = content(report, limits.output).splitlines()
            if sandbox.CONFINED not in lines[:1] and exit_code != -signal.SIGKILL:
                raise RuntimeError(f"the response's program was not run, as it can't be confined:\n{content(stderr, limits.output)}")
            return Ran(content(stdout, limits.output), exit_code, lines)
        finally:
            for file in files:
                os.close(file)


def environment(scratch: str) -> dict[str, str]:
    """Nothing of ours: no keys, no paths; one thread where a library would take all cores."""
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return {"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PATH": "", **single}


def memory_file(text: str = "") -> int:
    """An open file without a name, at its start; the limit on a file's size counts for it."""
    descriptor = os.memfd_create("posttrain")
    data = text.encode(errors="surrogatepass")
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def content(descriptor: int, most: int) -> str:
    return os.pread(descriptor, most, 0).decode(errors="replace")


def watch(process: subprocess.Popen, scratch: str, file_bytes: int, deadline: float) -> int:
    """Waits for the program's end and returns its exit code; kills it at the deadline or when it makes too much of something."""
    handle = os.pidfd_open(process.pid)
    try:
        while not select.select([handle], [], [], max(0.0, min(WATCH_SECONDS, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline or threads(process.pid) > MAX_THREADS or overfull(scratch, file_bytes):
                process.kill()
                break
        return process.wait()
    finally:
        process.kill()
        process.wait()
        os.close(handle)


def threads(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:  # it has just ended
        return 0


def overfull(scratch: str, most: int) -> bool:
    """Whether the scratch folder, in which there can be no folders, holds too many files or bytes."""
    sizes = [entry.stat(follow_symlinks=False).st_size for entry in os.scandir(scratch)]
    return len(sizes) > MAX_FILES or sum(sizes) > most
