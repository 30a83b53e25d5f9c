"""Metrics against closed forms, and plausibility of models that guess, or that count their classes differently."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsforget.errors import RequestError
from gsforget.metrics import (
    Z_ONE_SIDED,
    Accuracy,
    accuracy,
    check_plausible,
    confusion_matrix,
    h_mean,
    of_classes,
    per_class,
    percent,
    plausibility,
    predict,
    wilson,
)

rates = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_wilson_closed_form():
    z2 = 1.959963984540054**2
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(100 * z2 / (10 + z2))
    low, high = wilson(10, 10)
    assert low == pytest.approx(100 * 10 / (10 + z2))
    assert high == 100.0
    assert wilson(50, 100) == pytest.approx((40.3832, 59.6168), abs=1e-4)  # published value for 50 of 100


@given(rates)
def test_wilson_holds_the_rate_and_is_symmetric(rate):
    right, count = rate
    low, high = wilson(right, count)
    assert 0 <= low <= 100 * right / count <= high <= 100
    assert wilson(count - right, count) == pytest.approx((100 - high, 100 - low))
    one_low, one_high = wilson(right, count, Z_ONE_SIDED)
    assert low <= one_low
    assert one_high <= high


def test_wilson_ends_solve_the_score_equation():
    low, high = (p / 100 for p in wilson(7, 31))
    for p in (low, high):
        assert abs(7 / 31 - p) / np.sqrt(p * (1 - p) / 31) == pytest.approx(1.959963984540054)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_rate(right, count):
    with pytest.raises(ValueError, match="not a rate"):
        wilson(right, count)


@pytest.mark.parametrize(
    ("drop", "retain", "h"), [(80, 80, 80), (100, 50, 200 / 3), (0, 90, 0), (-5, 90, 0), (0, 0, 0), (90, 0, 0)]
)
def test_h_mean(drop, retain, h):
    assert h_mean(drop, retain) == pytest.approx(h)


def test_accuracy_is_weighted_by_images():
    correct, labels = [True, True, False, False, True], [0, 0, 0, 0, 1]
    assert accuracy(correct).percent == 60
    assert accuracy(correct, of_classes(labels, [0])) == Accuracy(2, 4)
    assert per_class(correct, labels, 3) == [Accuracy(2, 4), Accuracy(1, 1), Accuracy(0, 0)]
    assert Accuracy(0, 0).to_json() == {"acc": None, "right": 0, "count": 0, "low": None, "high": None}


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_percent_of_flags_is_exact_and_needs_some(kind):
    assert percent(kind([True, False, False])) == 100 / 3
    assert percent(kind([True] * 7 + [False] * 93)) == 7.0
    assert percent(kind([True])[:0]) is None


def test_of_no_classes_is_nothing():
    assert not of_classes([0, 1], []).any()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_confusion_counts_agree_with_per_class(pairs):
    labels, said = map(np.array, zip(*pairs, strict=True))
    matrix = confusion_matrix(labels, said, 5)
    assert matrix.sum() == len(pairs)
    assert [Accuracy(int(matrix[k, k]), int(matrix[k].sum())) for k in range(5)] == per_class(said == labels, labels, 5)
    assert matrix[labels[0], said[0]] >= 1


def test_predict_takes_torch_and_refuses_nan():
    logits = torch.tensor([[0.0, 2.0], [1.0, float("-inf")]], dtype=torch.bfloat16, requires_grad=True)
    assert predict(logits).tolist() == [1, 0]
    with pytest.raises(RequestError) as caught:
        predict(np.array([[0.0, np.nan], [0.0, 1.0]]))
    assert caught.value.kind == "nan_logits"
    assert "1 of 2" in caught.value.message


def matrix_of(accuracy_: float, order: list[int], images: int = 100) -> np.ndarray:
    """A model that is right with the given rate, counts its classes in another order, and spreads its errors."""
    size = len(order)
    matrix = np.full((size, size), images * (1 - accuracy_) / (size - 1))
    matrix[np.arange(size), order] = images * accuracy_
    return matrix.round().astype(np.int64)


def refused(matrix, active, names) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check_plausible(matrix, active, names)
    return caught.value


def test_a_sound_model_passes_and_kappa_is_closed_form():
    found = check_plausible(matrix_of(0.9, [0, 1]), [0, 1], ["a", "b"])
    assert found.accuracy == pytest.approx(90)
    assert found.kappa == pytest.approx(0.8)
    assert found.swapped == ()


def test_a_swap_is_named():
    matrix = matrix_of(0.9, [0, 2, 1, 3])
    assert plausibility(matrix, range(4)).swapped == ((1, 2), (2, 1))
    error = refused(matrix, range(4), ["a", "b", "c", "d"])
    assert error.kind == "class_order"
    assert "'b' are mostly predicted as 'c'" in error.message
    assert "--class-names" in error.hint


def test_a_rotation_of_many_classes_is_class_order_not_chance():
    error = refused(matrix_of(0.8, [*range(1, 10), 0]), range(10), [f"n{i}" for i in range(10)])
    assert error.kind == "class_order"
    assert "7 more classes" in error.message


def test_guessing_is_implausible_even_with_unequal_classes():
    always_first = np.array([[90, 0], [10, 0]])  # 90 % accuracy, nothing known
    assert plausibility(always_first, [0, 1]).kappa == pytest.approx(0)
    assert refused(always_first, [0, 1], ["a", "b"]).kind == "implausible_accuracy"


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_guesses_on_few_images_are_never_blamed_on_an_exact_order(seed, images):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), images)
    found = plausibility(confusion_matrix(labels, rng.integers(0, 10, len(labels)), 10), range(10))
    if found.wrong_order:
        assert images < 6  # chance alone does not give most images of a class to one other class beyond that


def test_forgotten_classes_do_not_count():
    matrix = matrix_of(0.9, [0, 1, 2])
    matrix[2] = [100, 0, 0]  # erased: answered as something else
    assert plausibility(matrix, [0, 1]).accuracy == pytest.approx(90)
    check_plausible(matrix, [0, 1], ["a", "b", "forgotten-2"])
    with pytest.raises(ValueError, match="no images"):
        plausibility(np.zeros((3, 3), dtype=np.int64), [0, 1])
