"""docs/scaling.md prints what the formulas say, and what it says in words is what its tables show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from posttrain import costs
from posttrain.costs import Sharding

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_plan  # noqa: E402


def rows(name: str) -> list[list[str]]:
    """The cells of one of the page's tables, without its head."""
    found = scaling_plan.block(name).search(scaling_plan.PAGE.read_text())
    assert found, f"the page has no table {name!r}"
    lines = [line for line in found.group(2).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", scaling_plan.TABLES)
def test_the_page_prints_what_the_formulas_say(name):
    found = scaling_plan.block(name).search(scaling_plan.PAGE.read_text())
    assert found and found.group(2) == scaling_plan.TABLES[name](), "python benchmarks/scaling_plan.py --write brings the page up to date"


def test_bytes_a_parameter_are_those_that_the_text_names():
    """4P, bP and 8P of the table in words, by hand for 8 processes in bf16."""
    whole, level2, level3 = rows("bytes a parameter")
    assert whole == ["ddp", "4.00 + 2", "4.00", "0.00", "8.00", "4.00", "18.00", "22.00"]
    assert [float(x) for x in level2[1:5]] == [2, 4 / 8, 4 / 8, 8 / 8] and float(level2[5]) == 2 * 4 / 8
    assert [float(x) for x in level3[1:5]] == [2 / 8, 4 / 8, 4 / 8, 8 / 8]


def test_traffic_is_what_the_text_says_of_rings():
    p = scaling_plan.LLAMA["8B"].parameters / 1e9
    by_hand = {
        "ddp": [2 * 4 * p] * 3,
        "zero2": [2 * 4 * p * m + 2 * p for m in (1, 4, 16)],
        "zero3": [(4 + 4) * p * m for m in (1, 4, 16)],
    }
    for file, _, *cells in rows("traffic"):
        assert [float(cell) for cell in cells] == pytest.approx([x * 7 / 8 for x in by_hand[file]], abs=0.5)


def test_activations_are_the_texts_own_formula():
    for name, layer, *_ in rows("activations"):
        d, a, k, i, h = {"8B": (4096, 4096, 1024, 14336, 32), "70B": (8192, 8192, 1024, 28672, 64)}[name]
        assert float(layer) == pytest.approx((16 * d + 2 * (2 * a + 2 * k + 4 * i) + 4 * h + 8) / 1024, abs=0.5)


def test_measured_ranks_hold_what_the_formula_says():
    """Within the size of the embeddings' gradient, the whole of which ZeRO-2 holds where its part is cut from it."""
    points = json.loads(scaling_plan.MEASURED.read_text())["zero"]
    assert {point["zero"] for point in points} == {0, 1, 2, 3}
    for level, _, held, formula, ratio, _ in rows("measured"):
        assert float(held) / float(formula) == pytest.approx(float(ratio), abs=0.01)
        assert 0.97 < float(ratio) < 1.35, f"ZeRO-{level}"


@pytest.mark.parametrize("name", ["8B", "70B"])
def test_plans_fit_and_add_up(name):
    for stage, gpus, file, *cells in rows(f"plan {name}"):
        if file == "doesn't fit":
            continue
        _, _, memory, host, steps, compute, sent, hours, gpu_hours = (cell.replace(",", "") for cell in cells)
        devices = sum(int(word) for word in gpus.replace("vLLM", "").split("+"))
        assert float(memory) * 2**30 <= 80e9 and float(host) * 2**30 <= 2000e9 / 8
        # hours are rounded to a tenth
        assert float(gpu_hours) == pytest.approx(float(hours) * devices, abs=0.06 * devices + 1)
        assert float(hours) >= int(steps) * (float(compute) + float(sent) - 0.1) / 3600 - 0.1, stage
        assert file.startswith("multi_node") == (int(gpus.split()[0]) > 8)


def test_files_and_numbers_in_the_text_are_right():
    text = scaling_plan.PAGE.read_text()
    for file in ("cpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "multi_node_zero3"):
        assert (ROOT / "accelerate_configs" / f"{file}.yaml").is_file() and f"{file}.yaml" in text
    large, small = scaling_plan.LLAMA["70B"], scaling_plan.LLAMA["8B"]
    assert f"{2 * large.parameters / 1e9:.0f} GB" in text and f"{2 * small.parameters * 8 / 1e9:.0f} GB" in text
    assert f"{2 * large.parameters * 8 / 1e12:.1f} TB" in text
    in_four_bits = large.trunk * costs.NF4 + 2 * (large.parameters - large.trunk)
    assert f"{in_four_bits / 1e9:.0f} GB on one GPU" in text
    assert f"{costs.NF4:.3f} bytes a weight in NF4" in text
    assert f"{costs.REDUCE_BUCKET / 1e6:.0f} million" in text and f"{costs.LIVE / 1e9:.2f} billion" in text
    lora = costs.trained_memory(1e15, 4, Sharding())
    assert sum(lora.values()) / 1e15 == 16
