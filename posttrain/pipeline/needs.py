"""What stages ask of their models, held against the models' files, along the whole pipeline and before anything is loaded.

A stage that hasn't run yet has no files, but what it starts from has: training changes neither context nor tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.config import ModelConfig
from posttrain.models.described import CAUSAL, REWARD, Description, ModelUse, describe, same_tokens, template_problem
from posttrain.pipeline.pipeline import HANDLE, Stage


@dataclass(frozen=True)
class Origin:
    """The model whose files can be read now, with the template that its tokenizer will have, and the kind that it will be ("": its own)."""

    model: ModelConfig
    template: str = "auto"
    kind: str = ""


UNKNOWN = Origin(ModelConfig())


def uses_of(stage: Stage) -> list[ModelUse]:
    """What the stage's companion `uses(config)` says, or nothing."""
    uses = stage.companion("uses") if callable(stage.function) else None
    return list(uses(stage.config)) if uses else []


def origin(stages: Sequence[Stage], model: ModelConfig, template: str, outputs: Mapping[str, Path]) -> Origin:
    """Where a model's files are now: its own folder, or for the output of a stage that hasn't run, what that stage starts from."""
    match = HANDLE.fullmatch(model.path)
    if not match:
        return Origin(model, template) if model.path else UNKNOWN
    name, rest = match.groups()
    if name in outputs:
        return Origin(replace(model, path=f"{outputs[name]}{rest}"), template)
    place = next((n for n, stage in enumerate(stages) if stage.name == name and not rest), -1)
    making = next((use for use in uses_of(stages[place]) if use.becomes), None) if place >= 0 else None
    if making is None:
        return UNKNOWN
    start = origin(stages[:place], making.model, making.template if template == "auto" else template, outputs)
    return replace(start, kind=making.becomes) if start.model.path else UNKNOWN


def stand_ins(stages: Sequence[Stage], outputs: Mapping[str, Path]) -> dict[str, Path]:
    """For each stage that makes a model and hasn't run: the folder of the model that it starts from, where that is known."""
    starts = {stage.name: origin(stages, ModelConfig(path=f"@{stage.name}"), "auto", outputs).model.path for stage in stages}
    return {name: Path(path) for name, path in starts.items() if path and Path(path).is_dir()}


def model_problems(stages: Sequence[Stage], stage: Stage, outputs: Mapping[str, Path], unreadable: Collection[str] = ()) -> list[str]:
    """What is wrong between a stage and its models; nothing is said of those in `unreadable`, whose problems are known."""
    uses = uses_of(stage)
    origins = {use.field: origin(stages, use.model, use.template, outputs) for use in uses}
    known = {field for field, start in origins.items() if start.model.path and start.model.path not in unreadable}
    found: list[str] = []
    for use in uses:
        start = origins[use.field]
        try:
            if use.field in known:
                found += _problems(use, start, describe(start.model))
            # with the model unknown, the template's name can still be wrong; of two models with one template it is said once
            problem = template_problem(start.model if use.field in known else ModelConfig(), use.template, use.reads_text)
            found += [problem] if problem and problem not in found else []
            if use.like and {use.field, use.like} <= known:
                found += _other_tokens(use, next(other for other in uses if other.field == use.like), origins)
        except ValueError as error:
            found.append(f"{use.field}.path: {error}")
    return [f"{stage.name}.{text}" for text in found]


def _other_tokens(use: ModelUse, like: ModelUse, origins: Mapping[str, Origin]) -> list[str]:
    one, other = origins[use.field], origins[like.field]
    if same_tokens(one.model, one.template, other.model, other.template):
        return []
    return [
        f"{use.field}.path={use.model.path!r} has another tokenizer or chat template than {like.field}.path={like.model.path!r}; "
        "a model that started from the same SFT model works"
    ]


def _problems(use: ModelUse, start: Origin, described: Description) -> Iterator[str]:
    kind = start.kind or described.kind
    if kind == CAUSAL and use.kind == REWARD:
        yield f"{use.field}.path={use.model.path!r} has no scalar head, it is a causal LM; the output of a reward_model stage works"
    if kind == REWARD and use.kind == CAUSAL:
        yield f"{use.field}.path={use.model.path!r} is a reward model, without an LM head; the folder of a causal LM works"
    for terms in use.rows:
        if 0 < described.context < sum(terms.values()):
            first, *others = terms
            works = described.context - sum(terms[name] for name in others)
            advice = f"{first}={works} works" if works > 0 else f"{' + '.join(terms)} must be at most {described.context}"
            said = " + ".join(f"{name}={value}" for name, value in terms.items())
            yield f"{said} is beyond the context of {use.field}.path={use.model.path!r}, {described.context} tokens; {advice}"
