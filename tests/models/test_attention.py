"""The three attention structures give the same numbers, and what they can't honour is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from posttrain.models import attention
from posttrain.models.attention import DenseStructure, FlexStructure, TreeStructure, block_mask, forest_attention, longest_path
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
    query, key, value = tensors(12)
    expected = slow_attention(nested, query, key, value, 0.25)
    for kind in (TreeStructure, DenseStructure):
        torch.testing.assert_close(kind(nested).attend(0, query, key, value, 0.25), expected, rtol=1e-5, atol=1e-5)
    assert longest_path(nested.lengths, nested.parents) == 12


def test_long_queries_are_read_in_blocks_without_masked_work(monkeypatch) -> None:
    sizes = []
    original = attention.scaled_dot_product_attention

    def spy(query, key, value, **options):
        sizes.append((query.shape[2], key.shape[2]))
        return original(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    packed = row((50, 300))
    TreeStructure(packed).attend(0, *tensors(packed.num_tokens), 0.25)
    assert sizes == [(50, 50), (128, 178), (128, 306), (44, 350)]


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
