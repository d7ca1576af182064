"""Jobs that a pair of ranks runs, and that one process runs as well, to compare with."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.config import OptimizerConfig
from posttrain.engine import Engine
from posttrain.models.model import PackedModel
from posttrain.packing import PackedBatch, Tree, pack, segment
from tests.tiny import tiny_model


def packed(family: str = "llama", **shape: Any) -> PackedModel:
    return PackedModel(tiny_model(family, **shape))


def rows(count: int = 5, seed: int = 0) -> list[Tree]:
    """Ragged conversations of 4 to 20 tokens, half of each trained."""
    draw = torch.Generator().manual_seed(seed)
    trees = []
    for i in range(count):
        length = int(torch.randint(4, 21, (1,), generator=draw))
        ids = torch.randint(5, 300, (length,), generator=draw).tolist()
        trees.append(Tree(segment(ids, [False] * (length // 2) + [True] * (length - length // 2)), index=i))
    return trees


def batch(engine: Engine, trees: list[Tree], max_tokens: int = 24) -> PackedBatch:
    return pack(trees, max_tokens, world_size=engine.world.size, rank=engine.world.rank, device=engine.world.device)


def train(
    engine: Engine, *, family: str = "llama", steps: int = 3, count: int = 5, max_tokens: int = 24, ptx_coef: float = 0.0, **optimizer: Any
) -> dict[str, Any]:
    """A few steps of NLL, plus `ptx_coef` times another NLL: what every backend must do alike."""
    config = OptimizerConfig(**{"lr": 1e-2, "weight_decay": 0.1, **optimizer})
    model = engine.train(packed(family), config, steps, name="policy")
    history = []
    for step in range(steps):
        main, text = batch(engine, rows(count, seed=step), max_tokens), batch(engine, rows(3, seed=100 + step), max_tokens)
        with engine.update(model) as update:
            for micro in main.micro_batches():
                update.backward(-model.logprobs(micro).sum(), over=main.num_tokens)
            if ptx_coef:
                for micro in text.micro_batches():
                    update.backward(-model.logprobs(micro).sum(), over=text.num_tokens, weight=ptx_coef, label="ptx")
        history.append(dict(terms=update.terms, norm=update.grad_norm, lr=update.lr, term_norms=update.term_norms, stepped=update.stepped))
    return {"history": history, "steps": model.steps, "weights": model.state_dict_full()}
