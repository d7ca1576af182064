"""What every config shares: problems found before anything runs, a JSON round trip, and what identifies a stage.

A config is a frozen dataclass of bool, int, float, str, tuples of these and nested configs, so that it is always JSON
and always a command line. Nothing is optional by union: "", 0 and False mean "off". Functions are named
"package.module:function"; the output of another stage of the pipeline is named "@stage".
Imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "VLLMConfig",
    "did_you_mean",
    "from_json",
    "gather_problems",
    "has_type_problems",
    "is_runtime",
    "replace",
    "resolve",
    "runtime",
    "runtime_factory",
    "semantic",
    "to_json",
    "type_hints",
    "when",
]

Config = TypeVar("Config")
T = TypeVar("T")


def runtime(default: T) -> T:
    """A field that may change between two runs of one stage (budgets, intervals): left out of the stage's identity."""
    return typing.cast(T, field(default=default, metadata={"runtime": True}))


def runtime_factory(factory: Callable[[], T]) -> T:
    """Like `runtime`, for defaults that must be made anew."""
    return typing.cast(T, field(default_factory=factory, metadata={"runtime": True}))


def is_runtime(a_field: Any) -> bool:
    """Whether a dataclass field was declared with `runtime`."""
    return bool(a_field.metadata.get("runtime", False))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known word, or a list, of 40 at the most, when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(known[:40])}{', …' if len(known) > 40 else ''}" if known else ""


def when(*cases: tuple[bool, str]) -> list[str]:
    """The texts of the cases that hold: `when((self.lr < 0, f"lr={self.lr} must not be negative; 1e-5 works"))`."""
    return [text for holds, text in cases if holds]


# --- types


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """The types of a config's fields, resolved."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(typing.cast(Any, cls))}


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def _item_types(hint: Any, count: int) -> list[Any] | None:
    """The types of a tuple's items, or None when the number of items is wrong."""
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        return [args[0]] * count
    return list(args) if len(args) == count else None


def _type_problems(value: Any, hint: Any, name: str) -> list[str]:
    """What is wrong with the type of one value; nested configs answer for themselves."""
    if typing.get_origin(hint) is tuple:
        items = _item_types(hint, len(value)) if isinstance(value, tuple) else None
        if items is None:
            return [f"{name}={value!r} must be a {_type_name(hint)}"]
        return [text for i, item in enumerate(items) for text in _type_problems(value[i], item, f"{name}[{i}]")]
    if is_dataclass(hint):
        return [] if isinstance(value, typing.cast(type, hint)) else [f"{name}={value!r} must be a {_type_name(hint)}"]
    if hint not in (bool, int, float, str):
        return [f"{name} is declared as {_type_name(hint)}, which a config cannot hold; bool, int, float, str, tuples and configs work"]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return []
    # a bool is an int to Python, but `epochs=True` is a mistake
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        return [f"{name}={value!r} must be of type {_type_name(hint)}, not {type(value).__name__}"]
    if hint is float and math.isnan(value):
        return [f"{name}=nan must be a number"]
    return []


def gather_problems(config: Any, where: str = "") -> list[str]:
    """Everything wrong with a config and the configs in it, each text starting with the dotted name of its field.

    Types are checked here; `problems(self) -> list[str]` of each config, pure and raising nothing, says the rest. It is
    only asked once its own types are right.
    """
    assert is_dataclass(config), f"{type(config).__name__} must be a dataclass"
    cls: Any = type(config)
    prefix = f"{where}." if where else ""
    found: list[str] = []
    for name, hint in type_hints(cls).items():
        found += _type_problems(getattr(config, name), hint, f"{prefix}{name}")
        found += _nested_problems(getattr(config, name), f"{prefix}{name}")
    if not found or not has_type_problems(config):
        found += [f"{prefix}{text}" for text in getattr(config, "problems", list)()]
    return found


def _nested_problems(value: Any, name: str) -> list[str]:
    if isinstance(value, tuple):
        return [text for i, item in enumerate(value) for text in _nested_problems(item, f"{name}[{i}]")]
    return gather_problems(value, name) if is_dataclass(value) and not isinstance(value, type) else []


def has_type_problems(value: Any) -> bool:
    """Whether a config, or one in it, has a field of another type than it was declared with: then nothing else can be asked of it."""
    if isinstance(value, tuple):
        return any(map(has_type_problems, value))
    if not is_dataclass(value):
        return False
    hints = type_hints(typing.cast(Any, type(value)))
    return any(_type_problems(getattr(value, n), hint, n) or has_type_problems(getattr(value, n)) for n, hint in hints.items())


