"""A stage's settings, with those that differ from the defaults first."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from html import escape
from typing import Any

from posttrain.report.gather import StageReport, flatten


def settings_table(stage: StageReport) -> str:
    """All settings of a stage, folded away; those that are not the defaults come first and bold."""
    settings = dict(flatten(stage.config.get("config", {})))
    if not settings:
        return ""
    usual = defaults(str(stage.config.get("function", "")))
    changed = [name for name, value in settings.items() if name not in usual or usual[name] != value] if usual else []
    rest = [name for name in settings if name not in changed]
    lines = [_line(name, settings[name], usual.get(name), name in changed) for name in (*changed, *rest)]
    said = f"{len(changed)} of {len(settings)} settings differ from the defaults" if usual else f"{len(settings)} settings"
    head = "<tr><th>setting</th><th>value</th><th>default</th></tr>"
    table = f'<table class="settings"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<details><summary>{said}</summary><div class="scroll">{table}</div></details>'


def defaults(function: str) -> dict[str, Any]:
    """The defaults of the config that a stage function ("package.module:name") takes, by dotted name; {} if it can't be found."""
    place, _, name = function.partition(":")
    try:
        module = importlib.import_module(place)
        first = next(iter(inspect.signature(getattr(module, name)).parameters.values()))
        config = getattr(module, first.annotation) if isinstance(first.annotation, str) else first.annotation
    except (ImportError, AttributeError, StopIteration, TypeError, ValueError):
        return {}  # the code may have moved since; the report is about what ran
    return _defaults_of(config, "") if dataclasses.is_dataclass(config) else {}


def _defaults_of(config: Any, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = f"{where}{field.name}"
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)  # type: ignore[arg-type]
        if value is not dataclasses.MISSING:
            found |= dict(flatten(json.loads(json.dumps(value, default=str)), name))
    return found


def _line(name: str, value: Any, usual: Any, changed: bool) -> str:
    cells = [escape(name), escape(_text(value)), escape(_text(usual)) if changed else ""]
    return f'<tr class="{"changed" if changed else ""}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
