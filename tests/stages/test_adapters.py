"""The InstructGPT chain with adapters: an SFT adapter, a reward model's adapter that continues it, four PPO roles over one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config import AdapterConfig, DataConfig, ModelConfig, OptimizerConfig, SamplingConfig
from posttrain.engine import Engine
from posttrain.stages import ppo, reward_model, sft
from tests.pairs import run_pair
from tests.runs import open_run
from tests.stages.worlds import conversations, prompts, rankings, texts
from tests.tiny import tiny_folder

LORA = AdapterConfig(rank=4, alpha=8.0, merge=False)


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def chain(engine: Engine, *, place: str, quantize: str = "none") -> dict[str, Any]:
    """SFT, reward model and PPO, each with an adapter over the base in `place`; the folders and PPO's last metrics."""
    root, fast = Path(place), OptimizerConfig(lr=1e-2, schedule="constant")
    if engine.world.is_main:
        tiny_folder(root / "base")
        data = {"chats": conversations(16), "ranks": rankings(12), "prompts": prompts(8), "texts": texts(12)}
        for name, rows in data.items():
            write(root / f"{name}.jsonl", rows)
    engine.world.barrier()
    source = {name: DataConfig(path=str(root / f"{name}.jsonl")) for name in ("chats", "ranks", "prompts", "texts")}
    adapter = AdapterConfig(rank=4, alpha=8.0, merge=False, quantize=quantize)

    def model(path: Path) -> ModelConfig:
        return ModelConfig(path=str(path), adapter=adapter)

    with open_run(root / "sft", world=engine.world) as run:
        config = sft.SFTConfig(model=model(root / "base"), data=source["chats"], optimizer=fast, batch_size=8, max_length=200)
        tuned = sft.train(config, run)
    with open_run(root / "reward_model", world=engine.world) as run:
        judged = reward_model.train(
            reward_model.RewardModelConfig(
                model=model(tuned), data=source["ranks"], demonstrations=source["chats"], optimizer=fast, batch_size=6, max_length=200
            ),
            run,
        )
    with open_run(root / "ppo", world=engine.world) as run:
        final = ppo.train(
            ppo.PPOConfig(
                policy=model(tuned),
                reward_model=model(judged),
                prompts=source["prompts"],
                pretraining=source["texts"],
                policy_optimizer=fast,
                critic_optimizer=fast,
                sampling=SamplingConfig(max_new_tokens=8),
                num_iterations=2,
                rollout_batch_size=8,
                minibatch_size=4,
                ptx_batch_size=2,
                ptx_window=32,
                max_prompt_length=100,
            ),
            run,
        )
        metrics = dict(run.metrics)
    return {"folders": [str(path) for path in (tuned, judged, final, root / "ppo" / "critic")], "metrics": metrics}


@pytest.mark.parametrize("backend", ("plain", "zero2", "zero3"))
def test_rule_05_and_16_the_whole_chain_runs_on_adapters_over_one_base(backend, tmp_path):
    """PPO itself stops where its reference or its sampler is another model than the policy, or where the first step moves nothing."""
    if backend == "plain":
        engine = Engine()
        found = chain(engine, place=str(tmp_path))
        engine.close()
    else:
        found = run_pair(backend, "tests.stages.test_adapters:chain", place=str(tmp_path))[0]
    from posttrain.models.adapter_files import read_adapter

    tuned, judged, final, critic = map(read_adapter, found["folders"])
    assert len({adapter.base.digest for adapter in (tuned, judged, final, critic)}) == 1
    assert judged.is_reward_model and critic.is_reward_model and not tuned.is_reward_model and not final.is_reward_model
    for before, after in ((tuned, judged), (tuned, final), (judged, critic)):
        assert before.weights.keys() == after.weights.keys()
        assert all(
            bool(torch.isfinite(value).all()) and not torch.equal(value, before.weights[name]) for name, value in after.weights.items()
        )
    assert found["metrics"]["kl"] == found["metrics"]["kl"]


def test_the_whole_chain_runs_on_a_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    engine = Engine()
    chain(engine, place=str(tmp_path), quantize="nf4")
    engine.close()
