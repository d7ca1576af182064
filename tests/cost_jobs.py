"""What a pair of ranks, or one process, counts of an update: bytes that are held and bytes that travel."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.engine import Engine
from tests.engine import jobs

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
SMALL = 1000  # bytes; losses, norms and flags of an update travel too


def held_storages() -> dict[int, int]:
    """Bytes of every tensor storage of this process by its address; gradients have no Python object of their own until asked for."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided]
    found = [thing for thing in found if not torch._is_functional_tensor(thing)]  # tracing leaves some behind, without storage
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that enter each collective, whoever calls it: torch.distributed's functions, and DeepSpeed's methods over them."""
    volumes: Counter[str] = Counter()
    depth = [0]
    backend = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
    places = [(dist, name) for name in COLLECTIVES] + [(backend, name) for name in COLLECTIVES if backend is not None]
    originals = [(place, name, getattr(place, name)) for place, name in places]

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            size = max(t.numel() * t.element_size() for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            if not depth[0] and size > SMALL:
                volumes[name.removesuffix("_into_tensor").removesuffix("_tensor")] += size
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for place, name, original in originals:
        setattr(place, name, counting(name, original))
    try:
        yield volumes
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def update(engine: Engine, *, dtype: str = "float32", terms: int = 1, ema: float = 0.0, whole: bool = True) -> dict[str, Any]:
    """The second update of a small model: what it holds after its last backward, and what it sends.

    Without `whole`, ZeRO-3 shards every weight again as soon as it was used, as it must when the model is large.
    """
    options = engine.world.launch.zero_options
    if not whole:
        options.update(stage3_max_live_parameters=0, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    before = held_storages()
    module = jobs.packed(hidden=128, dtype=getattr(torch, dtype))
    model = engine.train(module, OptimizerConfig(lr=1e-3), 4, name="policy", ema_decay=ema)
    for number in range(2):
        batch, text = engine.pack(jobs.rows(8, seed=number), 24), engine.pack(jobs.rows(3, seed=100), 24)
        with counted() as volumes, engine.update(model) as step:
            for micro in batch.micro_batches():
                step.backward(-model.logprobs(micro).sum(), over=batch.num_tokens)
            for micro in text.micro_batches() if terms == 2 else ():
                step.backward(-model.logprobs(micro).sum(), over=text.num_tokens, label="ptx")
            held = {place: size for place, size in held_storages().items() if place not in before}
    for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
        options.pop(name, None)
    micro_batches = len(batch.rows) + (len(text.rows) if terms == 2 else 0)
    after = sum(size for place, size in held_storages().items() if place not in before)
    return {"held": sum(held.values()), "after": after, "volumes": dict(volumes), "micro_batches": micro_batches}


def save(engine: Engine, *, folder: str) -> None:
    """A checkpoint of a model that has made a step."""
    model = engine.train(jobs.packed(hidden=128), OptimizerConfig(lr=1e-3), 4, name="policy", ema_decay=0.5)
    jobs.nll(engine, model, jobs.rows())
    engine.save(Path(folder), {"policy": model}, {}, {})
