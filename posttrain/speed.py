"""How fast this device multiplies matrices and reads memory, measured in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache


@cache
def matmul_flops() -> float:
    """FLOP/s of a square matrix product in the precision of training, the best of a few."""
    import torch

    is_cuda = torch.cuda.is_available()
    n, dtype = (4096, torch.bfloat16) if is_cuda else (768, torch.float32)
    a = torch.randn(n, n, device="cuda" if is_cuda else "cpu", dtype=dtype)
    return 2 * n**3 / _best(lambda: (a @ a).sum().item())


@cache
def read_rate() -> float:
    """Bytes per second at which a matrix-vector product reads its matrix from memory."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix, vector = torch.ones(8192, 2048, device=device), torch.ones(2048, device=device)
    return matrix.numel() * 4 / _best(lambda: (matrix @ vector).sum().item())


def _best(call: Callable[[], float]) -> float:
    """Seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
