"""Where the time of `make demo` goes: wall time by stage and by phase, which add up.

    python benchmarks/end_to_end.py                  # recipes/instructgpt.py tiny, as `make demo` runs it
    python benchmarks/end_to_end.py --quick          # the same pipeline with 64 rows and 2 steps of each stage
    python benchmarks/end_to_end.py --json FILE      # numbers, and beside them a table (.md) and a picture (.png)

Phases are what every run books its time under (`time/...` in its metrics, `phases` in stage.json), on rank 0: loading (files,
tokens and models, up to the first step), sampling, rewards (waiting for reward functions), scoring (passes without gradient),
update, evaluation (on held-out rows, while training), saving (what a checkpoint holds training up for), exporting, other.
Start-up is what passes before the first stage begins: launcher, imports and checks; between lies what no stage counts as
its own: opening folders and trackers, digests, the report, the exit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START_UP, BETWEEN = "start-up", "between stages"
PHASES = ("loading", "sampling", "rewards", "scoring", "update", "evaluation", "saving", "exporting", "other")
COLOURS = ("#9aa5b1", "#3b6fb6", "#7a5aa8", "#5aa1d6", "#d08a3e", "#6aa84f", "#c0504d", "#e0b040", "#d9d9d9")


def run_demo(folder: Path, quick: bool, threads: int, accelerate_config: str) -> tuple[float, float]:
    """Run the pipeline in `folder`: seconds until its first stage began, and until its process had ended."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate_config}.yaml"]
    command = [*launch, "recipes/instructgpt.py", "tiny", "--output-dir", str(folder / "demo"), *(["--smoke"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began, first = time.perf_counter(), 0.0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if not first and line.rstrip().endswith(" begins"):
                first = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the demo ended with code {process.returncode}; what it said stands above")
    return first, time.perf_counter() - began


def measured(output: Path, start_up: float, wall: float) -> dict[str, Any]:
    """{"seconds", "stages": {stage: {phase: seconds}}, "phases": {phase: seconds}}; stages and phases each add up to the seconds."""
    order = [stage["name"] for stage in json.loads((output / "pipeline.json").read_text())["stages"]]
    stages = {name: json.loads((output / name / "stage.json").read_text())["phases"] for name in order}
    inside = sum(sum(phases.values()) for phases in stages.values())
    stages = {START_UP: {"other": start_up}, **stages, BETWEEN: {"other": wall - start_up - inside}}
    phases = {phase: sum(stage.get(phase, 0.0) for name, stage in stages.items() if name in order) for phase in PHASES}
    phases |= {START_UP: start_up, BETWEEN: stages[BETWEEN]["other"]}
    unknown = {phase for stage in stages.values() for phase in stage} - set(PHASES)
    assert not unknown, f"phases that this table doesn't know: {unknown}"
    return {"seconds": wall, "stages": stages, "phases": phases}


def table(found: Mapping[str, Any]) -> str:
    """Stages down, phases across, in seconds, as a markdown table."""
    shown = [phase for phase in PHASES if any(stage.get(phase, 0.0) >= 0.05 for stage in found["stages"].values())]
    lines = [f"| Stage | {' | '.join(shown)} | seconds | share |", "|---" * (len(shown) + 3) + "|"]
    totals = {phase: sum(stage.get(phase, 0.0) for stage in found["stages"].values()) for phase in shown}
    for name, stage in (*found["stages"].items(), ("**all**", totals)):
        seconds = sum(stage.values())
        cells = [f"{stage[phase]:.1f}" if stage.get(phase, 0.0) >= 0.05 else "" for phase in shown]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {seconds:.1f} | {seconds / found['seconds']:.0%} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """One bar per stage, cut into its phases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = found["stages"]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.32 * len(stages)), layout="constrained")
    left = [0.0] * len(stages)
    for phase, colour in zip(PHASES, COLOURS):
        widths = [stage.get(phase, 0.0) for stage in stages.values()]
        if sum(widths) < 0.05:
            continue
        axis.barh(range(len(stages)), widths, left=left, label=phase, color=colour)
        left = [before + width for before, width in zip(left, widths)]
    for place, seconds in enumerate(left):
        axis.text(seconds, place, f" {seconds:.0f} s", va="center", fontsize=7)
    axis.set_yticks(range(len(stages)), [name.replace("_", " ") for name in stages], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds, of {found['seconds']:.0f}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 rows and 2 steps of each stage: minutes")
    parser.add_argument("--threads", type=int, default=2, help="as `make demo` has it")
    parser.add_argument("--accelerate-config", default="cpu", help="a file of accelerate_configs/, without .yaml")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_up, wall = run_demo(Path(folder), args.quick, args.threads, args.accelerate_config)
        found = measured(Path(folder) / ("demo-smoke" if args.quick else "demo"), start_up, wall)
    print(f"\n{table(found)}")
    if args.json:
        args.json.write_text(json.dumps({**found, "machine": {"threads": args.threads, "quick": args.quick}}, indent=2) + "\n")
        args.json.with_suffix(".md").write_text(f"{table(found)}\n")
        draw(found, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
