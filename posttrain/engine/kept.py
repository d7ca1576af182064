"""Log-probabilities of responses under the weights that a stage starts from, computed once and kept on disk.

Before its first step a policy is its own reference, adapters and precision included: so they are taken from the policy,
and no second model is loaded. They are kept in parts, each under a digest of the weights and of the part's tokens, which
hold what the tokenizer and the template made of the rows: a pass that was interrupted goes on where it stopped, and
another stage with the same start finds them there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.data.store import save_arrays
from posttrain.engine.inference import infer
from posttrain.packing import Tree

if TYPE_CHECKING:
    from posttrain.engine.engine import Engine
    from posttrain.engine.model import FrozenModel

VERSION = 1
PART = 1024  # trees in a file: what an interrupted pass does again at most


def sequence_logprobs(
    engine: Engine, model: FrozenModel, trees: Sequence[Tree], max_tokens: int, progress: Callable[[int], None] | None = None
) -> Tensor:
    """log pi of each response of a global batch, summed over its trainable tokens: (B,) on every rank's CPU.

    In fp64, as what is read from them is small differences between sums of hundreds of nats.
    """
    logprobs = infer(engine, model, trees, ("logprobs",), max_tokens, progress=progress)["logprobs"]
    return torch.stack([own.sum(dtype=torch.float64) for own in logprobs])


def kept_logprobs(
    engine: Engine,
    model: FrozenModel,
    trees: Sequence[Tree],
    max_tokens: int,
    folder: Path,
    after_part: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """`sequence_logprobs`, read from `folder` as far as it has them, else computed and put there.

    `after_part` is called, by every rank, with the number of trees that are done each time some have been computed.
    """
    weights = weights_digest(model) if trees else ""
    parts = [torch.zeros(0, dtype=torch.float64)]
    for first in range(0, len(trees), PART):
        part = trees[first : first + PART]
        path = folder / f"logprobs-{_digest(weights, part)}.safetensors"
        found = engine.world.first_says(partial(_read, path), "reading log-probabilities")
        if found is None:
            found = sequence_logprobs(engine, model, part, max_tokens)
            engine.world.first_says(partial(save_arrays, path, {"logprobs": found}, {}), "keeping log-probabilities")
            after_part(first + len(part))
        parts.append(found)
    return torch.cat(parts)


def weights_digest(model: FrozenModel) -> str:
    """sha256 of a model's weights and of the precision that it computes in, on rank 0; of no meaning elsewhere. Collective."""
    digest = hashlib.sha256(f"{VERSION} {getattr(model.backend, 'dtype', None)}".encode())
    with model.world.phase(f"digest of {model.name}"):
        for name, value in model.module.state_dict(keep_vars=True).items():
            with model.backend.whole([value] if isinstance(value, torch.nn.Parameter) else []):
                if model.world.is_main:
                    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                    digest.update(_bytes(value))
    return digest.hexdigest()


def _digest(weights: str, trees: Sequence[Tree]) -> str:
    digest = hashlib.sha256(weights.encode())
    for tree in trees:
        digest.update(f"tree {[len(part) for part in tree.segments]}".encode())
        for part in tree.segments:
            digest.update(_bytes(part.input_ids) + _bytes(part.trainable))
    return digest.hexdigest()[:32]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _read(path: Path) -> Tensor | None:
    return load_file(path)["logprobs"] if path.exists() else None
