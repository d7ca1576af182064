"""Running a pipeline: finished stages are skipped, a partial one resumes, a changed one is refused. Rank 0 decides for all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import CheckpointConfig, did_you_mean, to_json
from posttrain.data.shown import without_colors
from posttrain.pipeline import standing as standings
from posttrain.pipeline.check import Refused, pipeline_problems, remaining_problems
from posttrain.pipeline.identity import FUNCTION_OF_STAGE, Contents, sha256
from posttrain.pipeline.memory import peak_bytes, reset_peak
from posttrain.pipeline.pipeline import Pipeline, Stage, with_outputs
from posttrain.pipeline.show import ask
from posttrain.pipeline.standing import DONE, NEW, RESUMES, Standing, read_json, survey
from posttrain.run import Run, Stopped, command_line, write_json, write_text

if TYPE_CHECKING:
    from posttrain.engine import World


def prepare(pipeline: Pipeline, *, only: str = "", redo: Sequence[str] = ()) -> dict[str, Standing]:
    """Check the whole pipeline and say where each stage stands. Reads only. Raises Refused with every problem found."""
    names = [stage.name for stage in pipeline.stages]
    asked = [("--only", only)] * bool(only) + [("--redo", name) for name in redo]
    problems = [f"{option} {name}: no such stage{did_you_mean(name, names)}" for option, name in asked if name not in names]
    redone = pipeline.standing_on(set(redo))
    outputs = standings.outputs_on_disk(pipeline, redone)
    problems += pipeline_problems(pipeline, Contents(pipeline.output_dir / ".digests.json"), outputs)
    if problems:
        raise Refused(f"pipeline {pipeline.name!r} cannot run as it is:", problems)
    return survey(pipeline, redone)


def run_pipeline(
    pipeline: Pipeline,
    *,
    only: str = "",
    redo: Sequence[str] = (),
    restart_optimizer: bool = False,
    hang_minutes: float = 30.0,
    upload_artifacts: bool = False,
) -> None:
    """Run what is left to run, in this launch; the options are those of the command line (`posttrain.pipeline.command.Options`).

    Raises Refused for whatever is wrong before the first stage begins, Stopped when asked to stop.
    """
    from posttrain.engine import World

    options: dict[str, Any] = {"restart_optimizer": restart_optimizer, "upload": upload_artifacts}
    try:
        world = World.from_launch(hang_minutes)
    except ValueError as error:
        raise Refused("this launch cannot work:", [str(error)]) from error
    try:
        assert not world.stop.signal_number  # from here on Ctrl-C and SIGTERM are a flag
        names = world.first_says(lambda: _begin(pipeline, only, redo), "checking the pipeline")
        _refuse_own_disks(pipeline, world)
        world.first_says(lambda: _open(pipeline, redo), "opening the pipeline")
        ran = [name for name in names if _run_or_skip(pipeline, name, world, options)]
        if ran or not (pipeline.output_dir / "report.json").exists():
            world.first_says(lambda: _report(pipeline), "writing the report")
    except Refused as refused:
        if world.size > 1:  # rank 0 must have spoken before another one ends: the launcher then ends them all
            refused.shown = True
            if world.is_main:
                print(refused, file=sys.stderr, flush=True)
            world.barrier("refusing")
        raise
    except Stopped:  # by all ranks together
        raise
    except BaseException as error:
        world.fail(error)
        raise
    finally:
        world.close()


def _begin(pipeline: Pipeline, only: str, redo: Sequence[str]) -> list[str]:
    """Rank 0: check and refuse, reading only; the names of the stages to go through."""
    found = prepare(pipeline, only=only, redo=redo)
    names = [only] if only else list(found)
    if only:
        stage = next(stage for stage in pipeline.stages if stage.name == only)
        missing = sorted({name for name in stage.handles.values() if found[name].state != DONE})
        if missing:
            states = ", ".join(f"{name} ({found[name].state})" for name in missing)
            raise Refused("nothing was run:", [f"--only {only} needs finished stages: {states}; run --only {missing[0]} first"])
    standings.refuse_changed(found, names)
    return names


def _refuse_own_disks(pipeline: Pipeline, world: World) -> None:
    """Make the output folder. Raises Refused when hosts don't share it, and each has one of its own."""
    try:
        world.check_shared(pipeline.output_dir)
    except ValueError as error:
        raise Refused("nothing was run:", [f"output_dir {error}"]) from error


def _open(pipeline: Pipeline, redo: Sequence[str]) -> None:
    """Rank 0: set redone stages aside, and record where every stage stands."""
    for path in standings.set_aside(pipeline, pipeline.standing_on(set(redo))):
        print(f"set aside: {path}", flush=True)
    _record(pipeline)


