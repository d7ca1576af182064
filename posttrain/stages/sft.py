"""Supervised fine-tuning: next-token prediction on the assistant's tokens, or on plain text.

    minimise  - sum over trainable tokens of log pi(token | what came before) / number of trainable tokens

The denominator is that of the whole optimizer step: a token weighs the same in every micro-batch, on every rank
(InstructGPT, arXiv 2203.02155, section 3.5; the same loop on `text` rows is pretraining). Training ends after `epochs`,
or earlier when `patience` evaluations have not bettered the best; the best evaluated weights are kept. What is best, the
held-out loss says or, with `selection`, the score of responses to held-out prompts: InstructGPT picks its SFT model by
reward-model score, as the held-out loss overfits after one epoch of 16; LIMA (arXiv 2305.11206) by reading responses.

Text rows may be mixed in, `ptx_coef` times their mean loss in the same step, so that what was learnt before isn't forgotten.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/sft.py smollm2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, runtime, runtime_factory, when
from posttrain.data.curriculum import OrderConfig
from posttrain.models.described import CAUSAL, REWARD, ModelUse
from posttrain.rollout.selection import SCORE, SelectionConfig

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.forecast import Work
    from posttrain.packing import Tree
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Core fields first; run-time fields (budgets, intervals) don't change the result."""

    model: ModelConfig = ModelConfig()
    """The model to start from."""
    data: DataConfig = DataConfig(path="")
    """Rows to learn: demonstrations, or texts when `row_type` says so."""
    row_type: str = "demonstration"
    """demonstration (the assistant's tokens are trained) or text (every token is)."""
    validation: DataConfig = DataConfig(path="")
    """Held-out rows of the same type; "" trains without a held-out loss."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """InstructGPT: 9.65e-6 at 1.3B, cosine to 10 %, no warm-up (appendix C.1)."""
    epochs: float = 1.0
    """Passes over the rows; parts of one are allowed."""
    batch_size: int = 32
    """Conversations, or text windows, per optimizer step over all devices (InstructGPT: 32)."""
    max_length: int = 2048
    """Longest conversation in tokens (longer ones are cut by whole turns), or the length of a text window."""
    order: OrderConfig = OrderConfig()
    """In which order conversations are seen; by chance unless it says otherwise."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end of each epoch."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0 trains to the end."""
    selection: SelectionConfig = SelectionConfig()
    """Choose the weights by what they answer to held-out prompts, instead of by the held-out loss."""
    pretraining: DataConfig = DataConfig(path="")
    """Text rows mixed in, so that what was learnt before isn't forgotten; needed unless `ptx_coef` is 0."""
    ptx_coef: float = 0.0
    """Weight of their loss, mean against mean; 0 is off (InstructGPT mixes 10 % into the model that PPO starts from, C.3)."""
    ptx_batch_size: int = 32
    """Text windows per optimizer step."""
    ptx_window: int = 1024
    """Tokens per text window."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), chatml, lima (an end-of-turn token), alpaca, raw (contents only), or a jinja file."""
    neftune_alpha: float = 0.0
    """Uniform noise on the embeddings (NEFTune, arXiv 2310.05914: 5); 0 is off."""
    dropout: float = 0.0
    """Rate of the dropout layers that a family brings along (embedding, residual, MLP; most families have none)."""
    residual_dropout: tuple[float, float] = (0.0, 0.0)
    """On what each layer adds to the residual stream, in any family, from the bottom layer linearly to the top one
    (LIMA: 0.0 0.3, small models 0.0 0.2; InstructGPT: 0.2 0.2)."""
    max_dropped_fraction: float = 0.1
    """Largest share of rows that may be dropped for their length or for having nothing to train on."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    def problems(self) -> list[str]:
        judged = self.selection.max_prompt_length + self.selection.sampling.max_new_tokens
        return when(
            (not self.model.path, "model.path is empty; a model folder, a hub id or '@stage' works"),
            (not self.data.path, "data.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
            (self.row_type not in ("demonstration", "text"), f"row_type={self.row_type!r} must be demonstration or text"),
            (self.epochs <= 0, f"epochs={self.epochs} must be positive; 1 works"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1; 32 works"),
            (self.max_length < 2, f"max_length={self.max_length} must be at least 2; 2048 works"),
            (
                bool(self.order.columns) and self.row_type == "text",
                f"order.by={self.order.by!r} and order.interleave={self.order.interleave!r} order conversations, and windows of text "
                "have no columns; '' works",
            ),
            (self.evaluate_every < 0, f"evaluate_every={self.evaluate_every} must not be negative; 0 is once per epoch"),
            (self.patience < 0, f"patience={self.patience} must not be negative; 0 trains to the end"),
            (
                self.patience > 0 and not self.validation.path and not self.selection.is_on,
                f"patience={self.patience} needs validation.path: without held-out rows nothing tells when to stop; patience=0 works",
            ),
            (
                self.selection.is_on and self.selection.first_epoch > self.epochs,
                f"selection.first_epoch={self.selection.first_epoch} is after the last of epochs={self.epochs}; 0 is the beginning",
            ),
            (self.ptx_coef < 0, f"ptx_coef={self.ptx_coef} must not be negative; 0 is off"),
            (
                self.ptx_coef > 0 and not self.pretraining.path,
                f"ptx_coef={self.ptx_coef} needs text rows in pretraining.path; ptx_coef=0 mixes nothing in",
            ),
            (self.ptx_batch_size < 1, f"ptx_batch_size={self.ptx_batch_size} must be at least 1; 32 works"),
            (self.ptx_window < 2, f"ptx_window={self.ptx_window} must be at least 2; 1024 works"),
            (self.neftune_alpha < 0, f"neftune_alpha={self.neftune_alpha} must not be negative; 0 is off, 5 is the paper's"),
            (not 0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1); 0 works"),
            (
                not all(0 <= rate < 1 for rate in self.residual_dropout),
                f"residual_dropout={self.residual_dropout} must lie in [0, 1); (0.0, 0.3) is LIMA's",
            ),
            (
                self.dropout > 0 and any(self.residual_dropout),
                f"dropout={self.dropout} and residual_dropout={self.residual_dropout} would both drop from one stream; dropout=0 works",
            ),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (
                self.max_tokens_per_micro_batch < max(self.max_length, self.ptx_window if self.ptx_coef else 0),
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} is below max_length={self.max_length} or ptx_window",
            ),
            (
                bool(self.selection.reward_model.path) and self.max_tokens_per_micro_batch < judged,
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} is below selection.max_prompt_length + "
                f"selection.sampling.max_new_tokens, which the reward model reads; {judged} works",
            ),
        )


class Evaluations:
    """What was measured at each evaluation, and which of those that may be chosen is best: by `measure`, where higher is better."""

    def __init__(self, measure: str) -> None:
        self.measure = measure
        self.seen: list[dict[str, float]] = []  # step, epoch, may_be_chosen and what was measured

    def add(self, found: dict[str, float], step: int, epoch: float, may_be_chosen: bool) -> float | None:
        """Note an evaluation; returns how good it is, None where it may not be chosen."""
        self.seen.append({"step": step, "epoch": epoch, "may_be_chosen": may_be_chosen, **found})
        return self._height(self.seen[-1]) if may_be_chosen else None

    def _height(self, one: dict[str, float]) -> float:
        return one[self.measure] if self.measure == SCORE else -one[self.measure]

    @property
    def candidates(self) -> list[dict[str, float]]:
        return [one for one in self.seen if one["may_be_chosen"]]

    @property
    def best(self) -> dict[str, float]:
        """The first of the best ones; there must be one."""
        return max(self.candidates, key=self._height)

    @property
    def since(self) -> int:
        """How many evaluations have not bettered the best one."""
        return sum(one["step"] > self.best["step"] for one in self.candidates) if self.candidates else 0

    def is_over(self, patience: int) -> bool:
        return 0 < patience <= self.since

    def said(self) -> str:
        """What was chosen, and what the held-out loss would have chosen."""
        best = self.best
        text = f"chose the weights of epoch {best['epoch']:.2f}, step {best['step']}, by {self.measure} {best[self.measure]:.4g}"
        losses = [one for one in self.seen if "validation_loss" in one]
        if not losses:
            return text
        other = min(losses, key=lambda one: one["validation_loss"])
        return f"{text}; validation_loss {other['validation_loss']:.4g} was lowest in epoch {other['epoch']:.2f}, step {other['step']}"

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def evaluated_steps(config: SFTConfig, rows: int, total_steps: int) -> dict[int, bool]:
    """{step: whether its weights may be chosen} of the steps, from 1, after which the model is evaluated: every `evaluate_every`, or
    those nearest to the end of an epoch, and the last one. The bounds of `selection` mean the steps nearest to them.

    Raises ValueError when none may be chosen.
    """
    per_epoch = rows / config.batch_size
    spacing = config.evaluate_every or per_epoch
    steps = {max(1, round(n * spacing)) for n in range(1, 1 + int(total_steps / spacing))} | {total_steps}
    first, last = config.selection.first_epoch, config.selection.last_epoch
    bound = max(1, round(last * per_epoch)) if last else total_steps
    found = {step: round(first * per_epoch) <= step <= bound for step in sorted(steps)}
    if not any(found.values()):
        raise ValueError(
            f"selection.first_epoch={first} to selection.last_epoch={last}: none of the evaluations, at the steps {list(found)}, is in "
            f"between, as an epoch has {per_epoch:.1f} steps; evaluate_every=0 evaluates at the end of each epoch"
        )
    return found


def load_rows(config: SFTConfig, data: DataConfig, chat: Chat, run: Run) -> tuple[list[Tree], list[dict[str, Any]]]:
    """One root per conversation, or per text window, and the columns of each one's row that its place in the order depends on."""
    from posttrain.inputs import load_demonstrations_with, load_texts

    if config.row_type == "text":
        windows = load_texts(run, data, chat, config.max_length)
        return windows, [{} for _ in windows]
    return load_demonstrations_with(run, data, chat, config.max_length, config.max_dropped_fraction, config.order.columns)


