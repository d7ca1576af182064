"""A whole pipeline in a pair of ranks."""

from __future__ import annotations

from pathlib import Path

from posttrain.config import replace
from posttrain.engine import Engine
from posttrain.pipeline.check import Refused
from posttrain.pipeline.runner import run_pipeline
from tests.pipeline.stages_for_tests import Recipe, WriteConfig, build


def run_twice_then_change(engine: Engine, *, folder: str) -> dict[str, object]:
    """Run, run again, run something else; what this rank saw."""
    recipe = Recipe(output_dir=folder, first=WriteConfig(steps=3))
    calls = Path(folder) / "calls.txt"
    counts = []
    for _ in range(2):
        run_pipeline(build(recipe))
        engine.world.barrier("looking at the calls")
        counts.append(len(calls.read_text().split()))
    try:
        run_pipeline(build(replace(recipe, first=WriteConfig(steps=4))))
    except Refused as refused:
        return {"counts": counts, "refused": str(refused)}
    return {"counts": counts, "refused": ""}
