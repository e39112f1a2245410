"""How much memory this process has held at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: str) -> int:
    """Bytes: on a GPU what torch has allocated there at most, else the largest resident set, from the process's start."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts at the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
