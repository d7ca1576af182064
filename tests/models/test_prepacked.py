"""Weights in another layout give the same numbers, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.models import prepacked as module
from posttrain.models.logprobs import LogitTransform, TokenLogprobs
from posttrain.models.prepacked import can_prepack, prepacked


class Layer(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width, bias=bias), nn.Linear(3 * width, width, bias=bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(inputs)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_the_numbers_stay(rows, bias, monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)
    torch.manual_seed(0)
    layer, inputs = Layer(64, bias), torch.randn(1, rows, 64)
    with torch.inference_mode():
        expected = layer(inputs)
        with prepacked(layer):
            assert {"forward"} <= vars(layer.up).keys() & vars(layer.down).keys()
            torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer(inputs), expected)


def test_an_lm_head_gives_the_same_logits(monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)
    torch.manual_seed(0)
    head, hidden = TokenLogprobs.take_over(nn.Linear(32, 500), LogitTransform(scale=0.5, softcap=3.0)), torch.randn(7, 32)
    with torch.inference_mode():
        expected = head.logits(hidden)
        with prepacked(head):
            torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-6)


def test_only_large_fp32_maps_are_taken() -> None:
    large = nn.Linear(1024, 512)
    assert can_prepack(large)
    assert not can_prepack(nn.Linear(1024, 511)) and not can_prepack(nn.Embedding(1024, 512))
    assert not can_prepack(large.to(torch.bfloat16))


def test_the_layout_is_gone_after_an_error(monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)
    layer = Layer(8, bias=True)
    with pytest.raises(RuntimeError, match="stop"), prepacked(layer):
        raise RuntimeError("stop")
    assert "forward" not in vars(layer.up)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.up.weight.grad is not None


def test_weights_under_autocast_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)
    layer = Layer(8, bias=False)
    with torch.autocast("cpu", torch.bfloat16), prepacked(layer):
        assert "forward" not in vars(layer.up)
