"""Pipelines: declared, checked as a whole, skipped, resumed, refused, redone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config import DataConfig, ModelConfig, replace
from posttrain.pipeline import Pipeline
from posttrain.pipeline.check import Refused
from posttrain.pipeline.command import Options, carry_out, main
from posttrain.pipeline.pipeline import with_outputs
from posttrain.pipeline.runner import prepare
from posttrain.run import Stopped
from tests.pairs import run_pair
from tests.pipeline.stages_for_tests import OtherConfig, Recipe, Total, WriteConfig, build, other, write

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "pipeline" / "stages_for_tests.py"
NAMES = ["first", "second", "third", "beside"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(output_dir=str(tmp_path / "run"))


def run(recipe: Recipe, **options) -> list[str]:
    """Run the pipeline; the stages whose functions were called."""
    calls = Path(recipe.output_dir) / "calls.txt"
    calls.unlink(missing_ok=True)
    carry_out(build, recipe, Options(**options))
    return calls.read_text().split() if calls.exists() else []


def output(recipe: Recipe, stage: str) -> dict:
    return json.loads((Path(recipe.output_dir) / stage / "model" / "rows.jsonl").read_text())


def record(recipe: Recipe, stage: str) -> dict:
    return json.loads((Path(recipe.output_dir) / stage / "stage.json").read_text())


def statuses(recipe: Recipe) -> list[str]:
    written = json.loads((Path(recipe.output_dir) / "pipeline.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == NAMES
    return [stage["status"] for stage in written["stages"]]


# --- rule 22


def test_rule_22_a_finished_pipeline_runs_nothing_again(recipe):
    assert run(recipe) == NAMES
    assert statuses(recipe) == ["done"] * 4
    assert run(recipe) == []
    # run-time fields and the place of the folder change nothing
    assert run(replace(recipe, first=WriteConfig(verbose=True))) == []
    moved = replace(recipe, output_dir=f"{recipe.output_dir}-moved")
    os.rename(recipe.output_dir, moved.output_dir)
    assert run(moved) == []


def test_rule_22_a_changed_stage_is_refused_with_its_difference_and_nothing_is_lost(recipe):
    run(recipe)
    before = record(recipe, "first")
    with pytest.raises(Refused) as refused:
        run(replace(recipe, first=WriteConfig(text="b"), third=WriteConfig(steps=2)))
    text = str(refused.value)
    assert "--redo STAGE" in text and "text: a -> b" in text and "steps: 0 -> 2" in text
    assert record(recipe, "first") == before and run(recipe) == []


def test_rule_22_redo_accepts_a_change_and_redoes_what_stands_on_it(recipe):
    run(recipe)
    changed = replace(recipe, second=WriteConfig(text="b"))
    assert run(changed, redo=("second",)) == ["second", "third"]
    assert output(changed, "second")["text"] == "b" and run(changed) == []
    aside = sorted(path.name.rpartition("-")[0].rpartition("-")[0] for path in (Path(recipe.output_dir) / "redone").iterdir())
    assert aside == ["second", "third"]
    assert run(changed, redo=("first",)) == ["first", "second", "third"]


def test_rule_22_a_stage_whose_inputs_content_changed_is_refused(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    recipe = replace(recipe, first=WriteConfig(data=DataConfig(path=str(rows))))
    run(recipe)
    rows.write_text('{"text": "one more"}\n')
    with pytest.raises(Refused, match=r"data\.path: content \w+ -> content"):
        run(recipe)
    # an output that was edited by hand shows in the stage that stands on it
    rows.write_text('{"text": "one"}\n')
    (Path(recipe.output_dir) / "first" / "model" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(Refused, match=r"second\n.*model\.path: content"):
        run(recipe)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_rule_22_an_interrupted_stage_resumes_with_the_same_command(recipe, monkeypatch, capsys, name, code):
    straight = replace(recipe, output_dir=f"{recipe.output_dir}-straight", second=WriteConfig(steps=6))
    run(straight)
    recipe = replace(recipe, second=WriteConfig(steps=6, interrupt_at=4))
    monkeypatch.setenv("INTERRUPT", name)
    with pytest.raises(Stopped) as stopped:
        run(recipe)
    assert stopped.value.code == code
    said = capsys.readouterr().out
    assert "second/checkpoints/step_000004" in said and "run the same command again" in said
    assert statuses(recipe) == ["done", "stopped", "waiting", "waiting"]
    # the signals are given back
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.delenv("INTERRUPT")
    assert run(recipe) == ["second", "third", "beside"]
    assert output(recipe, "second") == output(straight, "second")
    for file in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.loads(line) for line in (Path(recipe.output_dir) / "second" / file).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert record(recipe, "second")["tokens"] == 60 and record(recipe, "second")["optimizer_steps"] == 6


def test_rule_22_a_partial_stage_that_changed_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("INTERRUPT", "SIGINT")
    with pytest.raises(Stopped):
        run(replace(recipe, first=WriteConfig(steps=6, interrupt_at=4)))
    monkeypatch.delenv("INTERRUPT")
    with pytest.raises(Refused, match=r"first\n.*steps: 6 -> 7"):
        run(replace(recipe, first=WriteConfig(steps=7)))


def test_rule_22_ranks_skip_and_refuse_alike_as_rank_0_decides(tmp_path):
    for result in run_pair("ddp", "tests.pipeline.jobs:run_twice_then_change", folder=str(tmp_path)):
        assert result["counts"] == [2 * len(NAMES)] * 2  # both ranks, once
        assert "steps: 3 -> 4" in result["refused"]


def test_a_crash_says_which_stage_and_how_to_go_on(recipe, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "1")
    recipe = replace(recipe, second=WriteConfig(fail=True, steps=2))
    with pytest.raises(RuntimeError, match="the stage fails here"):
        run(recipe)
    assert "second failed in step 2" in capsys.readouterr().out
    assert statuses(recipe) == ["done", "failed", "waiting", "waiting"]
    monkeypatch.delenv("FAIL")
    assert run(recipe) == ["second", "third", "beside"]


def test_only_runs_one_stage_once_its_inputs_are_finished(recipe):
    with pytest.raises(Refused, match=r"first \(new\)"):
        run(recipe, only="second")
    assert run(recipe, only="first") == ["first"]
    assert run(recipe, only="beside") == ["beside"]
    assert run(recipe, only="second") == ["second"]
    assert run(recipe, only="second") == []
    with pytest.raises(Refused) as refused:
        run(replace(recipe, first=WriteConfig(steps=-1)), only="thrid", redo=("first", "secnd"))
    for text in ("--only thrid: no such stage; did you mean 'third'?", "--redo secnd: no such stage; did you mean", "steps=-1"):
        assert text in str(refused.value)
    assert run(recipe) == ["third"]


def test_smoke_runs_small_in_a_folder_of_its_own(recipe):
    recipe = replace(recipe, first=WriteConfig(steps=100))
    carry_out(build, recipe, Options(smoke=True))
    small = replace(recipe, output_dir=f"{recipe.output_dir}-smoke")
    assert record(small, "first")["optimizer_steps"] == 2 and not Path(recipe.output_dir).exists()


def test_what_the_command_line_says_reaches_the_world_and_the_tracker(recipe, monkeypatch):
    from posttrain import engine, tracking

    seen = {}
    begin, follow = engine.World.from_launch, tracking.Tracker.__init__

    def from_launch(hang_minutes):
        seen["hang_minutes"] = hang_minutes
        return begin(hang_minutes)

    def init(self, *words, **options):
        seen["upload"] = options["upload"]
        follow(self, *words, **options)

    monkeypatch.setattr(engine.World, "from_launch", from_launch)
    monkeypatch.setattr(tracking.Tracker, "__init__", init)
    words = ["--output-dir", recipe.output_dir, "--only", "first"]
    main(build, {"small": recipe}, [*words, "--hang-minutes", "90", "--upload-artifacts"])
    assert seen == {"hang_minutes": 90.0, "upload": True}
    main(build, {"small": recipe}, ["--output-dir", f"{recipe.output_dir}-2", "--only", "first"])
    assert seen == {"hang_minutes": 30.0, "upload": False}
    with pytest.raises(SystemExit, match="2"):
        main(build, {"small": recipe}, [*words, "--hang-minutes", "-1"])


def test_records_say_what_a_stage_used_and_what_it_was_made_of(recipe):
    run(replace(recipe, first=WriteConfig(steps=3)))
    done = record(recipe, "first")
    assert done["optimizer_steps"] == 3 and done["tokens"] == 30 and done["metrics"]["total"] == 6
    assert done["seconds"] > 0 and done["peak_memory_bytes"] > 10e6 and done["output"] == "model"
    folder = Path(recipe.output_dir)
    assert json.loads((folder / "first" / "config.json").read_text())["config"]["steps"] == 3
    assert (folder / "first" / "preview.txt").read_text() == "a of \n"  # without colours
    assert json.loads((folder / "first" / "results.json").read_text()) == {"total": 6}
    assert json.loads((folder / "second" / "config.json").read_text())["config"]["model"]["path"] == str(folder / "first" / "model")
    written = json.loads((folder / "pipeline.json").read_text())
    assert written["stages"][2]["inputs"] == {"sources[0]": "@second", "sources[1]": "@first"}
    assert len({stage["wandb_id"] for stage in written["stages"]}) == 4
    assert not list(folder.rglob(".*.[0-9]*")), "temporary files are gone"


# --- handles


def test_handles_are_replaced_in_tuples_and_nested_configs():
    outputs = {"sft": Path("runs/x/sft/model")}
    config = OtherConfig(
        model="@sft", nested=WriteConfig(model=ModelConfig(path="@sft"), sources=("base", "@sft/rows.jsonl"), text="a @sft in a text")
    )
    resolved = with_outputs(config, outputs)
    assert resolved.model == resolved.nested.model.path == "runs/x/sft/model"
    assert resolved.nested.sources == ("base", "runs/x/sft/model/rows.jsonl") and resolved.nested.text == "a @sft in a text"
    assert with_outputs(WriteConfig(text="@other"), outputs).text == "@other"


# --- rule 10


def test_rule_10_everything_wrong_with_a_pipeline_is_reported_at_once(tmp_path):
    pipeline = Pipeline("wrong", tmp_path / "run")
    pipeline.stage("sft", write, WriteConfig(steps=-1, text=3, model=ModelConfig(dtype="fp8")))
    pipeline.stage("reward", write, WriteConfig(model=ModelConfig(path="@sfd"), sources=("@ppo", "@reward")))
    pipeline.stage("ppo", write, WriteConfig(data=DataConfig(path=str(tmp_path / "missing.jsonl")), model=ModelConfig(path="./nowhere")))
    pipeline.stage("ppo", write, WriteConfig(text="forbidden"))
    pipeline.stage("bad name", lambda config, run: None, {"steps": 3})
    pipeline.stage("eval", write, WriteConfig(function="posttrain.config:resolv"))
    with pytest.raises(Refused) as refused:
        prepare(pipeline)
    text = str(refused.value)
    for expected in [
        "stage 'ppo' is declared 2 times",
        "sft.text=3 must be of type str",
        "sft.model.dtype='fp8'",
        "reward.model.path='@sfd' is no stage of this pipeline; did you mean 'sft'?",
        "reward.sources[0]='@ppo' is declared after 'reward'",
        "reward.sources[1]='@reward' is the stage's own output",
        "missing.jsonl",
        "'./nowhere' does not exist",
        "forbidden",
        "'bad name' cannot be a folder's name",
        "must be a function at the top of a module",
        "its config is a dict",
        "did you mean 'resolve'?",
    ]:
        assert expected in text, f"{expected!r} is not in\n{text}"
    assert len(refused.value.problems) >= 13
    assert not (tmp_path / "run").exists()


def test_companions_belong_to_the_config_that_they_name():
    pipeline = Pipeline("p", "run")
    pipeline.stage("one", write, WriteConfig())
    pipeline.stage("two", other, OtherConfig())
    assert pipeline.stages[0].companion("plan") and not pipeline.stages[1].companion("plan")
    assert not pipeline.stages[0].companion("no_such_companion")


def children_seconds() -> float:
    """Processor time of the subprocesses that have ended, which other processes on the machine don't change."""
    times = os.times()
    return times.children_user + times.children_system


