"""Pipeline stage: how far a reward model may be optimised before a gold score says that it was too far.

The initial policy answers every prompt N times; what the reward model (the proxy) likes best among n of them is held against the
gold score, for n = 1, 2, 4, .. N. Policies that were trained against the proxy answer the same prompts; their KL to the initial
policy is the mean over responses of the summed log pi - log pi_initial. The iterations of a training stage can be added from its
metrics.jsonl (`kl`, `score`) and the responses in its samples.jsonl, which the gold score judges.

results.json has `overoptimisation`: {"best_of_n": .., "rl": .. for the policies, one entry per training stage}, each as
`posttrain.evaluation.overoptimisation.describe` makes it; samples.jsonl has each prompt's favourite of all N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config import DataConfig, ModelConfig, SamplingConfig, resolve, runtime, when
from posttrain.data.removed import Removed
from posttrain.evaluation.best_of_n import best_of_n_table, kl_of_best_of_n, powers_of_two
from posttrain.evaluation.overoptimisation import BEST_OF_N, RL, describe
from posttrain.evaluation.statistics import bootstrap_mean, finite
from posttrain.models.described import REWARD, ModelUse

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.model import FrozenModel
    from posttrain.rollout.local import Rollout
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OveroptimisationConfig:
    """Which proxy is optimised, from which policy, and what judges that."""

    policy: ModelConfig = ModelConfig()
    """The initial policy: the SFT model, RL's reference."""
    proxy: ModelConfig = ModelConfig()
    """The reward model."""
    gold: str = ""
    """The gold score: "package.module:function", called as gold(row, response) -> float."""
    prompts: DataConfig = DataConfig(path="", split="test")
    """Held-out prompt rows."""
    samples_per_prompt: int = 64
    """N, responses of the initial policy to each prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature 1 samples the models as they are."""
    policies: tuple[ModelConfig, ...] = ()
    """Policies that were trained against the proxy, in any order."""
    names: tuple[str, ...] = ()
    """What the report calls them."""
    samples_per_policy: int = 4
    """Their responses to each prompt."""
    trainings: tuple[str, ...] = ()
    """Folders of training stages that logged `kl` and `score`, or the "@stage" itself."""
    training_prompts: DataConfig = DataConfig(path="")
    """The prompt rows of those stages, whose columns the gold score wants; "" gives it the prompt's text alone."""
    training_points: int = 12
    """Points per training, each the mean of neighbouring iterations."""
    template: str = "auto"
    """Chat template: auto (the policy's own, proven), raw (contents only), or a jinja file."""
    max_prompt_length: int = 1024
    """Longer prompts are dropped, counted and said."""
    max_dropped_fraction: float = 0.0
    """Largest share of prompts that may be dropped."""
    max_failed_fraction: float = 0.01
    """Largest share of prompts whose responses have no gold score; they are counted and left out."""
    chunk_size: int = runtime(16)
    """Prompts answered N times between two checkpoints."""
    max_tokens_per_micro_batch: int = runtime(8192)
    """Tokens per packed row on one device."""

    def problems(self) -> list[str]:
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        return when(
            (not self.policy.path, "policy.path is empty; '@sft' works"),
            (not self.proxy.path, "proxy.path is empty; '@reward_model' works"),
            (not self.gold, "gold is empty; 'package.module:function' works"),
            (not self.prompts.path, "prompts.path is empty; held-out prompt rows work"),
            (self.samples_per_prompt < 2, f"samples_per_prompt={self.samples_per_prompt} leaves nothing to choose from; 64 works"),
            (self.samples_per_policy < 1, f"samples_per_policy={self.samples_per_policy} must be at least 1; 4 works"),
            (self.sampling.temperature <= 0, "sampling.temperature=0 gives one response N times; 1 works"),
            (not all(model.path for model in self.policies), "policies has a model without a path; '@ppo' works"),
            (len(self.names) != len(self.policies), f"names={self.names} must name the {len(self.policies)} policies, one each"),
            (len(set(self.names)) != len(self.names), f"names={self.names} must differ"),
            (self.training_points < 1, f"training_points={self.training_points} must be at least 1; 12 works"),
            (self.max_prompt_length < 1, f"max_prompt_length={self.max_prompt_length} must be at least 1; 1024 works"),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0 works"),
            (not 0 <= self.max_failed_fraction <= 1, f"max_failed_fraction={self.max_failed_fraction} must lie in [0, 1]; 0.01 works"),
            (self.chunk_size < 1, f"chunk_size={self.chunk_size} must be at least 1; 16 works"),
            (
                longest > self.sampling.max_cached_tokens,
                f"sampling.max_cached_tokens={self.sampling.max_cached_tokens} is below max_prompt_length + sampling.max_new_tokens; "
                f"{longest} works",
            ),
            (
                self.max_tokens_per_micro_batch < longest,
                f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} is below max_prompt_length + sampling.max_new_tokens; "
                f"{longest} works",
            ),
        )


