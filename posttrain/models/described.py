"""What a model's small files say about it, read in milliseconds and before any weight: its context, its kind, its tokenizer.

A stage says what it asks of its models with a companion `uses(config) -> list[ModelUse]`; the pipeline holds that against
the files. Only where JSON leaves a doubt is transformers asked, which takes seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import ModelConfig

CAUSAL, REWARD = "causal LM", "reward model"
TEMPLATES = ("auto", "chatml", "raw", "lima", "alpaca")  # the names among what a `template` field may say


@dataclass(frozen=True, kw_only=True)
class ModelUse:
    """What a stage asks of one of its models; `field` is the dotted name of its config in the stage's own."""

    field: str
    model: ModelConfig
    kind: str = CAUSAL
    """CAUSAL or REWARD: which head is needed."""
    rows: tuple[Mapping[str, int], ...] = ()
    """The longest row of each sort that it will read, as a sum of settings: {"max_prompt_length": 512, "sampling.max_new_tokens": 128}."""
    template: str = "auto"
    reads_text: bool = False
    """Whether it reads documents of plain text, which end with EOS."""
    like: str = ""
    """The field of another model of the stage whose tokens and template this one must share."""
    becomes: str = ""
    """CAUSAL or REWARD when the stage's output is this model, trained on."""


@dataclass(frozen=True)
class Description:
    """`context` tokens that the model can be trusted with and its `kind`; 0 and "" where the files don't say."""

    context: int = 0
    kind: str = ""


def describe(model: ModelConfig) -> Description:
    """What config.json says. Raises ValueError for a folder that isn't a model's, and for a hub model that can't be read."""
    folder = Path(model.path).expanduser()
    if folder.suffix == ".gguf":
        return Description(kind=CAUSAL)
    adapter = _read_json(model, "adapter_config.json") if folder.is_dir() else {}
    if adapter:
        base = Path(str(adapter.get("base_model_name_or_path") or ""))
        context = describe(ModelConfig(path=str(base))).context if base.name and base.is_dir() else 0
        return Description(context, REWARD if adapter.get("task_type") == "SEQ_CLS" else CAUSAL)
    config = _read_json(model, "config.json")
    if not config and folder.exists():
        inner = next((name for name in ("model", "world/model") if (folder / name / "config.json").is_file()), "")
        raise ValueError(f"{model.path!r} has no config.json, so it is no model folder" + (f"; '{folder / inner}' works" if inner else ""))
    architectures = config.get("architectures") or []
    if not architectures:
        return Description(_context(config))
    heads = [name.endswith("ForSequenceClassification") for name in architectures]
    return Description(_context(config), REWARD if any(heads) else CAUSAL)


def _context(config: Mapping[str, Any]) -> int:
    """As `posttrain.models.trust.longest_row` reads it: positions, an active window, where longrope changes its frequencies."""
    limits = [config.get("max_position_embeddings") or config.get("n_positions")]
    kinds = config.get("layer_types")
    # a family with a switch for its window says there whether it is active, or leaves it to code that isn't asked here
    if "sliding_attention" in kinds if kinds is not None else "use_sliding_window" not in config:
        limits.append(config.get("sliding_window"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        limits.append(rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=0)


def same_tokens(one: ModelConfig, template: str, other: ModelConfig, other_template: str) -> bool:
    """Whether two models' tokenizers turn text into the same ids under the same chat template."""
    if (one, template) == (other, other_template) or (template == other_template and _contract(one) == _contract(other) != ()):
        return True
    from posttrain.data.chat import Chat

    digests = [Chat.load(m.path, t, revision=m.revision).digest for m, t in ((one, template), (other, other_template))]
    return digests[0] == digests[1]


def _contract(model: ModelConfig) -> tuple[Any, ...]:
    """The files that decide what a text's ids are; () where there are others than these."""
    tokenizer, settings = _read_json(model, "tokenizer.json"), _read_json(model, "tokenizer_config.json")
    if not tokenizer or not settings:
        return ()
    parts = [tokenizer.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    named = [settings.get(name) for name in ("chat_template", "document_end", "eos_token", "bos_token", "add_bos_token")]
    return *parts, *named, tokenizer.get("post_processor"), _read(model, "chat_template.jinja")


def template_problem(model: ModelConfig, template: str, reads_text: bool) -> str:
    """What is wrong with a chat template, or with a tokenizer that lacks the EOS token it needs; "" when nothing is.

    The template itself is proven when the stage loads it.
    """
    if template not in TEMPLATES and "{" not in template and not Path(template).is_file():
        return f"template={template!r} is neither {', '.join(TEMPLATES)}, a file, nor jinja text; 'auto' works"
    settings = _read_json(model, "tokenizer_config.json") if model.path else {}
    named = _read_json(model, "special_tokens_map.json") if settings else {}
    in_doubt = bool(settings) and not settings.get("eos_token") and not named.get("eos_token")
    if not in_doubt or not (reads_text or template == "raw"):
        return ""
    from posttrain.data.chat import Chat  # a tokenizer's class may have an EOS of its own

    try:
        chat = Chat.load(model.path, template, revision=model.revision)
    except ValueError as error:
        return f"{model.path!r}: {error}"
    if reads_text and chat.document_end_id is None:
        return f"{model.path!r} has a tokenizer without EOS, which ends a document of plain text; set its eos_token, or template='chatml'"
    return ""


# --- files


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json of a model folder or a hub model, {} where it can't be had."""
    return _read_json(model, "config.json")


def _read_json(model: ModelConfig, name: str) -> dict[str, Any]:
    """A JSON file of a model, {} where there is none. Raises ValueError for one that isn't JSON."""
    text = _read(model, name)
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} of {model.path!r} is not JSON: {error}") from None


def _read(model: ModelConfig, name: str) -> str:
    """The text of a file of a model folder or hub model, "" where there is none."""
    folder = Path(model.path).expanduser()
    file = folder / name if folder.exists() else _hub_file(model, name)
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


def _hub_file(model: ModelConfig, name: str) -> Path | None:
    """A small file of a hub model: from the local cache, else from the hub. Raises ValueError where access is refused."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model.path, name, revision=model.revision or None))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None  # it has none, or there is no network: then the stage itself will say what it misses
    except HfHubHTTPError as error:  # above all, a model that is shown to its friends only
        raise ValueError(f"{name} of {model.path!r} can't be read from the hub: {str(error).strip().splitlines()[0]}") from None
