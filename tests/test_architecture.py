"""The house's plan: imports point one way, and only one room knows each heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("posttrain/**/*.py"), *ROOT.glob("recipes/*.py")])

# a room may import from rooms of a lower floor, and from its own floor where ALONGSIDE says so
FLOORS = {
    "recipes": 4,
    "standalone": 4,
    "stages": 3,
    "pipeline": 3,
    "__main__": 5,
    "run": 2,
    "reference": 2,
    "chat_terminal": 2,
    "engine": 1,
    "rollout": 1,
    "rewards": 1,
    "evaluation": 1,
    "synthesis": 1,
    "curation": 1,
    "models": 1,
    "data": 1,
    "inputs": 1,
    "estimates": 1,
    "forecast": 1,
    "tracking": 1,
    "progress": 1,
    "report": 1,
    "packing": 0,
    "preferences": 0,
    "ops": 0,
    "controllers": 0,
    "costs": 0,
    "speed": 0,
    "clock": 0,
    "config": 0,
}


def room(module: str) -> str:
    """The room that a dotted module name is in, "" outside the house."""
    parts = module.split(".")
    if parts[0] == "recipes":
        return "recipes"
    return parts[1] if parts[0] == "posttrain" and len(parts) > 1 else ""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """The modules that a file imports, anywhere in it; those under TYPE_CHECKING only when asked."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not typing_too and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "posttrain":
                found.update(f"posttrain.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    home = room(name_of(path))
    for module in imports(path):
        other = room(module)
        if other and other != home:
            assert home in FLOORS and other in FLOORS, f"{home} or {other} has no floor in the house's plan"
            assert FLOORS[other] <= FLOORS[home], f"{name_of(path)} imports {module}, which is above it"
            assert FLOORS[other] < 3 or FLOORS[home] > 3, f"{name_of(path)} imports {module}, sideways"


def test_no_stage_imports_another_stage():
    for path in ROOT.glob("posttrain/stages/*.py"):
        assert not [module for module in imports(path, typing_too=True) if room(module) == "stages"], path


@pytest.mark.parametrize(("library", "home"), [("accelerate", "engine"), ("deepspeed", "engine"), ("wandb", "tracking")])
def test_only_one_room_imports(library, home):
    users = {room(name_of(path)) for path in FILES if any(m.split(".")[0] == library for m in imports(path, typing_too=True))}
    assert users <= {home}, f"{library} is imported by {users - {home}}"


def test_ops_and_packing_know_nothing_but_torch():
    for name in ("ops", "packing"):
        heavy = {m.split(".")[0] for m in imports(ROOT / "posttrain" / f"{name}.py")} - set(sys.stdlib_module_names)
        assert heavy <= {"torch"}, heavy


def test_there_are_no_rooms_without_a_purpose():
    assert not [path for path in FILES if path.stem in ("utils", "common", "helpers", "misc")]


def test_importing_the_stages_is_cheap():
    stages = [name_of(path) for path in ROOT.glob("posttrain/stages/*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(['posttrain.pipeline', 'posttrain.run', *stages])}\n" + (
        "heavy = {'transformers', 'accelerate', 'deepspeed', 'wandb', 'datasets', 'trl'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
