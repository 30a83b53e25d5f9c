"""The group-lasso prox against a slow 50-digit solver, its optimality conditions, and whole problems solved with it."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.kernels.group_prox import prox_group_lasso, proximal_adam_step

torch.set_num_threads(1)


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def slow_prox(z: np.ndarray, d: np.ndarray, s: float) -> np.ndarray:
    """One group, by bisection on theta = ||x|| with 50 digits."""
    with mpmath.workdps(50):
        z, d, s = [mpmath.mpf(float(v)) for v in z], [mpmath.mpf(float(v)) for v in d], mpmath.mpf(float(s))
        if mpmath.sqrt(mpmath.fsum((b * a) ** 2 for a, b in zip(z, d))) <= s:
            return np.zeros(len(z))
        low, high = mpmath.mpf(0), mpmath.sqrt(mpmath.fsum(a * a for a in z))
        for _ in range(160):
            theta = (low + high) / 2
            above = mpmath.fsum((a / (theta + s / b)) ** 2 for a, b in zip(z, d)) > 1
            low, high = (theta, high) if above else (low, theta)
        return np.array([float(a * high / (high + s / b)) for a, b in zip(z, d)])


def problem(rng: np.random.Generator, lengths: list[int], spread: float):
    """z, metric with the given spread, and strengths of which about half kill their group."""
    n = sum(lengths)
    z = rng.normal(size=n) * 10.0 ** rng.uniform(-3, 3)
    d = 10.0 ** rng.uniform(-np.log10(spread) / 2, np.log10(spread) / 2, n)
    pieces = np.split(d * z, np.cumsum(lengths)[:-1])
    strengths = np.array([np.linalg.norm(p) for p in pieces]) * rng.uniform(0, 2, len(lengths))
    return z, d, strengths


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 24), min_size=1, max_size=4),
    st.sampled_from([1.0, 1e2, 1e6]),
)
@settings(max_examples=40, deadline=None)
def test_equals_bisection(seed, lengths, spread):
    z, d, strengths = problem(np.random.default_rng(seed), lengths, spread)
    x = prox_group_lasso(f64(z), f64(d), f64(strengths), torch.tensor(lengths)).numpy()
    cuts = np.cumsum(lengths)[:-1]
    for got, a, b, s in zip(np.split(x, cuts), np.split(z, cuts), np.split(d, cuts), strengths):
        want = slow_prox(a, b, s)
        assert (got == 0).all() == (want == 0).all()
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * np.abs(a).max())


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.floats(1, 1e6),
)
@settings(max_examples=150, deadline=None)
def test_optimality_conditions(seed, lengths, spread):
    z, d, strengths = problem(np.random.default_rng(seed), lengths, spread)
    x = prox_group_lasso(f64(z), f64(d), f64(strengths), torch.tensor(lengths)).numpy()
    cuts = np.cumsum(lengths)[:-1]
    for got, a, b, s in zip(np.split(x, cuts), np.split(z, cuts), np.split(d, cuts), strengths):
        pull = np.linalg.norm(b * a)
        if pull <= s:
            assert not got.any()
        else:
            assert got.any()
            residual = b * (got - a) + s * got / np.linalg.norm(got)
            assert np.linalg.norm(residual) <= 1e-9 * (pull + s)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 50), min_size=1, max_size=5), st.floats(1e-4, 1e4))
@settings(max_examples=60, deadline=None)
def test_euclidean_case_in_closed_form(seed, lengths, level):
    z, _, _ = problem(np.random.default_rng(seed), lengths, 1)
    cuts = np.cumsum(lengths)[:-1]
    norms = np.array([np.linalg.norm(p) for p in np.split(z, cuts)])
    strengths = level * norms * np.random.default_rng(seed + 1).uniform(0, 2, len(lengths))
    x = prox_group_lasso(f64(z), f64(np.full(len(z), level)), f64(strengths), torch.tensor(lengths)).numpy()
    shrink = np.repeat(np.maximum(0, 1 - strengths / (level * norms)), lengths)
    np.testing.assert_allclose(x, z * shrink, rtol=1e-9, atol=1e-12 * np.abs(z).max())


def test_strength_zero_is_the_identity():
    torch.manual_seed(0)
    z, d = torch.randn(60, dtype=torch.float64), torch.rand(60, dtype=torch.float64) * 1e6 + 1e-3
    z[3] = 0
    assert torch.equal(prox_group_lasso(z, d, f64([0, 0, 0]), torch.tensor([1, 19, 40])), z)


def test_zero_points_single_elements_and_mixed_groups():
    z, d, s = f64([0, 0, 5, -5, 3, 4]), f64([1, 2, 2, 2, 1, 1]), f64([0.5, 4, 11, 0])
    x = prox_group_lasso(z, d, s, torch.tensor([2, 1, 1, 2]))
    assert x.tolist() == [0, 0, 3, 0, 3, 4]  # one element: sign(z) max(0, |z| - s / d)


def test_the_boundary_belongs_to_zero():
    z, d = f64([3, 4]), f64([1, 1])
    assert not prox_group_lasso(z, d, f64([5.0]), torch.tensor([2])).any()
    assert prox_group_lasso(z, d, f64([np.nextafter(5, 0)]), torch.tensor([2])).all()


def test_nan_is_not_taken_for_a_dead_group():
    x = prox_group_lasso(f64([1, torch.nan, 3]), f64([1, 1, 1]), f64([9, 9]), torch.tensor([2, 1]))
    assert x[:2].isnan().any()
    assert x[2] == 0


class Flat:
    """A flat buffer with its group table and Adam's state."""

    def __init__(self, values: torch.Tensor, lengths: list[int], active: list[bool] | None = None):
        self.flat = values.clone()
        self.m, self.v = torch.zeros_like(values), torch.zeros_like(values)
        self.lengths = torch.tensor(lengths)
        self.weights = self.lengths.double().sqrt()
        self.active = torch.tensor(active or [True] * len(lengths))
        self.count = 0

    def step(self, grad: torch.Tensor, lr: float, strength: float, **options):
        self.count += 1
        return proximal_adam_step(
            self.flat,
            grad.clone(),
            self.m,
            self.v,
            self.lengths,
            self.weights,
            self.active,
            self.count,
            lr,
            strength,
            **options,
        )

    def copy(self) -> "Flat":
        other = Flat(self.flat, self.lengths.tolist(), self.active.tolist())
        other.m, other.v, other.count = self.m.clone(), self.v.clone(), self.count
        return other

    def groups(self, values: torch.Tensor | None = None):
        return (self.flat if values is None else values).split(self.lengths.tolist())


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
def test_strength_zero_is_adam_step_by_step(metric):
    torch.manual_seed(1)
    state = Flat(torch.randn(40), [10, 30])
    theirs = state.flat.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=3e-3)
    for _ in range(20):
        grad = torch.randn(40) * 10 ** torch.randn(40)
        theirs.grad = grad
        adam.step()
        state.step(grad, 3e-3, 0.0, metric=metric)
        torch.testing.assert_close(state.flat, theirs.detach(), rtol=3e-7, atol=3e-7)


