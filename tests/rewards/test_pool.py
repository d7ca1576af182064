"""The worker processes of reward functions: hostile functions cost their own rows, nothing is left behind, nothing waits forever."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import gather_problems
from posttrain.rewards.config import RewardConfig, RewardsConfig
from posttrain.rewards.pool import Rewards
from posttrain.rewards.process import Worker
from posttrain.rewards.scores import combine, part_means, require_scored, stack_parts

HERE = "tests.rewards.functions"


def config_of(*functions: str | RewardConfig, **changes: Any) -> RewardsConfig:
    parts = tuple(part if isinstance(part, RewardConfig) else RewardConfig(function=f"{HERE}:{part}") for part in functions)
    return RewardsConfig(functions=parts, **{"workers": 2, "seconds_per_response": 2.0, **changes})


@pytest.fixture(scope="module")
def rewards():
    """One pool for the functions that do as the response says, beside a function that always works."""
    with Rewards(config_of("obey", "length")) as pool:
        yield pool


def judged(rewards: Rewards, *responses: str, **row: Any) -> list[float]:
    """What `obey` gave for each response, while `length` was right about all of them."""
    for key, response in enumerate(responses):
        rewards.submit(key, row, response)
    values = rewards.collect()
    assert [values[key]["length"] for key in range(len(responses))] == [len(response) for response in responses]
    return [values[key]["obey"] for key in range(len(responses))]


def processes(parent: int) -> list[int]:
    """The living children of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(folder.name))
    return found


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# --- rule 18


FAILURES = {
    "raise": "RuntimeError: a deliberate mistake",
    "odd": "OddError",
    "recurse": "RecursionError",
    "exit": "SystemExit",
    "interrupt": "KeyboardInterrupt",
    "none": "returned None of type NoneType, not a number",
    "nan": "returned nan, which is not finite",
    "infinite": "returned inf, which is not finite",
    "text": "returned '1.0' of type str, not a number",
    "list": "returned [1.0] of type list, not a number",
    "huge": "OverflowError",
    "unheard of": "KeyError: 'unheard of'",
    "die": "exit code 7",
    "segfault": "killed by SIGSEGV",
    "abort": "killed by SIGABRT",
    "hang": "timed out after 2 s",
    "hang in c": "timed out after 2 s",
    "stop": "timed out after 2 s",
    "close": "the worker was killed",
    "forge": "wrote into its worker's channel",
}


@pytest.fixture(scope="module")
def failed(rewards):
    """Every failure between two responses that are fine: response -> (value, value after it, text)."""
    responses = [response for failure in FAILURES for response in (failure, "fine")]
    values = judged(rewards, *responses)
    assert len(rewards.failures) == len(FAILURES)
    return {failure: (values[2 * i], values[2 * i + 1], rewards.failures[i]) for i, failure in enumerate(FAILURES)}


@pytest.mark.parametrize("response", FAILURES)
def test_rule_18_a_function_that_fails_costs_its_row(failed, response):
    value, after, text = failed[response]
    assert math.isnan(value) and after == 1.0
    assert FAILURES[response] in text and f"{HERE}:obey failed on {{}}, response {response!r}" in text


def test_rule_18_many_failures_at_once_leave_every_other_value_right(rewards):
    responses = ["fine", "die", "raise", "true", "segfault", "nan", "print"] * 8
    values = judged(rewards, *responses)
    assert [value == 1.0 for value in values] == [response in ("fine", "true", "print") for response in responses]
    assert all(math.isnan(value) for value in values if value != 1.0) and len(rewards.failures) == 4 * 8
    assert judged(rewards, "fine") == [1.0] and rewards.failures == []


