"""Model folders, hub models and GGUF files become packed models, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from posttrain.config import ModelConfig
from posttrain.models.attention import NAME
from posttrain.models.model import PackedModel, set_dropout
from posttrain.models.trust import check_config, longest_row, probe

CALIBRATION_FILE = "reward_calibration.json"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a reward model's folder says about its scores.

    `bias` is subtracted from the raw score, so that demonstrations score 0 on average (InstructGPT, section 3.5);
    `mean` and `std` are those of held-out scores after that.
    """

    bias: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_calibration(folder: str | Path) -> Calibration:
    """The calibration of a reward model's folder; the neutral one where there is no file. Raises ValueError on a bad file."""
    path = Path(folder) / CALIBRATION_FILE
    if not path.is_file():
        return Calibration()
    try:
        return Calibration(**{name: float(value) for name, value in json.loads(path.read_text()).items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a calibration ({error}); {{"bias": 0.0, "mean": 0.0, "std": 1.0}} works') from None


def load_causal_lm(config: ModelConfig, tokenizer: Any = None) -> PackedModel:
    """A causal LM from a folder, the hub or a .gguf file, ready to be trained on packed rows; all dropout is 0.

    Where `tokenizer` is longer than the embeddings, they grow; the new rows are the mean of the old ones.
    Raises ValueError when the model can't be packed exactly, or when its files lack a tensor.
    """
    hf, info = _read(config, AutoModelForCausalLM)
    if any(name.endswith("ForSequenceClassification") for name in hf.config.architectures or ()):
        raise ValueError(f"model.path={config.path!r} is a reward model, without an LM head; the folder of a causal LM works")
    _complete(config, info, but=())
    return _packed(config, hf, tokenizer)


def load_scalar_model(config: ModelConfig, *, fresh_head: bool, seed: int = 0, tokenizer: Any = None) -> PackedModel:
    """A transformer with a scalar head on its hidden states: a reward model or a critic.

    With `fresh_head`, from a causal LM, the head drawn from N(0, 1 / (d + 1)) (variance; Huang et al. 2024, N+ implementation
    details). Without, from a reward model's folder, whose calibration bias is applied to scores and values.
    Raises ValueError naming the folder when its head is missing or has another shape.
    """
    hf, info = _read(config, AutoModelForSequenceClassification)
    head = getattr(hf, "score", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(hf).__name__} has no linear head named score, so it can't be a reward model; {config.path!r} was given")
    if fresh_head:
        _complete(config, info, but=("score.weight",))
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
        head.weight.data.copy_(weight)
        return _packed(config, hf, tokenizer)

    wrong = [name for name in (*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])) if name.startswith("score.")]
    if wrong:
        how = "is missing" if wrong[0] in info["missing_keys"] else "has another shape than (1, hidden size)"
        raise ValueError(
            f"model.path={config.path!r} is not a reward model: its scalar head {wrong[0]} {how}; "
            "the output folder of a reward_model stage works (AutoModelForSequenceClassification with num_labels=1)"
        )
    _complete(config, info, but=())
    model = _packed(config, hf, tokenizer)
    model.calibration = (read_calibration(config.path).bias, 1.0)
    return model


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


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that weights are held in: `auto` is bf16 where there is CUDA and fp32 elsewhere."""
    auto = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[auto if config.dtype == "auto" else config.dtype]


def _read(config: ModelConfig, auto: Any) -> tuple[Any, dict]:
    """The transformers model and what loading it found missing, unexpected or mis-shaped; refused before any weight is read."""
    path = Path(config.path)
    if not path.exists() and (path.is_absolute() or config.path.startswith(".") or config.path.endswith(".gguf")):
        raise ValueError(f"model.path={config.path!r} does not exist; a model folder, a .gguf file or a hub id works")
    folder, source = config.path, {"revision": config.revision or "main"}
    if path.suffix == ".gguf":
        folder, source = str(path.parent), {"gguf_file": path.name}
    shape = AutoConfig.from_pretrained(folder, **source)
    classes = auto._model_mapping
    if type(shape) not in classes:
        kind = auto.__name__.removeprefix("AutoModelFor")
        raise ValueError(f"model.path={config.path!r} is a {shape.model_type} model, which transformers has no {kind} for")
    check_config(shape, classes[type(shape)])
    probe(shape)
    options: dict[str, Any] = dict(source, dtype=compute_dtype(config), attn_implementation=NAME, output_loading_info=True)
    if auto is AutoModelForSequenceClassification:
        options.update(num_labels=1, ignore_mismatched_sizes=True)
    with quiet():
        hf, info = auto.from_pretrained(folder, **options)
    return (_unquantized(hf) if path.suffix == ".gguf" else hf), info


def _unquantized(hf: Any) -> Any:
    """The same weights in a model that doesn't remember its GGUF file, which transformers refuses to save."""
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    weights = dict(hf.state_dict())
    with quiet():
        fresh = type(hf).from_pretrained(None, config=hf.config, state_dict=weights, dtype=hf.dtype, attn_implementation=NAME)
    if hf.can_generate():
        fresh.generation_config = hf.generation_config
    return fresh


def _complete(config: ModelConfig, info: dict, but: tuple[str, ...]) -> None:
    """Raises ValueError unless every tensor of the model was in its files, with the right shape."""
    mismatched = [key[0] for key in info["mismatched_keys"]]
    lacking = sorted(name for name in {*info["missing_keys"], *mismatched} if name not in but)
    if lacking:
        listed = ", ".join(lacking[:3]) + (" ..." if len(lacking) > 3 else "")
        raise ValueError(f"model.path={config.path!r} lacks {len(lacking)} tensors or has them in another shape: {listed}")


def _packed(config: ModelConfig, hf: Any, tokenizer: Any) -> PackedModel:
    if tokenizer is not None:
        grow_embeddings(hf, len(tokenizer))
    set_dropout(hf, 0.0)
    model = PackedModel(hf, attention=config.attention, longest_row=longest_row(hf.config))
    if config.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    return model


@torch.no_grad()
def grow_embeddings(hf: Any, size: int) -> None:
    """Give the embeddings, and the LM head, at least `size` rows; the new rows are the mean of the old ones."""
    old = hf.get_input_embeddings().num_embeddings
    if size <= old:
        return
    hf.resize_token_embeddings(size, mean_resizing=False)
    head = hf.get_output_embeddings()
    for table in (hf.get_input_embeddings().weight, *(() if head is None else (head.weight, head.bias))):
        if table is not None:
            table[old:] = table[:old].float().mean(0).to(table.dtype)
