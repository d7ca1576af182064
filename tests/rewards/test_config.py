"""What is rewarded is read from texts, checked whole, and known to be callable, before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from posttrain.config import from_json, gather_problems, semantic, to_json
from posttrain.rewards.config import RewardConfig, RewardsConfig, read_options, requirements, requires
from tests.rewards.functions import column, length

COLUMN = "tests.rewards.functions:column"


def test_options_are_read_by_the_functions_own_types():
    assert read_options(column, ("name=a=b", "offset=-2", "negative=True")) == ({"name": "a=b", "offset": -2, "negative": True}, [])
    assert read_options(length, ("per=3",)) == ({"per": 3.0}, [])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("offsett=1", "column has no option 'offsett'; did you mean 'offset'?"),
        ("row=1", "has no option 'row'"),
        ("offset=1.5", "offset='1.5' must be of type int"),
        ("negative=maybe", "negative='maybe' must be of type bool"),
        ("offset", "'offset' has no '='"),
    ],
)
def test_options_that_the_function_does_not_take_are_said(option, reason):
    [text] = gather_problems(RewardConfig(function=COLUMN, options=(option,)))
    assert text.startswith("options: ") and reason in text


def test_everything_wrong_with_the_rewards_is_said_at_once():
    functions = (RewardConfig(function=COLUMN, weight=0.0), RewardConfig(function=COLUMN, weight=0.0, options=("offset=1", "offset=2")))
    found = gather_problems(RewardsConfig(functions=functions, seconds_per_response=0.0, max_failed_fraction=2.0, workers=0))
    assert len(found) == 6 and sum("works" in text for text in found) == 4
    for word in ("given twice", "several parts", "every weight is 0", "seconds_per_response", "max_failed_fraction", "workers"):
        assert sum(word in text for text in found) == 1, word
    assert gather_problems(RewardConfig(function=COLUMN, weight=float("inf")))


def test_a_reward_is_json_and_its_parts_have_names_and_weights():
    functions = (RewardConfig(function=COLUMN, options=("offset=1",)), RewardConfig(function=COLUMN, weight=0, name="plain"))
    config = RewardsConfig(functions=functions)
    assert gather_problems(config) == [] and from_json(RewardsConfig, to_json(config)) == config
    assert config.parts == ("column", "plain") and config.weights == {"column": 1.0, "plain": 0.0}
    # how many processes judge, and what is tolerated, changes no score
    assert semantic(config).keys() == {"functions", "seconds_per_response"}


@requires("a_package_that_nobody_has", "json")
def needs_a_package(row: dict, response: str) -> float:
    return 1.0


@requires(check=lambda size=1: [] if size < 3 else [f"size={size} is too large here; 2 works"])
def needs_room(row: dict, response: str, *, size: int = 1) -> float:
    return 1.0


def test_what_a_function_stands_on_is_known_when_a_run_is_planned():
    [text] = gather_problems(RewardConfig(function=f"{__name__}:needs_a_package"))
    assert "pip install a_package_that_nobody_has" in text
    [text] = gather_problems(RewardConfig(function=f"{__name__}:needs_room", options=("size=3",)))
    assert text == "function: needs_room: size=3 is too large here; 2 works"
    assert gather_problems(RewardConfig(function=f"{__name__}:needs_room", options=("size=2",))) == []
    assert requirements(column).modules == () and requirements(column).check is None


def test_a_module_that_fails_while_it_is_imported_is_said(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import json\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    [text] = gather_problems(RewardConfig(function="broken_rewards:reward"))
    assert "cannot be imported: ZeroDivisionError" in text


def test_planning_rewards_imports_nothing_heavy():
    names = ("verifiers:gsm8k", "verifiers:math_answer", "verifiers:reasoning_gym", "code:python_tests", "text:repetition_penalty")
    code = f"""
import sys
from posttrain.config import gather_problems
from posttrain.rewards.config import RewardConfig, RewardsConfig
import posttrain.rewards.pool
functions = tuple(RewardConfig(function="posttrain.rewards." + name) for name in {names})
assert gather_problems(RewardsConfig(functions=functions)) == []
assert not {{"torch", "sympy", "math_verify", "reasoning_gym"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
