"""Validation of a model in training, on answers that are given by hand."""

from dataclasses import dataclass

import pytest
import torch

from gsforget.earlier import EarlierClasses
from gsforget.tasks.base import Score
from gsforget.validation import Validation

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])  # 1 is forgotten now, 2 was forgotten earlier
SHOWS = torch.tensor([7, 7, 2, 3, 4, 5, 6, 7])


@dataclass
class Given:
    """Answers to all images; keeps what it was asked."""

    answers: torch.Tensor
    asked: list

    def score(self, seen, rows, shows):
        self.asked.append((rows.tolist(), shows.tolist()))
        return Score(1.0, 2.0, 3.0, 4.0, 5.0, class_bound=6.0)

    def right(self, seen, rows):
        return self.answers[rows]

    def named(self, seen, rows):
        return self.answers[rows]


def validation(*right: int, shows=SHOWS, few=(0,)) -> tuple[Validation, Given]:
    old, held = LABELS == 2, torch.arange(8)
    earlier = EarlierClasses.of(LABELS, old, held[:0], held)
    judge = Given(torch.isin(torch.arange(8), torch.tensor(right)), [])
    rows, some = torch.tensor([0, 1, 2, 3]), torch.tensor(few, dtype=torch.int64)
    return Validation(judge, lambda rows: rows, rows, some, LABELS > 0, shows, earlier, 1.0, torch.device("cpu")), judge


def test_all_images_decide_and_views_are_told_from_images():
    v, judge = validation(2, 4)
    watch = v.watch(9, [1])
    assert (watch.step, watch.active) == (9, [1])
    assert (watch.forget, watch.retain, watch.retain_before) == (1.0, 2.0, 3.0)
    assert (watch.drop_bound, watch.drop_most, watch.class_bound) == (4.0, 5.0, 6.0)
    assert watch.old == 25.0  # one of four
    assert watch.leak == 50.0  # one of two
    assert judge.asked == [([0, 1, 2, 3], [7, 7, 2, 3])]
    v, judge = validation(shows=None)
    v.watch(0, [])
    assert judge.asked == [([0, 1, 2, 3], [0, 1, 2, 3])]


@pytest.mark.parametrize(("right", "returned"), [((), []), ((4, 5, 6, 7), [2])])
def test_a_class_whose_images_are_named_again_has_returned(right, returned):
    assert validation(*right)[0].watch(0, []).returned == returned


def test_the_probe_looks_at_earlier_classes_once_they_are_taken_along():
    v, _ = validation(2, 4, 5)
    v.along = True
    assert v.watch(0, []).leak == 50.0  # three of six


def test_without_a_look_at_features_there_is_no_leak():
    v, judge = validation(2)
    judge.named = lambda seen, rows: None
    assert v.watch(0, []).leak is None


def test_a_glance_looks_at_a_few_and_at_nothing_else():
    v, judge = validation(2, 4)
    found = v.glance(3, [0])
    assert (found.retain, found.old, found.leak, found.returned) == (2.0, None, None, [])
    assert judge.asked == [([0], [7])]
    assert validation(few=())[0].glance(3, [0]) is None
