"""Gates: breached only when the one-sided 95 % bound lies beyond the threshold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.errors import RequestError
from gsforget.gates import evaluate_gates, paired_drop
from gsforget.metrics import Z_ONE_SIDED, wilson


def flags(right: int, count: int) -> list[bool]:
    return [True] * right + [False] * (count - right)


def test_paired_drop_closed_form():
    before = flags(90, 100)  # 20 turn wrong, 5 turn right
    after = [False] * 20 + [True] * 70 + [True] * 5 + [False] * 5
    drop, bound = paired_drop(before, after)
    assert drop == pytest.approx(15)
    assert bound == pytest.approx(100 * (15 / 102 - Z_ONE_SIDED * math.sqrt(26 - 15**2 / 102) / 102))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_paired_drop_is_the_difference_of_accuracies_and_bounded_by_it(pairs):
    before, after = zip(*pairs, strict=True)
    drop, bound = paired_drop(before, after)
    assert drop == pytest.approx(100 * (np.mean(before) - np.mean(after)))
    assert bound <= drop + 1e-9
    assert paired_drop(before, before)[0] == 0


def test_one_image_proves_no_drop():
    drop, bound = paired_drop([True], [False])
    assert drop == 100
    assert bound < 10
    assert paired_drop([True] * 40, [False] * 20 + [True] * 20)[1] > 30


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(1, 5))
def test_views_of_one_image_are_one_image(pairs, views):
    before, after = (np.array(flags) for flags in zip(*pairs, strict=True))
    alone = paired_drop(before, after)
    rows = np.tile(np.arange(len(pairs)), views)
    assert paired_drop(before[rows], after[rows], rows + 7) == pytest.approx(alone)


def test_views_that_differ_are_averaged():
    """One image of two lost in one of its two views, the other won in both."""
    drop, bound = paired_drop([True, False, True, False], [False, True, True, True], [0, 1, 0, 1])
    assert drop == pytest.approx(-25)
    assert bound == pytest.approx(100 * (-0.5 / 4 - Z_ONE_SIDED * math.sqrt(0.25 + 1 + 1 - 0.25 / 4) / 4))


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_paired_drop_needs_the_same_images(before, after):
    with pytest.raises(ValueError, match="same images"):
        paired_drop(before, after)


def judge(after_forget, after_kept, before_kept=None, **thresholds):
    """Class 0 is forgotten, class 1 retained."""
    labels = [0] * len(after_forget) + [1] * len(after_kept)
    before = [True] * len(after_forget) + (before_kept or [True] * len(after_kept))
    gates = evaluate_gates(before, after_forget + after_kept, labels, [0], [1], **thresholds)
    return {g.name: g for g in gates}


def test_forget_gate_goes_by_the_lower_bound():
    passed = judge(flags(3, 100), flags(50, 50))["forget_acc"]
    assert passed.value == 3
    assert passed.bound == wilson(3, 100, Z_ONE_SIDED)[0] > 1
    assert not passed.passed
    assert judge(flags(2, 100), flags(50, 50))["forget_acc"].passed  # 2 %: above 1 %, but not surely
    assert not judge(flags(2, 100), flags(50, 50), max_forget_acc=0.5)["forget_acc"].passed


def test_retain_gate_goes_by_the_paired_bound():
    # 30 of 1000 lost and none won: 3 points, bound 2.1.  Lost and won alike: no drop.
    assert not judge(flags(0, 50), flags(970, 1000))["retain_drop"].passed
    assert judge(flags(0, 50), flags(985, 1000), max_retain_drop=1)["retain_drop"].passed
    even = judge(flags(0, 50), [False] * 30 + [True] * 970, [True] * 970 + [False] * 30)["retain_drop"]
    assert even.value == pytest.approx(0)
    assert even.passed


def test_the_worst_class_decides():
    labels = np.repeat([0, 1, 2, 3], 100)
    after = np.concatenate([flags(0, 100), flags(100, 100), flags(70, 100), flags(98, 100)])
    gates = {g.name: g for g in evaluate_gates(np.ones(400, bool), after, labels, [0], [1, 2, 3], max_retain_drop=50)}
    worst = gates["class_drop"]
    assert worst.class_index == 2
    assert worst.value == pytest.approx(30)
    assert not worst.passed
    assert gates["retain_drop"].passed
    assert worst.to_json()["class_index"] == 2


def test_old_classes_must_stay_forgotten_and_count_for_nothing_else():
    labels = np.repeat([0, 1, 2], 50)
    before = np.concatenate([flags(50, 50), flags(50, 50), flags(0, 50)])
    back = np.concatenate([flags(0, 50), flags(50, 50), flags(20, 50)])
    gates = {g.name: g for g in evaluate_gates(before, back, labels, [0], [1], [2])}
    assert not gates["old_acc"].passed
    assert gates["old_acc"].value == 40
    assert gates["retain_drop"].value == 0
    assert gates["forget_acc"].passed


def test_no_old_gate_without_old_images():
    assert set(judge(flags(0, 5), flags(5, 5))) == {"forget_acc", "retain_drop", "class_drop"}


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_both_sides_need_test_images(labels):
    with pytest.raises(RequestError) as caught:
        evaluate_gates([True] * 2, [True] * 2, labels, [0], [1])
    assert caught.value.kind == "no_test_images"
