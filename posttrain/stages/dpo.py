"""Direct preference optimisation and its family: learn from ranked or judged responses, without a reward model or sampling.

    minimise  - log sigmoid(beta * [log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))])  +  nll_coef * NLL(y_w)

DPO (arXiv 2305.18290, equation 7) and a dozen losses that read the same four numbers; `losses` names one or several,
which are added up by `loss_weights`. A prompt with its K ranked responses is one batch element, computed once: its loss is
the mean over its non-tied pairs, and the NLL is taken on the best response. The reference is the policy that the stage
starts from. SimPO, ORPO and CPO have none, and none is loaded for them.

KTO (arXiv 2402.01306) learns from single responses that are desirable or not, against the mean log-ratio of mismatched
responses: each prompt with the response of the row before it in the global batch, as TRL does it (HALOs takes the row after).

What differs from the papers: AdamW instead of DPO's RMSprop; log-ratios are differences of fp64 sums; ORPO's NLL is of the
response alone, as everywhere here; `ipo` and `sigmoid_norm` read means over tokens, as IPO's authors do.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/dpo.py smollm2
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, did_you_mean, runtime, runtime_factory, when
from posttrain.controllers import Fall
from posttrain.models.described import CAUSAL, ModelUse
from posttrain.packing import Tree
from posttrain.preferences import Pairs, Responses, best_response, longest_row, mismatched, pair_up, side_sums, summary

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import TrainedModel
    from posttrain.forecast import Work
    from posttrain.reference import Reference
    from posttrain.run import Run

VERSION = 1
CHOSEN_FELL = (
    "the chosen responses' mean log-probability is more than {limit} nats below where it began. This is a known effect and no bug: the "
    "loss asks for a margin, and the rejected responses may fall faster (arXiv 2402.13228). A lower learning rate or a larger beta holds "
    "it back; for pairs, nll_coef=1 trains on the chosen responses beside"
)


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Core fields first; run-time fields (budgets, intervals) don't change the result."""

    model: ModelConfig = ModelConfig()
    """The model to start from, usually the SFT model; also the reference."""
    data: DataConfig = DataConfig(path="")
    """Comparison rows (a prompt and its ranked responses), or judgement rows for kto."""
    validation: DataConfig = DataConfig(path="")
    """Held-out rows of the same type; "" measures nothing."""
    losses: tuple[str, ...] = ("sigmoid",)
    """sigmoid (DPO), robust, hinge, ipo, exo_pair, nca_pair, apo_zero, apo_down, sigmoid_norm, simpo, orpo, cpo, added up; or kto alone."""
    loss_weights: tuple[float, ...] = (1.0,)
    """One weight per loss."""
    beta: float = 0.1
    """How strongly the policy is held to the reference (IPO's tau, ORPO's lambda; SimPO works with 2 to 10)."""
    nll_coef: float = 0.0
    """Weight of the chosen responses' mean NLL per token, which keeps them likely (ORPO and CPO: 1); 0 is off."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, warmup_steps=10)
    """DPO: 1e-6, of which the authors' code makes 5e-7."""
    epochs: float = 1.0
    """Passes over the rows."""
    batch_size: int = 64
    """Prompts, each with all its responses, per optimizer step over all devices (DPO: 64)."""
    max_length: int = 2048
    """Longest prompt with one response, in tokens; rows with a longer one are dropped whole."""
    reference: str = "live"
    """live (a frozen model computes each batch) or cached (computed for all rows before the first step, kept on disk)."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates once per epoch."""
    best_by: str = "loss"
    """Which evaluated weights are kept: those with the lowest held-out loss, or with the highest accuracy."""
    # advanced
    label_smoothing: float = 0.0
    """Probability that a label is wrong: sigmoid (cDPO), robust (0.1), exo_pair (1e-3)."""
    target_margin: float = 0.5
    """SimPO's gamma: what the chosen reward must lead by (half of beta)."""
    desirable_weight: float = 1.0
    """KTO's weight of desirable responses."""
    undesirable_weight: float = 1.0
    """KTO's weight of undesirable ones."""
    chosen_drop_warning: float = 20.0
    """Warn when the chosen responses' log-probability falls this many nats below where it began; 0 never warns."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    max_dropped_fraction: float = 0.1
    """Largest share of rows that may be dropped for their length or for having only ties."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device; a prompt with all its responses must fit."""
    checkpoint: CheckpointConfig = runtime_factory(CheckpointConfig)

    @property
    def is_unpaired(self) -> bool:
        """Whether single responses are judged (KTO) instead of pairs compared."""
        return self.losses == ("kto",)

    @property
    def row_type(self) -> str:
        return "judgement" if self.is_unpaired else "comparison"

    @property
    def needs_reference(self) -> bool:
        return not set(self.losses) <= set(REFERENCE_FREE)

    def problems(self) -> list[str]:
        known = (*LOSSES, "kto")
        unknown = [name for name in self.losses if name not in known]
        without_nll = [name for name in ("orpo", "cpo") if name in self.losses and not self.nll_coef]
        return when(
            (not self.model.path, "model.path is empty; a model folder, a hub id or '@stage' works"),
            (not self.data.path, "data.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
            *((True, f"losses={self.losses} has {name!r}{did_you_mean(name, known)}") for name in unknown),
            (not self.losses or len(set(self.losses)) < len(self.losses), f"losses={self.losses} must name one loss or more, each once"),
            ("kto" in self.losses and len(self.losses) > 1, f"losses={self.losses}: kto judges single responses; ('kto',) works"),
            (
                len(self.loss_weights) != len(self.losses),
                f"loss_weights={self.loss_weights} must hold one weight per loss; {(1.0,) * len(self.losses)} works",
            ),
            (any(weight <= 0 for weight in self.loss_weights), f"loss_weights={self.loss_weights} must be positive; 1 works"),
            (self.beta <= 0, f"beta={self.beta} must be positive; 0.1 works"),
            (self.nll_coef < 0, f"nll_coef={self.nll_coef} must not be negative; 0 is off"),
            (self.is_unpaired and self.nll_coef > 0, f"nll_coef={self.nll_coef} has no chosen responses with kto; 0 works"),
            *((True, f"nll_coef=0 leaves out the NLL that {name} is made of; nll_coef=1 is the paper's") for name in without_nll),
            (not 0 <= self.label_smoothing < 0.5, f"label_smoothing={self.label_smoothing} must lie in [0, 0.5); 0 is off"),
            (
                "exo_pair" in self.losses and self.label_smoothing == 0,
                "label_smoothing=0 makes exo_pair infinite; 1e-3 is the paper's",
            ),
            (
                self.label_smoothing > 0 and not set(self.losses) & {"sigmoid", "robust", "exo_pair"},
                f"label_smoothing={self.label_smoothing} is read by sigmoid, robust and exo_pair alone, not by {self.losses}; 0 works",
            ),
            (self.target_margin < 0, f"target_margin={self.target_margin} must not be negative; half of beta is SimPO's advice"),
            (self.epochs <= 0, f"epochs={self.epochs} must be positive; 1 works"),
            (self.batch_size < 1, f"batch_size={self.batch_size} must be at least 1; 64 works"),
            (
                self.is_unpaired and self.batch_size == 1,
                "batch_size=1 leaves kto without a mismatched response; 2 works, 64 estimates the KL well",
            ),
            (
                self.model.adapter.dropout > 0,
                f"model.adapter.dropout={self.model.adapter.dropout} is noise in every log-ratio; 0 works, SFT alone trains with it",
            ),
            (self.max_length < 2, f"max_length={self.max_length} must be at least 2; 2048 works"),
            (self.reference not in ("live", "cached"), f"reference={self.reference!r} must be live or cached"),
            (self.evaluate_every < 0, f"evaluate_every={self.evaluate_every} must not be negative; 0 is once per epoch"),
            (self.best_by not in ("loss", "accuracy"), f"best_by={self.best_by!r} must be loss or accuracy"),
            (
                min(self.desirable_weight, self.undesirable_weight) <= 0,
                f"desirable_weight={self.desirable_weight} and undesirable_weight={self.undesirable_weight} must be positive; 1 works",
            ),
            (self.chosen_drop_warning < 0, f"chosen_drop_warning={self.chosen_drop_warning} must not be negative; 0 never warns"),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (
                self.max_tokens_per_micro_batch < self.max_length,
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} must be at least max_length={self.max_length}",
            ),
        )


