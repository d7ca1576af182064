"""One picture of a pipeline: the models' gold scores, and how PPO came there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.report.charts import SMOOTH_FROM, smooth
from posttrain.report.gather import StageReport, gather, interval

COLORS = ("#a9abb0", "#3568b8", "#d1762c", "#3f8f5f")
INK, SOFT, LINE = "#23262b", "#6b7078", "#e6e3de"


def headline_picture(folder: Path | str, path: Path | str) -> Path:
    """Draw gold scores with 95 % intervals, and score and KL over the iterations of the last stage that has both, as a PNG.

    Raises ValueError when the pipeline has no gold scores yet.
    """
    from matplotlib.figure import Figure

    report = gather(folder)
    rows = [(name, value) for name, entry in report.evaluation.get("gold_score", {}).items() if (value := interval(entry))]
    if not rows:
        raise ValueError(f"{folder} has no gold_score in any results.json; run its evaluation stage first")
    tuned = next((stage for stage in reversed(report.stages) if {"score", "kl"} <= stage.series().keys()), None)
    figure = Figure(figsize=(10, 3.1) if tuned else (4.4, 3.1), dpi=160, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 3 if tuned else 1, squeeze=False)[0]
    _bars(axes[0], rows)
    if tuned:
        _curve(axes[1], tuned, "score", "reward model's score")
        _curve(axes[2], tuned, "kl", "KL to the SFT model, nats per response")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _bars(axis: Any, rows: list[tuple[str, tuple[float, float, float]]]) -> None:
    names = [name for name, _ in rows]
    means = [value[0] for _, value in rows]
    errors = [[mean - value[1] for mean, (_, value) in zip(means, rows)], [value[2] - mean for mean, (_, value) in zip(means, rows)]]
    axis.bar(names, means, yerr=errors, color=[COLORS[i % len(COLORS)] for i in range(len(rows))], width=0.62, capsize=4, ecolor=INK)
    for place, (_, (mean, _, high)) in enumerate(rows):
        axis.annotate(f"{mean:.2f}", (place, high), (0, 5), textcoords="offset points", ha="center", color=INK, fontsize=10)
    axis.set_ylim(top=max(value[2] for _, value in rows) * 1.15)
    _calm(axis, "gold score, held-out prompts")


def _curve(axis: Any, stage: StageReport, name: str, title: str) -> None:
    points = stage.series()[name]
    many = len(points) >= SMOOTH_FROM
    if many:
        axis.plot([step for step, _ in points], [value for _, value in points], color=COLORS[2], alpha=0.3, linewidth=1)
    axis.plot([step for step, _ in points], [value for _, value in (smooth(points) if many else points)], color=COLORS[2], linewidth=2)
    axis.set_xlabel(f"{stage.name} iteration", color=SOFT, fontsize=9)
    _calm(axis, title)


def _calm(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, color=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.tick_params(colors=SOFT, length=0, labelsize=9)
    axis.grid(axis="y", color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
