"""posttrain's side: its stages as a recipe runs them, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pace import Pace

LR, STEPS, BUDGET = 1e-6, 1000, 1 << 20


def run(stage: Callable[..., Any], config: Any, job: Mapping[str, Any], pace: Pace) -> None:
    """What a pipeline does with a stage, with a run that keeps pace."""
    import accelerate  # noqa: F401  imported before memory is read, as every run imports it
    import transformers  # noqa: F401

    from posttrain.config import CheckpointConfig
    from posttrain.engine import Engine
    from posttrain.run import Run
    from posttrain.tracking import Tracker

    class Listener(Tracker):
        """Hears where the time of a step went."""

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            super().log(step, metrics)
            self.phases = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}

    @dataclass(eq=False)
    class PacedRun(Run):
        def log(self, metrics: Mapping[str, float], tokens: int = 0, optimizer_steps: int = 0) -> None:
            super().log(metrics, tokens, optimizer_steps)
            trained = sum(p.numel() for m in self.engine.models for p in m.module.parameters() if p.requires_grad)
            pace(trained, metrics.get("loss"), tokens, tracker.phases)

        def resume(self, models: Mapping[str, Any], **objects: Any) -> int:
            step = super().resume(models, **objects)
            pace()
            return step

    folder = Path(job["work"]) / f"ours_{job['stage']}"
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine()
    engine.seed(0)
    tracker = Listener(folder, mode="disabled", is_main=True)
    pace.imported()
    never = CheckpointConfig(minutes=1e9)
    stage(config, PacedRun(name=folder.name, folder=folder, seed=0, engine=engine, tracker=tracker, checkpoints=never))


def settings() -> dict[str, Any]:
    """What all stages share: one micro-batch per step, AdamW as the other sides have it."""
    from posttrain.config import OptimizerConfig

    optimizer = OptimizerConfig(lr=LR, betas=(0.9, 0.999), schedule="constant", max_grad_norm=1.0)
    return {"optimizer": optimizer, "max_tokens_per_micro_batch": BUDGET}


def on_rows(stage: Callable[..., Any], config: type, job: Mapping[str, Any], pace: Pace) -> None:
    """A stage that trains on rows: every row in every step, as many epochs as there may be steps."""
    from posttrain.config import DataConfig, ModelConfig

    rows = {"data": DataConfig(path=job["rows"]), "batch_size": job["count"], "epochs": float(STEPS), "max_length": 8192}
    run(stage, config(model=ModelConfig(path=job["model"]), **rows, **settings()), job, pace)


def sft(job: Mapping[str, Any], pace: Pace) -> None:
    from posttrain.stages import sft

    on_rows(sft.train, sft.SFTConfig, job, pace)


def dpo(job: Mapping[str, Any], pace: Pace) -> None:
    from posttrain.stages import dpo

    on_rows(dpo.train, dpo.DPOConfig, job, pace)


def reward_model(job: Mapping[str, Any], pace: Pace) -> None:
    from posttrain.stages import reward_model

    on_rows(reward_model.train, reward_model.RewardModelConfig, job, pace)


def grpo(job: Mapping[str, Any], pace: Pace) -> None:
    from posttrain.config import DataConfig, ModelConfig, SamplingConfig
    from posttrain.rewards.config import RewardConfig, RewardsConfig
    from posttrain.stages import grpo

    responses = job["count"] * job["group"]
    config = grpo.GRPOConfig(
        policy=ModelConfig(path=job["model"]),
        prompts=DataConfig(path=job["rows"]),
        rewards=RewardsConfig(functions=(RewardConfig(function="side_ours:parity"),)),
        objective=grpo.ObjectiveConfig(kl="none", normalisation="token_mean"),
        sampling=SamplingConfig(max_new_tokens=job["new_tokens"], reuse_logprobs=True),
        num_iterations=STEPS,
        rollout_batch_size=responses,
        group_size=job["group"],
        minibatch_size=responses,
        **settings(),
    )
    run(grpo.train, config, job, pace)


def ppo(job: Mapping[str, Any], pace: Pace) -> None:
    from posttrain.config import DataConfig, ModelConfig, SamplingConfig
    from posttrain.stages import ppo

    optimizer = settings()["optimizer"]
    config = ppo.PPOConfig(
        policy=ModelConfig(path=job["model"]),
        reward_model=ModelConfig(path=job["scalar"]),
        prompts=DataConfig(path=job["rows"]),
        sampling=SamplingConfig(max_new_tokens=job["new_tokens"]),
        num_iterations=STEPS,
        rollout_batch_size=job["count"],
        minibatch_size=job["count"],
        ptx_coef=0.0,
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        max_tokens_per_micro_batch=BUDGET,
    )
    run(ppo.train, config, job, pace)


def parity(row: dict[str, Any], response: str) -> float:
    from shapes import parity

    return parity(response)
