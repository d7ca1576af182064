"""The command line of a recipe: presets as subcommands, every field an option, and what to do with the pipeline.

python recipes/instructgpt.py tiny --plan
accelerate launch --config_file accelerate_configs/zero3.yaml recipes/instructgpt.py llama-8b --ppo.kl-coef 0.1
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from posttrain.config import when
from posttrain.pipeline.check import Refused
from posttrain.pipeline.pipeline import Pipeline
from posttrain.run import Stopped

Recipe = TypeVar("Recipe")

PIPED_WIDTH = 140  # of a plan that goes to a file or a pager


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do with the pipeline."""

    plan: bool = False
    """Print the stages, their configs, sizes and where they stand, then exit; no model is loaded."""
    preview: bool = False
    """Print what the data looks like, trained tokens in colour, then exit."""
    smoke: bool = False
    """Run everything in small (64 rows, 2 steps), in a folder of its own."""
    only: str = ""
    """Run this stage alone; the stages that it reads must have finished."""
    redo: tuple[str, ...] = ()
    """Run these stages anew, and everything that stands on them; the old folders are moved to redone/."""
    restart_optimizer: bool = False
    """Resume from a checkpoint's weights only, for instance on another number of devices."""
    hang_minutes: float = 30.0
    """End the run, and say where, when a rank has waited this long for the others (rank 0 may tokenise for hours); 0 waits for ever."""
    upload_artifacts: bool = False
    """Copy models and data to Weights & Biases; otherwise its artifacts only say where they are."""

    def problems(self) -> list[str]:
        return when((self.hang_minutes < 0, f"--hang-minutes {self.hang_minutes} must not be negative; 30 works, 0 waits for ever"))


def main(build: Callable[[Recipe], Pipeline], presets: Mapping[str, Recipe], args: Sequence[str] | None = None) -> None:
    """Read the command line, build the pipeline and run it, or show its plan.

    `presets` are instances of the recipe's dataclass by name. Whatever is wrong is printed as one list, exit code 2; a
    stage that was asked to stop ends with 130 (Ctrl-C) or 143 (SIGTERM).
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # "package.module:function" of the user's own, as with `python -m`
    recipe, options = read_command_line(presets, args)
    try:
        carry_out(build, recipe, options)
        part()
    except Stopped:
        part()
        raise
    except Refused as refused:
        if not refused.shown and os.environ.get("RANK", "0") == "0":
            print(refused, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def part() -> None:
    """Leave the process group together: a rank whose peer is gone at its own exit would abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def read_command_line(presets: Mapping[str, Recipe], args: Sequence[str] | None = None) -> tuple[Recipe, Options]:
    """The chosen preset with its fields overridden, and the options. Exits on unknown options, with what was meant."""
    choices = []
    for name, preset in presets.items():
        cls: Any = type(preset)
        clash = {f.name for f in fields(cls)} & {f.name for f in fields(Options)}
        assert not clash, f"{cls.__name__} has fields that are options of every pipeline: {sorted(clash)}"
        command = make_dataclass(
            cls.__name__,
            [
                # no name: --ppo.kl-coef, not --recipe.ppo.kl-coef
                ("recipe", Annotated[cls, tyro.conf.arg(name="")], field(default=preset)),
                ("options", Annotated[Options, tyro.conf.arg(name="")], field(default=Options())),
            ],
            frozen=True,
        )
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        choices.append(Annotated[command, tyro.conf.subcommand(name, description=summary)])
    # tyro makes subcommands of a union of two or more; the name of a single preset may be left out
    words = list(sys.argv[1:] if args is None else args)
    if len(choices) == 1 and words[:1] == list(presets):
        words = words[1:]
    kind: Any = functools.reduce(operator.or_, choices)
    chosen: Any = tyro.cli(kind, args=words, config=(tyro.conf.FlagCreatePairsOff,))
    return chosen.recipe, chosen.options


def carry_out(build: Callable[[Recipe], Pipeline], recipe: Recipe, options: Options) -> None:
    """Build the pipeline and do what the options say. Raises Refused."""
    if problems := options.problems():
        raise Refused("nothing was run:", problems)
    pipeline = build_checked(build, recipe)
    if options.smoke:
        pipeline = pipeline.smoke()
    if options.plan or options.preview:
        show(pipeline, options)
        return
    from posttrain.pipeline.runner import prepare, run_pipeline

    if os.environ.get("WORLD_SIZE", "1") == "1":
        prepare(pipeline, only=options.only, redo=options.redo)  # mistakes are told before torch is even imported
    run_pipeline(
        pipeline,
        only=options.only,
        redo=options.redo,
        restart_optimizer=options.restart_optimizer,
        hang_minutes=options.hang_minutes,
        upload_artifacts=options.upload_artifacts,
    )


def build_checked(build: Callable[[Recipe], Pipeline], recipe: Recipe) -> Pipeline:
    """The recipe's pipeline. A recipe may have `problems()` of its own, and building may raise ValueError."""
    problems: list[str] = getattr(recipe, "problems", list)()
    if problems:
        raise Refused(f"{len(problems)} problems in {type(recipe).__name__}; nothing was run:", problems)
    try:
        return build(recipe)
    except ValueError as error:
        raise Refused(f"{type(recipe).__name__} cannot be built:", [str(error)]) from error


def show(pipeline: Pipeline, options: Options) -> None:
    """Print the plan or the preview on rank 0."""
    from rich.console import Console

    from posttrain.pipeline.runner import prepare
    from posttrain.pipeline.show import show_plan, show_preview

    standings = prepare(pipeline, only=options.only, redo=options.redo)
    if os.environ.get("RANK", "0") != "0":
        return
    piped = not sys.stdout.isatty()
    console = Console(soft_wrap=piped, width=PIPED_WIDTH if piped and "COLUMNS" not in os.environ else None)
    if options.plan:
        show_plan(console, pipeline, standings)
    if options.preview:
        show_preview(console, pipeline, standings)
