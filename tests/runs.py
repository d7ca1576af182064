"""Real stages on tiny models, run as the pipeline runs them; and stages that are killed in the middle, to go on later.

`python -m tests.runs posttrain.stages.sft:train CONFIG.json FOLDER` is a stage as a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from posttrain.config import CheckpointConfig, DataConfig, OptimizerConfig, from_json, gather_problems, resolve
from posttrain.engine import Engine, World
from posttrain.models.loading import CALIBRATION_FILE, Calibration
from posttrain.run import Run
from posttrain.tracking import Tracker
from tests.tiny import CHATML, tiny_config, tiny_tokenizer

# With eps far above any gradient AdamW is linear: a step moves weights by STEP times the gradient, so that weights tell gradients.
STEP = 0.1
LINEAR = OptimizerConfig(lr=STEP * 1e8, eps=1e8, max_grad_norm=0.0, schedule="constant")


class Killed(BaseException):
    """The end of a run without any farewell, as kill -9 leaves it."""


@dataclass(eq=False)
class MortalRun(Run):
    """A run that dies in step `dies_at`, after its updates and before its checkpoint."""

    dies_at: int = 0

    def log(self, metrics: Mapping[str, float], tokens: int = 0, optimizer_steps: int = 0) -> None:
        super().log(metrics, tokens, optimizer_steps)
        if self.step == self.dies_at:
            raise Killed


@contextmanager
def open_run(
    folder: Path, *, seed: int = 0, checkpoint: CheckpointConfig | None = None, world: World | None = None, dies_at: int = 0
) -> Iterator[Run]:
    """A run in `folder` with an engine of its own, seeded; the engine is closed after it."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(world)
    tracker = Tracker(folder, mode="disabled", is_main=engine.world.is_main)
    try:
        engine.seed(seed)
        yield MortalRun(
            name=folder.name,
            folder=folder,
            seed=seed,
            engine=engine,
            tracker=tracker,
            checkpoints=checkpoint or CheckpointConfig(),
            dies_at=dies_at,
        )
    finally:
        tracker.finish()
        engine.close()


def run_stage(stage: Callable, config: Any, folder: Path, *, seed: int = 0, world: World | None = None, dies_at: int = 0) -> Path:
    """What the pipeline does with a stage: check its config, run it. Returns what the stage returns, or `folder` when it was killed."""
    assert gather_problems(config) == []
    with open_run(folder, seed=seed, checkpoint=getattr(config, "checkpoint", None), world=world, dies_at=dies_at) as run:
        try:
            return stage(config, run)
        except Killed:
            return folder


def run_job(engine: Engine, *, stage: str, config: dict[str, Any], folder: str, seed: int = 0, deaths: Sequence[int] = (0,)) -> None:
    """For a pair of ranks: the stage in `folder`, killed at each of `deaths` and begun again; 0 lets it end."""
    function = resolve(stage)
    for dies_at in deaths:
        run_stage(function, from_json(config_class(stage), config), Path(folder), seed=seed, world=engine.world, dies_at=dies_at)


def config_class(stage: str) -> Any:
    """The config that a stage function takes: its module's only class whose name is the module's, in capitals."""
    module = sys.modules[resolve(stage).__module__]
    [found] = [cls for name, cls in vars(module).items() if name.lower() == f"{module.__name__.split('.')[-1].replace('_', '')}config"]
    return found


# --- what goes in


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> DataConfig:
    """A jsonl file of rows, as a config names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def reward_folder(folder: Path, *, seed: int = 3, calibration: Calibration | None = None, head: float = 1.0, **shape: Any) -> Path:
    """A reward model's folder: a random trunk, a random head of the given size, a calibration."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, **shape), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        model.score.weight.normal_(0, head)
    model.save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    if calibration:
        (folder / CALIBRATION_FILE).write_text(calibration.to_json())
    return folder


# --- what comes out


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The stage's logged numbers, one dict per step, without those that tell the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not tells_time(name)} for line in lines]


def tells_time(name: str) -> bool:
    return name in ("time", "tokens_per_second", "kl_seconds") or name.startswith("time/")


def logged(folder: Path, *names: str) -> list[dict[str, float]]:
    """What was logged under these names, or everything."""
    return [{name: value for name, value in line.items() if not names or name in names} for line in metrics(folder)]


def nearly(lines: list[dict[str, float]]) -> list:
    return [pytest.approx(line, rel=1e-5) for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder."""
    return load_file(folder / "model.safetensors")


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def gradient(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one LINEAR step says the gradient was."""
    return {name: (before[name] - after[name]) / STEP for name in before}


if __name__ == "__main__":
    name, config_file, place = sys.argv[1:]
    function = resolve(name)
    run_stage(function, from_json(config_class(name), json.loads(Path(config_file).read_text())), Path(place))