# --- one equation each: pairs (P,) -> losses (P,)


def sigmoid(pairs: Pairs, config: DPOConfig) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7); with label smoothing, cDPO."""
    lead, smoothing = config.beta * pairs.lead, config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(lead) - smoothing * F.logsigmoid(-lead)


def robust(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased when labels are wrong with probability `label_smoothing`."""
    lead, wrong = config.beta * pairs.lead, config.label_smoothing
    return (-(1 - wrong) * F.logsigmoid(lead) + wrong * F.logsigmoid(-lead)) / (1 - 2 * wrong)


def hinge(pairs: Pairs, config: DPOConfig) -> Tensor:
    """SLiC's hinge on DPO's margin (arXiv 2305.10425, 2309.06657)."""
    return torch.relu(1 - config.beta * pairs.lead)


def ipo(pairs: Pairs, config: DPOConfig) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17), on means over tokens."""
    return (pairs.mean_lead - 1 / (2 * config.beta)) ** 2


def exo_pair(pairs: Pairs, config: DPOConfig) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, equation 16): reverse KL from the policy's preference to the smoothed label."""
    lead = config.beta * pairs.lead
    won = torch.sigmoid(lead) * (F.logsigmoid(lead) - math.log1p(-config.label_smoothing))
    return won + torch.sigmoid(-lead) * (F.logsigmoid(-lead) - math.log(config.label_smoothing))


