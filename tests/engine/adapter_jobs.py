"""Jobs with adapters that a pair of ranks runs, and that one process runs as well, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.config import AdapterConfig, ModelConfig, OptimizerConfig
from posttrain.engine import Engine
from posttrain.engine.inference import infer
from posttrain.models.loading import load_causal_lm
from posttrain.packing import forest
from tests.engine.jobs import alone, nll, rows
from tests.pairs import run_pair
from tests.tiny import tiny_folder

LORA = AdapterConfig(rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="constant")


def on(backend: str, job: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """Every rank's result of a job of this file, on "plain" (one process) or a pair of ranks."""
    return [alone(job, **kwargs)] if backend == "plain" else run_pair(backend, f"{__name__}:{job.__name__}", **kwargs)


def base_folder(place: Path, family: str = "llama_tied") -> Path:
    return tiny_folder(place / "base", family)


def train(engine: Engine, *, folder: str, steps: int = 3, checkpointing: bool = False, **adapter: Any) -> dict[str, Any]:
    """A few updates of a LoRA adapter: losses, norms, the merged weights, and whether anything else moved."""
    config = ModelConfig(path=folder, gradient_checkpointing=checkpointing, adapter=AdapterConfig(**{"rank": 4, "alpha": 8.0, **adapter}))
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
    }