def _run_or_skip(pipeline: Pipeline, name: str, world: World, options: dict[str, Any]) -> bool:
    """Run one stage if it has to be run; whether it was."""
    stage = next(stage for stage in pipeline.stages if stage.name == name)

    def decide() -> tuple[Standing, dict[str, Path]]:
        found = survey(pipeline)  # anew: the stages before it have finished by now
        standings.refuse_changed(found, [name])
        outputs = standings.outputs_of(pipeline, found)
        problems = [] if found[name].state == DONE else remaining_problems(pipeline, name, outputs)
        if problems:
            raise Refused(f"{name} was not begun; from what has run it shows that this cannot work:", problems)
        return found[name], outputs

    _stop_between_stages(name, world)
    standing, outputs = world.first_says(decide, f"deciding about {name}")
    assert standing.state in (DONE, RESUMES, NEW), f"{name} {standing.state}, although every stage before it has run"
    if standing.state == DONE:
        if world.is_main:
            print(f"{name}: finished already, {standings.output_path(pipeline, name, standing.record)}", flush=True)
        return False
    _run(pipeline, stage, standing, outputs, world, **options)
    return True


def _stop_between_stages(name: str, world: World) -> None:
    """Raise Stopped when the signal came while no stage was looking."""
    number = max(world.gather(world.stop.signal_number, "asking whether to stop"))
    if number:
        message = f"stopped before {name}. To go on, run the same command again: {command_line()}"
        if world.is_main:
            print(message, flush=True)
        raise Stopped(message, number)


def _run(
    pipeline: Pipeline,
    stage: Stage,
    standing: Standing,
    outputs: dict[str, Path],
    world: World,
    *,
    restart_optimizer: bool,
    upload: bool,
) -> None:
    """Run one stage with an engine of its own, and record that it has finished."""
    from posttrain.engine import Engine
    from posttrain.tracking import Tracker

    config = with_outputs(stage.config, outputs)
    folder = pipeline.folder(stage.name)
    tracker_id = world.first_says(lambda: _open_folder(pipeline, stage, standing, outputs), f"opening {stage.name}")
    reset_peak()
    engine = Engine(world)
    engine.seed(pipeline.seed)
    with Tracker(
        folder,
        project=pipeline.name,
        name=stage.name,
        group=f"{pipeline.name}-{pipeline.output_dir.name}",
        job_type=stage.name,
        config=to_json(config) | {"made_of": standing.made_of, "seed": pipeline.seed},
        run_id=tracker_id,
        upload=upload,
        is_main=world.is_main,
    ) as tracker:
        run = Run(
            name=stage.name,
            folder=folder,
            seed=pipeline.seed,
            engine=engine,
            tracker=tracker,
            checkpoints=getattr(config, "checkpoint", CheckpointConfig()),
            restart_optimizer=restart_optimizer,
            identity=standing.digest,
        )
        for where, name in stage.handles.items():
            tracker.link_input(name, outputs[name], str(standing.made_of.get(where, "")).removeprefix("content "))
        output = _call(pipeline, stage, config, run)
        peak = max(world.gather(peak_bytes(), f"peak memory of {stage.name}"))
        world.first_says(lambda: _finish(pipeline, stage, standing, run, Path(output), peak), f"finishing {stage.name}")
    engine.close()


def _call(pipeline: Pipeline, stage: Stage, config: Any, run: Run) -> Path:
    """The stage itself. However it ends, it is said where it stands and how to go on."""
    world = run.engine.world
    try:
        _refuse_other_launch(run)
        with world.phase(stage.name, timed=False):
            return stage.function(config, run)
    except (Stopped, KeyboardInterrupt, Refused) as ended:
        _leave(pipeline, stage, run, "stopped")
        if isinstance(ended, Stopped) or world.size == 1:  # else ranks may have left one by one, and closing waits for all
            run.engine.close()
        raise
    except BaseException:
        _leave(pipeline, stage, run, "failed")
        step = standings.newest_step(run.folder)
        begins = f"goes on at step {step}" if step else "goes on from there" if run.keeps_results else "begins this stage anew"
        run.say(f"\n{stage.name} failed in step {run.step}; what is finished is kept. The same command {begins}: {command_line()}\n")
        if world.size == 1:
            run.engine.close()
        raise


def _refuse_other_launch(run: Run) -> None:
    """Raise Refused, before any model is loaded, when the checkpoint to go on from needs another launch."""
    try:
        run.find_checkpoint()
    except ValueError as error:
        raise Refused(f"{run.name} cannot be resumed:", [str(error)]) from error