def nca_pair(pairs: Pairs, config: DPOConfig) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): raises the chosen reward itself, and pulls both towards 0."""
    chosen, rejected = config.beta * pairs.chosen_ratio, config.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def apo_zero(pairs: Pairs, config: DPOConfig) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): for chosen responses that are better than the model's own."""
    return torch.sigmoid(-config.beta * pairs.chosen_ratio) + torch.sigmoid(config.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, config: DPOConfig) -> Tensor:
    """APO-down (arXiv 2408.06266, equation 8): for chosen responses that are worse than the model's own."""
    return torch.sigmoid(config.beta * pairs.chosen_ratio) + torch.sigmoid(-config.beta * pairs.lead)


def sigmoid_norm(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): DPO's loss of log-ratios per token; beta is larger (5)."""
    return -F.logsigmoid(config.beta * pairs.mean_lead)


def simpo(pairs: Pairs, config: DPOConfig) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): log-probabilities per token must lead by a target margin."""
    lead = pairs.chosen / pairs.chosen_lengths - pairs.rejected / pairs.rejected_lengths
    return -F.logsigmoid(config.beta * lead - config.target_margin)


def orpo(pairs: Pairs, config: DPOConfig) -> Tensor:
    """ORPO's odds-ratio term (arXiv 2403.07691, equation 7) times its lambda; the NLL beside it is `nll_coef`'s."""
    odds = log_odds(pairs.chosen / pairs.chosen_lengths) - log_odds(pairs.rejected / pairs.rejected_lengths)
    return -config.beta * F.logsigmoid(odds)


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logprobs); a response that is certain to the last digit has large odds, not infinite ones."""
    certain = -1e-12
    logprobs = mean_logprobs.clamp(max=certain)
    return logprobs - torch.log(-torch.expm1(logprobs))


