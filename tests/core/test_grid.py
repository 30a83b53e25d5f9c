"""Factors on the integer grid: the product is exact, the same in any order, and close to what was trained."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gsforget.errors import RequestError, SafetyError
from gsforget.lora.grid import FARTHEST, LIMIT, GridFactors, merge, read_delta, to_grid

torch.set_num_threads(1)


@st.composite
def pairs(draw, limit=6):
    """Pairs of any shape whose components lie many powers of ten apart; some components are zero."""
    rank, fan_in, fan_out = (draw(st.integers(1, limit)) for _ in range(3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = [draw(st.lists(st.floats(-12, 6), min_size=rank, max_size=rank)) for _ in "ab"]
    a, b = torch.randn(rank, fan_in, generator=rng), torch.randn(fan_out, rank, generator=rng)
    a *= 10.0 ** torch.tensor(scales[0])[:, None]
    b *= 10.0 ** torch.tensor(scales[1])
    for r in draw(st.sets(st.integers(0, rank - 1), max_size=2)):
        (a[r] if draw(st.booleans()) else b[:, r]).zero_()
    return a, b


def exact(g: GridFactors) -> list[list[Fraction]]:
    a, b = g.a.tolist(), g.b.tolist()
    powers = [Fraction(2) ** (i + j) for i, j in zip(g.ea.tolist(), g.eb.tolist())]
    return [
        [sum((row[r] * a[r][k] * powers[r] for r in range(len(a))), Fraction()) for k in range(len(a[0]))] for row in b
    ]


@given(pairs())
@settings(max_examples=120, deadline=None)
def test_product_equals_integer_arithmetic(pair):
    grid = to_grid(*pair)
    assert [[Fraction(v) for v in row] for row in grid.product().tolist()] == exact(grid)


@given(pairs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_product_does_not_depend_on_the_order_of_summation(pair, random):
    grid = to_grid(*pair)
    terms = torch.exp2((grid.ea + grid.eb).double())[:, None, None] * (
        grid.b.double().T[:, :, None] * grid.a.double()[:, None, :]
    )
    order = list(range(len(terms)))
    random.shuffle(order)
    total = torch.zeros(terms.shape[1:], dtype=torch.float64)
    for r in order:
        total += terms[r]
    assert torch.equal(total, grid.product())


@given(pairs(12))
@settings(max_examples=120, deadline=None)
def test_rounding_is_small_and_within_int16(pair):
    a, b = pair
    grid = to_grid(a, b)
    assert grid.a.dtype == grid.b.dtype == torch.int16
    assert grid.ea.dtype == grid.eb.dtype == torch.int32
    assert grid.a.to(torch.int32).abs().max() <= LIMIT
    assert grid.b.to(torch.int32).abs().max() <= LIMIT
    wide = b.double()[:, :, None] * a.double()[None]
    largest = wide.abs().amax()
    error = (grid.product() - b.double() @ a.double()).abs().max()
    assert error <= 2.0**-13 * largest * len(a)
    if largest > 0:  # the finest exponents: the strongest component uses more than half of int16's range
        assert max(grid.a.to(torch.int32).abs().max(), grid.b.to(torch.int32).abs().max()) > LIMIT // 2


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_factors_multiply_to_the_product(pair):
    grid = to_grid(*pair)
    a, b = grid.factors()
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(b.double() @ a.double(), grid.product()) or len(a) > 1
    torch.testing.assert_close(
        b.double() @ a.double(), grid.product(), rtol=1e-12, atol=1e-12 * float(grid.product().abs().max())
    )
    again = to_grid(a, b).product()  # what lies on the grid comes back from it, up to the balancing of norms
    torch.testing.assert_close(again, grid.product(), rtol=0, atol=2.0**-12 * len(a) * float(_peak(a, b)))


def _peak(a, b):
    return (b.double()[:, :, None] * a.double()[None]).abs().amax()


def test_zero_components_and_zero_pairs():
    a, b = torch.randn(3, 4), torch.randn(5, 3)
    a[1] = 0
    grid = to_grid(a, b)
    assert not grid.a[1].any()
    assert not grid.b[:, 1].any()
    assert not to_grid(torch.zeros(2, 3), torch.ones(4, 2)).product().any()
    assert not to_grid(torch.zeros(2, 3), torch.zeros(4, 2)).product().any()


def test_one_known_pair():
    grid = to_grid(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5], [-0.5]]))
    torch.testing.assert_close(grid.product(), torch.tensor([[1.0, 0], [-1, 0]]).double(), rtol=2.0**-13, atol=0)
    a, b = grid.factors()
    assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-4)


@given(pairs())
@settings(max_examples=40, deadline=None)
def test_merge_is_the_nearest_float32(pair):
    grid = to_grid(*pair)
    weight = torch.randn(grid.b.shape[0], grid.a.shape[1], generator=torch.Generator().manual_seed(0))
    for got, w, d in zip(merge(weight, grid).flatten(), weight.flatten(), [v for row in exact(grid) for v in row]):
        truth = Fraction(w.item()) + d
        error = abs(Fraction(got.item()) - truth)
        for way in (-torch.inf, torch.inf):
            other = torch.nextafter(got, torch.tensor(way)).item()
            # float64 may round once more on the way: a hair's breadth beside a tie
            assert error <= abs(Fraction(other) - truth) * (1 + Fraction(1, 2**20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_merge_refuses_other_precisions(dtype):
    with pytest.raises(RequestError, match="not float32"):
        merge(torch.zeros(3, 4, dtype=dtype), grid_of())


def grid_of(rank=2) -> GridFactors:
    rng = torch.Generator().manual_seed(1)
    return to_grid(torch.randn(rank, 4, generator=rng), torch.randn(3, rank, generator=rng))


def test_delta_file_round_trip(tmp_path):
    grids = {"blocks.0.mlp.fc1.weight": grid_of(), "odd::name.weight": grid_of(3)}
    save_file({k: t for n, g in grids.items() for k, t in g.tensors(n).items()}, tmp_path / "delta.safetensors")
    back = read_delta(tmp_path / "delta.safetensors")
    assert set(back) == set(grids)
    for name, grid in grids.items():
        assert all(torch.equal(getattr(back[name], k), getattr(grid, k)) for k in ("a", "b", "ea", "eb"))
        assert torch.equal(back[name].product(), grid.product())


@pytest.mark.parametrize("apart", [23, 100, FARTHEST])
def test_exponents_too_far_apart_are_refused(apart):
    grid = grid_of()
    far = GridFactors(grid.a, grid.b, grid.ea + torch.tensor([0, apart], dtype=torch.int32), grid.eb)
    with pytest.raises(SafetyError, match="powers of two apart"):
        far.product()


@pytest.mark.parametrize(
    "change",
    [
        {"ea": torch.tensor([0, FARTHEST + 1], dtype=torch.int32)},
        {"ea": torch.full((2,), 2**31 - 1, dtype=torch.int32), "eb": torch.full((2,), 2**31 - 1, dtype=torch.int32)},
        {"eb": torch.full((2,), -(2**31), dtype=torch.int32)},
        {"a": torch.randn(2, 4)},
        {"a": torch.full((2, 4), 2**30, dtype=torch.int32)},
        {"a": torch.ones(3, 4, dtype=torch.int16)},
        {"b": torch.ones(3, dtype=torch.int16)},
        {"ea": torch.zeros(1, dtype=torch.int32)},
        {"ea": torch.zeros(2)},
        {"eb": None},
    ],
    ids=["far", "overflow", "lowest", "float", "int32", "rank", "shape", "length", "type", "absent"],
)
def test_tampered_factors_are_refused(tmp_path, change):
    tensors = grid_of().tensors("w")
    for key, value in change.items():
        tensors[f"w::{key}"] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "delta.safetensors")
    with pytest.raises(SafetyError) as caught:
        read_delta(tmp_path / "delta.safetensors")["w"].product()
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("content", [None, b"", b"no tensors here"])
def test_unreadable_delta_file(tmp_path, content):
    path = tmp_path / "delta.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError):
        read_delta(path)