def _leave(pipeline: Pipeline, stage: Stage, run: Run, status: str) -> None:
    """Record how a stage ended that hasn't finished, when what it was writing is written."""
    run.engine.wait_for_files()
    run.count_time()
    if run.engine.world.is_main:
        _record(pipeline, {stage.name: {"status": status}})


def _open_folder(pipeline: Pipeline, stage: Stage, standing: Standing, outputs: dict[str, Path]) -> str:
    """Write config.json and preview.txt into the stage's folder; the tracker's id, which is kept over resumes."""
    folder = pipeline.folder(stage.name)
    tracker_id = read_json(folder / "config.json").get("tracker_id") or f"{stage.name}-{secrets.token_hex(4)}"
    write_json(
        folder / "config.json",
        {
            "stage": stage.name,
            "function": standing.made_of[FUNCTION_OF_STAGE],
            "digest": standing.digest,
            "tracker_id": tracker_id,
            "config": to_json(with_outputs(stage.config, outputs)),
            "made_of": standing.made_of,
        },
    )
    _record(pipeline, {stage.name: {"status": "running", "started": now()}})
    preview = ask(stage, "preview", outputs)
    if preview:
        write_text(folder / "preview.txt", without_colors(preview) + "\n")
    verb = f"resumes, newest checkpoint of step {standing.step}" if standing.step else "begins"
    print(f"\n{stage.name} {verb}", flush=True)
    return tracker_id


def _finish(pipeline: Pipeline, stage: Stage, standing: Standing, run: Run, output: Path, peak: int) -> None:
    """Rank 0: write stage.json, which says that the stage has finished."""
    if not output.exists():
        raise ValueError(f"{stage.name}: {stage.function.__qualname__} returned {output}, which does not exist")
    contents = Contents(pipeline.output_dir / ".digests.json")
    content = contents.digest(output)
    contents.save()
    run.count_time()
    counters = run.counters
    record = {
        "stage": stage.name,
        "digest": standing.digest,
        "output": os.path.relpath(output, pipeline.folder(stage.name)),
        "content_digest": content,
        "seconds": round(counters.seconds, 3),
        "phases": {name: round(seconds, 3) for name, seconds in counters.phases.items()},
        "optimizer_steps": counters.optimizer_steps,
        "tokens": counters.tokens,
        "tokens_per_second": round(counters.tokens / counters.seconds, 3) if counters.seconds else 0.0,
        "peak_memory_bytes": peak,
        "metrics": run.metrics,
        "notes": run.warnings,
        "finished": now(),
    }
    run.tracker.link_output(stage.name, output, content)
    write_json(pipeline.folder(stage.name) / "stage.json", record)
    _record(pipeline)
    print(f"{stage.name}: finished in {counters.seconds:.0f} s, {output}", flush=True)


def _record(pipeline: Pipeline, changes: dict[str, dict[str, Any]] | None = None) -> None:
    """Rank 0: write pipeline.json, the state of all stages in order."""
    path = pipeline.output_dir / "pipeline.json"
    before = {entry["name"]: entry for entry in read_json(path).get("stages", [])}
    entries = []
    for stage in pipeline.stages:
        folder = pipeline.folder(stage.name)
        config, record = read_json(folder / "config.json"), read_json(folder / "stage.json")
        status = "done" if record else before.get(stage.name, {}).get("status", "waiting") if config else "waiting"
        entries.append(
            {
                "name": stage.name,
                "status": status,
                "function": config.get("function", stage.function.__qualname__),
                "digest": config.get("digest", ""),
                "inputs": {where: f"@{name}" for where, name in stage.handles.items()},
                "output": os.path.relpath(folder / record["output"], pipeline.output_dir) if record else "",
                "content_digest": record.get("content_digest", ""),
                "started": before.get(stage.name, {}).get("started", "") if config else "",
                "finished": record.get("finished", ""),
                "seconds": record.get("seconds", 0.0),
                "wandb_id": config.get("tracker_id", ""),
            }
            | (changes or {}).get(stage.name, {})
        )
    write_json(
        path,
        {
            "name": pipeline.name,
            "seed": pipeline.seed,
            "digest": sha256(" ".join(entry["digest"] for entry in entries))[:16],
            "seconds": round(sum(entry["seconds"] for entry in entries), 3),
            "command": command_line(),
            "stages": entries,
        },
    )


def _report(pipeline: Pipeline) -> None:
    from posttrain.report import print_result_table, write_report

    print_result_table(pipeline.output_dir)
    print(f"\nreport: {write_report(pipeline.output_dir)}", flush=True)


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
