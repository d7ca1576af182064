"""A reward model from ranked responses: Bradley-Terry over all pairs of K responses to one prompt.

    minimise  - 1/C(K,2) * sum over pairs (w better than l) of log sigmoid(r(x, y_w) - r(x, y_l))

K ranked responses of a prompt are one batch element: the prompt is computed once, each response once, and all C(K,2)
pairs read the same K scores (InstructGPT, arXiv 2203.02155, section 3.5, equation 1). Ties give no pair. The score is a
linear head on the hidden state of the last response token. After training a bias is set so that demonstrations score 0
on average (section 3.5), and the mean and spread of held-out scores are stored beside the model.

What differs from the paper: a margin and a centring term are there, both off; the model starts from the SFT model.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/instructgpt.py tiny --only reward_model
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, runtime, runtime_factory, when
from posttrain.models.described import REWARD, ModelUse
from posttrain.ops import ordered_pairs
from posttrain.packing import Forest, Tree, segment
from posttrain.preferences import longest_row

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.forecast import Work
    from posttrain.models.loading import Calibration
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Core fields first; run-time fields (budgets, intervals) don't change the result."""

    model: ModelConfig = ModelConfig()
    """The model to start from, usually the SFT model; its LM head is replaced by a fresh scalar head."""
    data: DataConfig = DataConfig(path="")
    """Comparison rows: a prompt and K = 2..9 responses, best first, or with `ranks`."""
    validation: DataConfig = DataConfig(path="")
    """Held-out comparison rows; "" measures nothing."""
    demonstrations: DataConfig = DataConfig(path="")
    """Demonstration rows whose final replies shall score 0 on average; "" leaves the bias at 0."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=9e-6)
    """InstructGPT: 9e-6, cosine to 10 % (appendix C.2)."""
    epochs: float = 1.0
    """Passes over the rows (InstructGPT: one, more overfits)."""
    batch_size: int = 64
    """Prompts, each with all its responses, per optimizer step over all devices (InstructGPT: 64)."""
    max_length: int = 2048
    """Longest prompt with one response, in tokens; rows with a longer one are dropped whole."""
    margin: float = 0.0
    """Score difference asked for per rank of difference (Llama 2, arXiv 2307.09288, equation 2); 0 is off."""
    centering_coef: float = 0.0
    """Weight of (r_w + r_l)^2 in a pair's loss, which keeps scores around 0 (arXiv 2312.09244: 0.01); 0 is off."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end only."""
    max_dropped_fraction: float = 0.1
    """Largest share of rows that may be dropped for their length or for having only ties."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device; a prompt with all its responses must fit."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    def problems(self) -> list[str]:
        return when(
            (not self.model.path, "model.path is empty; a model folder, a hub id or '@stage' works"),
            (not self.data.path, "data.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
            (self.epochs <= 0, f"epochs={self.epochs} must be positive; 1 works"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1; 64 works"),
            (self.max_length < 2, f"max_length={self.max_length} must be at least 2; 2048 works"),
            (
                self.model.adapter.dropout > 0,
                f"model.adapter.dropout={self.model.adapter.dropout} is noise in every score; 0 works, SFT alone trains with it",
            ),
            (self.margin < 0, f"margin={self.margin} must not be negative; 0 is off"),
            (self.centering_coef < 0, f"centering_coef={self.centering_coef} must not be negative; 0 is off"),
            (self.evaluate_every < 0, f"evaluate_every={self.evaluate_every} must not be negative; 0 is at the end only"),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (
                self.max_tokens_per_micro_batch < self.max_length,
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} must be at least max_length={self.max_length}",
            ),
        )


def bradley_terry(scores: Tensor, ranks: Sequence[int], margin: float = 0.0, centering_coef: float = 0.0) -> Tensor:
    """Loss () of one batch element from the `scores (K,)` of its ranked responses (InstructGPT equation 1).

    The sum over the non-tied pairs divided by C(K,2). With `margin` m the winner must lead by m per rank; with
    `centering_coef` c each pair adds c (r_w + r_l)^2.
    """
    pairs = ordered_pairs(ranks)
    if not pairs:
        return scores.sum() * 0
    winners, losers = (torch.tensor(side, device=scores.device) for side in zip(*pairs))
    distance = torch.tensor([float(ranks[loser] - ranks[winner]) for winner, loser in pairs], device=scores.device)
    won, lost = scores[winners], scores[losers]
    loss = -F.logsigmoid(won - lost - margin * distance) + centering_coef * (won + lost) ** 2
    return loss.sum() / (len(scores) * (len(scores) - 1) / 2)


def ranking_loss(scores: Tensor, micro: Forest, margin: float = 0.0, centering_coef: float = 0.0) -> Tensor:
    """Sum of the elements' losses in a packed row: `scores (B,)` -> ()."""
    losses = [bradley_terry(scores[part], tree.ranks, margin, centering_coef) for tree, part in micro.groups]
    return torch.stack(losses).sum() if losses else scores.sum() * 0


