"""Adapter folders: peft's format, with the base's path and digest, and everything else that a model folder has.

adapter_config.json  adapter_model.safetensors    what peft.PeftModel.from_pretrained reads
config.json  tokenizer files                      the base's, so that whoever asks what the folder is finds out
reward_calibration.json                           beside the adapter of a reward model
export.json                                       digests: the folder's, the tokenizer's, the base's
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.config import AdapterConfig, ModelConfig
from posttrain.models.adapters import Adapter, BaseModel
from posttrain.models.export import MANIFEST, seal

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "score.weight"
# fields of peft's config that change what the numbers mean, and the values under which they don't
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What an adapter folder says: the adapter's shape, its base (with the digest that was recorded, "" where none was), its weights
    under peft's names without prefix, and the scalar head of a reward model ({} for a causal LM)."""

    path: str
    config: AdapterConfig
    base: BaseModel
    weights: Mapping[str, Tensor]
    head: Mapping[str, Tensor]

    @property
    def is_reward_model(self) -> bool:
        return bool(self.head)


def is_adapter_folder(path: str | Path) -> bool:
    return (Path(path) / ADAPTER_CONFIG).is_file()


def read_adapter(path: str) -> AdapterFolder:
    """Read an adapter folder, this project's or another's in peft's format.

    Raises ValueError when it is no plain LoRA, when its base is gone, or is not the one that the adapter was trained on.
    """
    folder = Path(path)
    said = json.loads((folder / ADAPTER_CONFIG).read_text())
    for key, plain in PLAIN.items():
        if key in said and said[key] not in plain:
            raise ValueError(f"{folder / ADAPTER_CONFIG} has {key}={said[key]!r}; only plain LoRA is read, {key}={plain[0]!r} works")
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    recorded = manifest.get("base", {})
    base = BaseModel(path=said["base_model_name_or_path"] or "", revision=said.get("revision") or "", digest=recorded.get("digest", ""))
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    config = AdapterConfig(
        rank=said["r"],
        alpha=float(said["lora_alpha"]),
        dropout=float(said.get("lora_dropout") or 0.0),
        targets=tuple(manifest.get("targets", ())),
        quantize=manifest.get("quantize", "none"),
        merge=False,
    )
    found = AdapterFolder(
        path=path,
        config=config,
        base=base,
        weights={name: value for name, value in tensors.items() if ".lora_" in name},
        head={name: value for name, value in tensors.items() if name == HEAD},
    )
    _check_base(found)
    return found


def _check_base(found: AdapterFolder) -> None:
    where = Path(found.base.path)
    if (where.is_absolute() or found.base.path.startswith(".")) and not where.exists():
        raise ValueError(
            f"{found.path} is an adapter of {found.base.path}, which does not exist; "
            f"put the base back, or write where it is as base_model_name_or_path into {ADAPTER_CONFIG}"
        )
    if found.base.digest and (now := base_digest(found.base)) != found.base.digest:
        raise ValueError(
            f"{found.path} is an adapter of {found.base.path} with the digest {found.base.digest[:16]}, but the weights there have "
            f"{now[:16]} now: they were changed after the adapter was trained; the original weights work"
        )


def check_agreement(asked: AdapterConfig, found: AdapterFolder, names: list[str]) -> None:
    """Raises ValueError unless an adapter to be continued has the shape that the config asks for; `names` are the layers asked for."""
    differences = [
        f"{key}={getattr(asked, key)} (the folder has {getattr(found.config, key)})"
        for key in ("rank", "alpha")
        if getattr(asked, key) != getattr(found.config, key)
    ]
    has = {name.rpartition(".lora_")[0] for name in found.weights}
    if has != set(names):
        mine, theirs = (", ".join(sorted({name.rsplit(".", 1)[-1] for name in side})) for side in (names, has))
        differences.append(f"targets={asked.targets}, which are {mine} (the folder has {theirs})")
    if differences:
        works = f"adapter.rank={found.config.rank} and alpha={found.config.alpha} with the folder's targets continue it"
        raise ValueError(
            f"{found.path} is an adapter that would be continued, but adapter.{' and '.join(differences)} disagree with it; {works}, "
            f"`{merge_command(found.path)}` makes a base of it for a new one"
        )


