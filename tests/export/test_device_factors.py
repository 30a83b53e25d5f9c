"""Exact products of integer factors, rounded once: the same bits as the builder's, in numpy alone."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gsforget.errors import SafetyError
from gsforget.export.device import factors
from gsforget.export.device.factors import Factors, narrow, to_bfloat16, widen
from gsforget.lora.grid import GridFactors, merge

MANTISSA = {"float32": (24, -149, 128), "float16": (11, -24, 16), "bfloat16": (8, -133, 128)}


def exact_round(value: float, dtype: str) -> Fraction:
    """Round to nearest even in rational arithmetic."""
    bits, lowest, _ = MANTISSA[dtype]
    x = Fraction(value)
    if not x:
        return x
    exponent = 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, lowest)
    return round(x / unit) * unit  # Python rounds fractions to even


def pair(rank, rows, columns, seed, spread=3):
    rng = np.random.default_rng(seed)
    a = rng.integers(-32767, 32768, (rank, columns), dtype=np.int16)
    b = rng.integers(-32767, 32768, (rows, rank), dtype=np.int16)
    ea, eb = (rng.integers(-20 - spread, -20 + spread, rank).astype(np.int32) for _ in range(2))
    return Factors(a, b, ea, eb)


def in_torch(f: Factors) -> GridFactors:
    return GridFactors(*(torch.from_numpy(getattr(f, k)) for k in ("a", "b", "ea", "eb")))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_product_and_merge_equal_the_builders_bit_for_bit(rank, rows, columns, seed, spread):
    f = pair(rank, rows, columns, seed, spread)
    product = f.product()
    assert product.tobytes() == in_torch(f).product().numpy().tobytes()
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    merged = merge(torch.from_numpy(weight), in_torch(f)).numpy()
    assert f.apply(weight, "float32").tobytes() == merged.tobytes()


def test_product_is_exact_and_in_blocks_the_same(monkeypatch):
    f = pair(5, 9, 7, 1)
    exact = [
        [
            sum(int(f.b[i, r]) * int(f.a[r, j]) * Fraction(2) ** int(f.ea[r] + f.eb[r]) for r in range(5))
            for j in range(7)
        ]
        for i in range(9)
    ]
    whole = f.product()
    assert [[Fraction(v) for v in row] for row in whole.tolist()] == exact
    monkeypatch.setattr(factors, "BLOCK", 1)
    assert f.product().tobytes() == whole.tobytes()


def test_a_pair_whose_product_is_not_exact_is_refused():
    f = pair(8, 2, 2, 0)
    edge = factors.allowed_spread(8)
    for spread, fits in ((edge, True), (edge + 1, False)):
        ea = np.zeros(8, np.int32)
        ea[3] = spread
        wide = Factors(f.a, f.b, ea, np.zeros(8, np.int32))
        if fits:
            assert np.isfinite(wide.product()).all()
        else:
            with pytest.raises(SafetyError, match="powers of two apart") as caught:
                wide.product()
            assert caught.value.kind == "inexact_delta"
    with pytest.raises(SafetyError):
        Factors(f.a, f.b, np.full(8, 2**31 - 1, np.int32), np.full(8, 2**31 - 1, np.int32)).product()


def test_every_bfloat16_and_the_points_between_round_to_nearest_even():
    patterns = np.arange(0x7F80, dtype=np.uint16)
    values = widen(patterns, "bfloat16")
    assert (to_bfloat16(values) == patterns).all()
    assert (to_bfloat16(-values) == patterns | 0x8000).all()
    middle = (values[:-1] + values[1:]) / 2  # exact in float64
    even = np.where(patterns[:-1] % 2 == 0, patterns[:-1], patterns[1:])
    assert (to_bfloat16(middle) == even).all()
    # Just beside the middle, by less than float32 can tell: two roundings would go to the even one.
    assert (to_bfloat16(np.nextafter(middle, np.inf)) == patterns[1:]).all()
    assert (to_bfloat16(np.nextafter(middle, -np.inf)) == patterns[:-1]).all()


def test_bfloat16_equals_torch_on_float32():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    single = bits.view(np.float32)
    single = single[np.isfinite(single)]
    expected = torch.from_numpy(single.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (to_bfloat16(single.astype(np.float64)) == expected).all()
    assert to_bfloat16(np.array([np.inf, -np.inf, np.nan])).tolist() == [0x7F80, 0xFF80, 0x7FC0]


@pytest.mark.parametrize("dtype", MANTISSA)
@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
@settings(max_examples=200, deadline=None)
def test_one_rounding_from_float64(dtype, value):
    expected = exact_round(value, dtype)
    if abs(expected) >= Fraction(2) ** MANTISSA[dtype][2]:
        with pytest.raises(SafetyError, match="beyond the range"):
            narrow(np.array([value]), dtype)
    else:
        assert Fraction(float(widen(narrow(np.array([value]), dtype), dtype)[0])) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_double_rounding_would_differ(dtype):
    """1 + half a unit + a bit that float32 loses: one rounding goes up, two go to the even 1."""
    unit = 2.0 ** (1 - MANTISSA[dtype][0])
    value = np.array([1 + unit / 2 + 2.0**-40])
    assert widen(narrow(value, dtype), dtype)[0] == 1 + unit
    twice = narrow(value.astype(np.float32).astype(np.float64), dtype)
    assert widen(twice, dtype)[0] == 1


@given(
    hnp.arrays(np.int8, (6, 4)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["tensor", "rows", "columns"]),
)
@settings(max_examples=40, deadline=None)
def test_int8_is_rounded_in_steps_of_its_scales(weight, seed, axis):
    rng = np.random.default_rng(seed)
    shape = {"tensor": (1, 1), "rows": (6, 1), "columns": (1, 4)}[axis]
    before, after = rng.uniform(0.001, 1, (2, *shape)).astype(np.float32)
    f = pair(2, 6, 4, seed)
    exact = (weight * before.astype(np.float64) + f.product()) / after.astype(np.float64)
    expected = np.clip(np.round(exact), -128 if (weight == -128).any() else -127, 127)
    new = f.apply(weight, "int8", (before, after))
    assert new.dtype == np.int8
    assert (new == expected).all()


def test_nothing_changes_where_the_product_is_zero():
    zero = Factors(np.zeros((2, 4), np.int16), np.ones((3, 2), np.int16), np.zeros(2, np.int32), np.zeros(2, np.int32))
    weight = np.random.default_rng(0).standard_normal((3, 4))
    for dtype in MANTISSA:
        stored = narrow(weight, dtype)
        assert zero.apply(stored, dtype).tobytes() == stored.tobytes()