def train(config: RewardModelConfig, run: Run) -> Path:
    """Train on the comparisons, calibrate on held-out rows, export. Returns the model folder."""
    from posttrain.data.chat import Chat
    from posttrain.data.sampler import Sampler
    from posttrain.engine.tally import report
    from posttrain.evaluation.pairs import correct_pairs, pair_accuracy
    from posttrain.inputs import check_budget, check_fits, load_comparisons
    from posttrain.models.loading import CALIBRATION_FILE, load_scalar_model

    engine = run.engine
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    limits = (chat, config.max_length, config.max_dropped_fraction)
    trees = load_comparisons(run, config.data, *limits)
    held_out = load_comparisons(run, config.validation, *limits) if config.validation.path else []
    total_steps = max(1, round(config.epochs * len(trees) / config.batch_size))

    check_budget([*trees, *held_out], config.max_tokens_per_micro_batch, "comparison")
    module = load_scalar_model(config.model, fresh_head=True, seed=run.seed, tokenizer=chat.tokenizer)
    check_fits(module, longest_row([*trees, *held_out]), "comparisons")
    model = engine.train(module, config.optimizer, total_steps, name="reward_model")
    sampler = Sampler(len(trees), config.batch_size, run.seed)
    run.resume({"reward_model": model}, sampler=sampler)

    for step in run.steps(total_steps):
        batch = engine.pack([trees[i] for i in sampler.take()], config.max_tokens_per_micro_batch)
        seen = torch.zeros(2)
        with engine.update(model) as update:
            for micro in batch.micro_batches():
                scores = model.scores(micro)
                update.backward(ranking_loss(scores, micro, config.margin, config.centering_coef), over=batch.num_trees)
                for tree, part in micro.groups:
                    seen += torch.tensor(correct_pairs(scores[part], tree.ranks))
        correct, pairs = engine.world.sum(seen.to(engine.world.device)).tolist()
        metrics = {"loss": math.nan, "pair_accuracy": correct / pairs, **report(update)}
        if held_out and config.evaluate_every and (step + 1) % config.evaluate_every == 0:
            metrics["validation_accuracy"] = pair_accuracy(score_trees(model, held_out, run, config), held_out, run.seed)["pair_accuracy"]
        run.log(metrics, tokens=batch.size, optimizer_steps=1)
        run.checkpoint()

    calibration = calibrate(model, held_out or trees, chat, config, run)
    return engine.export(model, run.folder / "model", chat.tokenizer, extra_files={CALIBRATION_FILE: calibration.to_json()})