def command(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_rule_10_the_command_line_reports_all_problems_quickly_and_without_a_traceback(tmp_path):
    start = children_seconds()
    wrong = command(tmp_path, "small", "--first.steps", "-1", "--second.text", "forbidden", "--third.model.dtype", "fp8")
    assert children_seconds() - start < 5
    assert wrong.returncode == 2, wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert all(f"  {i}. " in wrong.stderr for i in (1, 2, 3))
    unknown = command(tmp_path, "small", "--first.stpes", "3")
    assert unknown.returncode == 2 and "--first.steps" in unknown.stdout + unknown.stderr


def test_rule_10_plan_is_quick_and_loads_no_model_library(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['recipe', 'large', '--plan', '--second.steps', '7']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'wandb'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = children_seconds()
    plan = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert children_seconds() - start < 5
    assert plan.returncode == 0, plan.stderr
    assert "text = 'large'" in plan.stdout and "steps = 7" in plan.stdout and "rows: 1,234,567" in plan.stdout
    assert "will run" in plan.stdout and not (tmp_path / "runs").exists()


def test_plan_and_preview_say_where_stages_stand(recipe, capsys):
    run(recipe, only="first")
    capsys.readouterr()
    carry_out(build, recipe, Options(plan=True, preview=True))
    shown = capsys.readouterr().out
    assert "done in" in shown and "will run" in shown
    assert "a of model" in shown and "can be shown once second has finished" not in shown.partition("third")[0]
    carry_out(build, replace(recipe, first=WriteConfig(text="b")), Options(plan=True))
    assert "needs --redo" in capsys.readouterr().out.replace("\n", " ")


def test_presets_are_subcommands_and_a_single_one_may_go_unnamed(recipe, tmp_path):
    words = ["--output-dir", str(tmp_path / "cli"), "--first.text", "typed"]
    main(build, {"small": recipe}, words)
    main(build, {"small": recipe}, ["small", *words])
    assert output(replace(recipe, output_dir=str(tmp_path / "cli")), "first")["text"] == "typed"


def test_ctrl_c_ends_the_command_with_130_and_the_same_command_goes_on(tmp_path):
    words = ("small", "--first.steps", "5", "--first.interrupt-at", "2")
    stopped = command(tmp_path, *words, INTERRUPT="SIGINT")
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
    assert "step_000002" in stopped.stdout
    again = command(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "resumes at step 2" in again.stdout


def test_totals_are_what_the_future_depends_on():
    total = Total()
    total.load_state_dict({"value": 3})
    assert total.state_dict() == {"value": 3}
