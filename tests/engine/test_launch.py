"""Launch files: what they say is done, and what posttrain decides elsewhere they may not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from posttrain.config import OptimizerConfig
from posttrain.engine import Engine, World
from posttrain.engine.launch import LAUNCH_KEYS, Launch, read_launch
from tests.engine import jobs
from tests.pairs import ROOT

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
TELLS = """
import sys
from posttrain.engine import Engine
engine = Engine()
world = engine.world
# one write, so that two ranks don't mix their lines
sys.stdout.write(f"told {world.gather((world.rank, world.size, world.backend, world.zero_stage, str(world.device)))}\\n")
engine.close()
"""


@pytest.fixture
def launched(monkeypatch):
    """Sets environment variables as a launcher does."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")]:
        monkeypatch.delenv(name)

    def launched(**variables: str) -> Launch:
        for name, value in variables.items():
            monkeypatch.setenv(name if name.isupper() and name.startswith(("WORLD", "ACC")) else f"ACCELERATE_{name.upper()}", value)
        return read_launch()

    return launched


def test_all_launch_files_are_there():
    names = ["cpu", "cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    assert sorted([*names, "multi_node_zero2", "multi_node_zero3"]) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rule_10_every_launch_file_is_read_by_accelerate_and_opens_with_its_command(path):
    ClusterConfig.from_yaml_file(str(path))  # raises on unknown keys
    content = yaml.safe_load(path.read_text())
    assert set(content.get("deepspeed_config", {})) <= set(LAUNCH_KEYS)
    assert "mixed_precision" not in content and "gradient_clipping" not in content.get("deepspeed_config", {})
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and f"accelerate_configs/{path.name}" in lines[1]


def test_plain_python_is_one_process(launched):
    assert launched() == Launch()


def test_backends_are_read_from_the_environment(launched):
    assert launched(WORLD_SIZE="2").backend == "ddp"
    found = launched(use_deepspeed="true", deepspeed_zero_stage="3", deepspeed_offload_optimizer_device="cpu")
    assert (found.backend, found.zero_stage, found.offload_optimizer, found.offload_param) == ("zero", 3, "cpu", "none")


def test_stage_0_is_data_parallelism(launched):
    assert launched(WORLD_SIZE="2", use_deepspeed="true", deepspeed_zero_stage="0").backend == "ddp"


def test_rule_10_everything_that_cannot_be_honoured_is_said_at_once(launched, tmp_path):
    with pytest.raises(ValueError) as caught:
        launched(
            use_deepspeed="true",
            deepspeed_zero_stage="2",
            mixed_precision="fp16",
            gradient_accumulation_steps="4",
            gradient_clipping="1.0",
            use_fsdp="true",
            deepspeed_offload_param_device="cpu",
        )
    text = str(caught.value)
    for part in ("FSDP", "gradient_accumulation_steps=4", "OptimizerConfig.max_grad_norm", "'fp16'", "needs zero_stage 3, not 2"):
        assert part in text


def test_rule_10_a_deepspeed_file_is_checked_key_by_key(launched, tmp_path):
    config = {
        "zero_optimization": {"stage": 3, "overlap_com": True, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "train_batch_size": 64,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        launched(use_deepspeed="true", deepspeed_config_file=str(path))
    text = str(caught.value)
    for part in ("unknown key 'optimizer'", "bf16.enabled", "train_batch_size=64", "did you mean 'overlap_comm'?"):
        assert part in text
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"}}))
    found = read_launch()
    assert (found.zero_stage, found.zero_options) == (3, {"reduce_bucket_size": 1000})


def test_a_precision_that_disagrees_with_the_model_is_an_error():
    engine = Engine(World(launch=Launch(mixed_precision="bf16")))
    with pytest.raises(ValueError, match="mixed_precision='bf16' in the launch file disagrees with policy, which is float32"):
        engine.train(jobs.packed(), OptimizerConfig(lr=1.0), 1, name="policy")
    engine.train(jobs.packed(dtype=torch.bfloat16), OptimizerConfig(lr=1.0), 1, name="policy")
    engine.close()
    engine.world.close()


@pytest.mark.parametrize("config", ("cpu_ddp", "cpu_zero3"))
def test_accelerate_launch_starts_two_ranks_on_a_cpu(config, tmp_path):
    script = tmp_path / "tells.py"
    script.write_text(TELLS)
    file = f"accelerate_configs/{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0", str(script)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "DS_", "MASTER_"))}
    env["PYTHONPATH"] = str(ROOT)
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    backend = ("ddp", 0) if config == "cpu_ddp" else ("zero", 3)
    told = [line for line in found.stdout.splitlines() if line.startswith("told")]
    assert told == [f"told {[(rank, 2, *backend, 'cpu') for rank in range(2)]}"] * 2, found.stderr[-3000:]
