"""A simulated labeler: ranks the responses to each prompt by a score function, with honest mistakes.

    score(row, response) -> float       row is the prompt row with all its columns, larger is better

Writes three files of comparison rows: train.jsonl, validation.jsonl and validation_clean.jsonl. Validation prompts are
split off by the prompt's digest, so that no prompt is in both. The labeler misjudges a response with probability `noise`:
it then gets the score of another response to the same prompt. validation_clean has the same rows without mistakes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig, resolve, when

if TYPE_CHECKING:
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """What is labelled, by which function, and how reliably."""

    responses: DataConfig = DataConfig(path="")
    """Prompt rows with a list of `responses`, as `posttrain.rollout.generate` writes them."""
    score: str = ""
    """The labeler's taste: "package.module:function", called as score(row, response) -> float."""
    noise: float = 0.0
    """Probability that a response is misjudged."""
    validation_fraction: float = 0.1
    """Share of the prompts that is held out."""

    def problems(self) -> list[str]:
        return when(
            (not self.responses.path, "responses.path is empty; '@stage' of a generating stage works"),
            (not self.score, "score is empty; 'package.module:function' works"),
            (not 0 <= self.noise <= 1, f"noise={self.noise} must lie in [0, 1]; 0 never errs"),
            (not 0 <= self.validation_fraction < 1, f"validation_fraction={self.validation_fraction} must lie in [0, 1); 0.1 works"),
        )


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Competition ranks: 0 is best, equal scores share a rank."""
    return [sum(other > score for other in scores) for score in scores]


def misjudge(scores: Sequence[float], noise: float, generator: random.Random) -> list[float]:
    """Each score, or with probability `noise` that of another response."""
    others = [[*scores[:i], *scores[i + 1 :]] for i in range(len(scores))]
    return [generator.choice(rest) if rest and generator.random() < noise else score for score, rest in zip(scores, others)]


def is_validation(prompt: Any, fraction: float) -> bool:
    """Whether a prompt is held out: a pure function of its text."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def label(config: LabelConfig, run: Run) -> Path:
    """Rank every row's responses and write the comparison rows. Returns the folder that holds the three files."""
    from posttrain.data.sources import read_source

    folder = run.folder / "comparisons"
    if run.engine.world.is_main:
        write_comparisons(config, list(read_source(config.responses)), folder, run)
    run.engine.world.barrier("labelling")
    return folder


def write_comparisons(config: LabelConfig, rows: Sequence[dict[str, Any]], folder: Path, run: Run) -> None:
    score = resolve(config.score)
    generator = random.Random(run.seed)
    files: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "validation_clean": []}
    changed = pairs = 0
    for row in rows:
        clean = [float(score(row, response)) for response in row["responses"]]
        noisy = misjudge(clean, config.noise, generator)
        comparison = {"prompt": row["prompt"], "responses": row["responses"], "ranks": ranks_of(noisy), "scores": clean}
        if is_validation(row["prompt"], config.validation_fraction):
            files["validation"].append(comparison)
            files["validation_clean"].append({**comparison, "ranks": ranks_of(clean)})
        else:
            files["train"].append(comparison)
        order = [(i, j) for i in range(len(clean)) for j in range(i)]
        pairs += sum(clean[i] != clean[j] for i, j in order)
        changed += sum((clean[i] - clean[j]) * (noisy[i] - noisy[j]) < 0 for i, j in order)
    folder.mkdir(parents=True, exist_ok=True)
    for name, comparisons in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in comparisons), encoding="utf-8")
    mean = sum(sum(c["scores"]) / len(c["scores"]) for part in ("train", "validation") for c in files[part]) / max(1, len(rows))
    run.results({"labels": {"rows": len(rows), "mean_score": mean, "pairs": pairs, "reversed_pairs": changed}})
    run.say(f"{len(rows)} prompts ranked, mean score {mean:.3f}; {changed} of {pairs} pairs reversed by mistake")


def smoke(config: LabelConfig) -> LabelConfig:
    return replace(config, responses=replace(config.responses, limit=64))
