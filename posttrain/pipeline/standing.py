"""Where each stage of a pipeline stands: finished, to be resumed, new, changed since, or waiting for another one.

A stage's folder holds config.json from its first second (what it is made of) and stage.json once it has finished.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.pipeline.check import Refused
from posttrain.pipeline.identity import UNKNOWN, Contents, differences, digest, made_of
from posttrain.pipeline.pipeline import Pipeline, Stage

DONE, RESUMES, NEW, CHANGED, WAITS = "done", "resumes", "new", "changed", "waits"


@dataclass
class Standing:
    """One stage's state, the digest of what it is made of, and its record when it has finished."""

    state: str
    digest: str = ""
    made_of: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    step: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def survey(pipeline: Pipeline, redone: Iterable[str] = ()) -> dict[str, Standing]:
    """Where every stage stands. Stages in `redone` count as new. Reads only; raises Refused when an input can't be identified."""
    contents = Contents(pipeline.output_dir / ".digests.json")
    outputs: dict[str, str] = {}
    result: dict[str, Standing] = {}
    problems: list[str] = []
    for stage in pipeline.stages:
        try:
            standing = _standing(pipeline, stage, outputs, contents, stage.name in redone)
        except ValueError as error:
            problems.append(f"{stage.name}: {error}")
            continue
        result[stage.name] = standing
        if standing.state == DONE:
            # the content as it is now, so that an output edited by hand shows in what stands on it
            outputs[stage.name] = contents.digest(output_path(pipeline, stage.name, standing.record))
    if problems:
        raise Refused("some inputs cannot be read:", problems)
    if pipeline.output_dir.exists():
        contents.save()
    return result


def _standing(pipeline: Pipeline, stage: Stage, outputs: dict[str, str], contents: Contents, redo: bool) -> Standing:
    making = made_of(stage, pipeline.seed, outputs, contents)
    known = UNKNOWN not in making.values()
    standing = Standing(state=NEW if known else WAITS, digest=digest(making) if known else "", made_of=making)
    started = read_json(pipeline.folder(stage.name) / "config.json")
    if redo or not started:
        return standing
    standing.differences = differences(started["made_of"], making)
    if standing.differences:
        standing.state = CHANGED
    elif known:
        record = read_json(pipeline.folder(stage.name) / "stage.json")
        finished = bool(record) and output_path(pipeline, stage.name, record).exists()
        standing.state, standing.record = (DONE, record) if finished else (RESUMES, {})
        standing.step = 0 if finished else newest_step(pipeline.folder(stage.name))
    return standing


def output_path(pipeline: Pipeline, stage: str, record: dict[str, Any]) -> Path:
    """The output of a finished stage. Records hold relative paths, so that a folder of runs can be moved."""
    return Path(os.path.normpath(pipeline.folder(stage) / record["output"]))


def outputs_of(pipeline: Pipeline, standings: dict[str, Standing]) -> dict[str, Path]:
    """The outputs of the stages that have finished."""
    return {name: output_path(pipeline, name, s.record) for name, s in standings.items() if s.state == DONE}


def outputs_on_disk(pipeline: Pipeline, redone: Iterable[str]) -> dict[str, Path]:
    """The outputs of the stages that finished at some time, whatever they were made of, for checks that read files."""
    records = {stage.name: read_json(pipeline.folder(stage.name) / "stage.json") for stage in pipeline.stages if stage.name not in redone}
    paths = {name: output_path(pipeline, name, record) for name, record in records.items() if record}
    return {name: path for name, path in paths.items() if path.exists()}


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by name, or 0."""
    steps = [re.fullmatch(r"step_(\d+)", path.name) for path in (folder / "checkpoints").glob("step_*")]
    return max((int(match.group(1)) for match in steps if match), default=0)


def refuse_changed(standings: dict[str, Standing], names: Iterable[str]) -> None:
    """Raise Refused with the difference of every stage that is not what it was."""
    changed = {name: standings[name] for name in names if standings[name].state == CHANGED}
    if changed:
        raise Refused(
            "these stages were run with something else; --redo STAGE runs one anew, and what stands on it (the old folder is kept aside):",
            [f"{name}\n" + "\n".join(standing.differences) for name, standing in changed.items()],
        )


def set_aside(pipeline: Pipeline, names: Iterable[str]) -> list[Path]:
    """Move the folders of stages out of the way, into output_dir/redone/. Returns where they are now."""
    moved = []
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in names:
        folder = pipeline.folder(name)
        if folder.exists():
            target = pipeline.output_dir / "redone" / f"{name}-{stamp}"
            while target.exists():
                target = target.with_name(f"{target.name}+")
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            moved.append(target)
    return moved