def cpo(pairs: Pairs, config: DPOConfig) -> Tensor:
    """CPO's preference term (arXiv 2401.08417, equation 3): DPO with a uniform reference; the NLL beside it is `nll_coef`'s."""
    return -F.logsigmoid(config.beta * (pairs.chosen - pairs.rejected))


LOSSES: dict[str, Callable[[Pairs, DPOConfig], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
}
REFERENCE_FREE = ("simpo", "orpo", "cpo")


def kto(log_ratios: Tensor, desirable: Tensor, baseline: float, config: DPOConfig) -> Tensor:
    """KTO (arXiv 2402.01306, equation 7) of responses with `log_ratios (B,)`, `desirable (B,)` bool -> (B,)."""
    lead = torch.where(desirable, log_ratios - baseline, baseline - log_ratios)
    weight = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return weight * torch.sigmoid(-config.beta * lead)


def kl_baseline(log_ratios: Tensor) -> float:
    """KTO's z0: the mean of the mismatched responses' `log_ratios (B,)`, not below 0."""
    return float(log_ratios.mean().clamp(min=0))  # NaN stays NaN


# --- from pairs and judgements to elements: sums, with sums of what is logged

Sums = tuple[Tensor, dict[str, Tensor]]


def implicit_rewards(responses: Responses, config: DPOConfig) -> Tensor:
    """beta times the log-ratios (B,), without gradient; where there is no reference and a loss reads means, per token."""
    by_token = not config.needs_reference and not set(config.losses).isdisjoint(("simpo", "orpo"))
    return config.beta * responses.log_ratios.detach() / (responses.lengths if by_token else 1)


def paired_objective(responses: Responses, config: DPOConfig, nll_scale: float) -> Sums:
    """Sum over elements of the weighted losses, each a mean over its element's non-tied pairs, + `nll_scale` * the NLL of the best."""
    pairs, places, share = pair_up(responses)
    chosen, rejected = places.unbind(1)
    parts = {name: (share * LOSSES[name](pairs, config)).sum() for name in config.losses}
    best = [part.start + best_response(tree) for tree, part in responses.groups]
    nll = -responses.logprobs[best].sum()
    loss = torch.stack([weight * part for weight, part in zip(config.loss_weights, parts.values())]).sum() + nll_scale * nll
    rewards = implicit_rewards(responses, config)
    stats = {f"{name}_loss": part for name, part in parts.items()}
    stats |= {"nll_loss": nll, "nll_tokens": responses.lengths[best].sum(), "elements": share.sum()}
    stats |= {"accuracy": (share * (rewards[chosen] > rewards[rejected])).sum()}
    return loss, stats | side_sums("chosen", chosen, share, responses, rewards) | side_sums("rejected", rejected, share, responses, rewards)


def unpaired_objective(responses: Responses, config: DPOConfig, baseline: float) -> Sums:
    """Sum of KTO's losses over responses. What is logged as chosen are the desirable ones."""
    desirable = torch.tensor([tree.ranks == (0,) for tree, _ in responses.groups], dtype=torch.bool, device=responses.logprobs.device)
    counted = torch.tensor([part.start for _, part in responses.groups], dtype=torch.int64, device=responses.logprobs.device)
    log_ratios = responses.log_ratios[counted]
    loss = (config.loss_weights[0] * kto(log_ratios, desirable, baseline, config)).sum()
    rewards = implicit_rewards(responses, config)
    right = (rewards[counted] > config.beta * baseline) == desirable
    stats = {"accuracy": right.sum(), "elements": torch.tensor(len(counted))}
    for name, side in (("chosen", counted[desirable]), ("rejected", counted[~desirable])):
        stats |= side_sums(name, side, torch.ones_like(responses.logprobs[side]), responses, rewards)
    return loss, stats


# --- the loop


def train(config: DPOConfig, run: Run) -> Path:
    """Train on the preferences and export the best model. Returns its folder."""
    from posttrain.data.chat import Chat
    from posttrain.data.sampler import Sampler
    from posttrain.engine.inference import number_responses
    from posttrain.engine.tally import Tally, report
    from posttrain.inputs import check_budget, check_fits
    from posttrain.models.loading import load_causal_lm

    engine, budget = run.engine, config.max_tokens_per_micro_batch
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    trees = number_responses(load_rows(config, config.data, chat, run))
    held_out = load_rows(config, config.validation, chat, run) if config.validation.path else []
    total_steps = max(1, round(config.epochs * len(trees) / config.batch_size))
    evaluate_every = config.evaluate_every or max(1, len(trees) // config.batch_size)
    longest = longest_row(trees)
    warn_of_imbalance(config, trees, run)

    check_budget([*trees, *held_out], budget, config.row_type)
    module = load_causal_lm(config.model, chat.tokenizer, seed=run.seed)
    check_fits(module, longest_row([*trees, *held_out]), f"{config.row_type}s")
    policy = engine.train(module, config.optimizer, total_steps, name="policy")
    order = Sampler(len(trees), config.batch_size, run.seed)
    # before `resume`: until then the policy is what the stage starts from
    reference = load_reference(config, run, policy, trees, total_steps, chat)
    evaluation = HeldOut(config, run, policy, held_out)
    level = Fall()
    run.resume({"policy": policy}, order=order, level=level)

    for step in run.steps(total_steps):
        rows = [trees[i] for i in order.take()]
        batch = engine.pack(rows, budget)
        log_ratios, cost = mismatched_log_ratios(config, run, policy, rows, longest, partial(reference.of_step, step))
        objective = objective_of(config, rows, log_ratios)
        tally = Tally()
        with engine.update(policy) as update:
            for micro in batch.micro_batches():
                ref_logprobs = reference.of_row(micro)  # (B,)
                loss, stats = objective(Responses.of_row(micro, policy.logprobs(micro), ref_logprobs))
                update.backward(loss.float(), over=batch.num_trees)
                tally.add(stats)
        metrics = {"loss": math.nan, **report(update), **summary(tally.total(engine.world)), **cost, "epoch": order.epoch}
        warn_of_drop(config, metrics, level, run)

        score = None
        if held_out and ((step + 1) % evaluate_every == 0 or step + 1 == total_steps):
            metrics |= evaluation.measure()
            score = metrics["validation_accuracy"] if config.best_by == "accuracy" else -metrics["validation_loss"]
        run.log(metrics, tokens=batch.size, optimizer_steps=int(update.stepped))
        run.checkpoint(score=score)

    if held_out:
        run.restore_best({"policy": policy})
    return engine.export(policy, run.folder / "model", chat.tokenizer)


def load_rows(config: DPOConfig, data: DataConfig, chat: Chat, run: Run) -> list[Tree]:
    """One tree per comparison, or per judgement."""
    from posttrain.inputs import load_comparisons, load_judgements

    load = load_judgements if config.is_unpaired else load_comparisons
    return load(run, data, chat, config.max_length, config.max_dropped_fraction)


def objective_of(config: DPOConfig, rows: Sequence[Tree], log_ratios: Tensor) -> Callable[[Responses], Sums]:
    """The loss of any part of a global batch, with what must be known of all of it before its first forward:
    KTO's baseline from the mismatched `log_ratios (B,)`, or the number of tokens that the NLL is divided by."""
    if config.is_unpaired:
        return partial(unpaired_objective, config=config, baseline=kl_baseline(log_ratios))
    chosen_tokens = sum(int(tree.children[best_response(tree)].trainable.sum()) for tree in rows)
    # elements over tokens: the sum is divided by the number of elements later, the NLL is a mean over tokens
    return partial(paired_objective, config=config, nll_scale=config.nll_coef * len(rows) / max(1, chosen_tokens))


# --- the reference


def load_reference(config: DPOConfig, run: Run, policy: TrainedModel, trees: Sequence[Tree], total_steps: int, chat: Chat) -> Reference:
    """The policy that the stage starts from, which has taken no step yet: nothing, a frozen model, or a table of all rows."""
    from posttrain.data.sampler import Sampler
    from posttrain.models.loading import load_causal_lm
    from posttrain.reference import cached, live, no_reference

    if not config.needs_reference:
        return no_reference()
    if config.reference == "live":
        frozen = run.engine.reference(policy, lambda: load_causal_lm(config.model, chat.tokenizer))
        return live(run, frozen, config.max_tokens_per_micro_batch)
    # which responses meet by mismatch is known beforehand: the order of the rows is
    order, longest = Sampler(len(trees), config.batch_size, run.seed), longest_row(trees)
    steps = range(total_steps if config.is_unpaired else 0)
    pairs = [mismatched([trees[i] for i in order.take()], longest) for _ in steps]
    return cached(run, policy, trees, pairs, config.max_tokens_per_micro_batch)


def mismatched_log_ratios(
    config: DPOConfig, run: Run, policy: TrainedModel, rows: Sequence[Tree], longest: int, reference: Callable[[Sequence[Tree]], Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Log-ratios (B,) of a global batch's mismatched responses, without gradient, and what they cost. Only KTO reads them."""
    from posttrain.engine.kept import sequence_logprobs

    if not config.is_unpaired:
        return torch.zeros(0), {}
    began, pairs = time.monotonic(), mismatched(rows, longest)
    log_ratios = sequence_logprobs(run.engine, policy, pairs, config.max_tokens_per_micro_batch) - reference(pairs)
    tokens = float(sum(pair.num_tokens for pair in pairs))
    return log_ratios, {"kl": kl_baseline(log_ratios), "kl_tokens": tokens, "kl_seconds": time.monotonic() - began}


# --- watching


class HeldOut:
    """Held-out rows, with their log-probabilities under the policy that the stage starts from."""

    def __init__(self, config: DPOConfig, run: Run, policy: TrainedModel, trees: Sequence[Tree]) -> None:
        from posttrain.reference import starting_logprobs, zeros

        self.config, self.run, self.policy, self.trees = config, run, policy, trees
        self.longest = longest_row(trees) if trees else 0
        pairs = mismatched(trees, self.longest) if config.is_unpaired else []
        known = partial(starting_logprobs, run, policy, max_tokens=config.max_tokens_per_micro_batch) if config.needs_reference else zeros
        self.ref_logprobs, self.ref_mismatched = known(trees), known(pairs)

    def measure(self) -> dict[str, float]:
        """Loss, accuracy and margin over all of them."""
        from posttrain.engine.kept import sequence_logprobs

        config = self.config
        pace = self.run.pace(sum(tree.num_tokens for tree in self.trees) // self.run.engine.world.size)
        with self.run.timed("evaluation"):
            logprobs = sequence_logprobs(self.run.engine, self.policy, self.trees, config.max_tokens_per_micro_batch, pace)
            log_ratios, _ = mismatched_log_ratios(
                config, self.run, self.policy, self.trees, self.longest, lambda pairs: self.ref_mismatched
            )
        loss, sums = objective_of(config, self.trees, log_ratios)(Responses.of_trees(self.trees, logprobs, self.ref_logprobs))
        means = summary({name: float(value) for name, value in sums.items()})
        return {
            "validation_loss": float(loss) / len(self.trees),
            "validation_accuracy": means["accuracy"],
            "validation_margin": means["margin"],
        }


def warn_of_drop(config: DPOConfig, metrics: Mapping[str, float], level: Fall, run: Run) -> None:
    """Say it when the chosen responses have become less likely than they were: users take it for a bug.

    The log-ratio to the reference tells it. Without a reference the first steps are compared with the last ones, per token,
    as lengths differ more than anything else.
    """
    if config.needs_reference:
        drop = -metrics["chosen_log_ratio"]
    else:
        drop = level.update(metrics["chosen_logprobs_per_token"]) * metrics["chosen_length"]
    if 0 < config.chosen_drop_warning < drop:
        run.warn(CHOSEN_FELL.format(limit=config.chosen_drop_warning))


def warn_of_imbalance(config: DPOConfig, trees: Sequence[Tree], run: Run) -> None:
    """KTO asks for desirable_weight * n_D / (undesirable_weight * n_U) in [1, 4/3] (arXiv 2402.01306, equation 8)."""
    if not config.is_unpaired:
        return
    good = sum(tree.ranks == (0,) for tree in trees)
    bad = len(trees) - good
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad) if bad else math.inf
    if not 1 <= round(ratio, 6) <= round(4 / 3, 6):
        works = f"; undesirable_weight={config.desirable_weight * good / bad:.4g} makes it 1" if good and bad else ""
        run.warn(
            f"{good} desirable rows of weight {config.desirable_weight} and {bad} undesirable ones of weight {config.undesirable_weight} "
            f"have the ratio {ratio:.3g}, outside KTO's range [1, 4/3]{works}"
        )


# --- companions


def uses(config: DPOConfig) -> list[ModelUse]:
    """What is asked of the model, for the check before anything is loaded."""
    rows = ({"max_length": config.max_length},)
    return [ModelUse(field="model", model=config.model, template=config.template, rows=rows, becomes=CAUSAL)]


def check(config: DPOConfig) -> list[str]:
    """Rows that are too long, and comparisons that fit in no packed row: their pairs need all their responses at once."""
    from posttrain.estimates import row_problems

    return [text for data in (config.data, config.validation) for text in row_problems(data, config.row_type, config)]


def plan(config: DPOConfig) -> dict[str, Any]:
    """Rows, tokens, steps, memory and time."""
    from posttrain.estimates import rows_and_tokens
    from posttrain.forecast import forecast

    size = rows_and_tokens(config.data, config.row_type, config.model.path)
    if "tokens" in size:
        size["optimizer steps"] = max(1, round(config.epochs * size["rows"] / config.batch_size))
    return size | forecast(workload(config, size))


def workload(config: DPOConfig, size: Mapping[str, Any]) -> Work:
    """What passes through the models, of rows as `plan` counts them."""
    from posttrain.costs import Tokens
    from posttrain.forecast import Role, Work, trees_of

    seen = trees_of(size, config.epochs, head="scored")
    is_live = config.needs_reference and config.reference == "live"
    before = trees_of(size, 1.0, head="scored") if config.needs_reference and not is_live else Tokens()  # the policy, before it moves
    reference = Role(name="reference", model=config.model, is_trained=False, shares_base=True, read=seen)
    return Work(
        roles=(Role(name="policy", model=config.model, trained=seen, read=before), *([reference] if is_live else [])),
        row=config.max_tokens_per_micro_batch,
        longest=config.max_length,
        update=seen.count / size.get("optimizer steps", 1),
        copies_checkpoints=config.checkpoint.background,
    )


def preview(config: DPOConfig) -> str:
    """The first rows as the model will read them: the best response, or a desirable one, in green and the others in red."""
    from posttrain.data.chat import Chat
    from posttrain.data.rows import read_rows
    from posttrain.data.shown import shown

    if config.model.path.startswith("@"):
        return f"shown when {config.model.path} has run: its tokenizer and template are needed"
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    return "\n\n".join(shown(row, config.row_type, chat) for row in read_rows(replace(config.data, limit=3), config.row_type)[:3])


def smoke(config: DPOConfig) -> DPOConfig:
    """The same stage on 64 rows, for two optimizer steps."""
    limited = {name: replace(getattr(config, name), limit=64) for name in ("data", "validation")}
    return replace(config, **limited, batch_size=32, epochs=1.0)
