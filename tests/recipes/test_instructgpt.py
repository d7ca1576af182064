from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config import gather_problems
from posttrain.pipeline.runner import prepare
from recipes import instructgpt, sft

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu.yaml")]
STAGES = ["world", "base", "sft", "candidates", "labels", "reward_model", "ppo", "evaluation", "overoptimisation"]


def run(*arguments: str, launch: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, *(LAUNCH if launch else []), str(ROOT / "recipes/instructgpt.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def smoked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = run("tiny", "--smoke", "--output-dir", str(folder), launch=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder.with_name("tiny-smoke")


def test_rule_11_the_tiny_recipe_runs_its_whole_life_cycle_without_network(smoked: Path):
    report = json.loads((smoked / "report.json").read_text())
    assert {"name", "digest", "seconds"} <= report["pipeline"].keys() and list(report["stages"]) == STAGES
    for stage in report["stages"].values():
        assert {"seconds", "optimizer_steps", "tokens", "tokens_per_second", "peak_memory_bytes", "metrics"} <= stage.keys()
    evaluation = report["evaluation"]
    for name in ("base", "sft", "ppo"):
        gold = evaluation["gold_score"][name]
        assert gold["n"] > 0 and gold["ci95"][0] <= gold["mean"] <= gold["ci95"][1] and evaluation["pretraining_loss"][name] > 0
    assert {"pair_accuracy", "ci95", "n_pairs"} <= evaluation["reward_model"].keys()
    assert set(evaluation["preference"]) == {"gold judge", "reward model"}
    for judged in evaluation["preference"].values():
        assert judged["baseline"] == "sft" and set(judged["elo"]) == {"base", "sft", "ppo"} and set(judged["win_rate"]) == {"base", "ppo"}
    assert set(evaluation["tasks"]["choices"]["models"]) == {"base", "sft", "ppo"} and set(evaluation["response_length"]) == {
        "base",
        "sft",
        "ppo",
    }
    assert [point["n"] for point in evaluation["overoptimisation"]["best_of_n"]["points"]] == [1, 2, 4]
    assert report["stages"]["ppo"]["optimizer_steps"] == 4
    page = (smoked / "report.html").read_text()
    for known in ("http://www.w3.org", "http://127.0.0.1:8000"):  # a namespace, and the default of a config that isn't used
        page = page.replace(known, "")
    assert "<svg" in page and "http://" not in page


def test_rule_11_every_evaluated_response_can_be_scored_again(smoked: Path):
    from recipes.tiny_world import score

    rows = [json.loads(line) for line in (smoked / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {"base", "sft", "ppo"}
    assert all({"task", "seed", "index", "prompt", "response", "score"} <= row.keys() for row in rows)
    assert all(score(row, row["response"]) == row["score"] for row in rows)


def test_rule_22_the_same_command_again_has_nothing_to_do(smoked: Path):
    before = (smoked / "ppo" / "stage.json").stat().st_mtime_ns
    again = run("tiny", "--smoke", "--output-dir", str(smoked).removesuffix("-smoke"))
    assert again.returncode == 0 and again.stdout.count("finished already") == len(STAGES)
    assert (smoked / "ppo" / "stage.json").stat().st_mtime_ns == before


def test_rule_10_a_wrong_config_is_refused_at_once_with_everything_wrong_in_it(tmp_path: Path):
    result = run("tiny", "--output-dir", str(tmp_path / "x"), "--ppo.minibatch-size", "60", "--sft.epochs", "-1", "--labels.noise", "2")
    assert result.returncode == 2 and not (tmp_path / "x").exists()
    for text in ("minibatch_size=60 must divide rollout_batch_size=128; 64 works", "epochs=-1", "noise=2"):
        assert text in result.stderr


def test_rule_10_every_preset_is_sound():
    for name, preset in instructgpt.PRESETS.items():
        stages = instructgpt.build(preset).stages
        assert [text for stage in stages for text in gather_problems(stage.config, stage.name)] == [], name
    for name, preset in sft.PRESETS.items():  # which leave the data to the user
        [stage] = sft.build(preset).stages
        [problem] = gather_problems(stage.config, stage.name)
        assert problem.startswith("sft.data.path is empty"), name
    assert prepare(instructgpt.build(instructgpt.TINY)).keys() == set(STAGES)