# --- JSON


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON: tuples become lists, floats are floats even when they were written as 1."""
    return _plain(config, lambda f: True)


def semantic(config: Any) -> dict[str, Any]:
    """The JSON of a config without its run-time fields: what a stage's result depends on."""
    return _plain(config, lambda f: not is_runtime(f))


def _plain(value: Any, keep: Callable[[Any], bool], hint: Any = None) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        hints = type_hints(typing.cast(Any, type(value)))
        return {f.name: _plain(getattr(value, f.name), keep, hints[f.name]) for f in fields(value) if keep(f)}
    if isinstance(value, tuple | list):
        items = (_item_types(hint, len(value)) if typing.get_origin(hint) is tuple else None) or [None] * len(value)
        return [_plain(item, keep, items[i]) for i, item in enumerate(value)]
    return float(value) if hint is float and isinstance(value, int) else value


def from_json(cls: type[Config], data: dict[str, Any]) -> Config:
    """The config that `to_json` wrote. Raises ValueError naming every unknown key, missing key and wrong type at once."""
    found: list[str] = []
    config = _read(cls, data, "", found)
    if found:
        raise ValueError(f"{cls.__name__} cannot be read:\n" + "\n".join(f"  {text}" for text in found))
    return config


def _read(hint: Any, data: Any, name: str, found: list[str]) -> Any:
    if is_dataclass(hint):
        return _read_config(hint, data, name, found)
    if typing.get_origin(hint) is tuple and isinstance(data, list | tuple):
        items = _item_types(hint, len(data))
        if items is not None:
            return tuple(_read(item, data[i], f"{name}[{i}]", found) for i, item in enumerate(items))
        data = tuple(data)
    found += _type_problems(data, hint, name)
    return float(data) if hint is float and isinstance(data, int) else data


def _read_config(cls: Any, data: Any, name: str, found: list[str]) -> Any:
    if not isinstance(data, dict):
        found.append(f"{name or cls.__name__}={data!r} must be an object with the fields of {cls.__name__}")
        return None
    prefix = f"{name}." if name else ""
    hints = type_hints(cls)
    found += [f"{prefix}{key} is not a field of {cls.__name__}{did_you_mean(key, hints)}" for key in data if key not in hints]
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - data.keys())
    found += [f"{prefix}{key} is missing" for key in missing]
    values = {key: _read(hints[key], value, f"{prefix}{key}", found) for key, value in data.items() if key in hints}
    return None if missing else cls(**values)


# --- functions by name


