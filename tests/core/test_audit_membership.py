"""Membership inference: hand-counted ranks, closed-form intervals, no memory where there is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.audit.membership import auc, auc_interval, confidences, losses, membership, tpr_at_fpr
from gsforget.metrics import wilson

scores = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


def test_auc_by_hand():
    assert auc([3, 1], [2, 0]) == 0.75
    assert auc([1, 2], [2]) == 0.25, "a tie counts one half"
    assert auc([5], [5]) == 0.5
    assert auc([2, 3], [0, 1]) == 1
    assert auc([0, 1], [2, 3]) == 0
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="scores"):
            auc(bad, [1])


@given(scores, scores)
def test_auc_is_the_share_of_pairs_and_symmetric(members, nonmembers):
    pairs = [(a > b) + (a == b) / 2 for a in members for b in nonmembers]
    assert auc(members, nonmembers) == pytest.approx(np.mean(pairs))
    assert auc(nonmembers, members) == pytest.approx(1 - auc(members, nonmembers))


def test_tpr_by_hand():
    nonmembers = list(range(100))  # one false alarm allowed: the threshold is the second largest, 98
    assert tpr_at_fpr([98, 98.5, 99, 200], nonmembers, 0.01) == 0.75
    assert tpr_at_fpr([98.5, 99, 99.5], [*nonmembers[:99], 99], 0.005) == pytest.approx(1 / 3), "none allowed"
    assert tpr_at_fpr([1, 2], [1, 1, 1], 0.01) == 0.5
    assert tpr_at_fpr([1, 2], [5], 1.0) == 1


@given(scores, scores, st.floats(0, 1))
def test_tpr_is_the_best_threshold(members, nonmembers, fpr):
    inside, outside = np.array(members), np.array(nonmembers)
    thresholds = [-np.inf, *outside]
    best = max((inside > t).mean() for t in thresholds if (outside > t).mean() <= fpr + 1e-9)
    assert tpr_at_fpr(members, nonmembers, fpr) == pytest.approx(best)


def test_confidence_is_the_logit_of_the_probability_and_ranks_as_the_loss():
    logits, labels = np.random.default_rng(0).normal(size=(50, 4)) * 3, np.arange(50) % 4
    p = np.exp(-losses(logits, labels))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert p == pytest.approx(softmax[np.arange(50), labels])
    assert confidences(logits, labels) == pytest.approx(np.log(p / (1 - p)))
    assert (np.argsort(confidences(logits, labels)) == np.argsort(-losses(logits, labels))).all()
    assert confidences([[100.0, 0.0], [1000.0, 0.0]], [0, 0]).tolist() == [100, 1000], "no saturation"
    assert losses([[1000.0, 0.0]], [1]).tolist() == [1000]


def test_a_masked_head_gives_no_nan():
    values = confidences([[-np.inf, 1.0, 0.0], [-np.inf, 3.0, 0.0], [-np.inf, 0.0, 0.0]], [0, 0, 0])
    result = membership(values[:2], values[1:], [0, 0], [0, 0])
    assert (result.auc, result.tpr) == (0.5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_no_memory_gives_one_half(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 4000)
    values = rng.normal(size=4000) + labels
    result = membership(values[:2000], values[2000:], labels[:2000], labels[2000:])
    assert 0.45 <= result.auc <= 0.55
    assert result.low <= result.auc <= result.high
    assert result.tpr < 0.03
    assert (result.members, result.nonmembers) == (2000, 2000)


def test_memory_shows_in_both_directions():
    rng = np.random.default_rng(0)
    base, shifted = rng.normal(size=300), rng.normal(size=300) + 3
    high, low = membership(shifted, base), membership(base, shifted)
    assert high.low > 0.5
    assert low.high < 0.5
    assert high.leak == pytest.approx(low.leak)
    assert min(high.tpr, low.tpr) > 0.3
    assert high.to_json() == {
        "auc": high.auc, "low": high.low, "high": high.high, "tpr": high.tpr,
        "members": 300, "nonmembers": 300, "fpr": 0.01, "decisive": True,
    }  # fmt: skip


def test_easy_classes_are_not_mistaken_for_memory():
    rng = np.random.default_rng(0)
    # The easy class (scores about 10) has most training images and few test images, the hard one the reverse.
    inside = np.concatenate([rng.normal(10, 1, 900), rng.normal(0, 1, 100)])
    outside = np.concatenate([rng.normal(10, 1, 100), rng.normal(0, 1, 900)])
    first, second = np.repeat([0, 1], [900, 100]), np.repeat([0, 1], [100, 900])
    assert membership(inside, outside).auc > 0.85, "images of all classes in one heap"
    fair = membership(inside, outside, first, second)
    assert 0.45 <= fair.auc <= 0.55
    assert fair.tpr < 0.04


def test_classes_without_counterpart_do_not_count():
    result = membership([1, 2, 9, 9], [0, 3, -9], [0, 0, 1, 1], [0, 0, 2])
    assert (result.auc, result.members, result.nonmembers) == (0.5, 2, 2)
    with pytest.raises(ValueError, match="no class has both"):
        membership([1.0], [1.0], [0], [1])


def test_interval_of_one_pair_is_wilsons():
    for value, right in ((0.0, 0), (1.0, 1)):
        low, high = auc_interval(value, [(1, 1)])
        assert (100 * low, 100 * high) == pytest.approx(wilson(right, 1))


def test_interval_ends_solve_the_score_equation():
    m, n, value, z = 40, 25, 0.7, 1.959963984540054
    for t in auc_interval(value, [(m, n)]):
        extra = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        assert abs(value - t) / np.sqrt(t * (1 - t) * (1 + extra) / (m * n)) == pytest.approx(z)


def test_interval_shrinks_with_images_and_is_symmetric():
    wide, narrow = auc_interval(0.6, [(20, 20)]), auc_interval(0.6, [(2000, 2000)])
    assert wide[0] < narrow[0] < 0.6 < narrow[1] < wide[1]
    assert auc_interval(0.4, [(20, 20)]) == pytest.approx((1 - wide[1], 1 - wide[0]))
    assert auc_interval(0.5, [(10, 10)] * 100)[0] == pytest.approx(auc_interval(0.5, [(1000, 1000)])[0], abs=2e-3)


def test_interval_covers_the_truth():
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        result = membership(rng.normal(0.5, 1, 40), rng.normal(0, 1, 30))
        held += result.low <= 0.63816 <= result.high  # the truth is Phi(0.5 / sqrt 2)
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(("count", "decisive"), [(1, False), (2, False), (3, True)])
def test_how_many_images_could_show_memory_at_all(count, decisive):
    assert membership(np.arange(count) + 10.0, np.arange(count)).decisive is decisive
