"""CKA against its identities and against a direct computation; shifts of class means by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.audit.similarity import cka, prototype_shift


def features(n: int, d: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(n, d))


@given(st.integers(4, 30), st.integers(1, 20), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_copies_that_are_rotated_scaled_and_moved_give_one(n, d, seed, scale):
    x = features(n, d, seed)
    rotation, _ = np.linalg.qr(features(d, d, seed + 1))
    value = cka(x, scale * x @ rotation + features(1, d, seed + 2))
    # With few images the unbiased estimate of a feature's own variance may be 0 or negative: nothing to compare then.
    assert value is None or value == pytest.approx(1, abs=1e-6)
    if n > 12:
        assert value is not None


def test_unrelated_features_give_zero_however_many_there_are():
    for d in (3, 50, 2000):
        assert abs(np.mean([cka(features(50, d, s), features(50, d, s + 100)) for s in range(10)])) < 0.05
    x, y = features(50, 2000), features(50, 2000, 1)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased > 0.9, "the plain estimate calls them alike"


def test_unbiased_hsic_by_its_definition():
    """Song et al. 2012: sums over tuples of distinct images (here i, j, q, r of 6)."""
    from itertools import permutations

    x, y = features(6, 3, 5), features(6, 2, 6)
    y[:, 0] += x[:, 0]

    def hsic(a, b):
        k, m = a @ a.T, b @ b.T
        two = np.mean([k[i, j] * m[i, j] for i, j in permutations(range(6), 2)])
        four = np.mean([k[i, j] * m[q, r] for i, j, q, r in permutations(range(6), 4)])
        three = np.mean([k[i, j] * m[i, q] for i, j, q in permutations(range(6), 3)])
        return two + four - 2 * three

    x, y = x + 2 * features(6, 3, 7), y + features(6, 2, 8)
    assert hsic(x, x) > 0
    assert hsic(y, y) > 0
    assert cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def test_it_lies_between_for_features_in_part_the_same():
    x = features(400, 10)
    y = np.hstack([x[:, :5], features(400, 5, 1)])
    assert cka(x, y) == pytest.approx(0.5, abs=0.1)  # 5 shared directions of 10 and 10: 5 / sqrt(10 * 10)
    assert cka(x, y) == pytest.approx(cka(y, x))


def test_no_variance_is_not_compared():
    assert cka(np.ones((9, 3)), features(9, 3)) is None
    assert cka(features(9, 3), np.zeros((9, 1))) is None


def test_cka_refuses_too_few_or_other_images():
    for n, m in ((3, 3), (5, 6)):
        with pytest.raises(ValueError, match="at least 4"):
            cka(features(n, 2), features(m, 2))
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        cka(np.zeros(5), features(5, 2))


def test_prototype_shift_by_hand():
    before = [[1, 0], [1, 0], [1, 0], [3, 4], [0, 0]]
    after = [[2, 0], [0, 5], [-1, 0], [4, 3], [1, 1]]
    assert prototype_shift(before, after) == pytest.approx([1, 0, -1, 0.96, 0])
    with pytest.raises(ValueError, match="must both"):
        prototype_shift([[1, 0]], [[1, 0, 0]])
