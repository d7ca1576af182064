"""SFT -> KTO: learn from single responses that somebody liked or did not (arXiv 2402.01306).

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/kto.py tiny
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/kto.py smollm2
"""

from __future__ import annotations

from dataclasses import replace

from posttrain.config import DataConfig
from posttrain.pipeline import main
from recipes.dpo import SHARED, SMOLLM2_DPO, TINY_DPO, build

JUDGEMENTS = DataConfig(path=f"{SHARED}/preference/kto_en_demo.json", split="train[:90%]")

TINY_KTO = replace(
    TINY_DPO,
    output_dir="runs/kto-tiny",
    labels=replace(TINY_DPO.labels, kind="judgement"),
    dpo=replace(
        TINY_DPO.dpo,
        losses=("kto",),
        epochs=1,  # one response a row: four times the rows
        evaluate_every=60,
        desirable_weight=2.0,  # fewer than half of the responses are right
        optimizer=replace(TINY_DPO.dpo.optimizer, lr=1e-4),
    ),
)
SMOLLM2_KTO = replace(
    SMOLLM2_DPO,
    output_dir="runs/kto-smollm2",
    dpo=replace(SMOLLM2_DPO.dpo, losses=("kto",), data=JUDGEMENTS, validation=replace(JUDGEMENTS, split="train[90%:]")),
)

PRESETS = {"tiny": TINY_KTO, "smollm2": SMOLLM2_KTO}

if __name__ == "__main__":
    main(build, PRESETS)