def test_rule_18_what_a_function_started_ends_with_it(rewards, tmp_path):
    pidfile = tmp_path / "pid"
    [value] = judged(rewards, "child", pidfile=str(pidfile))
    assert math.isnan(value) and gone(int(pidfile.read_text()))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (f"{HERE}:needs_more", "needs_more cannot be called as needs_more(row, response): missing a required argument: 'answer'"),
        (f"{HERE}:needs_less", "too many positional arguments"),
        (f"{HERE}:later", "must be a plain function"),
        (f"{HERE}:bit_by_bit", "must be a plain function"),
        (f"{HERE}:Class", "must be a plain function"),
        (f"{HERE}:HERE", "has no 'HERE'"),
        (f"{HERE}:lenght", "did you mean 'length'?"),
        ("tests.rewards.nowhere:length", "there is no module"),
        ("length", "'package.module:function' does"),
    ],
)
def test_rule_18_a_wrong_signature_is_caught_before_the_first_generation(function, reason):
    config = config_of(RewardConfig(function=function))
    assert any(text.startswith("rewards.functions[0].function") and reason in text for text in gather_problems(config, "rewards"))
    with pytest.raises(ValueError, match=r"rewards\.functions\[0\]"):
        Rewards(config)


def test_rule_18_too_many_unscored_rows_stop_the_run_with_the_traceback(rewards):
    judged(rewards, "raise", *["fine"] * 19)
    scores = torch.tensor([math.nan] + [1.0] * 19)
    require_scored(scores, config_of("obey", max_failed_fraction=0.05), rewards.failures)
    with pytest.raises(RuntimeError, match=r"(?s)1 of 20 .*max_failed_fraction=0.04.*a deliberate mistake"):
        require_scored(scores, config_of("obey", max_failed_fraction=0.04), rewards.failures)


def test_rule_18_workers_that_can_no_longer_start_cost_rows_and_never_wait(monkeypatch):
    with Rewards(config_of("obey", "length")) as rewards:
        assert judged(rewards, "fine") == [1.0]
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        for key in range(6):
            rewards.submit(key, {}, "die")
        values = rewards.collect()
        assert all(math.isnan(value["obey"]) for value in values.values()) and len(values) == 6
        assert any("could not start" in text for text in rewards.failures)
        rewards.submit(0, {}, "fine")
        assert math.isnan(rewards.collect()[0]["obey"])


# --- what functions see


def test_values_are_those_of_plain_calls(rewards):
    responses = ["fine", "true", "print"] * 100
    assert judged(rewards, *responses) == [1.0] * 300 and rewards.failures == []