@dataclass(frozen=True, eq=False)
class Asked:
    """What the models answer: P prompt rows, their token ids, and how to speak with the initial policy."""

    chat: Chat
    rows: list[dict[str, Any]]
    prompts: list[list[int]]


class Scores:
    """Proxy and gold scores so far, so that an interrupted stage goes on: of the initial policy's N responses to each prompt, in order,
    and of each trained policy. A gold score that is no number is NaN."""

    def __init__(self) -> None:
        self.proxy: list[list[float]] = []
        self.gold: list[list[float]] = []
        self.policies: list[dict[str, Any]] = []  # {name, kl (B,), proxy (P, G), gold (P, G)}

    def state_dict(self) -> dict[str, Any]:
        return {"proxy": self.proxy, "gold": self.gold, "policies": self.policies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.proxy, self.gold, self.policies = state["proxy"], state["gold"], state["policies"]


def measure(config: OveroptimisationConfig, run: Run) -> Path:
    """Sample, score, fit. Returns results.json."""
    from posttrain.data.chat import Chat
    from posttrain.inputs import load_prompts
    from posttrain.models.loading import load_causal_lm, load_scalar_model
    from posttrain.rollout.settings import require_same_tokens

    chat = Chat.load(config.policy.path, config.template, revision=config.policy.revision)
    require_same_tokens(config.proxy, config.policy, chat, config.template)
    limits = (config.max_prompt_length, config.sampling.system_prompt, config.max_dropped_fraction)
    asked = Asked(chat, *load_prompts(run, config.prompts, chat, *limits))
    scores = Scores()
    run.resume({}, scores=scores)
    initial = run.engine.freeze(load_causal_lm(config.policy, chat.tokenizer), name="initial policy")
    proxy = run.engine.freeze(load_scalar_model(config.proxy, fresh_head=False), name="proxy")
    chunks = -(-len(asked.prompts) // config.chunk_size)
    for step in run.steps(chunks + len(config.policies)):
        if step < chunks:
            best_of(config, run, asked, initial, proxy, scores)
        else:
            trained(config, run, asked, initial, proxy, scores, step - chunks)
        run.checkpoint(force=True)
    return run.results(run.engine.world.first_says(lambda: results(config, run, asked, scores), "fitting"))


def best_of(config: OveroptimisationConfig, run: Run, asked: Asked, initial: FrozenModel, proxy: FrozenModel, scores: Scores) -> None:
    """The next chunk of prompts, answered N times by the initial policy."""
    from posttrain.rollout.experience import sample_responses

    start, count = len(scores.proxy), config.samples_per_prompt
    here = slice(start, start + config.chunk_size)
    rollout = sample_responses(
        run, initial, asked.chat, asked.prompts[here], config.sampling, 0, samples_per_prompt=count, first_prompt=start
    )
    liked, worth = score_all(config, run, asked.chat, asked.rows[here], rollout, proxy)
    scores.proxy += grouped(liked, count)
    scores.gold += grouped(worth, count)
    run.samples(favourites(asked, rollout, scores, start))
    run.log({"proxy": float(np.mean(liked)), "gold": float(np.nanmean(worth))}, tokens=rollout.num_tokens)


def trained(
    config: OveroptimisationConfig, run: Run, asked: Asked, initial: FrozenModel, proxy: FrozenModel, scores: Scores, place: int
) -> None:
    """One trained policy's answers to all prompts, and its KL to the initial policy."""
    from posttrain.models.loading import load_causal_lm
    from posttrain.ops import kl_k1, sum_by_length
    from posttrain.rollout.experience import annotate, sample_responses
    from posttrain.rollout.settings import require_same_tokens

    name, source, count = config.names[place], config.policies[place], config.samples_per_policy
    require_same_tokens(source, config.policy, asked.chat, config.template)
    policy: Any = run.engine.freeze(load_causal_lm(source, asked.chat.tokenizer), name=name)
    rollout = sample_responses(run, policy, asked.chat, asked.prompts, config.sampling, 0, samples_per_prompt=count)
    experience = annotate(run, rollout, policy, initial, config.max_tokens_per_micro_batch, config.sampling)
    policy.close()
    run.engine.models.remove(policy)
    kl = sum_by_length(kl_k1(experience.logprobs, experience.ref_logprobs), experience.lengths)
    liked, worth = score_all(config, run, asked.chat, asked.rows, rollout, proxy)
    scores.policies.append({"name": name, "kl": grouped(kl.tolist(), count), "proxy": grouped(liked, count), "gold": grouped(worth, count)})
    run.log({f"{name}/kl": float(kl.mean()), f"{name}/proxy": float(np.mean(liked)), f"{name}/gold": float(np.nanmean(worth))})


def score_all(
    config: OveroptimisationConfig, run: Run, chat: Chat, rows: Sequence[dict[str, Any]], rollout: Rollout, proxy: FrozenModel
) -> tuple[list[float], list[float]]:
    """Proxy and gold scores (B,) of a rollout's responses, alike on every rank."""
    from posttrain.engine.inference import infer
    from posttrain.rollout.trees import response_trees

    found = infer(
        run.engine, proxy, response_trees(rollout), ("scores",), config.max_tokens_per_micro_batch, progress=lambda _: run.heed_stop()
    )
    asked = list(zip(rollout.prompt_of.tolist(), map(chat.decode_response, rollout.responses)))
    gold = resolve(config.gold)
    worth = run.engine.world.first_says(lambda: [number(gold(rows[p], text)) for p, text in asked], "asking the gold score")
    return [float(score) for score in found["scores"]], worth


def number(value: Any) -> float:
    """A score as a float; NaN for what is no finite number."""
    return float(value) if finite(value) else math.nan


def grouped(values: Sequence[float], count: int) -> list[list[float]]:
    return [list(values[i : i + count]) for i in range(0, len(values), count)]


def favourites(asked: Asked, rollout: Rollout, scores: Scores, start: int) -> list[dict[str, Any]]:
    """For samples.jsonl: to each prompt of the rollout the response that the proxy likes best of all."""
    count = len(rollout.responses) // len(rollout.prompts)
    best = [int(np.argmax(own)) for own in scores.proxy[start:]]
    return [
        {
            "prompt": asked.rows[start + p]["prompt"],
            "response": asked.chat.decode_response(rollout.responses[p * count + k]),
            "score": scores.proxy[start + p][k],
            "gold": scores.gold[start + p][k] if math.isfinite(scores.gold[start + p][k]) else None,
            "best_of": count,
        }
        for p, k in enumerate(best)
    ]


# --- from scores to results


def results(config: OveroptimisationConfig, run: Run, asked: Asked, scores: Scores) -> dict[str, Any]:
    """All curves. Raises ValueError when too many prompts have a response without a gold score."""
    failed = Removed(seen=len(scores.gold))
    known = []
    for p, row in enumerate(asked.rows):
        everything = [scores.gold[p], *(policy["gold"][p] for policy in scores.policies)]
        if all(math.isfinite(value) for own in everything for value in own):
            known.append(p)
        else:
            failed.add("no gold score", row)
    failed.check(config.max_failed_fraction, f"prompts of {config.gold}")
    curve, gains = best_of_curve([scores.proxy[p] for p in known], [scores.gold[p] for p in known], run.seed)
    found = {BEST_OF_N: describe(BEST_OF_N, curve, gains, run.seed)}
    beginning = {name: value for name, value in curve[0].items() if name != "n"} | {"name": "initial policy"}
    if scores.policies:
        found[RL] = describe(RL, [beginning, *(policy_point(policy, known, run.seed) for policy in scores.policies)], seed=run.seed)
    removed = {f"{run.name}: gold scores": failed.to_json()}
    for folder in map(stage_folder, config.trainings):
        unknown = Removed()
        found[folder.name] = describe(RL, training_curve(config, asked.chat, folder, run, unknown), seed=run.seed)
        removed[f"{run.name}: samples of {folder.name}"] = unknown.to_json()
    return {"overoptimisation": found, "removed": removed}


def best_of_curve(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Points {n, kl, proxy, gold} for n = 1, 2, 4, .. N, and every prompt's gold gains (P, K) over n = 1."""
    sizes = powers_of_two(len(proxy[0]))
    tables = {"proxy": best_of_n_table(proxy, proxy, sizes), "gold": best_of_n_table(proxy, gold, sizes)}
    curve = [
        {"n": n, "kl": kl_of_best_of_n(n)}
        | {name: bootstrap_mean(table[:, k].tolist(), seed=seed).to_json() for name, table in tables.items()}
        for k, n in enumerate(sizes)
    ]
    return curve, tables["gold"] - tables["gold"][:, :1]


def policy_point(policy: Mapping[str, Any], known: Sequence[int], seed: int) -> dict[str, Any]:
    """A trained policy as {name, kl, kl_ci95, proxy, gold}, prompts counting with the mean of their responses."""
    means = {name: bootstrap_mean([float(np.mean(policy[name][p])) for p in known], seed=seed) for name in ("kl", "proxy", "gold")}
    kl = means.pop("kl")
    return {"name": policy["name"], "kl": kl.mean, "kl_ci95": [kl.low, kl.high], **{name: one.to_json() for name, one in means.items()}}


# --- the iterations of a training stage


def stage_folder(path: str) -> Path:
    """A stage's own folder, of itself or of the model in it that "@stage" names."""
    place = Path(path)
    return place if (place / "metrics.jsonl").is_file() or not (place.parent / "metrics.jsonl").is_file() else place.parent


def training_curve(config: OveroptimisationConfig, chat: Chat, folder: Path, run: Run, unknown: Removed) -> list[dict[str, Any]]:
    """Points {iteration, kl, proxy, gold} of neighbouring iterations; KL and proxy are of all their responses, as the stage logged
    them, gold of those that it kept. The first iteration, whose KL is 0, is a point of its own.

    Raises ValueError for a folder without such numbers.
    """
    from posttrain.tracking import read_lines

    logged = [line for line in read_lines(folder / "metrics.jsonl") if {"kl", "score"} <= line.keys()]
    if not logged:
        raise ValueError(f"{folder} has no metrics.jsonl with kl and score; the folder of a ppo or grpo stage works")
    gold = gold_by_step(config, chat, read_lines(folder / "samples.jsonl"), run, unknown)
    judged = [line for line in logged if gold.get(line["step"])]
    if not judged:
        raise ValueError(f"{folder} has no samples.jsonl with responses of its iterations, which the gold score could judge")
    parts = [judged[:1], *([*part] for part in np.array_split(np.array(judged[1:], dtype=object), config.training_points) if len(part))]
    points = []
    for part in parts:
        values = {"proxy": [line["score"] for line in part], "gold": [value for line in part for value in gold[line["step"]]]}
        means = {name: bootstrap_mean(own, seed=run.seed).to_json() for name, own in values.items()}
        kl = 0.0 if part is parts[0] else sum(line["kl"] for line in part) / len(part)
        points.append({"iteration": part[-1]["step"], "kl": kl, **means})
    return points


def gold_by_step(
    config: OveroptimisationConfig, chat: Chat, samples: Sequence[Mapping[str, Any]], run: Run, unknown: Removed
) -> dict[int, list[float]]:
    """The gold scores of a stage's kept responses, by iteration. Its prompts are rendered texts: each is known by its row's rendering."""
    from posttrain.data.rows import read_rows

    rows = read_rows(config.training_prompts, "prompt") if config.training_prompts.path else []
    rendered = {chat.decode(chat.prompt(row["prompt"], config.sampling.system_prompt, row.get("tools"))): row for row in rows}
    gold, found = resolve(config.gold), dict[int, list[float]]()
    for sample in samples:
        unknown.seen += 1
        row = rendered.get(sample["prompt"]) if rows else sample
        value = number(gold(row, sample["response"])) if row is not None else math.nan
        if math.isfinite(value):
            found.setdefault(sample["step"], []).append(value)
        else:
            unknown.add("no gold score" if row is not None else "not a prompt of training_prompts", sample)
    unknown.check(config.max_failed_fraction, "samples of a training")
    return found


# --- what the pipeline asks


def uses(config: OveroptimisationConfig) -> list[ModelUse]:
    """What is asked of the models, for the check before anything is loaded."""
    rows = ({"max_prompt_length": config.max_prompt_length, "sampling.max_new_tokens": config.sampling.max_new_tokens},)
    initial = ModelUse(field="policy", model=config.policy, template=config.template, rows=rows)
    proxy = replace(initial, field="proxy", model=config.proxy, kind=REWARD, like="policy")
    trained = [replace(initial, field=f"policies[{i}]", model=model, like="policy") for i, model in enumerate(config.policies)]
    return [initial, proxy, *trained]


def check(config: OveroptimisationConfig) -> list[str]:
    """Prompts that are too long, more of them than may be dropped."""
    from posttrain.estimates import prompt_problems

    return prompt_problems(config, config.policy)


def plan(config: OveroptimisationConfig) -> dict[str, Any]:
    """Prompts, responses of all models and an upper bound on their tokens."""
    from posttrain.estimates import rows_and_tokens

    size = rows_and_tokens(config.prompts, "prompt", config.policy.path)
    if "tokens" not in size:
        return size
    responses = size["rows"] * (config.samples_per_prompt + config.samples_per_policy * len(config.policies))
    return {"prompts": size["rows"], "responses": responses, "tokens at most": responses * config.sampling.max_new_tokens}


def smoke(config: OveroptimisationConfig) -> OveroptimisationConfig:
    """The same stage on 16 prompts with 4 responses each."""
    return replace(config, prompts=replace(config.prompts, limit=16), samples_per_prompt=4, samples_per_policy=1)
