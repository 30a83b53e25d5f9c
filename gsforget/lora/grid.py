"""Factors on an integer grid, so that their product is exact and the same on every machine.

A pair is stored as int16 factors with one power-of-two exponent per rank component:
D = sum_r 2^(ea_r + eb_r) * b[:, r] a[r, :].  Each integer product is below 2^30; with the exponents of a pair kept within
`spread` of each other, all partial sums are integers below 2^53 in units of the smallest exponent, so float64 adds them
without rounding in any order.  The merged weight is round_p(W + D), rounded once to the precision p of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.factors import FARTHEST, allowed_spread, check_spread

LIMIT = 32767


@dataclass(frozen=True)
class GridFactors:
    """int16 `a` [rank, in] and `b` [out, rank] with int32 exponents `ea`, `eb` [rank]."""

    a: Tensor
    b: Tensor
    ea: Tensor
    eb: Tensor

    def product(self) -> Tensor:
        """The exact product D, float64 [out, in].  Raises SafetyError where exactness cannot be shown."""
        exponents = self.ea.to(torch.int64) + self.eb
        low, high = (int(exponents.min()), int(exponents.max())) if len(exponents) else (0, 0)
        check_spread(low, high, len(exponents))
        scaled = self.b.to(torch.float64) * torch.exp2((exponents - low).to(torch.float64))
        # Plus 0: whether a sum of zeros is -0 would depend on the machine's BLAS.
        return (scaled @ self.a.to(torch.float64)) * 2.0**low + 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors as float32 `a` [rank, in] and `b` [out, rank]; exact, int16 times a power of two."""
        a = self.a.float() * torch.exp2(self.ea.float())[:, None]
        return a, self.b.float() * torch.exp2(self.eb.float())

    def tensors(self, parameter: str) -> dict[str, Tensor]:
        return {f"{parameter}::{k}": getattr(self, k).contiguous() for k in ("a", "b", "ea", "eb")}


def to_grid(a: Tensor, b: Tensor) -> GridFactors:
    """Round a pair to the grid.

    Args:
        a: float [rank, in].
        b: float [out, rank].

    Returns:
        The nearest factors at the finest exponents that int16 holds.  Components are balanced first (a and b of one
        rank get equal norms, which leaves the product as it is); exponents of weak components are raised until the sum
        is exact in float64.
    """
    a, b = a.detach().cpu().to(torch.float64), b.detach().cpu().to(torch.float64)
    norm_a, norm_b = a.norm(dim=1), b.norm(dim=0)
    ratio = torch.where(
        (norm_a > 0) & (norm_b > 0), (norm_b / norm_a.clamp_min(1e-300)).sqrt(), torch.zeros(()).double()
    )
    a = a * ratio[:, None]
    b = torch.where(ratio > 0, b / ratio.clamp_min(1e-300), torch.zeros(()).double())
    ea, eb = _exponents(a.abs().amax(1)), _exponents(b.abs().amax(0))
    allowed = allowed_spread(len(ea))
    lift = ((ea + eb).max() - allowed - (ea + eb)).clamp_min(0)
    ea, eb = ea + lift // 2, eb + lift - lift // 2
    return GridFactors(
        _round(a / torch.exp2(ea.double())[:, None]), _round(b / torch.exp2(eb.double())), ea.int(), eb.int()
    )


def _exponents(peaks: Tensor) -> Tensor:
    """The smallest exponent e with peak / 2^e <= 32767 for each peak; of all-zero components, that of the largest."""
    peaks = torch.where(peaks > 0, peaks, peaks.max().clamp_min(2.0**-20))
    return torch.ceil(torch.log2(peaks / LIMIT)).to(torch.int64)


def _round(values: Tensor) -> Tensor:
    return values.round().clamp(-LIMIT, LIMIT).to(torch.int16)


def merge(weight: Tensor, factors: GridFactors) -> Tensor:
    """round(W + D) of a float32 weight: one rounding, on the CPU, the same on every machine.

    Half precision belongs to the export's chain: torch would round float64 to float16 twice.
    """
    if weight.dtype != torch.float32:
        raise RequestError(
            f"The weights are {weight.dtype}, not float32.", "Convert the model first: model.float().", "not_float32"
        )
    return (weight.detach().cpu().to(torch.float64) + factors.product()).to(torch.float32)


def read_delta(path: Path) -> dict[str, GridFactors]:
    """Read `delta.safetensors`: grid factors by parameter name.

    Raises RequestError where there is no readable file, SafetyError where it does not hold grid factors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"{path} cannot be read ({error}).", "It may have been purged or damaged.", "no_delta"
        ) from error
    names = sorted({key.rsplit("::", 1)[0] for key in raw})
    return {n: _checked(n, [raw.get(f"{n}::{k}") for k in ("a", "b", "ea", "eb")], path) for n in names}


def _checked(name: str, tensors: list[Tensor | None], path: Path) -> GridFactors:
    a, b, ea, eb = tensors
    fits = (
        a is not None and b is not None and ea is not None and eb is not None
        and a.dtype == b.dtype == torch.int16 and ea.dtype == eb.dtype == torch.int32
        and a.ndim == b.ndim == 2 and (len(a),) == (b.shape[1],) == ea.shape == eb.shape
        and all(e.long().abs().max() <= FARTHEST for e in (ea, eb) if len(e))
    )  # fmt: skip
    if not fits:
        raise SafetyError(
            f"{path} does not hold int16 factors with their exponents for {name}.",
            "The delta file is damaged or was not written by gsforget.",
            "bad_delta",
        )
    return GridFactors(a, b, ea, eb)  # type: ignore[arg-type]
