"""Trying whether something fits in memory, without harm to the process where it does not; and how much it took at its peak."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def within_memory(action: Callable[[], T]) -> T | None:
    """What `action` returns, or None where memory runs out on its way.

    On the CPU the process's address space is limited to what the machine has left, for that time: without the limit Linux
    grants more than there is, and kills the process when it is used.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limited = not torch.cuda.is_available()
    if limited:
        limit = _status_bytes("VmSize") + int(_available_bytes() * 0.9)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        return action()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:  # the CPU allocator's own
        if "allocate memory" not in str(error):
            raise
        return None
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def begin_peak(device: torch.device) -> None:
    """From here on `peak_bytes` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak resident size begins anew (proc(5))


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since `begin_peak`: allocated on a GPU, resident in the whole process on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _available_bytes() -> int:
    """Memory that the machine can give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
