"""The three attention structures give the same numbers, and what they can't honour is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from posttrain.models.attention import DenseStructure, FlexStructure, TreeStructure, block_mask, forest_attention, longest_path, parts_of
from posttrain.packing import Forest, Tree, forest, segment


def row(*shapes: tuple[int, ...]) -> Forest:
    """A packed row of trees given as (root length, child lengths...)."""
    return forest([Tree(segment([1] * root), tuple(segment([1] * child, True) for child in children)) for root, *children in shapes])


def tensors(length: int, heads: int = 4, shared: int = 2, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, length, width, generator=generator, requires_grad=True) for count in (heads, shared, shared)]


def slow_attention(packed: Forest, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Token by token: walk the predecessors back to the root and attend to just those tokens."""
    out = torch.zeros(1, query.shape[2], query.shape[1], query.shape[3])
    group = query.shape[1] // key.shape[1]
    for i in range(query.shape[2]):
        path = [i]
        while int(packed.predecessor[path[-1]]) != path[-1]:
            path.append(int(packed.predecessor[path[-1]]))
        for head in range(query.shape[1]):
            weights = (key[0, head // group, path] @ query[0, head, i] * scaling).softmax(0)
            out[0, i, head] = weights @ value[0, head // group, path]
    return out


SHAPES = [((5, 3, 4), (7,), (2, 1, 1, 6)), ((40, 150, 3), (1, 1), (30,)), ((1,),)]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", [TreeStructure, DenseStructure, FlexStructure])
@torch.no_grad()
def test_every_structure_equals_a_walk_over_predecessors(kind, shapes) -> None:
    packed = row(*shapes)
    query, key, value = (x.detach() for x in tensors(packed.num_tokens))  # FlexAttention has no backward on a CPU
    expected = slow_attention(packed, query, key, value, 0.3)
    torch.testing.assert_close(kind(packed).attend(0, query, key, value, 0.3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES[:2])
def test_rule_25_tree_gradients_equal_the_dense_mask(shapes) -> None:
    packed = row(*shapes)
    results = []
    for kind in (TreeStructure, DenseStructure):
        inputs = tensors(packed.num_tokens)
        out = kind(packed).attend(0, *inputs, 0.25)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([x.grad for x in inputs])
    for tree, dense in zip(*results):
        torch.testing.assert_close(tree, dense, rtol=1e-5, atol=1e-5)


def test_segments_may_be_nested_deeper_than_a_prompt_and_its_responses() -> None:
    flat = row((4, 3), (5,))  # the last segment becomes a grandchild: root -> child -> grandchild
    position = torch.cat((flat.position_ids[:7], torch.arange(7, 12)))
    predecessor = torch.cat((flat.predecessor[:7], torch.arange(6, 11)))
    nested = replace(flat, parents=[-1, 0, 1], position_ids=position, predecessor=predecessor)
    for packed in (nested, nested_row()):
        query, key, value = tensors(packed.num_tokens)
        expected = slow_attention(packed, query, key, value, 0.25)
        for kind in (TreeStructure, DenseStructure):
            torch.testing.assert_close(kind(packed).attend(0, query, key, value, 0.25), expected, rtol=1e-5, atol=1e-5)
    assert longest_path(nested.lengths, nested.parents) == 12


def nested_row() -> Forest:
    """One tree of five segments: 0 -> (1 -> (2, 3), 4), and a tree of its own beside it."""
    flat = row((4, 3, 2, 5, 6), (3,))
    before = torch.arange(-1, 22)
    before[[0, 4, 7, 9, 14, 20]] = torch.tensor([0, 3, 6, 6, 3, 20])
    return replace(flat, parents=[-1, 0, 1, 1, 0, -1], predecessor=before)


def test_what_descends_from_a_segment_reads_it_as_one_run_and_nothing_is_read_in_vain() -> None:
    for packed in (row((5, 3, 4), (7,), (2, 1, 1, 6)), nested_row()):
        seen = torch.zeros(packed.num_tokens, packed.num_tokens, dtype=torch.int)
        for part in parts_of(packed):
            block = torch.ones(part.queries.stop - part.queries.start, part.keys.stop - part.keys.start, dtype=torch.int)
            seen[part.queries, part.keys] += block.tril() if part.causal else block
        assert torch.equal(seen, DenseStructure(packed).mask.int()), "every visible pair once, and no other"
    assert len(parts_of(nested_row())) == 6 + 2


@pytest.mark.parametrize("packed", [row((3, 2, 4)), nested_row()], ids=["prompt and responses", "nested"])
def test_tree_gradients_equal_finite_differences(packed) -> None:
    inputs = [x.detach().double().requires_grad_() for x in tensors(packed.num_tokens, width=3)]
    assert torch.autograd.gradcheck(lambda *given: TreeStructure(packed).attend(0, *given, 0.5), inputs)


def test_scores_far_apart_are_merged_without_overflow() -> None:
    packed = row((6, 4, 3))
    query, key, value = (x.detach() for x in tensors(packed.num_tokens))
    found = TreeStructure(packed).attend(0, query, key, value, 60.0)
    torch.testing.assert_close(found, slow_attention(packed, query, key, value, 60.0), rtol=1e-4, atol=1e-4)


def test_values_may_be_narrower_than_keys() -> None:
    packed = row((6, 4, 3))
    query, key, value = (x.detach() for x in tensors(packed.num_tokens))
    narrow = value[..., :10]
    found = TreeStructure(packed).attend(0, query, key, narrow, 0.25)
    torch.testing.assert_close(found, DenseStructure(packed).attend(0, query, key, narrow, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [TreeStructure, DenseStructure, FlexStructure])
def test_queries_and_keys_in_fp32_meet_values_in_bf16_as_under_autocast(kind) -> None:
    packed = row((6, 4, 3))
    query, key, value = tensors(packed.num_tokens)
    with torch.set_grad_enabled(kind is not FlexStructure):  # FlexAttention has no backward on a CPU
        found, _ = forest_attention(Layer(), query, key, value.bfloat16(), attention_mask=None, structure=kind(packed))
    with torch.autocast("cpu", torch.bfloat16):
        expected = DenseStructure(packed).attend(0, query, key, value.bfloat16(), 0.25)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    if found.requires_grad:
        found.float().sum().backward()
        assert query.grad is not None and query.grad.dtype == torch.float32


def test_the_graph_keeps_no_copy_of_keys_or_values() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    packed = row((100, 30, 30, 30))
    query, key, value = tensors(packed.num_tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = TreeStructure(packed).attend(0, query, key, value, 0.25)
    sums = 4 * query.shape[1] * packed.num_tokens
    assert sum(kept.values()) == sums + sum(x.untyped_storage().nbytes() for x in (query, key, value, out))


def test_the_tree_is_refused_elsewhere_than_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="attention='tree' works on a CPU, not on meta"):
        TreeStructure(row((5, 3)).to("meta"))


@pytest.mark.parametrize("shapes", [((200, 150, 3, 90), (20,), (300,)), ((384, 128),), ((100, 30), (2, 1, 1, 1))])
def test_flex_blocks_are_those_that_torch_finds_in_the_full_mask(shapes) -> None:
    packed = row(*shapes)
    mine = block_mask(packed)
    theirs = create_block_mask(mine.mask_mod, None, None, packed.num_tokens, packed.num_tokens, device="cpu")
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(mine.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(mine.kv_num_blocks, theirs.kv_num_blocks)
    assert mine.seq_lengths == theirs.seq_lengths
    assert torch.equal(mine.full_q_num_blocks, theirs.full_q_num_blocks), "what the backward pass reads"


class Layer(torch.nn.Module):
    layer_idx = 0


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("softcap", 50.0),
        ("s_aux", torch.zeros(4)),
        ("dropout", 0.1),
        ("is_causal", False),
        ("position_bias", torch.zeros(1)),
        ("attention_mask", torch.ones(1, 1, 8, 8)),
        ("something_new", 1),
        ("output_attentions", True),
    ],
)
def test_a_keyword_that_would_change_the_model_is_refused(keyword, value) -> None:
    packed = row((5, 3))
    options = {"attention_mask": None, "structure": TreeStructure(packed), keyword: value}
    with pytest.raises(ValueError, match=keyword):
        forest_attention(Layer(), *tensors(8), **options)


def test_neutral_keywords_are_accepted() -> None:
    neutral = dict(
        dropout=0.0, is_causal=True, softcap=None, s_aux=None, sliding_window=None, position_ids=torch.arange(8), use_cache=False
    )
    out, weights = forest_attention(Layer(), *tensors(8), attention_mask=None, structure=TreeStructure(row((5, 3))), **neutral)
    assert out.shape == (1, 8, 4, 16)
    assert weights is None


def test_a_window_is_refused_when_a_row_is_longer_and_ignored_when_none_is() -> None:
    packed = row((5, 3), (6,))
    for window in (8, 100):
        forest_attention(Layer(), *tensors(14), attention_mask=None, structure=TreeStructure(packed), sliding_window=window)
    with pytest.raises(ValueError, match="sliding_window=7, shorter than a row of 8 tokens"):
        forest_attention(Layer(), *tensors(14), attention_mask=None, structure=TreeStructure(packed), sliding_window=7)


def test_a_packed_model_refuses_to_run_without_a_structure() -> None:
    with pytest.raises(ValueError, match="PackedModel"):
        forest_attention(Layer(), *tensors(8), attention_mask=None)
