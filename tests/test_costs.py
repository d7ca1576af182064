"""The formulas of posttrain.costs against what is counted: paper, tensors, FLOPs, collectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from posttrain import costs
from posttrain.costs import Sharding, Tokens, shape_of
from posttrain.models import logprobs
from posttrain.packing import Tree, forest, segment
from posttrain.rollout import local
from tests import cost_jobs
from tests.engine import jobs
from tests.engine.jobs import alone
from tests.pairs import BACKENDS, run_pair
from tests.tiny import tiny_config, tiny_model

PARAMETERS = sum(p.numel() for p in tiny_model(hidden=128).parameters())
LEVEL = {"plain": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def counted(backend: str, **kwargs) -> list[dict]:
    if backend == "plain":
        return [alone(cost_jobs.update, **kwargs)]
    return run_pair(backend, "tests.cost_jobs:update", **kwargs)


def sharding(backend: str) -> Sharding:
    return Sharding(level=LEVEL[backend], ranks=1 if backend == "plain" else 2)


def shape(**changes) -> costs.Shape:
    found = shape_of(tiny_config(**changes).to_dict())
    assert found is not None
    return found


# --- memory


def test_the_zero_papers_own_example():
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs, mixed precision with K = 12; bytes in GB."""
    found = [costs.per_rank(2 * 7.5, 2 * 7.5, 12 * 7.5, level, 64) for level in range(4)]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        (dict(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336, vocabulary=128256), 8.030),  # Llama 3.1's card
        (dict(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, inner=28672, vocabulary=128256), 70.554),
    ],
)
def test_published_shapes_have_their_published_number_of_parameters(model, billions):
    assert costs.Shape(**model).parameters / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "mistral", "gemma", "gpt2", "opt", "gpt_neox"])
def test_a_shape_is_read_from_config_json(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    found = shape_of(json.loads((tmp_path / "config.json").read_text()))
    assert found is not None
    # biases and learnt positions are left out: a few per cent of so small a model
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "position" not in name and "wpe" not in name)
    assert found.trunk + found.table * (1 if found.tied else 2) == matrices
    assert shape_of({"architectures": ["Unknown"]}) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["plain", *BACKENDS])
def test_an_update_holds_what_the_formula_says(backend, dtype):
    expected = costs.trained_memory(PARAMETERS, 4 if dtype == "float32" else 2, sharding(backend), ema=True)
    # what is alive only inside a forward, a backward or a collective is not there to be counted after the last backward
    gone = {"copies in bf16", "weights made whole", *({"reduce bucket"} if effective(backend, dtype) in (0, 2) else ())}
    held = sum(size for name, size in expected.items() if name not in gone)
    kept = sum(costs.between_updates(expected, effective(backend, dtype)).values())
    waiting = 4 * shape(hidden=128).table  # ZeRO-2 holds the whole of a gradient that its part is cut from
    for found in counted(backend, dtype=dtype, ema=0.5):
        assert 0.999 * held <= found["held"] <= 1.01 * held + waiting
        assert 0.999 * kept <= found["after"] <= 1.01 * kept + waiting


def effective(backend: str, dtype: str) -> int:
    return costs.effective_level(LEVEL[backend], 4 if dtype == "float32" else 2)


@pytest.mark.parametrize("backend", ["plain", "zero1", "zero2", "zero3"])
def test_a_second_term_adds_copies_of_the_gradients(backend):
    one, two = (counted(backend, terms=terms)[0]["held"] for terms in (1, 2))
    said = [sum(costs.trained_memory(PARAMETERS, 4, sharding(backend), terms=terms).values()) for terms in (1, 2)]
    assert two - one == pytest.approx(said[1] - said[0], abs=4.1 * shape(hidden=128).table)


@pytest.mark.parametrize(
    ("family", "dtype", "autocast", "checkpointing", "children"),
    [
        ("llama", torch.float32, False, False, 0),
        ("llama", torch.bfloat16, False, False, 0),
        ("llama", torch.float32, True, False, 0),
        ("llama", torch.float32, False, True, 0),
        ("llama", torch.bfloat16, False, True, 0),
        ("mistral", torch.float32, False, False, 0),
        ("mistral", torch.float32, False, False, 3),
        ("llama", torch.bfloat16, False, False, 2),
    ],
)
def test_activations_are_what_autograd_saves(family, dtype, autocast, checkpointing, children):
    """Of one layer more; hooks see every tensor that the graph keeps, weights and their bf16 copies apart."""
    length = 100
    few, many = (saved_bytes(family, layers, length, dtype, autocast, checkpointing, children) for layers in (2, 3))
    kwargs = dict(autocast=autocast, checkpointing=checkpointing)
    tokens = length * (1 + children)
    said = [costs.activations(shape(family=family, layers=n), tokens, dtype.itemsize, **kwargs) for n in (2, 3)]
    assert many - few == pytest.approx(said[1] - said[0], rel=1e-3)


def saved_bytes(family: str, layers: int, length: int, dtype: torch.dtype, autocast: bool, checkpointing: bool, children: int) -> int:
    model = jobs.packed(family, layers=layers, dtype=dtype).train()
    model.set_gradient_checkpointing(checkpointing)
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters() if p.ndim > 1}
    kept = []

    def pack(tensor):
        if tuple(tensor.shape) not in weights:
            kept.append(tensor)
        return tensor

    ids = list(range(5, 5 + length))
    root = segment(ids, [False] + [not children] * (length - 1))
    row = forest([Tree(root, tuple(segment(ids, True) for _ in range(children)))])
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(row, ("logprobs",))
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values())


