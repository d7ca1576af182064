"""What the launch says: backend, ZeRO stage, offload; and what it may not say, because posttrain decides it elsewhere.

`accelerate launch --config_file accelerate_configs/X.yaml recipe.py` puts a launch file into environment variables;
plain `python recipe.py` sets none and means one process. Accelerate's own classes read them.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ZERO_STAGES = (0, 1, 2, 3)
OFFLOAD_DEVICES = ("none", "cpu")

# Keys of a launch file's `deepspeed_config` block that Accelerate turns into environment variables. It drops unknown ones silently.
LAUNCH_KEYS = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "deepspeed_config_file",
    "deepspeed_multinode_launcher",
    "deepspeed_hostfile",
    "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter",
)
# Keys of a DeepSpeed JSON file's `zero_optimization` block that change speed and memory but never the numbers.
ZERO_OPTIONS = (
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "contiguous_gradients",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
ZERO_KEYS = ("stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save", *ZERO_OPTIONS)
DEEPSPEED_KEYS = (
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "bf16",
    "fp16",
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process was launched. `mixed_precision` is "no" when the launch file doesn't say."""

    backend: str = "single"  # "single", "ddp" or "zero"
    zero_stage: int = 0
    offload_optimizer: str = "none"
    offload_param: str = "none"
    mixed_precision: str = "no"
    use_cpu: bool = False
    zero_options: dict[str, Any] = field(default_factory=dict)


def prepare_environment() -> None:
    """Set what DeepSpeed reads while it is imported: the CPU accelerator where there is no GPU, and where operators are built.

    The ninja of this interpreter's environment comes first: another version of it would compile everything anew each time.
    """
    import torch

    commands = str(Path(sys.executable).parent)
    if commands not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = os.pathsep.join([commands, os.environ.get("PATH", "")])
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def quiet_start(launch: Launch) -> Iterator[None]:
    """DeepSpeed says on every rank that its CPU operator was built, also when it only found it; what is worth saying is that it waits."""
    built = any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/*.so"))
    if launch.backend == "zero" and not built and os.environ.get("DS_ACCELERATOR") == "cpu" and os.environ.get("RANK", "0") == "0":
        print("compiling DeepSpeed's operator for CPUs, once; about a minute", flush=True)
    with redirect_stdout(io.StringIO()):
        yield


def build_operators() -> None:
    """Compile the operator that DeepSpeed needs on CPUs (about a minute; nothing to do with a GPU, or the second time)."""
    prepare_environment()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()


def read_launch() -> Launch:
    """Read the launch from the environment. Raises ValueError that lists everything in it that posttrain can't honour."""
    problems = _foreign_settings() + _launch_file_problems()
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    common = dict(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        use_cpu=os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true",
    )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        _refuse(problems)
        return Launch(backend="ddp" if workers > 1 else "single", **common)  # type: ignore[arg-type]

    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    problems += _unknown(config, DEEPSPEED_KEYS, "DeepSpeed config") + _unknown(zero, ZERO_KEYS, "zero_optimization")
    stage = plugin.zero_stage
    if stage not in ZERO_STAGES:
        problems.append(f"zero_stage={stage} is none of {ZERO_STAGES}; 3 works")
    for name in ("offload_optimizer_device", "offload_param_device"):
        device = getattr(plugin, name) or "none"
        if device not in OFFLOAD_DEVICES:
            problems.append(f"{name}={device!r} isn't supported; 'cpu' or 'none' works")
    if (plugin.offload_param_device or "none") != "none" and stage != 3:
        problems.append(f"offload_param_device={plugin.offload_param_device!r} needs zero_stage 3, not {stage}; zero3_offload.yaml works")
    _refuse(problems)
    if stage == 0:  # DeepSpeed's stage 0 steps into NaN in fp32 and reports no gradient norm; plain data parallelism does neither
        return Launch(backend="ddp" if workers > 1 else "single", **common)  # type: ignore[arg-type]
    return Launch(
        backend="zero",
        zero_stage=stage,
        offload_optimizer=plugin.offload_optimizer_device or "none",
        offload_param=plugin.offload_param_device or "none",
        zero_options={key: zero[key] for key in ZERO_OPTIONS if zero.get(key, "auto") != "auto"},
        **common,  # type: ignore[arg-type]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("the launch file asks for what posttrain can't honour:\n" + "\n".join(f"  - {p}" for p in problems))


def _foreign_settings() -> list[str]:
    """Settings that Accelerate passes on and that have another home in posttrain, or none."""
    env = os.environ
    problems = []
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ):
        if env.get(variable, "false").lower() == "true":
            problems.append(f"{name} isn't a backend of posttrain; accelerate_configs/zero3.yaml works")
    accumulation = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto", "None"):
        problems.append(
            f"gradient_accumulation_steps={accumulation}: accumulation follows from the batch size and max_tokens_per_micro_batch; 1 works"
        )
    clipping = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        problems.append(f"gradient_clipping={clipping}: clipping is OptimizerConfig.max_grad_norm; leave the line out")
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        problems.append(f"mixed_precision={precision!r}: precision is ModelConfig.dtype, 'bf16' or 'fp32'; leave the line out")
    dynamo = env.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        problems.append(f"dynamo_backend={dynamo!r}: models aren't compiled; leave the line out")
    return problems


def _unknown(config: dict[str, Any], known: tuple[str, ...], where: str) -> list[str]:
    problems = []
    for key in config:
        if key in known:
            continue
        close = get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        problems.append(f"unknown key {key!r} in {where}; {hint}")
    for key in ("bf16", "fp16"):
        section = config.get(key)
        if where == "DeepSpeed config" and isinstance(section, dict) and section.get("enabled") not in (None, False, "auto"):
            problems.append(f"{key}.enabled in {where}: precision is ModelConfig.dtype; 'auto' works")
    passed_on = () if "ACCELERATE_GRADIENT_CLIPPING" in os.environ else ("gradient_clipping",)  # named once is enough
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", *passed_on):
        if where == "DeepSpeed config" and config.get(key, "auto") not in ("auto", "none", None):
            problems.append(f"{key}={config[key]} in {where}: it is set by the recipe; 'auto' works")
    return problems


def _launch_file_problems() -> list[str]:
    """Unknown keys of the launch file's `deepspeed_config`, found by asking the launcher for its command line (Linux)."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or not parent.exists():
        return []
    words = parent.read_bytes().decode(errors="replace").split("\0")
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config_file"]
    named += [word.removeprefix("--config_file=") for word in words if word.startswith("--config_file=")]
    if not named or not Path(named[0]).is_file():
        return []
    import yaml

    content = yaml.safe_load(Path(named[0]).read_text()) or {}
    return _unknown(content.get("deepspeed_config") or {}, LAUNCH_KEYS, f"deepspeed_config of {named[0]}")
