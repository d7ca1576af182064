"""SFT -> DPO, or any other preference loss: no reward model, no sampling while training.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo.py tiny
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo.py smollm2 --dpo.losses simpo --dpo.beta 2
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo.py zephyr-7b

Every field of a preset is an option: `--dpo.beta 0.05`. `--plan` shows what would run, and runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from posttrain.config import AdapterConfig, DataConfig, ModelConfig, OptimizerConfig, runtime
from posttrain.pipeline import Pipeline, main
from posttrain.stages import dpo, sft
from posttrain.stages.dpo import DPOConfig
from posttrain.stages.sft import SFTConfig
from recipes import gsm8k
from recipes.begin import TINY, Beginning, at, base_model, compare, labelled_samples


@dataclass(frozen=True, kw_only=True)
class DPO(Beginning):
    """SFT -> preference optimisation -> evaluation."""

    output_dir: str = runtime("runs/dpo")
    dpo: DPOConfig = field(default_factory=DPOConfig)


def build(recipe: DPO) -> Pipeline:
    pipeline = Pipeline("dpo", recipe.output_dir, seed=recipe.seed)
    base = base_model(pipeline, recipe)
    policy = pipeline.stage("sft", sft.train, replace(recipe.sft, model=base))
    preferences = recipe.dpo
    if recipe.label_own_samples:
        rows, held_out, _ = labelled_samples(pipeline, recipe, policy)
        preferences = replace(preferences, data=rows, validation=held_out)
    final = pipeline.stage("dpo", dpo.train, replace(preferences, model=at(preferences.model, policy)))
    compare(pipeline, recipe.evaluation, {"base": base.path, "sft": policy, "dpo": final}, like=base)
    return pipeline


TINY_DPO = DPO(
    **vars(TINY),
    output_dir="runs/dpo-tiny",
    dpo=DPOConfig(
        max_length=128,
        epochs=2,
        batch_size=48,
        beta=0.3,
        evaluate_every=30,
        optimizer=OptimizerConfig(lr=3e-4, warmup_steps=10),
    ),
)

SHARED = "../shared/data"  # --sft.data.path and its like name other places
DOLLY = f"{SHARED}/dolly/dolly_rows.jsonl"
PREFERENCES = DataConfig(path=f"{SHARED}/preference/dpo_en_demo.json", split="train[:90%]")
SMOLLM2 = ModelConfig(path="models/SmolLM2-135M-Instruct")
SMOLLM2_DPO = DPO(
    output_dir="runs/dpo-smollm2",
    sft=SFTConfig(
        model=SMOLLM2,
        data=DataConfig(path=DOLLY, split="train[:95%]"),
        validation=DataConfig(path=DOLLY, split="train[95%:]"),
        max_length=1024,
        epochs=1,
        max_tokens_per_micro_batch=1024,
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=5),
    ),
    dpo=DPOConfig(
        model=ModelConfig(adapter=AdapterConfig(rank=16, alpha=32)),
        data=PREFERENCES,
        validation=replace(PREFERENCES, split="train[90%:]"),
        max_length=1024,
        batch_size=16,
        max_dropped_fraction=0.5,  # its long conversations need more memory than a laptop has
        max_tokens_per_micro_batch=2048,
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=2),
    ),
    evaluation=gsm8k.HELD_OUT,
)

ULTRACHAT, ULTRAFEEDBACK = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"
ZEPHYR_7B = DPO(
    output_dir="runs/zephyr-7b",
    sft=SFTConfig(
        model=ModelConfig(path="mistralai/Mistral-7B-v0.1", gradient_checkpointing=True),
        data=DataConfig(path=ULTRACHAT, split="train_sft"),
        validation=DataConfig(path=ULTRACHAT, split="test_sft", limit=2000),
        batch_size=128,
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=100),
    ),
    dpo=DPOConfig(
        model=ModelConfig(gradient_checkpointing=True),
        data=DataConfig(path=ULTRAFEEDBACK, split="train_prefs"),
        validation=DataConfig(path=ULTRAFEEDBACK, split="test_prefs"),
        max_length=1024,
        batch_size=128,
        beta=0.01,
        reference="cached",
        optimizer=OptimizerConfig(lr=5e-7, warmup_steps=50),
    ),
    evaluation=gsm8k.TEST,
)

PRESETS = {"tiny": TINY_DPO, "smollm2": SMOLLM2_DPO, "zephyr-7b": ZEPHYR_7B}

if __name__ == "__main__":
    main(build, PRESETS)
