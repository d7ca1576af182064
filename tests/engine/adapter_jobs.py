"""Jobs with adapters that a pair of ranks runs, and that one process runs as well, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig
from posttrain.engine import Engine
from posttrain.engine.inference import infer
from posttrain.models.loading import load_causal_lm, load_roles, load_scalar_model
from posttrain.packing import forest
from tests.engine.jobs import alone, nll, rows
from tests.pairs import run_pair
from tests.tiny import tiny_folder, tiny_tokenizer

LORA = AdapterConfig(rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="constant")


def on(backend: str, job: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """Every rank's result of a job of this file, on "plain" (one process) or a pair of ranks."""
    return [alone(job, **kwargs)] if backend == "plain" else run_pair(backend, f"{__name__}:{job.__name__}", **kwargs)


def base_folder(place: Path, family: str = "llama_tied") -> Path:
    return tiny_folder(place / "base", family)


def train(
    engine: Engine, *, folder: str, steps: int = 3, checkpointing: bool = False, dtype: str = "fp32", quantize: str = "none"
) -> dict[str, Any]:
    """A few updates of a LoRA adapter: losses, norms, the merged weights, and what its reference is."""
    adapter = AdapterConfig(rank=4, alpha=8.0, quantize=quantize)
    config = ModelConfig(path=folder, gradient_checkpointing=checkpointing, dtype=dtype, adapter=adapter)
    model = engine.train(load_causal_lm(config, seed=3), OPTIMIZER, steps, name="policy", ema_decay=0.5)
    reference = engine.reference(model, lambda: load_causal_lm(config))
    start = model.state_dict_full()
    updates = [nll(engine, model, rows(seed=step)) for step in range(steps)]
    with model.gathered():
        sampled = model.module(forest(rows(seed=50)), ("logprobs",))["logprobs"]
    updates.append(nll(engine, model, rows(seed=9)))
    return {
        "norms": [update.grad_norm for update in updates],
        "losses": [update.terms["loss"] for update in updates],
        "start": start,
        "weights": model.state_dict_full(),
        "ema": model.state_dict_full(ema=True),
        "sampled": sampled.cpu(),
        "reference": torch.cat(infer(engine, reference, rows(seed=50), ("logprobs",), 24)["logprobs"]),
        "frozen": reference.state_dict_full(),
        "masters": {master.dtype for master in model.backend.masters()},
    }


def save_and_resume(engine: Engine, *, folder: str, place: str) -> list[dict[str, Any]]:
    """Four updates in one go; then two with a save, and two more in a new engine. The reference is asked for after loading."""

    def leg(start: int, stop: int, save: bool) -> dict[str, Any]:
        config = ModelConfig(path=folder, adapter=LORA)
        model = engine.train(load_causal_lm(config, seed=start), OPTIMIZER, 4, name="policy", ema_decay=0.5)
        engine.seed(7)
        if start:
            engine.load(Path(place), {"policy": model})
        reference = engine.reference(model, lambda: load_causal_lm(config))
        losses = [nll(engine, model, rows(seed=step)).terms for step in range(start, stop)]
        if save:
            engine.save(Path(place), {"policy": model}, {}, {})
        found = {
            "losses": losses,
            "weights": model.state_dict_full(),
            "ema": model.state_dict_full(ema=True),
            "reference": torch.cat(infer(engine, reference, rows(), ("logprobs",), 24)["logprobs"]),
        }
        engine.close()
        return found

    return [leg(0, 4, False), leg(0, 2, True), leg(2, 4, False)]


def continue_adapter(engine: Engine, *, folder: str, place: str, **shape: Any) -> dict[str, Any]:
    """An adapter from its folder: what it and its reference say before an update, after it, and after a checkpoint was loaded."""
    config = ModelConfig(path=folder, adapter=AdapterConfig(**{"rank": 4, "alpha": 8.0, **shape}))
    found = {}
    for step in ("first", "resumed"):
        model = engine.train(load_causal_lm(config), OPTIMIZER, 4, name="policy")
        if step == "resumed":
            engine.load(Path(place), {"policy": model})
        reference = engine.reference(model, lambda: load_causal_lm(config))
        with model.gathered():  # after it a sharded backend hooks everything anew, what was added since as well
            model.module(forest(rows()), ("logprobs",))
        before = torch.cat(infer(engine, model, rows(), ("logprobs",), 24)["logprobs"])
        update = nll(engine, model, rows())
        if step == "first":
            engine.save(Path(place), {"policy": model}, {}, {})
        after = torch.cat(infer(engine, model, rows(), ("logprobs",), 24)["logprobs"])
        frozen = torch.cat(infer(engine, reference, rows(), ("logprobs",), 24)["logprobs"])
        found[step] = {"before": before, "after": after, "reference": frozen, "norm": update.grad_norm}
        engine.close()
    return found


