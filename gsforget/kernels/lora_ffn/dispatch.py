"""Which products go through our kernel and which through the vendor's library: by measured tables, else by counting.

A table is a JSON file in `tables/`, one per device, written by `benchmarks/gpu.py`: rows of stage, element type, shape
(M, N, K) and the faster way.  The nearest shape by the sum of |log ratio| decides.  On a device without a table the
default is what counted bytes suggest, and is logged once.  Nothing is ever tuned while a user waits.

Stages: "up" (first product, with the activation), "down" (last product), "slope" (dy W times act'), "back" (dx).
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from importlib import resources
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("gsforget.kernels")

# Counted at ViT-B, 50 x 197 tokens: with the activation in the epilogue the first product saves 120 MB of traffic, which
# pays from about 70 % of the vendor's speed on; a pair's term beside a narrow output is cheaper as a second product.
DEFAULT = {"up": "fused", "down": "vendor", "slope": "vendor", "back": "vendor"}
WAYS = ("fused", "vendor")
_forced: dict[str, str] = {}


def choose(stage: str, x: Tensor, m: int, n: int, k: int) -> str:
    """ "fused" or "vendor" for a product [m, k] x [k, n] on x's device and in its element type."""
    if stage in _forced:
        return _forced[stage]
    return _choose(stage, _name(x.device), str(x.dtype).removeprefix("torch."), m, n, k)


class forced:
    """Context in which stages go one way: ``with forced(up="vendor"): ...``; for measuring and for tests."""

    def __init__(self, **ways: str):
        unknown = [s for s, w in ways.items() if s not in DEFAULT or w not in WAYS]
        if unknown:
            raise ValueError(f"no such stage or way: {unknown}")
        self.ways = ways

    def __enter__(self) -> None:
        self.before = dict(_forced)
        _forced.update(self.ways)

    def __exit__(self, *_: object) -> None:
        _forced.clear()
        _forced.update(self.before)


@functools.cache
def target(device: torch.device) -> int:
    """Compute capability as an integer, such as 90; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@functools.lru_cache(4096)
def _choose(stage: str, device: str, dtype: str, m: int, n: int, k: int) -> str:
    rows = [r for r in _table(device) if r["stage"] == stage and r["dtype"] == dtype]
    if not rows:
        return DEFAULT[stage]
    return nearest(rows, m, n, k)["way"]


def nearest(rows: list[dict[str, Any]], m: int, n: int, k: int) -> dict[str, Any]:
    """The row whose shape is nearest, by the sum of |log ratio| over M, N and K."""
    return min(rows, key=lambda r: sum(abs(math.log(a / b)) for a, b in zip((r["m"], r["n"], r["k"]), (m, n, k))))


@functools.cache
def _table(device: str) -> list[dict[str, Any]]:
    file = resources.files(__package__) / "tables" / f"{slug(device)}.json"
    if not file.is_file():
        log.info("no measured table for %s: products go %s", device, ", ".join(f"{s} {w}" for s, w in DEFAULT.items()))
        return []
    rows = json.loads(file.read_text())["rows"]
    assert all(r["stage"] in DEFAULT and r["way"] in WAYS for r in rows), file
    return rows


def slug(device: str) -> str:
    """The file name of a device: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
