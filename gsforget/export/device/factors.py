"""A change of rank r, exact on every machine: D = sum_r 2^(ea_r + eb_r) * b[:, r] a[r, :] from int16 factors.

Each integer product is at most 2^30.  With the exponents of a pair close enough together, all partial sums are integers
of at most 2^53 in units of the smallest exponent, so float64 adds them without rounding, in any order.  The new weight is
round_p(W + D): one addition in float64, and one rounding to the precision p, to nearest even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gsforget.errors import SafetyError

FARTHEST = 400  # powers of two: beyond what float32 factors need, and a product far from float64's limits
# Multiplications at a time: they stay in a core's cache, and no BLAS starts threads of its own beside ours for so few.
BLOCK = 2**18
EXPONENT = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}
STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "i1"}  # bfloat16 as bit patterns


def allowed_spread(rank: int) -> int:
    """How many powers of two the exponents of a pair may lie apart, so that the product is exact."""
    return 53 - 30 - math.ceil(math.log2(max(1, rank)))


def check_spread(low: int, high: int, rank: int) -> None:
    """Raise SafetyError ``inexact_delta`` unless a product with exponents from ``low`` to ``high`` is exact."""
    if high - low > allowed_spread(rank) or low < -2 * FARTHEST or high > 2 * FARTHEST:
        raise SafetyError(
            f"The exponents of a factor pair lie {high - low} powers of two apart, up to {high}: the product would not be "
            "exact.",
            "The factors are damaged or were not written by gsforget.",
            "inexact_delta",
        )


@dataclass(frozen=True)
class Factors:
    """int16 ``a`` [rank, columns] and ``b`` [rows, rank] with int32 exponents ``ea``, ``eb`` [rank]."""

    a: np.ndarray
    b: np.ndarray
    ea: np.ndarray
    eb: np.ndarray

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The exact product, float64, some rows at a time.  Raises SafetyError where exactness cannot be shown."""
        exponents = self.ea.astype(np.int64) + self.eb.astype(np.int64)
        low, high = int(exponents.min()), int(exponents.max())
        check_spread(low, high, len(exponents))
        a = self.a.astype(np.float64)
        b = self.b.astype(np.float64) * np.exp2((exponents - low).astype(np.float64))
        a *= 2.0**low
        step = max(1, BLOCK // a.size)
        for start in range(0, len(b), step):
            rows = slice(start, min(start + step, len(b)))
            block = b[rows] @ a
            block += 0.0  # whether a sum of zeros is -0 would depend on the machine's BLAS
            yield rows, block

    def product(self) -> np.ndarray:
        """The exact product D, float64 [rows, columns]."""
        out = np.empty((len(self.b), self.a.shape[1]))
        for rows, block in self.blocks():
            out[rows] = block
        return out

    def apply(self, weight: np.ndarray, dtype: str, scales: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """round_p(W + D).

        Args:
            weight: [rows, columns] as stored: float32, float16, bit patterns of bfloat16 in uint16, or int8.
            dtype: a key of ``STORED``.
            scales: of int8, before and after, float32, broadcast against the weight: the new weight is
                clip(round((W * before + D) / after)), from -127 (-128 where the weight holds that already) to 127.

        Returns:
            The new weight, as stored.  Raises SafetyError ``out_of_range`` where a value does not fit.
        """
        out = np.empty(weight.shape, STORED[dtype])
        least = min(int(weight.min()), -127) if dtype == "int8" else 0
        for rows, block in self.blocks():
            before, after = (
                None if s is None else np.broadcast_to(s, weight.shape)[rows].astype(np.float64)
                for s in scales or (None, None)
            )
            block += widen(weight[rows], dtype, before)
            out[rows] = narrow(block, dtype, after, least)
        return out


def widen(stored: np.ndarray, dtype: str, scale: np.ndarray | None = None) -> np.ndarray:
    """Stored values as float64, exactly; int8 times its scale (float64, rounded once at most)."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    wide = stored.astype(np.float64)
    return wide if scale is None else wide * scale


def narrow(values: np.ndarray, dtype: str, scale: np.ndarray | None = None, least: int = -127) -> np.ndarray:
    """Round float64 once, to nearest even, to a stored type.

    Raises SafetyError ``out_of_range`` where a value is beyond the type's largest; int8 is clipped instead, to
    ``least`` and 127.
    """
    if dtype == "int8":
        return np.clip(np.rint(values / scale), least, 127).astype(np.int8)
    with np.errstate(over="ignore"):
        rounded = to_bfloat16(values) if dtype == "bfloat16" else values.astype(STORED[dtype])
    bits, exponent = EXPONENT[dtype]
    if ((rounded.view(bits) & bits(exponent)) == exponent).any():  # infinite or NaN
        message = f"A new weight is beyond the range of {dtype}."
        raise SafetyError(message, "Export at a higher precision: --precision fp32.", "out_of_range")
    return rounded


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float64 rounded once, to nearest even, to bit patterns of bfloat16 (uint16); NaN stays NaN.

    By way of float32 rounded to odd: what float32 cannot hold is cut off and remembered in its last bit, which is far
    enough below bfloat16's for the second rounding to come out as one rounding would.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    inexact = wide != values
    bits = bits - (np.abs(wide) > np.abs(values))  # towards zero
    bits = (bits | inexact).astype(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
