"""Declaring a pipeline: named stages, and handles ("@sft") that stand for the output of a stage in another one's config.

Declaring runs nothing and raises nothing: what is wrong with a declaration is reported with everything else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

HANDLE = re.compile(r"@([\w-]+)((?:/[\w.-]+)*)")
STAGE_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One declared stage: `function(config, run) -> Path` of its output."""

    name: str
    function: Callable[..., Path]
    config: Any

    @property
    def handles(self) -> dict[str, str]:
        """{dotted field: name of the stage whose output it takes}."""
        found = {where: HANDLE.fullmatch(text) for where, text in nodes(self.config) if isinstance(text, str)}
        return {where: match.group(1) for where, match in found.items() if match}

    def companion(self, name: str) -> Callable[..., Any] | None:
        """The module-level `name(config)` beside the stage's function, where there is one for this kind of config.

        A module with several stages says by the annotation of its first parameter whose companion it is.
        """
        function = getattr(sys.modules[self.function.__module__], name, None)
        if not callable(function):
            return None
        hint = next(iter(getattr(function, "__annotations__", {}).values()), type(self.config))
        hint = hint if isinstance(hint, str) else hint.__name__
        return function if hint in {cls.__name__ for cls in type(self.config).__mro__} else None


class Pipeline:
    """Stages that run one after another, each in `output_dir/<its name>`.

    `seed` is the seed of every stage and part of their identity.
    """

    def __init__(self, name: str, output_dir: str | Path, seed: int = 0) -> None:
        self.name = name
        self.output_dir = Path(output_dir)
        self.seed = seed
        self.stages: list[Stage] = []

    def stage(self, name: str, function: Callable[..., Path], config: Any) -> str:
        """Declare a stage. Returns its handle, "@name", for the configs of later stages; "@name/file" is a file in its output.

        `function` is a module-level function `(config, run) -> Path`; `config` a frozen dataclass. Its module may have
        companions that take the config: `uses -> list[ModelUse]` (what is asked of its models), `check -> list[str]` (problems
        in the files that it names), `plan -> dict` (numbers for --plan), `preview -> str` (for --preview and preview.txt) and
        `smoke -> config` (the stage in small). In the config that they see, handles of finished stages are paths, the others
        are still handles; for `check` and `plan`, the model that a stage starts from stands in for the one that it will make.
        """
        self.stages.append(Stage(name=name, function=function, config=config))
        return f"@{name}"

    def folder(self, stage: str) -> Path:
        return self.output_dir / stage

    def standing_on(self, names: set[str]) -> set[str]:
        """The stages `names` and every stage that takes their output, directly or not."""
        found = set(names)
        for stage in self.stages:  # in declared order, so that one pass is enough
            if found & set(stage.handles.values()):
                found.add(stage.name)
        return found

    def smoke(self) -> Pipeline:
        """The same pipeline in small, in a folder of its own."""
        small = Pipeline(self.name, f"{self.output_dir}-smoke", self.seed)
        for stage in self.stages:
            shrink = stage.companion("smoke")
            small.stage(stage.name, stage.function, shrink(stage.config) if shrink else stage.config)
        return small


def nodes(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every text and every config inside a config, as (dotted field, value)."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from nodes(item, f"{name}[{i}]")
    elif is_dataclass(value) and not isinstance(value, type):
        yield name, value
        for f in fields(value):
            yield from nodes(getattr(value, f.name), f"{name}.{f.name}" if name else f.name)


def with_outputs(config: Any, outputs: Mapping[str, Path]) -> Any:
    """The config with every handle of a stage in `outputs` replaced by the path of that stage's output."""
    if isinstance(config, str):
        match = HANDLE.fullmatch(config)
        return f"{outputs[match.group(1)]}{match.group(2)}" if match and match.group(1) in outputs else config
    if isinstance(config, tuple):
        return tuple(with_outputs(item, outputs) for item in config)
    if is_dataclass(config) and not isinstance(config, type):
        changed = {f.name: with_outputs(getattr(config, f.name), outputs) for f in fields(config)}
        return replace(config, **changed)
    return config
