"""Reinforcement learning with verifiable rewards after a cold start, as DeepSeek-R1 does it (arXiv 2501.12948).

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/r1.py tiny
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/r1.py smollm2 --grpo.num-iterations 4
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/r1.py qwen-7b

A short SFT shows the model what an answer looks like, then GRPO (here with DAPO's settings) learns from verifiers alone.
Preset tiny also trains each half alone for at least as long, to see what they are worth together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from posttrain.config import AdapterConfig, DataConfig, ModelConfig, OptimizerConfig, SamplingConfig, runtime
from posttrain.pipeline import Pipeline, main
from posttrain.rewards.config import RewardConfig, RewardsConfig
from posttrain.stages import grpo, sft
from posttrain.stages.grpo import ALGORITHMS, GRPOConfig
from posttrain.stages.sft import SFTConfig
from recipes import gsm8k
from recipes.begin import TINY, WORLD, Beginning, at, base_model, compare


@dataclass(frozen=True, kw_only=True)
class R1(Beginning):
    """Cold-start SFT -> GRPO with verifiable rewards -> evaluation."""

    output_dir: str = runtime("runs/r1")
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sft_alone_epochs: float = 0.0
    """A control: SFT of the base model for so many epochs, and nothing else; 0 leaves it out."""
    rl_alone_iterations: int = 0
    """A control: GRPO from the base model for so many iterations; 0 leaves it out."""


def build(recipe: R1) -> Pipeline:
    pipeline = Pipeline("r1", recipe.output_dir, seed=recipe.seed)
    base = base_model(pipeline, recipe)
    start = pipeline.stage("sft", sft.train, replace(recipe.sft, model=base))
    final = pipeline.stage("grpo", grpo.train, replace(recipe.grpo, policy=at(recipe.grpo.policy, start)))
    controls: dict[str, str] = {}
    if recipe.sft_alone_epochs:
        longer = replace(recipe.sft, model=base, epochs=recipe.sft_alone_epochs)
        controls["sft alone"] = pipeline.stage("sft_alone", sft.train, longer)
    if recipe.rl_alone_iterations:
        zero = replace(recipe.grpo, policy=at(recipe.grpo.policy, base.path), num_iterations=recipe.rl_alone_iterations)
        controls["rl alone"] = pipeline.stage("rl_alone", grpo.train, zero)
    compare(pipeline, recipe.evaluation, {"base": base.path, **controls, "sft": start, "grpo": final}, like=base)
    return pipeline


TINY_GRPO = GRPOConfig(
    prompts=DataConfig(path=f"{WORLD}/prompts"),
    rewards=RewardsConfig(functions=(RewardConfig(function="recipes.tiny_world:score", name="verifier"),), workers=2),
    objective=ALGORITHMS["dapo"],
    num_iterations=50,
    rollout_batch_size=128,
    group_size=8,
    minibatch_size=64,
    max_prompt_length=96,
    sampling=SamplingConfig(max_new_tokens=32),
    optimizer=OptimizerConfig(lr=2e-4, schedule="constant", warmup_steps=5),
)
TINY_R1 = R1(
    **{**vars(TINY), "sft": replace(TINY.sft, epochs=2.0)},
    output_dir="runs/r1-tiny",
    grpo=TINY_GRPO,
    sft_alone_epochs=3.0,
    rl_alone_iterations=90,
)

SMOLLM2_R1 = R1(
    output_dir="runs/r1-smollm2",
    sft=SFTConfig(
        model=ModelConfig(path="models/SmolLM2-135M-Instruct"),
        data=DataConfig(path=gsm8k.TRAIN, split="train[:2000]"),
        validation=DataConfig(path=gsm8k.TRAIN, split="train[6800:7000]"),
        max_length=512,
        max_tokens_per_micro_batch=1024,
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=5),
    ),
    grpo=GRPOConfig(
        policy=ModelConfig(adapter=AdapterConfig(rank=16, alpha=32)),
        prompts=DataConfig(path=gsm8k.TRAIN, split="train[2000:6800]"),
        rewards=RewardsConfig(functions=(RewardConfig(function=gsm8k.SCORE),)),
        objective=ALGORITHMS["dapo"],
        num_iterations=100,
        rollout_batch_size=64,
        group_size=8,
        minibatch_size=32,
        mask_truncated=True,
        max_prompt_length=256,
        max_tokens_per_micro_batch=1024,
        sampling=SamplingConfig(max_new_tokens=192),
        optimizer=OptimizerConfig(lr=2e-5, schedule="constant", warmup_steps=10),
    ),
    evaluation=gsm8k.HELD_OUT,
)

THINK = (  # DeepSeek-R1, table 1
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks "
    "about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
)
MATH = "open-r1/OpenR1-Math-220k"
QWEN_7B = R1(
    output_dir="runs/r1-qwen-7b",
    sft=SFTConfig(
        model=ModelConfig(path="Qwen/Qwen2.5-7B", gradient_checkpointing=True),
        data=DataConfig(path=MATH, limit=5000),
        max_length=8192,
        max_dropped_fraction=0.5,  # its longest thoughts
        max_tokens_per_micro_batch=16384,
        optimizer=OptimizerConfig(lr=1e-5),
    ),
    grpo=GRPOConfig(
        policy=ModelConfig(gradient_checkpointing=True),
        prompts=DataConfig(path="openai/gsm8k?name=main"),
        rewards=RewardsConfig(
            functions=(
                RewardConfig(function=gsm8k.SCORE),
                RewardConfig(function="posttrain.rewards.verifiers:think_format", weight=0.2),
            ),
        ),
        objective=ALGORITHMS["dapo"],
        num_iterations=500,
        rollout_batch_size=512,
        group_size=16,
        minibatch_size=128,
        mask_truncated=True,
        overlong_cache=512,
        sampling_rounds=4,
        sampling=SamplingConfig(max_new_tokens=4096, system_prompt=THINK),
        optimizer=OptimizerConfig(lr=1e-6, schedule="constant", warmup_steps=20),
    ),
    evaluation=replace(gsm8k.TEST, sampling=SamplingConfig(max_new_tokens=4096, system_prompt=THINK)),
)

PRESETS = {"tiny": TINY_R1, "smollm2": SMOLLM2_R1, "qwen-7b": QWEN_7B}

if __name__ == "__main__":
    main(build, PRESETS)