def merge_command(folder: str) -> str:
    """The command that turns an adapter folder into a plain model folder."""
    return f"python -m posttrain merge {folder} {str(folder).rstrip('/')}_merged"


def base_digest(base: BaseModel) -> str:
    """sha256 over the names and contents of a base's weight files, wherever they are."""
    files = _weight_files(base)
    return _digest_of(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def _weight_files(base: BaseModel) -> list[Path]:
    place = Path(base.path)
    if place.suffix == ".gguf":
        return [place]
    if not place.is_dir():
        from transformers.utils import cached_file

        place = Path(str(cached_file(base.path, "config.json", revision=base.revision or "main"))).parent
    found = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    return [file for file in found if file.name != ADAPTER_WEIGHTS]


@lru_cache
def _digest_of(files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, *_ in files:
        with open(name, "rb") as stream:
            total.update(f"{Path(name).name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def write_adapter(
    adapter: Adapter,
    hf: Any,
    weights: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    tokenizer: Any,
    folder: str | Path,
    extra_files: Mapping[str, str] | None = None,
) -> str:
    """Write an adapter folder; returns its content digest. `weights` and `head` are what `AdapterFolder` says.

    Written under a temporary name, read back and compared, then renamed. Raises ValueError for an empty or non-finite tensor;
    nothing is left behind then.
    """
    from peft import LoraConfig

    folder = Path(folder)
    tensors = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in {**weights, **head}.items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is {'empty' if tensor.numel() == 0 else 'not finite'}; {folder} was not written")
    base = replace(adapter.base, digest=adapter.base.digest or base_digest(adapter.base))
    place = Path(base.path)
    said = LoraConfig(
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.config.dropout,
        target_modules=sorted({name.rpartition(".lora_")[0] for name in weights}),
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=["score"] if head else None,
        base_model_name_or_path=str(place.resolve()) if place.exists() else base.path,
        revision=base.revision or None,
        fan_in_fan_out=any(getattr(module, "fan_in_fan_out", False) for module in hf.modules()),
        inference_mode=True,
    )
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        said.save_pretrained(str(temporary))
        save_file(tensors, temporary / ADAPTER_WEIGHTS, {"format": "pt"})
        config = copy.deepcopy(hf.config)
        config.architectures = [type(hf).__name__]
        config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text)
        read_back = load_file(temporary / ADAPTER_WEIGHTS)
        if read_back.keys() != tensors.keys() or not all(torch.equal(read_back[name], value) for name, value in tensors.items()):
            raise ValueError(f"{ADAPTER_WEIGHTS} was not read back as it was written; is the disk all right?")
        about = {
            "model_class": type(hf).__name__,
            "base": asdict(base),
            "targets": list(adapter.config.targets),
            "quantize": adapter.config.quantize,
        }
        return seal(temporary, folder, about)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge(folder: str, out: str | Path) -> str:
    """Write the plain model that an adapter folder means, verified; returns its content digest.

    Raises ValueError when `folder` is no adapter folder.
    """
    from transformers import AutoTokenizer

    from posttrain.models.export import write_model
    from posttrain.models.loading import CALIBRATION_FILE, load_causal_lm, load_scalar_model

    if not is_adapter_folder(folder):
        raise ValueError(
            f"{folder} is no adapter folder ({ADAPTER_CONFIG} is missing); the output of a stage with adapter.merge=False works"
        )
    config, source = ModelConfig(path=str(folder), dtype="fp32" if _is_fp32(folder) else "bf16"), read_adapter(str(folder))
    model = load_scalar_model(config, fresh_head=False) if source.is_reward_model else load_causal_lm(config)
    words = folder if (Path(folder) / "tokenizer_config.json").is_file() else source.base.path
    calibration = Path(folder) / CALIBRATION_FILE
    extra = {CALIBRATION_FILE: calibration.read_text()} if calibration.is_file() else None
    return write_model(model.hf, None, AutoTokenizer.from_pretrained(words), out, extra)


def _is_fp32(folder: str) -> bool:
    said = json.loads((Path(folder) / "config.json").read_text()) if (Path(folder) / "config.json").is_file() else {}
    return said.get("dtype", said.get("torch_dtype", "float32")) == "float32"
