"""The peak memory of one stage, although stages share a process."""

from __future__ import annotations

import re
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Begin to measure anew. The kernel's mark of the peak is cumulative: writing 5 resets it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_bytes() -> int:
    """Peak since the last reset, of this process: allocated device memory on CUDA, resident memory on a CPU; 0 where neither is known."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if not STATUS.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return int(found.group(1)) * 1024 if found else 0