def score_trees(model: Any, trees: Sequence[Tree], run: Run, config: RewardModelConfig) -> list[Tensor]:
    """The scores (K,) of each element's responses."""
    from posttrain.engine.inference import infer

    pace = run.pace(sum(tree.num_tokens for tree in trees) // run.engine.world.size)
    with run.timed("evaluation"):
        flat = infer(run.engine, model, trees, ("scores",), config.max_tokens_per_micro_batch, progress=pace)["scores"]
    return list(torch.stack(flat).split([tree.num_responses for tree in trees]))


def calibrate(model: Any, trees: Sequence[Tree], chat: Chat, config: RewardModelConfig, run: Run) -> Calibration:
    """Measure the trained model: the bias under which demonstrations score 0, and mean and std of held-out scores after it.

    Also reports what goes wrong unnoticed: scores that follow the length, and scores of degenerate responses.
    """
    from posttrain.evaluation.pairs import pair_accuracy
    from posttrain.evaluation.statistics import spearman
    from posttrain.inputs import load_demonstrations
    from posttrain.models.loading import Calibration

    bias = 0.0
    if config.demonstrations.path:
        demonstrations = load_demonstrations(run, config.demonstrations, chat, config.max_length, config.max_dropped_fraction)
        bias = float(torch.cat(score_trees(model, demonstrations, run, config)).mean())
    scores = [x - bias for x in score_trees(model, trees, run, config)]
    flat = torch.cat(scores)
    lengths = [float(len(child)) for tree in trees for child in tree.children]
    probes = degenerate_probes(trees[:64], chat)
    results = {
        "reward_model": {
            **pair_accuracy(scores, trees, run.seed),
            "held_out": bool(config.validation.path),
            "mean": float(flat.mean()),
            "std": float(flat.std()),
            "spearman_score_length": spearman(flat.tolist(), lengths),
            "degenerate_probes": {
                name: float(torch.cat(score_trees(model, probe, run, config)).mean()) - bias for name, probe in probes.items()
            },
        }
    }
    run.results(results)
    run.say(f"reward model: {results['reward_model']}")
    return Calibration(bias=bias, mean=float(flat.mean()), std=float(flat.std()))


def degenerate_probes(trees: Sequence[Tree], chat: Chat) -> dict[str, list[Tree]]:
    """Responses that no person would rank high: nothing at all, one token over and over, the prompt echoed."""
    end = list(chat.end_of_turn_ids[:1])

    def answer(tree: Tree, ids: list[int]) -> Tree:
        # no longer than the longest response: beside a long prompt a longer one would not fit
        room = max(map(len, tree.children)) - 1
        return Tree(tree.root, (segment(ids[:room] + end, True),))

    def echo(tree: Tree) -> list[int]:
        return chat.response(str(chat.tokenizer.decode(tree.root.input_ids, skip_special_tokens=True)))[:-1]

    def first_token(tree: Tree) -> list[int]:
        return tree.children[0].input_ids[:1].tolist()

    return {
        "empty": [answer(tree, []) for tree in trees],
        "repeated_token": [answer(tree, first_token(tree) * 16) for tree in trees],
        "echoed_prompt": [answer(tree, echo(tree)) for tree in trees],
    }


def uses(config: RewardModelConfig) -> list[ModelUse]:
    """What is asked of the model, for the check before anything is loaded."""
    return [
        ModelUse(field="model", model=config.model, template=config.template, rows=({"max_length": config.max_length},), becomes=REWARD)
    ]


def check(config: RewardModelConfig) -> list[str]:
    """Rows that are too long, and comparisons that fit in no packed row: their pairs need all their scores at once."""
    from posttrain.estimates import row_problems

    return [text for data in (config.data, config.validation) for text in row_problems(data, "comparison", config)]


def plan(config: RewardModelConfig) -> dict[str, Any]:
    """Rows, tokens, steps, memory and time."""
    from posttrain.estimates import rows_and_tokens
    from posttrain.forecast import forecast

    size = rows_and_tokens(config.data, "comparison", config.model.path)
    if "tokens" in size:
        size["optimizer steps"] = max(1, round(config.epochs * size["rows"] / config.batch_size))
    return size | forecast(workload(config, size))


def workload(config: RewardModelConfig, size: Mapping[str, Any]) -> Work:
    """What passes through the model, of rows as `plan` counts them."""
    from posttrain.forecast import Role, Work, trees_of

    seen = trees_of(size, config.epochs)
    return Work(
        roles=(Role(name="reward_model", model=config.model, is_scalar=True, trained=seen),),
        row=config.max_tokens_per_micro_batch,
        longest=config.max_length,
        update=seen.count / size.get("optimizer steps", 1),
        copies_checkpoints=config.checkpoint.background,
    )


def preview(config: RewardModelConfig) -> str:
    """The first comparisons as the model will read them: the best response in green, the others in red, each with its rank."""
    from posttrain.data.chat import Chat
    from posttrain.data.rows import read_rows
    from posttrain.data.shown import shown

    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    return "\n\n".join(shown(row, "comparison", chat) for row in read_rows(replace(config.data, limit=3), "comparison")[:3])


def smoke(config: RewardModelConfig) -> RewardModelConfig:
    """The same stage on 64 rows, for two optimizer steps."""
    limited = {name: replace(getattr(config, name), limit=64) for name in ("data", "validation", "demonstrations")}
    return replace(config, **limited, batch_size=32, epochs=1.0)
