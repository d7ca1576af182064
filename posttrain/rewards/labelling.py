"""A simulated labeler: ranks the responses to each prompt by a score function, with honest mistakes.

    score(row, response) -> float       row is the prompt row with all its columns, larger is better

Writes three files: train.jsonl, validation.jsonl and validation_clean.jsonl. Validation prompts are split off by the
prompt's digest, so that no prompt is in both. The labeler misjudges a response with probability `noise`: it then gets the
score of another response to the same prompt. validation_clean judges the same prompts without mistakes.

The rows are comparisons, one per prompt with all its responses, or judgements, one per response: desirable or not.
Comparisons in which all responses are equally good say nothing and are left out, counted.
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
from posttrain.ops import ordered_pairs

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
    kind: str = "comparison"
    """comparison (responses are ranked) or judgement (each is called desirable or not, for KTO)."""
    desirable_from: float = 0.5
    """Judgements call a response with this score, or a higher one, desirable."""
    noise: float = 0.0
    """Probability that a response is misjudged."""
    validation_fraction: float = 0.1
    """Share of the prompts that is held out."""

    def problems(self) -> list[str]:
        return when(
            (not self.responses.path, "responses.path is empty; '@stage' of a generating stage works"),
            (not self.score, "score is empty; 'package.module:function' works"),
            (self.kind not in ("comparison", "judgement"), f"kind={self.kind!r} must be comparison or judgement"),
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
    """Judge every row's responses and write the rows. Returns the folder that holds the three files."""
    from posttrain.data.sources import read_source

    folder = run.folder / f"{config.kind}s"
    # what goes wrong on rank 0 is raised by every rank, or the others would wait for it
    run.engine.world.first_says(lambda: write_labels(config, list(read_source(config.responses)), folder, run), "labelling")
    return folder


def write_labels(config: LabelConfig, rows: Sequence[dict[str, Any]], folder: Path, run: Run) -> None:
    score = resolve(config.score)
    generator = random.Random(run.seed)
    files: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "validation_clean": []}
    total, tied, pairs, reversed_pairs = 0.0, 0, 0, 0
    for row in rows:
        clean = [float(score(row, response)) for response in row["responses"]]
        noisy = misjudge(clean, config.noise, generator)
        total += sum(clean) / len(clean)
        pairs += len(ordered_pairs(ranks_of(clean)))
        reversed_pairs += sum(noisy[i] < noisy[j] for i, j in ordered_pairs(ranks_of(clean)))
        held_out = is_validation(row["prompt"], config.validation_fraction)
        files["validation" if held_out else "train"] += labelled(row, noisy, clean, config)
        files["validation_clean"] += labelled(row, clean, clean, config) if held_out else []
        tied += len(set(noisy)) == 1
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        if written:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    counts = {name: len(written) for name, written in files.items()}
    mean = total / len(rows)
    run.results({"labels": {**counts, "tied": tied, "mean_score": mean, "pairs": pairs, "reversed_pairs": reversed_pairs}})
    run.say(f"{len(rows)} prompts, mean score {mean:.3f}, {tied} all tied; {reversed_pairs} of {pairs} pairs reversed by mistake")


def labelled(row: dict[str, Any], scores: Sequence[float], clean: Sequence[float], config: LabelConfig) -> list[dict[str, Any]]:
    """The rows that one prompt's responses give when they are judged by `scores`; their true scores stand beside."""
    if config.kind == "comparison":
        return [{**row, "ranks": ranks_of(scores), "scores": list(clean)}] if len(set(scores)) > 1 else []
    rest = {name: value for name, value in row.items() if name not in ("responses", "finished")}
    return [
        {**rest, "response": response, "desirable": score >= config.desirable_from, "score": true}
        for response, score, true in zip(row["responses"], scores, clean)
    ]


def length(row: dict[str, Any], response: str) -> float:
    """The number of characters of a response: a labeler who can always tell responses apart."""
    return float(len(response))


def smoke(config: LabelConfig) -> LabelConfig:
    """Judge by length: what an untrained model answers is all equally wrong."""
    return replace(config, score=f"{__name__}:length", desirable_from=20.0, validation_fraction=0.5)
