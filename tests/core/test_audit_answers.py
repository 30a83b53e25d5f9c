"""Output-level metrics against cases counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gsforget.audit.answers import Sink, churn, class_drops, misattribution, rank_of_truth
from gsforget.errors import RequestError


def test_rank_by_hand():
    logits = [[3, 2, 1], [3, 2, 1], [3, 2, 1], [-np.inf, 0, 1]]
    assert rank_of_truth(logits, [0, 1, 2, 0]).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize(("classes", "rank"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_rank_of_equal_logits_is_the_middle(classes, rank):
    assert rank_of_truth(np.zeros((1, classes)), [classes - 1]).tolist() == [rank]


def test_ties_below_the_truth_do_not_matter():
    assert rank_of_truth([[0, 0, 0, 5, 9]], [3]).tolist() == [2]


@given(st.integers(1, 6).flatmap(lambda k: st.tuples(arrays(float, (5, k), elements=st.floats(-9, 9)), st.just(k))))
def test_ranks_of_all_classes_are_places(case):
    logits, k = case
    logits = logits + np.arange(k) * 100.0  # no ties
    ranks = np.stack([rank_of_truth(logits, np.full(5, c)) for c in range(k)])
    assert (np.sort(ranks, axis=0) == np.arange(1, k + 1)[:, None]).all()
    assert ((ranks == 1).argmax(axis=0) == logits.argmax(axis=1)).all()


def test_rank_refuses_nan_and_wrong_shapes():
    with pytest.raises(RequestError) as error:
        rank_of_truth([[np.nan, 0]], [0])
    assert error.value.kind == "nan_logits"
    with pytest.raises(ValueError, match="must be"):
        rank_of_truth([[0, 1]], [0, 1])


def test_misattribution_by_hand():
    probabilities = [
        [0.1, 0.8, 0.1],  # retained class 1, sure
        [0.2, 0.6, 0.2],  # retained class 1, sure
        [0.1, 0.2, 0.7],  # retained class 2, sure
        [0.3, 0.3, 0.4],  # retained class 2, not sure
        [0.9, 0.1, 0.0],  # its own, forgotten, class: no misattribution
    ]
    assert misattribution(probabilities, 0.5, [1, 2]) == [
        Sink(1, pytest.approx(40), pytest.approx(0.7)),
        Sink(2, pytest.approx(20), pytest.approx(0.7)),
    ]
    assert misattribution(probabilities, 0.9, [1, 2]) == []
    assert misattribution(probabilities, 0.7, [1, 2]) == [Sink(1, 20, 0.8)], "the threshold must be exceeded"
    assert [sink.class_index for sink in misattribution(probabilities, 0.0, [1, 2])] == [1, 2], "ties: lower index"
    with pytest.raises(ValueError, match="at least one image"):
        misattribution(np.empty((0, 3)), 0.5, [1])


def test_churn_by_hand():
    #        same  right->wrong  wrong->right  wrong->other wrong
    assert churn([0, 1, 2, 0], [0, 2, 1, 2], [0, 1, 1, 1]) == (75, 25)
    assert churn([0, 1], [0, 1], [1, 1]) == (0, 0)
    with pytest.raises(ValueError, match="same images"):
        churn([0], [0, 1], [0])
    with pytest.raises(ValueError, match="at least one"):
        churn([], [], [])


def test_class_drops_by_hand():
    before, after, labels = [1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 2]
    assert class_drops(before, after, labels, [0, 1, 2, 3]) == {0: 50, 1: -50, 2: 0}
    assert class_drops(before, after, labels, [2]) == {2: 0}
    with pytest.raises(ValueError, match="same images"):
        class_drops([1], [1, 1], [0], [0])
