"""Every preset of every recipe can be planned, in seconds."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("*.py")) if re.search(r"^PRESETS\b", path.read_text(), re.M)]
PRESETS = [(recipe, preset) for recipe in RECIPES for preset in importlib.import_module(f"recipes.{recipe}").PRESETS]
# what a machine without network, and a user who has yet to say what the rows are, may be told
EXCUSES = ("not to be had", "no local file", "is empty; ", "does not exist", "there is no such file or folder", ": as ")


def plan(recipe: str, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`recipes/RECIPE.py WORDS --plan`, and the processor time that it took, which other processes on the machine don't change."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), *words, "--plan"]
    before = os.times()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    after = os.times()
    return result, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(("recipe", "preset"), PRESETS)
def test_rule_10_every_preset_plans_in_five_seconds(recipe, preset, tmp_path):
    result, seconds = plan(recipe, preset, "--output-dir", str(tmp_path / "run"))
    assert seconds < 5 and "Traceback" not in result.stderr, result.stderr
    numbered = re.findall(r"^ +\d+\. (.*)", result.stderr, re.M)
    assert result.returncode == (2 if numbered else 0)
    assert all(any(excuse in text for excuse in EXCUSES) for text in numbered), result.stderr
    if preset == "tiny":
        assert not numbered and "will run" in result.stdout
    assert not (tmp_path / "run").exists()


def test_rule_10_many_mistakes_are_told_at_once(tmp_path):
    wrong = {
        "--ppo.minibatch-size": ("60", "ppo.minibatch_size=60 must divide rollout_batch_size=128; 64 works"),
        "--ppo.kl-coef": ("-1", "ppo.kl_coef=-1.0 must not be negative"),
        "--sft.template": ("nope", "sft.template='nope' is neither auto"),
        "--sft.data.split": ("train[3", "split='train[3' is not a split's name"),
        "--reward-model.model.dtype": ("fp8", "reward_model.model.dtype='fp8' must be auto, fp32 or bf16"),
        "--candidates.prompts.format": ("gms8k", "format='gms8k' is no known format; did you mean 'gsm8k'?"),
        "--evaluation.score": ("recipes.tiny_world:scor", "recipes.tiny_world has no 'scor'; did you mean 'score'?"),
    }
    result, seconds = plan("instructgpt", "tiny", "--output-dir", str(tmp_path / "x"), *(w for o, (v, _) in wrong.items() for w in (o, v)))
    assert result.returncode == 2 and seconds < 5 and "Traceback" not in result.stderr
    for _, text in wrong.values():
        assert text in result.stderr
    assert len(re.findall(r"^ +\d+\. ", result.stderr, re.M)) == len(wrong)
