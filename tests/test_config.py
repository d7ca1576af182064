"""Configs: every problem at once, a JSON round trip, what identifies a stage, the learning rate's closed form."""

from __future__ import annotations

import ast
import importlib
import json
import math
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path

import pytest

from posttrain import config as shared
from posttrain.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    from_json,
    gather_problems,
    replace,
    resolve,
    runtime,
    runtime_factory,
    semantic,
    to_json,
    when,
)

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Outer:
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    sources: tuple[DataConfig, ...] = ()
    batch_size: int = 8
    weights: tuple[float, float] = (1.0, 2)
    name: str = ""
    fast: bool = False
    budget: int = runtime(64)
    folders: tuple[str, ...] = runtime_factory(tuple)

    def problems(self) -> list[str]:
        return when((self.batch_size % 2 == 1, f"batch_size={self.batch_size} must be even; {self.batch_size + 1} works"))


def test_all_problems_of_nested_configs_come_at_once_with_dotted_names():
    config = Outer(
        optimizer=OptimizerConfig(lr=-1.0, schedule="cosin"), sources=(DataConfig(path="a"), DataConfig(path="b", limit=-2)), batch_size=7
    )
    found = gather_problems(config, "sft")
    assert len(found) == 4
    assert found[0].startswith("sft.optimizer.lr=-1.0 must")
    assert found[1].startswith("sft.optimizer.schedule='cosin'") and "did you mean 'cosine'?" in found[1]
    assert found[2].startswith("sft.sources[1].limit=-2")
    assert found[3] == "sft.batch_size=7 must be even; 8 works"
    assert gather_problems(Outer()) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": "8"}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 8.0}, "batch_size"),
        ({"weights": (1.0,)}, "weights"),
        ({"weights": [1.0, 2.0]}, "weights"),
        ({"weights": (1.0, math.nan)}, "weights[1]"),
        ({"name": None}, "name"),
        ({"fast": 1}, "fast"),
        ({"model": "folder"}, "model"),
        ({"sources": ("rows.jsonl",)}, "sources[0]"),
        ({"model": ModelConfig(path=3)}, "model.path"),
        ({"optimizer": OptimizerConfig(lr="1e-3")}, "optimizer.lr"),
    ],
)
def test_a_wrong_type_is_a_problem_and_never_a_crash(change, name):
    found = gather_problems(replace(Outer(), **change))
    assert len(found) == 1 and found[0].startswith(f"{name}="), found


def test_json_round_trip_is_the_same_config():
    config = Outer(sources=(DataConfig(path="@labels", limit=3),), folders=("x", "y"), weights=(1, 0.5))
    data = json.loads(json.dumps(to_json(config)))
    assert from_json(Outer, data) == config
    assert data["weights"] == [1.0, 0.5] and isinstance(data["weights"][0], float)


def test_rule_10_unknown_and_missing_keys_and_types_of_a_json_config_are_all_named_at_once():
    data = to_json(Outer(sources=(DataConfig(path="a"),)))
    data["batchsize"] = 3
    data["optimizer"]["warmup_step"] = 1
    data["sources"][0] = {"limit": "many"}
    data["fast"] = "yes"
    with pytest.raises(ValueError) as error:
        from_json(Outer, data)
    text = str(error.value)
    assert "batchsize is not a field of Outer; did you mean 'batch_size'?" in text
    assert "optimizer.warmup_step is not a field of OptimizerConfig; did you mean 'warmup_steps'?" in text
    assert "sources[0].path is missing" in text and "sources[0].limit='many'" in text and "fast='yes'" in text


def test_runtime_fields_are_left_out_of_what_identifies_a_stage():
    one, two = Outer(), Outer(budget=128, folders=("z",), model=ModelConfig(gradient_checkpointing=True, attention="dense"))
    assert semantic(one) == semantic(two) and to_json(one) != to_json(two)
    assert "budget" not in semantic(one) and "attention" not in semantic(one)["model"]
    assert semantic(replace(one, batch_size=16)) != semantic(one)
    assert semantic(replace(one, weights=(1.0, 2.0))) == semantic(one)