def test_the_samplers_pieces_are_those_of_its_code():
    assert (costs.SAMPLED_LOGITS, costs.PREFILL_TOKENS) == (local.LOGIT_BYTES, local.PREFILL_TOKENS)


def test_the_cache_is_as_large_as_the_samplers():
    from posttrain.config import SamplingConfig

    model, prompts = jobs.packed("mistral"), [list(range(5, 15))] * 3
    wave = local.Decoder(model.eval(), prompts, [0, 0, 0], [(0, n) for n in range(3)], SamplingConfig(max_new_tokens=6), "cpu")
    with torch.inference_mode():
        wave.run(local.Ending([], (), None), local.Meter(3, 6, None))
    held = sum(buffer.nbytes for layer in wave.cache.layers.values() for buffer in layer)
    assert held == costs.cache_memory(shape(family="mistral"), 3 * (10 + 6), 4)


@pytest.mark.parametrize("backend", ["plain", "zero2"])
def test_a_checkpoint_is_as_large_on_disk(backend, tmp_path):
    kwargs = dict(folder=str(tmp_path / "step_000001"))
    alone(cost_jobs.save, **kwargs) if backend == "plain" else run_pair(backend, "tests.cost_jobs:save", **kwargs)
    size = sum(file.stat().st_size for file in Path(kwargs["folder"]).iterdir())
    said = costs.checkpoint_bytes(PARAMETERS, 4, sharding(backend), ema=True)
    assert said < size < said * 1.03  # names, random numbers, padding of shards


def test_an_adapter_has_as_many_parameters_as_peft_gives_it():
    from posttrain.config import AdapterConfig
    from posttrain.models.adapters import DEFAULT, BaseModel, Switch, attach, trained_parameters

    model = jobs.packed("mistral")
    model.adapter = attach(model.hf, AdapterConfig(rank=3), BaseModel(path=""), name=DEFAULT, switch=Switch(), start={}, seed=0)
    assert sum(p.numel() for p in trained_parameters(model).values()) == costs.adapter_parameters(shape(family="mistral"), 3)


# --- traffic


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_sends_what_the_formula_says(backend, dtype, terms):
    for found in counted(backend, dtype=dtype, terms=terms):
        expected = costs.communication(
            PARAMETERS, 4 if dtype == "float32" else 2, sharding(backend), micro_batches=found["micro_batches"], terms=terms
        )
        assert found["volumes"] == pytest.approx(expected, rel=0.01)


def test_zero3_gathers_weights_twice_when_they_cant_stay():
    for found in run_pair("zero3", "tests.cost_jobs:update", whole=False):
        large = costs.communication(2 * costs.LIVE, 4, sharding("zero3"), micro_batches=found["micro_batches"])
        said = large["all_gather"] / (2 * costs.LIVE) * PARAMETERS
        assert 0.7 * said < found["volumes"]["all_gather"] <= 1.01 * said  # the last layer is still there when its backward begins


def test_the_zero_papers_volumes():
    """arXiv 1910.02054, section 7: 2 P for data parallelism and levels 1 and 2, 3 P for level 3, in elements of one width."""
    many = 1_000_000
    volume = {"all_reduce": costs.sent({"all_reduce": 1.0}, many), "split": costs.sent({"reduce_scatter": 1.0, "all_gather": 1.0}, many)}
    assert volume == pytest.approx({"all_reduce": 2, "split": 2}, rel=1e-5)
    large = costs.communication(2 * costs.LIVE, 4, Sharding(level=3, ranks=many))
    assert costs.sent(large, many) == pytest.approx(3 * 4 * 2 * costs.LIVE, rel=1e-5)


# --- arithmetic


@pytest.mark.parametrize(("children", "checkpointing", "want"), [(0, False, "nll"), (0, True, "logprobs"), (3, False, "logprobs")])
def test_flops_are_those_that_torch_counts(children, checkpointing, want, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 16 * 4 * shape().vocabulary})
    monkeypatch.setattr(logprobs, "KEPT_BYTES", {"cpu": 0})
    model = jobs.packed(layers=3, hidden=64).train()
    model.set_gradient_checkpointing(checkpointing)
    length = 40
    ids = list(range(5, 5 + length))
    root = segment(ids, [False] + [not children] * (length - 1))
    row = forest([Tree(root, tuple(segment(ids, True) for _ in range(children)))])
    scored = children * length if children else length - 1
    pairs = length * length + children * length * 2 * length  # the counter takes every rectangle for full
    tokens = Tokens(count=length * (1 + children), pairs=pairs, **{"summed" if want == "nll" else "scored": scored})
    with counter() as forward, torch.no_grad():
        model.eval()(row, (want,))
    model.train()
    with counter() as both:
        model(row, (want,))[want].sum().backward()
    size = shape(layers=3, hidden=64)
    assert forward.get_total_flops() == pytest.approx(costs.forward_flops(size, tokens), rel=1e-6)
    assert both.get_total_flops() == pytest.approx(costs.training_flops(size, tokens, checkpointing=checkpointing), rel=1e-6)


def test_a_tree_counts_the_pairs_that_see_each_other():
    root, children, response = 5, 3, 4
    row = forest([Tree(segment([5] * root), tuple(segment([6] * response, True) for _ in range(children)))])
    from posttrain.models.attention import DenseStructure

    found = costs.tree(root, children, response)
    assert found.pairs == int(DenseStructure(row).mask.sum()) and found.count == row.num_tokens


def counter() -> FlopCounterMode:
    """torch's counter, taught a CPU's attention and matrix products that are added in place."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: lambda _, left, right, *__, **___: 2 * left[0] * left[1] * right[1],
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
        },
    )
