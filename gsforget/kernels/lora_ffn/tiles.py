"""Tile sizes of the kernels, by GPU generation and element size, chosen so that no register spills (see `specs`).

Which do depends on the version of Triton as well: all of these were compiled with 3.6 and 3.8, for every target that
these know (3.6 does not know sm_110).
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = 8  # rows of product tiles that share their columns in the L2 cache


class Tile(NamedTuple):
    """One configuration: rows, columns and depth of a tile, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def product_tile(target: int, size: int, rank: int) -> Tile:
    """For `product_kernel`.

    Args:
        target: compute capability as an integer, such as 90; 0 for the interpreter.
        size: bytes per element.
        rank: as the kernels hold it, see `padded`.
    """
    if not target:
        return Tile(32, 32, 16, 4, 1)
    if target < 80:
        return Tile(32, 32, 32, 8 if rank > 32 else 4, 2)  # Triton multiplies on the ordinary cores there
    if size == 4:
        if target in (100, 110) and rank <= 32:
            return Tile(128, 128, 32, 8, 3)
        if target >= 120 and rank == 16:
            return Tile(64, 64, 32, 4, 2)
        return Tile(64, 64, 32, 8, 2) if rank > 32 or target >= 120 else Tile(128, 64, 32, 8, 2)
    return Tile(128, 128, 64, 8, 3)


def pass_tile(target: int, size: int, rank: int) -> Tile:
    """For the passes without much state: `activate_kernel` and `skinny_kernel`."""
    if not target:
        return Tile(16, 16, 0, 4, 1)
    if target < 80:
        return Tile(32, 32, 0, 8, 1) if rank <= 32 else Tile(32, 16, 0, 8, 1)
    if size == 4 and rank > 32:
        return Tile(16, 16, 0, 8, 1) if target == 110 else Tile(32, 32, 0, 8, 1)
    if size == 4:
        return Tile(64, 64, 0, 8, 2) if rank == 16 else Tile(64, 32, 0, 8, 2 if target >= 90 else 1)
    many = rank > 32 if target >= 100 else rank == 32 and _few_registers(target)
    return Tile(64, 64, 0, 8 if many else 4, 2)


def gradient_tile(target: int, size: int, rank: int, gated: bool) -> Tile:
    """For `gradient_kernel`."""
    if not target:
        return Tile(16, 16, 0, 4, 1)
    if target < 80:
        many = rank > 32 or (size == 4 and rank == 16)
        return Tile(16, 16, 0, 8 if gated and many else 4, 1)
    small = _few_registers(target)
    if size == 4:
        if rank > 32:
            return Tile(16, 16, 0, 8, 1)
        if rank == 16 and target == 80 and not gated:
            return Tile(64, 32, 0, 8, 2)
        staged = rank == 16 and (target >= 120 or (small if gated else target == 90))
        return Tile(32, 32, 0, 8, 2 if staged else 1)
    if target == 90 and gated and rank == 16:
        return Tile(64, 32, 0, 8, 2)
    if rank == 16:
        return Tile(64, 64, 0, 8, 2)
    if target >= 120 and rank == 64 and gated:
        return Tile(32, 32, 0, 8, 1)
    return Tile(64, 32, 0, 4 if rank == 32 and (gated or (target < 100 and not small)) else 8, 2)


def _few_registers(target: int) -> bool:
    """Where what compiles without a spill for an A100 spills a few bytes."""
    return target in (86, 87, 89)


def padded(rank: int) -> int:
    """The rank as the kernels hold it: a power of two from 16 on, which is what a matrix unit takes."""
    return max(16, 1 << (rank - 1).bit_length())