def test_a_function_sees_neither_ranks_nor_gpus_nor_what_another_did_to_the_row(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    parts = ("obey", RewardConfig(function=f"{HERE}:column", options=("offset=2", "negative=true")), "about_the_process")
    with Rewards(config_of(*parts)) as rewards:
        for key in range(20):
            rewards.submit(key, {"value": key}, "change")
        values = rewards.collect()
    assert rewards.failures == []
    assert values == {key: {"obey": 1.0, "column": -key - 2.0, "about_the_process": 1.0} for key in range(20)}


def test_rows_are_judged_side_by_side_while_the_caller_goes_on(tmp_path):
    with Rewards(config_of("obey", "process_number", seconds_per_response=60.0)) as rewards:
        for key in range(2):
            rewards.submit(key, {"mine": str(tmp_path / str(key)), "other": str(tmp_path / str(1 - key))}, "meet")
        values = rewards.collect()
    assert [value["obey"] for value in values.values()] == [1.0, 1.0]
    assert len({value["process_number"] for value in values.values()}) == 2


def test_verifiers_run_in_workers_and_no_response_pays_for_their_imports():
    names = ("verifiers:gsm8k", "verifiers:math_answer", "verifiers:reasoning_gym", "code:python_tests", "verifiers:regex_match")
    options = {"verifiers:regex_match": ("pattern=(a+)+b$",), "code:python_tests": ("seconds=4",)}
    functions = [RewardConfig(function=f"posttrain.rewards.{name}", options=options.get(name, ())) for name in names]
    row = {"answer": "18", "tests": ["assert True"], "entry": {"answer": "18", "metadata": {"source_dataset": "basic_arithmetic"}}}
    with Rewards(config_of(*functions, workers=1, seconds_per_response=5.0)) as rewards:
        rewards.submit(0, row, "18")
        rewards.submit(1, row, "a" * 50)  # backtracks for longer than the universe is old
        values = rewards.collect()
    assert values[0] == {"gsm8k": 1.0, "math_answer": 1.0, "reasoning_gym": 1.0, "regex_match": 0.0, "python_tests": 1.0}
    assert values[1]["gsm8k"] == 0.0 and math.isnan(values[1]["regex_match"]) and "timed out after 5 s" in rewards.failures[0]


def test_thousands_of_small_calls_are_cheap(rewards):
    begun = time.process_time()  # of all threads, as other programs may be using the machine
    judged(rewards, *["fine"] * 3000)
    assert (time.process_time() - begun) / 6000 < 0.1e-3


# --- ends


def test_nothing_is_left_when_the_pool_closes():
    before, threads = set(processes(os.getpid())), threading.active_count()
    with pytest.raises(KeyboardInterrupt), Rewards(config_of("obey", seconds_per_response=600.0)) as rewards:
        for key in range(4):
            rewards.submit(key, {}, "hang")
        time.sleep(0.3)
        assert len(set(processes(os.getpid())) - before) == 2
        raise KeyboardInterrupt
    assert set(processes(os.getpid())) == before and threading.active_count() == threads
    with pytest.raises(AssertionError, match="inside"):
        rewards.submit(0, {}, "fine")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent(number, tmp_path):
    program = (
        "import time; from posttrain.rewards.config import *; from posttrain.rewards.pool import Rewards\n"
        f"config = RewardsConfig(functions=(RewardConfig(function='{HERE}:obey'),), workers=2, seconds_per_response=600.0)\n"
        "with Rewards(config) as rewards:\n"
        "    rewards.submit(0, {}, 'hang in c'); rewards.submit(1, {}, 'hang'); time.sleep(0.3)\n"
        "    while not all(worker.process for worker in rewards._workers): time.sleep(0.1)\n"
        "    print(*[worker.process.pid for worker in rewards._workers], flush=True); rewards.collect()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a parent that is killed leaves an empty scratch folder
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.send_signal(number)
    assert parent.wait(10) == (-number) or number == signal.SIGINT
    assert all(gone(worker) for worker in workers)


def test_a_worker_that_cannot_import_the_function_says_so_before_the_first_response(monkeypatch):
    monkeypatch.setattr("posttrain.rewards.process.environment", lambda scratch: {"PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "x"})
    with pytest.raises(RuntimeError, match="could not start"), Rewards(config_of("length")):
        pass


def test_answers_that_came_in_time_count_however_late_they_are_read():
    worker = Worker(config_of("length", seconds_per_response=0.3), "/tmp")
    answers = worker.ask([(b"\x80\x04}.", "one"), (b"\x80\x04}.", "three")])
    assert next(answers) == (3.0, "")
    time.sleep(0.6)
    assert next(answers) == (5.0, "")
    worker.kill()


# --- from parts to scores


def test_scores_are_weighted_sums_and_unscored_where_a_part_that_counts_is():
    parts = stack_parts({5: {"a": 1.0, "b": 2.0, "c": math.nan}, 3: {"a": math.nan, "b": 1.0, "c": 4.0}}, [3, 5], ["a", "b", "c"])
    torch.testing.assert_close(combine(parts, {"a": 1.0, "b": -0.5, "c": 0.0}), torch.tensor([math.nan, 0.0]), equal_nan=True)
    torch.testing.assert_close(combine(parts, {"a": 0.0, "b": 2.0, "c": 0.0}), torch.tensor([2.0, 4.0]))
    assert part_means(parts) == {"reward/a": 1.0, "reward/b": 1.5, "reward/c": 4.0}
    assert part_means({"a": torch.tensor([math.nan])}) == {}