def export(engine: Engine, *, folder: str, out: str, merge: bool, **adapter: Any) -> Tensor:
    """A policy's log-probabilities after two updates; its folder is written to `out`."""
    config = ModelConfig(path=folder, adapter=AdapterConfig(**{"rank": 4, "alpha": 8.0, "merge": merge, **adapter}))
    model = engine.train(load_causal_lm(config, seed=1), OPTIMIZER, 2, name="policy", ema_decay=0.5)
    for step in range(2):
        nll(engine, model, rows(seed=step))
    engine.export(model, Path(out), tiny_tokenizer())
    engine.export(model, Path(f"{out}_ema"), tiny_tokenizer(), ema=True)
    with model.evaluating():
        return model.logprobs(forest(rows())).cpu()


def export_reward_model(engine: Engine, *, folder: str, out: str, merge: bool, **adapter: Any) -> Tensor:
    """A reward model's scores after two updates; its folder is written to `out`, with a bias of 0.25."""
    config = ModelConfig(path=folder, adapter=AdapterConfig(**{"rank": 4, "alpha": 8.0, "merge": merge, **adapter}))
    model = engine.train(load_scalar_model(config, fresh_head=True, seed=1), OPTIMIZER, 2, name="reward_model")
    for step in range(2):
        value_update(engine, model, step)
    engine.export(model, Path(out), tiny_tokenizer(), extra_files={"reward_calibration.json": '{"bias": 0.25, "mean": 0.0, "std": 1.0}'})
    with model.evaluating():
        return model.scores(forest(rows())).cpu() - 0.25


def value_update(engine: Engine, model: Any, seed: int) -> None:
    batch = engine.pack(rows(seed=seed), 24)
    with engine.update(model) as update:
        for micro in batch.micro_batches():
            error = (model.values(micro) - 1.0) * micro.trainable
            update.backward(error.square().sum(), over=batch.num_tokens)


def four_roles(engine: Engine, *, policy: str, reward_model: str, shared: bool, place: str, checkpointing: bool = False) -> dict[str, Any]:
    """Three rounds of a policy update against its reference and the reward model's scores, and a critic update; weights, scores, saves."""
    ask = ModelConfig(path=policy, adapter=LORA, gradient_checkpointing=checkpointing)
    give = ModelConfig(path=reward_model, adapter=LORA)
    if shared:
        modules = tuple(load_roles(ask, give, tiny_tokenizer(), seed=1))
    else:
        modules = (load_causal_lm(ask, seed=1), *(load_scalar_model(give, fresh_head=False) for _ in range(2)))
    trained_policy = engine.train(modules[0], OPTIMIZER, 3, name="policy", ema_decay=0.5)
    critic = engine.train(modules[1], OptimizerConfig(lr=3e-2, schedule="constant"), 3, name="critic")
    judge = engine.freeze(modules[2], name="reward_model")
    reference = engine.reference(trained_policy, lambda: load_causal_lm(ask))
    trees = rows(3, seed=9)

    def standing() -> dict[str, Tensor]:
        wants = ((trained_policy, "logprobs"), (critic, "values"), (judge, "scores"), (reference, "logprobs"))
        return {model.name: torch.stack([x.sum() for x in infer(engine, model, trees, (want,), 60)[want]]) for model, want in wants}

    trail = [standing()]
    for step in range(3):
        batch = engine.pack(rows(seed=step), 40)
        with engine.update(trained_policy) as update:
            for micro in batch.micro_batches():
                logprobs = trained_policy.logprobs(micro)  # another role runs between this forward and its backward
                target = reference.logprobs(micro) + judge.scores(micro)[micro.response_of]
                update.backward(((logprobs - target) * micro.trainable).square().sum(), over=batch.num_tokens)
        trail.append(standing())
        value_update(engine, critic, step)
        trail.append(standing())
    engine.save(Path(place) / "step_000003", {"policy": trained_policy, "critic": critic}, {}, {})
    for model, folder in ((trained_policy, "model"), (critic, "critic")):
        engine.export(model, Path(place) / folder, tiny_tokenizer())
    weights = {model.name: model.state_dict_full() for model in (trained_policy, critic, judge, reference)}
    value_update(engine, critic, 7)
    nll(engine, trained_policy, rows(seed=7))
    engine.load(Path(place) / "step_000003", {"policy": trained_policy, "critic": critic})
    again = {model.name: model.state_dict_full() for model in (trained_policy, critic)}
    return {"trail": trail, "weights": weights, "again": again, "training": modules[0].hf.training}
