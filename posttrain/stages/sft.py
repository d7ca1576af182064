"""Supervised fine-tuning: next-token prediction on the assistant's tokens, or on plain text.

    minimise  - sum over trainable tokens of log pi(token | what came before) / number of trainable tokens

The denominator is that of the whole optimizer step: a token weighs the same in every micro-batch, on every rank
(InstructGPT, arXiv 2203.02155, section 3.5; the same loop on `text` rows is pretraining). Training ends after `epochs`,
or earlier when the held-out loss has not fallen for `patience` evaluations; the best evaluated weights are kept.

Text rows may be mixed in, `ptx_coef` times their mean loss in the same step, so that what was learnt before isn't forgotten.

What differs from the paper: InstructGPT picks its SFT model by reward-model score after 16 epochs; here the held-out
loss decides, and overfitting is left to the user's choice of `epochs`.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/sft.py smollm2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, runtime, runtime_factory, when
from posttrain.models.described import CAUSAL, ModelUse

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
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
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates once per epoch."""
    patience: int = 0
    """Stop after this many evaluations without a lower held-out loss; 0 trains to the end."""
    pretraining: DataConfig = DataConfig(path="")
    """Text rows mixed in, so that what was learnt before isn't forgotten; needed unless `ptx_coef` is 0."""
    ptx_coef: float = 0.0
    """Weight of their loss, mean against mean; 0 is off (InstructGPT mixes 10 % into the model that PPO starts from, C.3)."""
    ptx_batch_size: int = 32
    """Text windows per optimizer step."""
    ptx_window: int = 1024
    """Tokens per text window."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    neftune_alpha: float = 0.0
    """Uniform noise on the embeddings (NEFTune, arXiv 2310.05914: 5); 0 is off."""
    dropout: float = 0.0
    """Residual dropout of families that have it (InstructGPT: 0.2)."""
    max_dropped_fraction: float = 0.1
    """Largest share of rows that may be dropped for their length or for having nothing to train on."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    def problems(self) -> list[str]:
        return when(
            (not self.model.path, "model.path is empty; a model folder, a hub id or '@stage' works"),
            (not self.data.path, "data.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
            (self.row_type not in ("demonstration", "text"), f"row_type={self.row_type!r} must be demonstration or text"),
            (self.epochs <= 0, f"epochs={self.epochs} must be positive; 1 works"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1; 32 works"),
            (self.max_length < 2, f"max_length={self.max_length} must be at least 2; 2048 works"),
            (self.evaluate_every < 0, f"evaluate_every={self.evaluate_every} must not be negative; 0 is once per epoch"),
            (self.patience < 0, f"patience={self.patience} must not be negative; 0 trains to the end"),
            (
                self.patience > 0 and not self.validation.path,
                f"patience={self.patience} needs validation.path: without held-out rows nothing tells when to stop; patience=0 works",
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
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (
                self.max_tokens_per_micro_batch < max(self.max_length, self.ptx_window if self.ptx_coef else 0),
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} is below max_length={self.max_length} or ptx_window",
            ),
        )


class BestLoss:
    """The lowest held-out loss so far, and how many evaluations ago it was seen."""

    def __init__(self) -> None:
        self.lowest = float("inf")
        self.since = 0

    def update(self, loss: float) -> None:
        self.since = 0 if loss < self.lowest else self.since + 1
        self.lowest = min(self.lowest, loss)

    def is_over(self, patience: int) -> bool:
        return 0 < patience <= self.since

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def load_rows(config: SFTConfig, data: DataConfig, chat: Chat, run: Run) -> list[Tree]:
    """One root per conversation, or per text window."""
    from posttrain.inputs import load_demonstrations, load_texts

    if config.row_type == "text":
        return load_texts(run, data, chat, config.max_length)
    return load_demonstrations(run, data, chat, config.max_length, config.max_dropped_fraction)


def train(config: SFTConfig, run: Run) -> Path:
    """Train on the rows and export the best model. Returns its folder."""
    from posttrain.data.chat import Chat
    from posttrain.data.sampler import Sampler
    from posttrain.engine.tally import report
    from posttrain.inputs import check_fits, load_texts
    from posttrain.models.loading import load_causal_lm
    from posttrain.models.model import set_dropout
    from posttrain.ops import nll

    engine, budget = run.engine, config.max_tokens_per_micro_batch
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    trees = load_rows(config, config.data, chat, run)
    held_out = load_rows(config, config.validation, chat, run) if config.validation.path else []
    windows = load_texts(run, config.pretraining, chat, config.ptx_window) if config.ptx_coef else []
    total_steps = max(1, round(config.epochs * len(trees) / config.batch_size))
    evaluate_every = config.evaluate_every or max(1, len(trees) // config.batch_size)

    model = load_causal_lm(config.model, chat.tokenizer, seed=run.seed)
    check_fits(model, max(tree.num_tokens for tree in (*trees, *held_out, *windows)), "rows")
    model.neftune_alpha = config.neftune_alpha
    set_dropout(model, config.dropout)
    policy = engine.train(model, config.optimizer, total_steps, name="policy")
    order = Sampler(len(trees), config.batch_size, run.seed)
    text_order = Sampler(max(1, len(windows)), config.ptx_batch_size, run.seed + 1)
    best = BestLoss()
    run.resume({"policy": policy}, order=order, texts=text_order, best=best)

    # a run that had stopped early, and was killed before its export, has no step left to do
    for step in run.steps(run.step if best.is_over(config.patience) else total_steps):
        batch = engine.pack([trees[i] for i in order.take()], budget)
        text = engine.pack([windows[i] for i in text_order.take()] if windows else [], budget)
        with engine.update(policy) as update:
            for micro in batch.micro_batches():
                update.backward(nll(policy.logprobs(micro), micro.trainable), over=batch.num_tokens)
            for micro in text.micro_batches():
                loss = nll(policy.logprobs(micro), micro.trainable)
                update.backward(loss, over=text.num_tokens, weight=config.ptx_coef, label="ptx")
        metrics = {"loss": math.nan, **report(update), "epoch": order.epoch}
        if "ptx_loss" in metrics:
            metrics["ptx_loss"] /= config.ptx_coef

        score = None
        if held_out and ((step + 1) % evaluate_every == 0 or step + 1 == total_steps):
            metrics["validation_loss"] = held_out_loss(policy, held_out, run, budget)
            best.update(metrics["validation_loss"])
            score = -metrics["validation_loss"]
        run.log(metrics, tokens=batch.size + text.size, optimizer_steps=int(update.stepped))
        run.checkpoint(score=score)
        if best.is_over(config.patience):
            run.say(f"the held-out loss has not fallen for {best.since} evaluations; its best was {best.lowest:.4f}")
            break

    if held_out:
        run.restore_best({"policy": policy})
    return engine.export(policy, run.folder / "model", chat.tokenizer)


def held_out_loss(policy: Any, trees: Sequence[Tree], run: Run, max_tokens: int) -> float:
    """Mean -log pi per trainable token over held-out rows."""
    from posttrain.engine.inference import infer

    pace = run.pace(sum(tree.num_tokens for tree in trees) // run.engine.world.size)
    logprobs = infer(run.engine, policy, trees, ("logprobs",), max_tokens, progress=pace)["logprobs"]
    return -sum(float(x.sum(dtype=x.double().dtype)) for x in logprobs) / sum(len(x) for x in logprobs)


def uses(config: SFTConfig) -> list[ModelUse]:
    """What is asked of the model, for the check before anything is loaded."""
    windows = ({"ptx_window": config.ptx_window},) if config.ptx_coef else ()
    return [
        ModelUse(
            field="model",
            model=config.model,
            template=config.template,
            rows=({"max_length": config.max_length}, *windows),
            reads_text=config.row_type == "text" or config.ptx_coef > 0,
            becomes=CAUSAL,
        )
    ]


def check(config: SFTConfig) -> list[str]:
    """Conversations that are too long, more of them than may be dropped."""
    from posttrain.estimates import row_problems

    sources = (config.data, config.validation) if config.row_type == "demonstration" else ()
    return [text for data in sources for text in row_problems(data, config.row_type, config)]


def plan(config: SFTConfig) -> dict[str, Any]:
    """Rows, tokens, steps, memory and time."""
    from posttrain.estimates import rows_and_tokens, training_cost

    size = rows_and_tokens(config.data, config.row_type, config.model.path)
    if config.row_type == "text" and "tokens" in size:
        size["optimizer steps"] = max(1, round(config.epochs * size["tokens"] / config.max_length / config.batch_size))
    elif "tokens" in size:
        size["optimizer steps"] = max(1, round(config.epochs * size["rows"] / config.batch_size))
    return size | training_cost(config.model.path, size["tokens"] * config.epochs if "tokens" in size else None)


def preview(config: SFTConfig) -> str:
    """The first rows as the model will read them, trained text in green."""
    from posttrain.data.chat import Chat
    from posttrain.data.rows import read_rows

    if config.model.path.startswith("@"):
        return f"shown when {config.model.path} has run: its tokenizer and template are needed"
    rows = read_rows(replace(config.data, limit=3), config.row_type)
    if config.row_type == "text":
        return "\n\n".join(f"\x1b[32m{row['text']}\x1b[0m" for row in rows)
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    pieces = [chat.pieces(row["messages"], row.get("tools")) for row in rows]
    return "\n\n".join("".join(f"\x1b[32m{p.text}\x1b[0m" if p.trained else p.text for p in parts) for parts in pieces)


def smoke(config: SFTConfig) -> SFTConfig:
    """The same stage on 64 rows, for two optimizer steps."""
    rows = replace(config.data, limit=64)
    validation = replace(config.validation, limit=64)
    texts = replace(config.pretraining, limit=64)
    return replace(config, data=rows, validation=validation, pretraining=texts, batch_size=32, epochs=1.0, patience=0)
