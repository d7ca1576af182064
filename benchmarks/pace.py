"""Side by side: each side in a process of its own, taking turns step by step, so that both meet the same machine.

A side is a function `(job, pace)` that trains and calls `pace()` wherever one step has ended and the next may begin. The
process that compares says when; what a step took is told back through a pipe.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

GIB = 2**30
GO, COUNT, END = "go", "count", "end"


class Done(BaseException):
    """All steps are measured; whatever loop the side is in ends here."""


class Pace:
    """What a side calls. `imported()` after its imports, `pace()` at every border between two steps."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began = 0.0
        self.imports = 0
        self.parameters = 0
        self.counter: Any = None

    def imported(self) -> None:
        """Imports are over: what they hold is no fault of the trainer."""
        self.imports = resident("VmRSS")

    def __call__(self, parameters: int = 0, loss: float | None = None, tokens: int = 0, phases: Mapping[str, float] | None = None) -> None:
        """One step has ended (none, at the first call), its seconds by `phases` if it knows; wait for leave to begin the next."""
        seconds = time.perf_counter() - self.began
        self.parameters = parameters or self.parameters
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.pipe.send({"flops": self.counter.get_total_flops()})
        elif self.began:
            peak = resident("VmHWM")
            held = {"peak": peak, "imports": self.imports, "parameters": self.parameters}
            self.pipe.send({"seconds": seconds, "loss": loss, "tokens": tokens, "phases": dict(phases or {}), **held})
        self.counter = None
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep what this side doesn't need while the others work
        match self.pipe.recv():
            case "end":
                raise Done
            case "count":
                self.counter = flop_counter()
                self.counter.__enter__()
        self.began = time.perf_counter()


def resident(field: str) -> int:
    """Bytes of memory this process holds (VmRSS) or has held at most (VmHWM)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def flop_counter() -> Any:
    """torch's FLOP counter, taught what it passes over otherwise: a CPU's attention, and matrix products added in place."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    def added(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    mapping = {
        aten.addmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Side:
    """One side's process, seen from the one that compares."""

    def __init__(self, name: str, function: str, job: Mapping[str, Any], threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self.process = context.Process(target=run_side, args=(function, dict(job), theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.steps: list[dict[str, Any]] = []
        self.flops = 0

    def step(self) -> None:
        """Let it do one step, alone on the machine."""
        self.steps.append(self._ask(GO))

    def count(self) -> None:
        """One more step, under the FLOP counter."""
        self.flops = self._ask(COUNT)["flops"]

    def end(self) -> None:
        self.pipe.send(END)
        self.process.join(60)
        self.process.kill()

    def _ask(self, command: str) -> dict[str, Any]:
        self.pipe.send(command)
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit(f"{self.name} ended before its step was measured; what it said stands above") from None

    def summary(self, warmup: int, tokens: int) -> dict[str, float]:
        """Medians and minima over the steps after warm-up. Memory is the peak above imports, weights, gradients and AdamW's two moments."""
        seconds = [step["seconds"] for step in self.steps[warmup:]]
        last = self.steps[-1]
        return {
            "seconds_per_step": statistics.median(seconds),
            "seconds_per_step_min": min(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "peak_bytes": last["peak"],
            "peak_bytes_above_model": last["peak"] - last["imports"] - 16 * last["parameters"],
            "flops_per_step": self.flops,
            "first_loss": self.steps[0]["loss"],
        }

    def phase_seconds(self, phase: str, warmup: int) -> float:
        """Median over the steps after warm-up of what was spent in one phase."""
        return statistics.median(step["phases"][phase] for step in self.steps[warmup:])


def run_side(function: str, job: dict[str, Any], pipe: Connection) -> None:
    """In the side's process: call its function until the comparison has seen enough."""
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(job, Pace(pipe))
    except Done:
        os._exit(0)  # trainers would save, log and wait for threads


def alternate(sides: Sequence[Side], warmup: int, steps: int) -> None:
    """Every side takes its steps in turn with the others; then one step of each under the FLOP counter."""
    for _ in range(warmup + steps):
        for side in sides:
            side.step()
    for side in sides:
        side.count()
        side.end()


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """speed: how many times faster (medians; `speed_min` by minima); memory and flops: our share of theirs."""
    return {
        "speed": theirs["seconds_per_step"] / ours["seconds_per_step"],
        "speed_min": theirs["seconds_per_step_min"] / ours["seconds_per_step_min"],
        "memory": ours["peak_bytes_above_model"] / theirs["peak_bytes_above_model"],
        "flops": ours["flops_per_step"] / theirs["flops_per_step"],
    }