def test_inactive_groups_stay_exactly_zero_and_untouched():
    torch.manual_seed(2)
    state = Flat(torch.randn(30), [10, 10, 10], [True, False, True])
    state.groups()[1].zero_()
    for k in range(20):
        result = state.step(torch.randn(30), 1e-2, 0.01 * k)
        assert not state.groups()[1].any()
        assert not state.groups(state.m)[1].any()
        assert not state.groups(state.v)[1].any()
        assert result.norms[1] == result.critical[1] == 0
    state.groups()[1].fill_(3.0)
    state.step(torch.randn(30), 1e-2, 1e6)
    assert (state.groups()[1] == 3).all()
    assert not state.groups()[0].any()


def test_norms_are_those_of_the_buffer():
    torch.manual_seed(3)
    state = Flat(torch.randn(30), [4, 26])
    result = state.step(torch.randn(30), 1e-2, 1e-3)
    torch.testing.assert_close(result.norms, f64([g.double().norm() for g in state.groups()]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_critical_is_the_strength_at_which_a_group_dies(metric, seed):
    rng = torch.Generator().manual_seed(seed)
    state = Flat(torch.randn(33, generator=rng), [1, 12, 20])
    for _ in range(3):
        state.step(torch.randn(33, generator=rng), 1e-2, 0.0)
    grad = torch.randn(33, generator=rng)
    critical = state.copy().step(grad, 1e-2, 0.0, metric=metric).critical
    for group, strength in enumerate(critical.tolist()):
        below, above = state.copy(), state.copy()
        told = below.step(grad, 1e-2, strength * (1 - 1e-9), metric=metric).critical
        above.step(grad, 1e-2, strength * (1 + 1e-9), metric=metric)
        assert torch.equal(told, critical)  # what is reported does not depend on the strength in use
        assert below.groups()[group].any()
        assert not above.groups()[group].any()


def fista(a: np.ndarray, y: np.ndarray, lengths: list[int], strengths: np.ndarray, steps: int) -> np.ndarray:
    """argmin 1/2 ||a x - y||^2 + sum s_g ||x_g||, float64 (Beck and Teboulle, 2009)."""
    size = 1 / np.linalg.norm(a, 2) ** 2
    x = point = np.zeros(a.shape[1])
    t = 1.0
    for _ in range(steps):
        z = point - size * a.T @ (a @ point - y)
        pieces = np.split(z, np.cumsum(lengths)[:-1])
        new = np.concatenate(
            [p * max(0.0, 1 - size * s / max(np.linalg.norm(p), 1e-300)) for p, s in zip(pieces, strengths)]
        )
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        point, x, t = new + (t - 1) / t_new * (new - x), new, t_new
    return x


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
def test_solves_a_group_lasso_problem(metric):
    """With its own metric the proximal step has the minimiser as its fixed point, whatever Adam's preconditioner is.

    The Euclidean prox has it only where the preconditioner is a constant: eps far above sqrt(v_hat) makes it 1 / eps.
    """
    rng = np.random.default_rng(5)
    lengths = [3, 5, 4, 6, 2]
    a = rng.normal(size=(60, sum(lengths))) / np.sqrt(60)
    truth = np.concatenate([rng.normal(size=n) * (k % 2 == 0) for k, n in enumerate(lengths)])
    y = a @ truth + 0.05 * rng.normal(size=60)
    strength = 0.08
    want = fista(a, y, lengths, strength * np.sqrt(lengths), 4000)
    support = [bool(p.any()) for p in np.split(want, np.cumsum(lengths)[:-1])]
    assert True in support
    assert False in support
    state = Flat(torch.zeros(sum(lengths)), lengths)
    at, yt = torch.tensor(a, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    if metric == "adam":
        for k in range(3000):
            grad = at.T @ (at @ state.flat - yt)
            state.step(grad, 2e-2 * (1 - k / 3000), strength, metric=metric)
    else:
        for _ in range(800):
            grad = at.T @ (at @ state.flat - yt)
            # A gradient step of lr / eps = 0.2, and a threshold of lr * strength / eps.
            state.step(grad, 2e2, strength / 1e3, eps=1e3, metric=metric)
    assert [bool(g.any()) for g in state.groups()] == support
    np.testing.assert_allclose(state.flat.numpy(), want, atol=2e-3)
