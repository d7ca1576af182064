"""report.json and report.html: one file without anything outside it, made to be looked at rather than read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from posttrain.progress import TELLING, duration, number
from posttrain.report import charts
from posttrain.report.gather import PipelineReport, StageReport, gather, interval
from posttrain.report.settings import settings_table
from posttrain.report.tables import samples_block, training_samples

TOGETHER = {"loss": ("validation_loss",), "pair_accuracy": ("validation_accuracy",)}  # drawn in one chart
NOT_DRAWN = ("tokens", "epoch")
FIRST_CURVES = 9


def write_report(folder: Path | str) -> Path:
    """Write report.json and report.html from what the stages of a pipeline folder left behind; returns the page's path.

    Stages that have not run, and files that are missing, leave gaps. Raises ValueError when there is no pipeline.json.
    """
    report = gather(folder)
    _replace(report.folder / "report.json", json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    return _replace(report.folder / "report.html", page(report))


def page(report: PipelineReport) -> str:
    """The whole page as text."""
    done = sum(stage.status == "done" for stage in report.stages)
    facts = {
        "stages": f"{done} of {len(report.stages)} done",
        "time": duration(report.seconds),
        "seed": report.head.get("seed", 0),
        "digest": str(report.head.get("digest", ""))[:12],
    }
    parts = [
        f"<h1>{escape(report.name)}</h1>{_facts(facts)}",
        _headline(report),
        "<h2>Lineage</h2>" + _lineage(report) if report.stages else "",
        "<h2>Stages</h2>",
        *(_stage(stage) for stage in report.stages),
        samples_block(report.stages),
        f"<footer>Made from the files in <code>{escape(report.folder.name)}</code>; the same numbers are in report.json.</footer>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(report.name)}</title>'
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    body = f"<main>{''.join(parts)}</main><script>{script}</script>"
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}</body></html>\n'


def _headline(report: PipelineReport) -> str:
    """Model against model: the gold score with its intervals, the differences, the other numbers."""
    found = report.evaluation
    rows = [(name, value) for name, entry in found.get("gold_score", {}).items() if (value := interval(entry))]
    cards = []
    if rows:
        table = _model_table(found, [name for name, _ in rows])
        top = 1.0 if all(value[1] >= 0 and value[2] <= 1 for _, value in rows) else None
        title = "<h3>Gold score</h3><small>mean over held-out prompts, with 95 % intervals</small>"
        cards.append(f'<div class="card">{title}{charts.intervals(rows, high=top)}<div class="scroll">{table}</div></div>')
    judged = found.get("reward_model", {})
    if isinstance(judged.get("pair_accuracy"), int | float):
        cards.append(_judge_card(judged))
    return f"<h2>What came out</h2>{''.join(cards)}" if cards else ""


def _model_table(found: Mapping[str, Any], names: Sequence[str]) -> str:
    loss, spans = found.get("pretraining_loss", {}), found.get("pretraining_loss_ci95", {})
    differences = reversed(found.get("gold_difference", {}).items())  # the first of a model is to the one before it
    changes = {key.split(" - ")[0]: (key, value) for key, value in differences}
    head = "<tr><th>model</th><th class=num>gold score</th><th class=num>95 % interval</th><th class=num>prompts</th>"
    head += "<th class=wide>against the one before</th><th class=num>pretraining loss</th></tr>"
    lines = []
    for name in names:
        entry = found["gold_score"][name]
        mean, low, high = interval(entry) or (0.0, 0.0, 0.0)
        span = f" <small>{spans[name][0]:.3f} – {spans[name][1]:.3f}</small>" if name in spans else ""
        text_loss = f"{loss[name]:.4f}{span}" if isinstance(loss.get(name), int | float) else "–"
        cells = [f"<td class=num><b>{mean:.3f}</b></td>", f"<td class=num>{low:.3f} – {high:.3f}</td>"]
        cells += [
            f"<td class=num>{escape(str(entry.get('n', '')))}</td>",
            f"<td class=wide>{_difference(*changes.get(name, ('', None)))}</td>",
        ]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}<td class=num>{text_loss}</td></tr>")
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _difference(name: str, entry: Any) -> str:
    value = interval(entry)
    if value is None:
        return '<span class="soft">–</span>'
    mean, low, high = value
    tone = "up" if low > 0 else "down" if high < 0 else "soft"
    return f'<span class="{tone}">{mean:+.3f}</span> <small>[{low:+.3f}, {high:+.3f}]  {escape(name)}</small>'


def _judge_card(judged: Mapping[str, Any]) -> str:
    """How far the reward model can be trusted."""
    rows = [("clean labels" if "noisy" in judged else "pair accuracy", _accuracy(judged))]
    if isinstance(judged.get("noisy"), Mapping):
        rows.append(("noisy labels", _accuracy(judged["noisy"])))
    length = judged.get("spearman_score_length")
    facts = {"held-out pairs": number(judged.get("n_pairs"))}
    facts |= {"score against length (Spearman)": f"{length:.2f}"} if isinstance(length, int | float) else {}
    facts |= {f"{name.replace('_', ' ')} scores": number(value) for name, value in judged.get("degenerate_probes", {}).items()}
    note = "<h3>Reward model</h3><small>share of held-out pairs in the right order; the line is chance</small>"
    drawing = charts.intervals(rows, low=0.0, high=1.0, mark=0.5, first_tone=1)
    return f'<div class="card">{note}{drawing}{_facts(facts)}</div>'


def _accuracy(entry: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = entry.get("ci95") or (entry["pair_accuracy"],) * 2
    return float(entry["pair_accuracy"]), float(low), float(high)


def _lineage(report: PipelineReport) -> str:
    nodes = []
    for stage in report.stages:
        seconds = stage.to_json()["seconds"]
        note = f"{stage.status}, {duration(seconds)}" if seconds else stage.status
        nodes.append((stage.name, note, stage.status, stage.inputs))
    return f'<div class="card">{charts.lineage(nodes)}</div>'


def _stage(stage: StageReport) -> str:
    """One block: what it cost, its curves, what it said, its settings."""
    numbers = stage.to_json()
    facts = {
        "time": duration(numbers["seconds"] or 0),
        "optimizer steps": f"{numbers['optimizer_steps'] or 0:,}",
        "tokens": number(numbers["tokens"] or 0),
        "tokens/s": number(numbers["tokens_per_second"] or 0),
        "peak memory": f"{(numbers['peak_memory_bytes'] or 0) / 2**30:.2f} GiB",
        "digest": str(numbers["digest"])[:12],
    }
    title = f"<h3>{escape(stage.name)}</h3><code class=soft>{escape(str(stage.entry.get('function', '')))}</code>"
    head = f'<div class="head">{title}<span class="pill {escape(stage.status)}">{escape(stage.status)}</span></div>'
    notes = stage.record.get("notes") or []
    lost = sorted({name for line in stage.metrics for name in line.get("nonfinite", [])})
    notes = [*notes, *([f"not finite at some step: {', '.join(lost)}"] if lost else [])]
    said = f"<ul class=notes>{''.join(f'<li>{escape(str(note))}</li>' for note in notes)}</ul>" if notes else ""
    body = f"{head}{_facts(facts) if stage.record else ''}{said}{_curves(stage)}{training_samples(stage)}{settings_table(stage)}"
    return f'<div class="card" id="stage-{escape(stage.name)}">{body}</div>'


def _curves(stage: StageReport) -> str:
    series = {name: points for name, points in stage.series().items() if name not in NOT_DRAWN}
    taken: set[str] = set()
    drawn = []
    rank = {name: place for place, name in enumerate(TELLING)}
    for name in sorted(series, key=lambda name: rank.get(name, len(rank))):
        if name in taken:
            continue
        beside = [other for other in TOGETHER.get(name, ()) if other in series]
        taken |= {name, *beside}
        drawn.append(charts.curves(name.replace("_", " "), {key: series[key] for key in (name, *beside)}))
    if not drawn:
        return ""
    more = drawn[FIRST_CURVES:]
    rest = f"<details><summary>{len(more)} more curves</summary><div class=curves>{''.join(more)}</div></details>" if more else ""
    return f'<div class="curves">{"".join(drawn[:FIRST_CURVES])}</div>{rest}'


def _facts(facts: Mapping[str, Any]) -> str:
    return (
        f'<div class="facts">{"".join(f"<span>{escape(name)} <b>{escape(str(value))}</b></span>" for name, value in facts.items())}</div>'
    )


def _replace(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
