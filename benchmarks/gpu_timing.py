"""What the parts of `gpu.py` measure with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH = 256 << 20  # bytes; above the L2 cache of every GPU


@dataclass(frozen=True)
class Setting:
    """Where and how to measure.  tiny: shapes and rounds that only try the script."""

    device: str
    type_name: str
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.type_name)

    @property
    def rounds(self) -> int:
        return 3 if self.tiny else 50

    @property
    def warm(self) -> int:
        return 1 if self.tiny else 10

    def clock(self, step: Callable[[], object]) -> float:
        """Milliseconds of one call, its inputs no longer in the L2 cache; CUDA events, on a CPU the wall clock."""
        if self.device != "cuda":
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flushed().zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """The most memory that a call takes beside what is there before it; None on a CPU."""
        if self.device != "cuda":
            return None
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, step: Callable[[], object]) -> int | None:
        """Kernels that one call launches; None on a CPU."""
        if self.device != "cuda":
            return None
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.int8, device="cuda")