def train(config: SFTConfig, run: Run) -> Path:
    """Train on the rows and export the best model. Returns its folder."""
    from posttrain.data.chat import Chat
    from posttrain.data.curriculum import order_sampler
    from posttrain.data.sampler import Sampler
    from posttrain.engine.tally import report
    from posttrain.inputs import check_fits, load_texts
    from posttrain.models.dropout import set_residual_dropout
    from posttrain.models.loading import load_causal_lm
    from posttrain.models.model import set_dropout
    from posttrain.rollout.selection import Examiner

    engine, budget = run.engine, config.max_tokens_per_micro_batch
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    trees, columns = load_rows(config, config.data, chat, run)
    held_out = load_rows(config, config.validation, chat, run)[0] if config.validation.path else []
    windows = load_texts(run, config.pretraining, chat, config.ptx_window) if config.ptx_coef else []
    total_steps = max(1, round(config.epochs * len(trees) / config.batch_size))
    evaluated = evaluated_steps(config, len(trees), total_steps)
    order = order_sampler(config.order, columns, config.batch_size, run.seed)

    model = load_causal_lm(config.model, chat.tokenizer, new_tokens=chat.added_ids, seed=run.seed)
    check_fits(model, max(tree.num_tokens for tree in (*trees, *held_out, *windows)), "rows")
    model.neftune_alpha = config.neftune_alpha
    set_dropout(model, config.dropout)
    set_residual_dropout(model.hf, *config.residual_dropout)
    policy = engine.train(model, config.optimizer, total_steps, name="policy")
    text_order = Sampler(max(1, len(windows)), config.ptx_batch_size, run.seed + 1)
    examiner = Examiner(config.selection, run, chat, budget) if config.selection.is_on else None
    if examiner:
        check_fits(model, examiner.longest, "held-out prompts with their responses")
    evaluations = Evaluations(SCORE if examiner else "validation_loss")
    run.resume({"policy": policy}, order=order, texts=text_order, evaluations=evaluations)

    # a run that had stopped early, and was killed before its export, has no step left to do
    for step in run.steps(run.step if evaluations.is_over(config.patience) else total_steps):
        batch = engine.pack([trees[i] for i in order.take()], budget)
        text = engine.pack([windows[i] for i in text_order.take()] if windows else [], budget)
        with engine.update(policy) as update:
            for micro in batch.micro_batches():
                update.backward(policy.nll(micro), over=batch.num_tokens)
            for micro in text.micro_batches():
                update.backward(policy.nll(micro), over=text.num_tokens, weight=config.ptx_coef, label="ptx")
        metrics = {"loss": math.nan, **report(update), "epoch": order.epoch}
        if "ptx_loss" in metrics:
            metrics["ptx_loss"] /= config.ptx_coef

        score = None
        if step + 1 in evaluated and (held_out or examiner):
            found = {"validation_loss": held_out_loss(policy, held_out, run, budget)} if held_out else {}
            found |= examiner(policy) if examiner else {}
            metrics |= found
            score = evaluations.add(found, step + 1, order.epoch, evaluated[step + 1])
        run.log(metrics, tokens=batch.size + text.size, optimizer_steps=int(update.stepped))
        run.checkpoint(score=score)
        if evaluations.is_over(config.patience):
            measure = evaluations.measure
            run.say(f"{measure} was best at {evaluations.best[measure]:.4f} and {evaluations.since} evaluations have not bettered it")
            break

    if evaluations.seen:
        run.restore_best({"policy": policy})
    if examiner:
        run.results({"selection": {run.name: {"by": SCORE, "evaluations": evaluations.seen, "chosen": evaluations.best}}})
        run.warn(evaluations.said())
    return engine.export(policy, run.folder / "model", chat.tokenizer)


