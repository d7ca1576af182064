"""Tensors on disk, written whole or not at all; trees are one flat file of tokens."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.packing import Segment, Tree


def save_trees(path: Path, trees: Sequence[Tree], notes: Mapping[str, Any]) -> None:
    """Write trees and JSON notes to `path`."""
    parts = [part for tree in trees for part in tree.segments]
    empty = torch.zeros(0, dtype=torch.int64)
    arrays = {
        "input_ids": torch.cat([part.input_ids for part in parts] or [empty]).to(torch.int32),
        "trainable": torch.cat([part.trainable for part in parts] or [empty.bool()]),
        "lengths": torch.tensor([len(part) for part in parts], dtype=torch.int64),
        "segments": torch.tensor([len(tree.segments) for tree in trees], dtype=torch.int64),
        "ranks": torch.tensor([rank for tree in trees for rank in tree.ranks], dtype=torch.int64),
    }
    save_arrays(path, arrays, {"notes": json.dumps(dict(notes))})


def save_arrays(path: Path, arrays: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(dict(arrays), name, metadata=dict(metadata))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def load_trees(path: Path) -> tuple[list[Tree], dict[str, Any]]:
    """The trees and notes of `save_trees`."""
    with safe_open(str(path), framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        notes = json.loads(file.metadata()["notes"])
    lengths = arrays["lengths"].tolist()
    ids = iter(arrays["input_ids"].long().split(lengths))
    masks = iter(arrays["trainable"].split(lengths))
    ranks = iter(arrays["ranks"].tolist())
    ranked = len(arrays["ranks"]) > 0
    trees = []
    for index, count in enumerate(arrays["segments"].tolist()):
        root, *children = (Segment(next(ids), next(masks)) for _ in range(count))
        order = tuple(next(ranks) for _ in children) if ranked else ()
        trees.append(Tree(root, tuple(children), index=index, ranks=order))
    return trees, notes