def resolve(name: str) -> Callable[..., Any]:
    """The function named "package.module:function". Raises ValueError saying which part doesn't exist."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{name!r} does not name a function; 'package.module:function' does")
    module = _import(module_name, name)
    function = getattr(module, attribute, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{name!r}: {module_name} has no {attribute!r}{did_you_mean(attribute, public)}")
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function")
    return function


def _import(module_name: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a module that exists and fails to import something else is the user's code speaking: let it speak
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(f"{name!r}: there is no module {error.name!r} on the path; sys.path begins with {sys.path[:2]}") from None
        raise


# --- the configs that stages share

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685): W x + alpha / rank * B A x with W frozen, B starting at 0."""

    rank: int = 0
    """Inner dimension of A and B (QLoRA: 64); 0 trains all weights."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapter's input; only SFT trains with it on."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that are adapted, such as ("q_proj", "v_proj"); () is all of them but the heads (QLoRA)."""
    quantize: str = "none"
    """none, or nf4: the frozen base is held in 4 bits with double quantisation (QLoRA, arXiv 2305.14314)."""
    merge: bool = True
    """Export the adapted weights as a plain model folder; otherwise the adapter alone, which names its base."""

    def problems(self) -> list[str]:
        return when(
            (self.rank < 0, f"rank={self.rank} must not be negative; 0 trains all weights, 16 works"),
            (self.alpha <= 0, f"alpha={self.alpha} must be positive; 16 works"),
            (not 0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1); 0 works"),
            (self.quantize not in ("none", "nf4"), f"quantize={self.quantize!r} must be none or nf4"),
            (
                self.quantize != "none" and self.rank == 0,
                f"quantize={self.quantize!r} needs an adapter, as 4-bit weights can't be trained; rank=64 works",
            ),
            (not self.merge and self.rank == 0, "merge=False has no meaning without an adapter; rank=16 works"),
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where a model comes from and how it is held."""

    path: str = ""
    """A model folder, a hub id, or "@stage"."""
    revision: str = ""
    """Commit or branch of a hub model; "" is its default branch."""
    dtype: str = "auto"
    """auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16."""
    gradient_checkpointing: bool = runtime(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: str = runtime("auto")
    """auto, tree (FlashAttention per segment, CPU), flex (FlexAttention, CUDA) or dense (the reference: memory grows with N squared)."""
    adapter: AdapterConfig = AdapterConfig()
    """Train a LoRA adapter instead of all weights."""

    def problems(self) -> list[str]:
        return when(
            (self.dtype not in ("auto", "fp32", "bf16"), f"dtype={self.dtype!r} must be auto, fp32 or bf16"),
            (
                self.attention not in ("auto", "tree", "dense", "flex"),
                f"attention={self.attention!r} must be auto, tree, dense or flex",
            ),
            (
                bool(self.revision) and self.path.startswith("@"),
                f"revision={self.revision!r} has no meaning for {self.path!r}, the output of a stage; '' works",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) are never decayed."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 never scales."""
    schedule: str = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly; the first one already has 1/warmup_steps of it."""
    min_lr_ratio: float = 0.1
    """Where cosine and linear end, as a share of `lr`."""

    def lr_at(self, step: int, total_steps: int) -> float:
        """The learning rate of optimizer step `step` (0-based) out of `total_steps`, in closed form.

        (step + 1) / warmup_steps during the warm-up; then, with progress p from 0 at the first step after the warm-up
        towards 1 at `total_steps`: cosine m + (1 - m) (1 + cos(pi p)) / 2, linear 1 - (1 - m) p, m = min_lr_ratio.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        fallen = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.lr * (1 - (1 - self.min_lr_ratio) * fallen)

    def problems(self) -> list[str]:
        return when(
            (self.lr < 0 or math.isinf(self.lr), f"lr={self.lr} must be finite and not negative; 1e-5 works"),
            (not all(0 <= beta < 1 for beta in self.betas), f"betas={self.betas} must lie in [0, 1); (0.9, 0.95) works"),
            (self.eps <= 0, f"eps={self.eps} must be positive; 1e-8 works"),
            (self.weight_decay < 0, f"weight_decay={self.weight_decay} must not be negative; 0 is off"),
            (self.max_grad_norm < 0, f"max_grad_norm={self.max_grad_norm} must not be negative; 0 is off, 1 is usual"),
            (
                self.schedule not in SCHEDULES,
                f"schedule={self.schedule!r} must be cosine, linear or constant{did_you_mean(self.schedule, SCHEDULES)}",
            ),
            (self.warmup_steps < 0, f"warmup_steps={self.warmup_steps} must not be negative; 0 is off"),
            (not 0 <= self.min_lr_ratio <= 1, f"min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]; 0.1 works"),
        )


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """Responses from vLLM instead of the training process. It rounds otherwise than the trainer, which `importance_cap` corrects."""

    mode: str = ""
    """server asks a running `vllm serve`, colocate runs vLLM in this process (CUDA), "" is the local sampler."""
    importance_cap: float = 2.0
    """Each token is weighed by pi_trainer / pi_sampler, at most this (truncated importance sampling); 0 is off."""
    url: str = runtime("http://127.0.0.1:8000")
    """Where the server answers."""
    connection_timeout: float = runtime(0.0)
    """Seconds to wait until it does, for one that is still starting."""
    concurrency: int = runtime(64)
    """Prompts that each rank asks about at a time."""
    transfer: str = runtime("folder")
    """How weights reach the server: folder (files that both see) or nccl (from GPU to GPU)."""
    folder: str = runtime("")
    """Where these files are put for a moment: a shared file system, /dev/shm on one machine; "" is the place for temporary files."""
    group_port: int = runtime(51216)
    """Of the NCCL group that trainer and server form."""
    tensor_parallel_size: int = runtime(1)
    """GPUs over which a colocated model is split; it divides the number of ranks."""
    gpu_memory_utilization: float = runtime(0.3)
    """Share of each GPU's memory that a colocated vLLM takes, weights and cache."""
    max_model_len: int = runtime(0)
    """Longest prompt and response of a colocated vLLM, in tokens; 0 is the model's own."""

    def problems(self) -> list[str]:
        return when(
            (self.mode not in ("", "server", "colocate"), f"mode={self.mode!r} must be '' (no vLLM), server or colocate"),
            (self.importance_cap < 0, f"importance_cap={self.importance_cap} must not be negative; 2 is usual, 0 is off"),
            (
                not self.url.startswith(("http://", "https://")),
                f"url={self.url!r} must begin with http:// or https://; 'http://127.0.0.1:8000' works",
            ),
            (self.connection_timeout < 0, f"connection_timeout={self.connection_timeout} must not be negative; 240 works"),
            (self.concurrency < 1, f"concurrency={self.concurrency} must be at least 1; 64 works"),
            (self.transfer not in ("folder", "nccl"), f"transfer={self.transfer!r} must be folder or nccl"),
            (not 0 < self.group_port < 65536, f"group_port={self.group_port} must lie in [1, 65535]; 51216 works"),
            (self.tensor_parallel_size < 1, f"tensor_parallel_size={self.tensor_parallel_size} must be at least 1"),
            (
                not 0 < self.gpu_memory_utilization <= 1,
                f"gpu_memory_utilization={self.gpu_memory_utilization} must lie in (0, 1]; 0.3 leaves room for training",
            ),
            (self.max_model_len < 0, f"max_model_len={self.max_model_len} must not be negative; 0 is the model's own"),
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled. No top-k and no top-p: the trainer must describe the same distribution."""

    max_new_tokens: int = 128
    """A response that reaches this without ending is truncated."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    stop: tuple[str, ...] = ()
    """A response also ends where its text contains one of these."""
    system_prompt: str = ""
    """Put before every prompt; "" adds none."""
    max_cached_tokens: int = runtime(65536)
    """Budget of the key-value cache per device, in tokens; sets how many responses are sampled side by side."""
    reuse_logprobs: bool = runtime(False)
    """The old log-probabilities are those that responses were drawn with, where they are exact to the last digits: in fp32, without
    vLLM. Saves the policy a pass over each rollout; the logged entropy is then estimated from the sampled tokens."""
    vllm: VLLMConfig = VLLMConfig()
    """Whether vLLM samples, and where."""

    @property
    def importance_cap(self) -> float:
        """Largest weight of a token whose sampler rounds otherwise than the trainer; 0 where both are one."""
        return self.vllm.importance_cap if self.vllm.mode else 0.0

    def problems(self) -> list[str]:
        return when(
            (self.max_new_tokens < 1, f"max_new_tokens={self.max_new_tokens} must be at least 1; 128 works"),
            (
                self.temperature < 0 or math.isinf(self.temperature),
                f"temperature={self.temperature} must not be negative; 0 is greedy, 1 samples the model as it is",
            ),
            ("" in self.stop, f"stop={self.stop} holds an empty string, which every text contains; () stops at the end of turn only"),
            (
                self.max_cached_tokens < self.max_new_tokens,
                f"max_cached_tokens={self.max_cached_tokens} is below max_new_tokens={self.max_new_tokens}; 65536 works",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a stage saves what it needs to go on."""

    every: int = runtime(0)
    """Steps between checkpoints; 0 goes by `minutes` alone."""
    minutes: float = runtime(10.0)
    """A checkpoint is also due when the last one is older than this: what a kill can cost. 0 goes by `every` alone."""
    keep: int = runtime(2)
    """Newest checkpoints kept, the best one beside them."""
    grace_seconds: float = runtime(25.0)
    """Time to end in after SIGTERM; torch elastic kills after 30."""
    background: bool = runtime(True)
    """Write while training goes on, from a copy on the host: 12 bytes per trained parameter, 16 with EMA; ZeRO's ranks share them."""

    def problems(self) -> list[str]:
        return when(
            (self.every < 0, f"every={self.every} must not be negative; 0 goes by minutes alone"),
            (self.minutes < 0, f"minutes={self.minutes} must not be negative; 10 works, 0 goes by every alone"),
            (self.keep < 1, f"keep={self.keep} must be at least 1; 2 survives a damaged checkpoint"),
            (self.grace_seconds <= 0, f"grace_seconds={self.grace_seconds} must be positive; 25 works"),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from."""

    path: str
    """A local file or folder, a hub id, "package.module:generator", or "@stage"; "" is no data, where a stage allows it."""
    format: str = ""
    """A published format's name, with its options: "oasst?lang=en&top_k=1"; "" recognises it from the columns."""
    split: str = "train"
    """Which split of it."""
    limit: int = 0
    """Take this many of the source's rows; 0 takes all."""

    def problems(self) -> list[str]:
        return when((self.limit < 0, f"limit={self.limit} must not be negative; 0 takes all rows"))