def held_out_loss(policy: Any, trees: Sequence[Tree], run: Run, max_tokens: int) -> float:
    """Mean -log pi per trainable token over held-out rows."""
    from posttrain.engine.inference import infer

    pace = run.pace(sum(tree.num_tokens for tree in trees) // run.engine.world.size)
    with run.timed("evaluation"):
        logprobs = infer(run.engine, policy, trees, ("logprobs",), max_tokens, progress=pace)["logprobs"]
    return -sum(float(x.sum(dtype=x.double().dtype)) for x in logprobs) / sum(len(x) for x in logprobs)


def uses(config: SFTConfig) -> list[ModelUse]:
    """What is asked of the models, for the check before anything is loaded."""
    selection = config.selection
    answers = {
        "selection.max_prompt_length": selection.max_prompt_length,
        "selection.sampling.max_new_tokens": selection.sampling.max_new_tokens,
    }
    optional = [({"ptx_window": config.ptx_window}, config.ptx_coef > 0), (answers, selection.is_on)]
    policy = ModelUse(
        field="model",
        model=config.model,
        template=config.template,
        rows=({"max_length": config.max_length}, *(rows for rows, are_read in optional if are_read)),
        reads_text=config.row_type == "text" or config.ptx_coef > 0,
        becomes=CAUSAL,
    )
    if not selection.reward_model.path:
        return [policy]
    return [policy, ModelUse(field="selection.reward_model", model=selection.reward_model, rows=(answers,), kind=REWARD)]


def check(config: SFTConfig) -> list[str]:
    """Conversations and prompts that are too long, more of them than may be dropped."""
    from posttrain.estimates import prompt_problems, row_problems

    sources = (config.data, config.validation) if config.row_type == "demonstration" else ()
    found = [text for data in sources for text in row_problems(data, config.row_type, config)]
    return found + [f"selection.{text}" for text in prompt_problems(config.selection, config.model)]


def plan(config: SFTConfig) -> dict[str, Any]:
    """Rows, tokens, steps, memory and time."""
    from posttrain.estimates import rows_and_tokens
    from posttrain.forecast import forecast

    size = rows_and_tokens(config.data, config.row_type, config.model.path)
    if "tokens" in size:
        rows = size["tokens"] / config.max_length if config.row_type == "text" else size["rows"]
        size["optimizer steps"] = max(1, round(config.epochs * rows / config.batch_size))
    asked = rows_and_tokens(config.selection.prompts, "prompt", config.model.path) if config.selection.is_on else {}
    if "tokens" in asked:
        size["responses at each evaluation"] = asked["rows"] * config.selection.samples_per_prompt
    return size | forecast(workload(config, size))


def workload(config: SFTConfig, size: Mapping[str, Any]) -> Work:
    """What passes through the model, of rows as `plan` counts them."""
    from posttrain.costs import tree
    from posttrain.forecast import Role, Work, trees_of

    steps, mixed_in = size.get("optimizer steps", 0), config.ptx_batch_size if config.ptx_coef else 0
    seen = trees_of(size, config.epochs, window=config.max_length if config.row_type == "text" else 0, head="summed")
    seen += tree(config.ptx_window, summed=config.ptx_window) * (mixed_in * steps)
    return Work(
        roles=(Role(name="policy", model=config.model, terms=1 + bool(mixed_in), trained=seen),),
        row=config.max_tokens_per_micro_batch,
        longest=max(config.max_length, config.ptx_window if mixed_in else 0),
        update=seen.count / max(1, steps),
        copies_checkpoints=config.checkpoint.background,
    )


def preview(config: SFTConfig) -> str:
    """The first rows as the model will read them, trained text in green."""
    from posttrain.data.chat import Chat
    from posttrain.data.rows import read_rows
    from posttrain.data.shown import shown

    if config.model.path.startswith("@"):
        return f"shown when {config.model.path} has run: its tokenizer and template are needed"
    chat = None if config.row_type == "text" else Chat.load(config.model.path, config.template, revision=config.model.revision)
    return "\n\n".join(shown(row, config.row_type, chat) for row in read_rows(replace(config.data, limit=3), config.row_type)[:3])


def smoke(config: SFTConfig) -> SFTConfig:
    """The same stage on 64 rows, for two optimizer steps; any evaluation may be chosen."""
    rows = replace(config.data, limit=64)
    validation = replace(config.validation, limit=64)
    texts = replace(config.pretraining, limit=64)
    selection = replace(
        config.selection,
        prompts=replace(config.selection.prompts, limit=64),
        sampling=replace(config.selection.sampling, max_new_tokens=min(16, config.selection.sampling.max_new_tokens)),
        first_epoch=0.0,
        last_epoch=0.0,
    )
    config = replace(config, data=rows, validation=validation, pretraining=texts, selection=selection)
    return replace(config, batch_size=32, epochs=1.0, patience=0)
