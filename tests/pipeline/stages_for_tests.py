"""Stages that write files in a moment, and a recipe of them: what a pipeline does is seen without training a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, replace, runtime, runtime_factory, when
from posttrain.pipeline import Pipeline, main

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Writes its text and what it reads."""

    text: str = "a"
    """Some text."""
    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    sources: tuple[str, ...] = ()
    function: str = ""
    steps: int = 0
    interrupt_at: int = runtime(0)
    fail: bool = runtime(False)
    verbose: bool = runtime(False)
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    def problems(self) -> list[str]:
        return when((self.steps < 0, f"steps={self.steps} must not be negative; 0 works"))


class Total:
    """A running sum of the steps: the part of a stage that the future depends on."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def write(config: WriteConfig, run: Any) -> Path:
    """Count to `steps`, then write one file."""
    with (run.folder.parent / "calls.txt").open("a") as file:
        file.write(f"{run.name}\n")
    total = Total()
    run.resume({}, total=total)
    for step in run.steps(config.steps):
        total.value += step + 1
        if run.step == config.interrupt_at and os.environ.get("INTERRUPT"):
            os.kill(os.getpid(), getattr(signal, os.environ["INTERRUPT"]))
        run.log({"total": total.value}, tokens=10, optimizer_steps=1)
        run.samples([{"prompt": "p", "response": str(step)}])
        run.checkpoint()
    if config.fail and os.environ.get("FAIL"):
        raise RuntimeError("the stage fails here")
    output = run.folder / "model"
    output.mkdir(exist_ok=True)
    read = [Path(path).name for path in config.sources]
    (output / "rows.jsonl").write_text(json.dumps({"text": config.text, "read": read, "total": total.value}) + "\n")
    run.results({"total": total.value})
    return output


def preview(config: WriteConfig) -> str:
    return f"\x1b[32m{config.text}\x1b[0m of {Path(config.model.path).name}"


def plan(config: WriteConfig) -> dict[str, Any]:
    return {"rows": 1234567, "memory": "1 GB"}


def check(config: WriteConfig) -> list[str]:
    return when((config.text == "forbidden", "text='forbidden' is found wanting by a check that reads files"))


def smoke(config: WriteConfig) -> WriteConfig:
    return replace(config, steps=min(config.steps, 2))


@dataclass(frozen=True, kw_only=True)
class OtherConfig:
    """A second kind of stage in the same module: the companions above aren't its own."""

    model: str = ""
    nested: WriteConfig = field(default_factory=WriteConfig)


def other(config: OtherConfig, run: Any) -> Path:
    return write(replace(config.nested, text=config.model), run)


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """A stage that makes a model folder out of what it alone knows."""

    folder: str = ""


def copy_model(config: CopyConfig, run: Any) -> Path:
    shutil.copytree(config.folder, run.folder / "world" / "model", dirs_exist_ok=True)
    return run.folder / "world"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Three stages in a row, and one beside them."""

    output_dir: str = "runs/test"
    seed: int = 0
    first: WriteConfig = field(default_factory=WriteConfig)
    second: WriteConfig = field(default_factory=WriteConfig)
    third: WriteConfig = field(default_factory=WriteConfig)


def build(recipe: Recipe) -> Pipeline:
    pipeline = Pipeline("three", recipe.output_dir, seed=recipe.seed)
    first = pipeline.stage("first", write, recipe.first)
    second = pipeline.stage("second", write, replace(recipe.second, model=ModelConfig(path=first)))
    pipeline.stage("third", write, replace(recipe.third, sources=(second, f"{first}/rows.jsonl")))
    pipeline.stage("beside", write, WriteConfig(text="beside"))
    return pipeline


if __name__ == "__main__":
    main(build, {"small": Recipe(), "large": Recipe(first=WriteConfig(text="large"))})