def test_resolve_names_the_part_that_does_not_exist():
    assert resolve("posttrain.config:resolve") is resolve
    for name, expected in [
        ("posttrain.config", "does not name a function"),
        ("posttrain.config:resolv", "did you mean 'resolve'?"),
        ("posttrain.confg:resolve", "no module 'posttrain.confg'"),
        ("posttrain.config:SCHEDULES", "is a tuple"),
    ]:
        with pytest.raises(ValueError) as error:
            resolve(name)
        assert expected in str(error.value)


def test_learning_rate_equals_pytorchs_and_transformers_schedules():
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    total, warmup = 40, 5
    for name, reference in [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]:
        ours = OptimizerConfig(lr=3e-4, schedule=name, warmup_steps=warmup, min_lr_ratio=0.0)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        schedule = reference(optimizer, warmup, total)
        for step in range(total):
            if step >= warmup:
                assert ours.lr_at(step, total) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            schedule.step()


def test_learning_rate_warms_up_from_a_positive_value_and_ends_at_its_floor():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert [config.lr_at(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert config.lr_at(100, 100) == pytest.approx(0.1) and config.lr_at(1000, 100) == pytest.approx(0.1)
    assert replace(config, schedule="constant").lr_at(99, 100) == 1.0
    # a warm-up as long as the whole run never divides by zero
    assert replace(config, warmup_steps=100).lr_at(99, 100) == 1.0 and replace(config, warmup_steps=100).lr_at(100, 100) == 1.0


def test_shared_configs_refuse_what_cannot_work():
    for bad in [
        OptimizerConfig(lr=1e-3, betas=(0.9, 1.0)),
        OptimizerConfig(lr=1e-3, min_lr_ratio=2.0),
        SamplingConfig(max_new_tokens=0),
        SamplingConfig(temperature=-1.0),
        SamplingConfig(stop=("",)),
        ModelConfig(dtype="fp8"),
        ModelConfig(path="@sft", revision="main"),
        shared.CheckpointConfig(keep=0),
    ]:
        assert len(gather_problems(bad)) == 1, bad


def test_importing_configs_is_quick_and_needs_no_torch():
    code = "import sys, posttrain.config; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert time.perf_counter() - start < 5


# --- every field is read by somebody


def config_classes() -> list[type]:
    """Every dataclass of posttrain and recipes that is a config: by its name, or because a config holds it."""
    found: dict[str, type] = {}
    for path in sorted([*ROOT.glob("posttrain/**/*.py"), *ROOT.glob("recipes/*.py")]):
        names = [
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Recipe"))
        ]
        if not names:
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in names if is_dataclass(getattr(module, name))}
    return list(found.values())


def names_read() -> set[str]:
    """Every attribute that is read anywhere in posttrain or recipes, but by a config's own `problems`."""
    read: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "problems":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for path in [*ROOT.glob("posttrain/**/*.py"), *ROOT.glob("recipes/*.py")]:
        visit(ast.parse(path.read_text()))
    return read


def test_rule_10_every_field_of_every_config_is_read_by_somebody():
    read = names_read()
    unread = [f"{cls.__name__}.{f.name}" for cls in config_classes() for f in fields(cls) if f.name not in read]
    assert not unread, f"nobody reads {', '.join(unread)}"


def test_every_config_is_frozen_keyword_only_and_plain():
    for cls in config_classes():
        assert cls.__dataclass_params__.frozen and all(f.kw_only for f in fields(cls)), cls
        for f in fields(cls):
            hint = shared.type_hints(cls)[f.name]
            assert "|" not in str(hint) and "Optional" not in str(hint) and "Union" not in str(hint), f"{cls.__name__}.{f.name}: {hint}"
        if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(cls)):
            config = cls()
            assert from_json(cls, json.loads(json.dumps(to_json(config)))) == config
            assert not [text for text in gather_problems(config) if "must be of type" in text or "cannot hold" in text]
