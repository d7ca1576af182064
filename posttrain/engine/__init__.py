"""The backbone: models trained and frozen on one process, data parallelism or ZeRO. Only this room knows accelerate and deepspeed."""

from __future__ import annotations

from posttrain.engine.engine import Engine
from posttrain.engine.model import FrozenModel, TrainedModel
from posttrain.engine.update import Update
from posttrain.engine.world import World

__all__ = ["Engine", "FrozenModel", "TrainedModel", "Update", "World"]
