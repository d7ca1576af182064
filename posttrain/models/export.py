"""Models leave as plain Hugging Face folders, which are reopened and compared before they get their name."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

MANIFEST = "export.json"
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece", "additional_chat")
PROBED_PARAMETERS = 2_000_000_000  # logits are compared up to this size; keys and tensors always


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they would say is checked and raised here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_model(
    hf: Any, state_dict: Mapping[str, Tensor] | None, tokenizer: Any, folder: str | Path, extra_files: Mapping[str, str] | None = None
) -> str:
    """Write a transformers model, its tokenizer and `extra_files` {name: text} to `folder`; returns the content digest.

    `state_dict` has the full weights on the CPU under the names of `hf`'s own state dict (None: those of `hf` itself, which
    may be empty shells where a backend shards them). The folder is written under a temporary name, reopened with
    transformers, compared tensor by tensor and by its logits, and only then renamed; an older folder of the name is replaced.
    Raises ValueError for a missing, unexpected, empty or non-finite tensor; nothing is left behind then.
    """
    folder = Path(folder)
    weights = {name: tensor.detach() for name, tensor in (hf.state_dict() if state_dict is None else state_dict).items()}
    for name, tensor in weights.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is {'empty' if tensor.numel() == 0 else 'not finite'}; {folder} was not written")
    plain = _plain_model(hf, weights, tokenizer, folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with quiet():
            plain.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text)
        _verify(temporary, plain)
        return seal(temporary, folder, {"model_class": type(hf).__name__})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(temporary: Path, folder: Path, about: Mapping[str, Any]) -> str:
    """Write the manifest of a finished folder, `about` in it, flush everything and give it its name; returns the content digest."""
    digest = content_digest(temporary)
    manifest = {"digest": digest, "tokenizer": tokenizer_digest(temporary), **about}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _flush(*temporary.rglob("*"), temporary)
    _swap(temporary, folder)
    return digest


def _plain_model(hf: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path) -> Any:
    """A model of the same class with transformers' own attention and head, holding the given weights."""
    config = copy.deepcopy(hf.config)
    if config.pad_token_id is None and tokenizer is not None and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id  # a plain classifier finds the last token of padded rows by it
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    with quiet():
        plain, info = type(hf).from_pretrained(  # shares the storage of the weights
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    _clean(info, folder)
    if plain.can_generate():
        plain.generation_config = copy.deepcopy(hf.generation_config)
        plain.generation_config.eos_token_id = _ends(plain.generation_config.eos_token_id, tokenizer)
        # hub models that name a temperature without sampling load with a warning, but refuse to be saved
        try:
            plain.generation_config.validate(strict=True)
        except ValueError:
            plain.generation_config.do_sample = True
    return plain.eval()


def _ends(known: int | list[int] | None, tokenizer: Any) -> int | list[int] | None:
    """The ids that end a generation: the tokenizer's EOS, which training taught, before those that the model came with."""
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    return ends[0] if len(ends) == 1 else ends or None


def _clean(info: Mapping[str, Any], folder: Path) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise ValueError(f"{folder} would have {kind.replace('_', ' ')}: {', '.join(map(str, list(info[kind])[:5]))}")


@torch.no_grad()
def _verify(folder: Path, plain: Any) -> None:
    """Read the files back: the same tensors, no more and no fewer, and the same logits on a short input."""
    expected = plain.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if name not in expected or not torch.equal(tensors.get_tensor(name), expected[name].cpu()):
                    raise ValueError(f"{file.name}: {name} was not read back as it was written; is the disk all right?")
    with quiet():
        reopened, info = type(plain).from_pretrained(folder, dtype=plain.dtype, attn_implementation="eager", output_loading_info=True)
    _clean(info, folder)
    if plain.num_parameters() > PROBED_PARAMETERS:
        return
    size = plain.get_input_embeddings().num_embeddings
    tokens = (torch.arange(8)[None] * 7 + 3) % size
    if not torch.equal(reopened.eval()(input_ids=tokens).logits, plain(input_ids=tokens).logits):
        raise ValueError(f"{folder}: the reopened model gives other logits than the one that was written")


def content_digest(folder: str | Path) -> str:
    """sha256 over the names and contents of all files in a folder but its manifest."""
    return _digest(Path(folder), lambda name: name != MANIFEST)


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 over the tokenizer's files in a model folder."""
    return _digest(Path(folder), lambda name: name.startswith(TOKENIZER_FILES))


def _digest(folder: Path, chosen: Any) -> str:
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if chosen(name):
            with file.open("rb") as stream:
                total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _flush(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _swap(temporary: Path, folder: Path) -> None:
    """Give the finished folder its name; the one that had it before goes only afterwards."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
