"""Classes forgotten earlier that a model names again: found on validation images, and learned from once."""

import torch

from gsforget.earlier import EarlierClasses

LABELS = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3])
OLD = torch.isin(LABELS, torch.tensor([1, 2]))
TRAIN, VAL = torch.tensor([0, 1, 2, 4, 7]), torch.tensor([3, 5, 6])


def earlier() -> EarlierClasses:
    return EarlierClasses.of(LABELS, OLD, TRAIN, VAL)


def test_only_images_of_earlier_classes_are_held():
    found = earlier()
    assert found.train.tolist() == [1, 2, 4]
    assert found.val.tolist() == [3, 5, 6]
    assert found.val_labels.tolist() == [1, 2, 2]


def test_a_class_has_returned_when_chance_does_not_explain_its_answers():
    found = earlier()
    assert found.returned(torch.tensor([False, False, False]), 1.0) == []
    assert found.returned(torch.tensor([False, False, True]), 1.0) == [2]
    assert found.returned(torch.tensor([True, True, True]), 1.0) == [1, 2]
    assert found.returned(torch.tensor([False, False, True]), 50.0) == []  # one of two is no evidence of over half
    many = EarlierClasses.of(torch.ones(400).long(), torch.ones(400, dtype=torch.bool), TRAIN[:0], torch.arange(400))
    right = torch.zeros(400, dtype=torch.bool)
    right[:5] = True
    assert many.returned(right, 1.0) == []  # 1.25 %, but its lower bound is below 1 %
    right[:20] = True
    assert many.returned(right, 1.0) == [1]


def test_training_images_are_handed_out_once():
    found = earlier()
    assert found.learn_from([2]).tolist() == [4]
    assert found.learn_from([1, 2]).tolist() == [1, 2]
    assert found.learn_from([1]).tolist() == []
    assert found.again == [1, 2]


def test_the_rest_is_what_has_not_come_back():
    found = earlier()
    assert found.not_learned_from().tolist() == [1, 2, 4]
    found.learn_from([2])
    assert found.not_learned_from().tolist() == [1, 2]


def test_without_earlier_classes_there_is_nothing():
    none = EarlierClasses.of(LABELS, torch.zeros(8, dtype=torch.bool), TRAIN, VAL)
    assert none.returned(torch.zeros(0, dtype=torch.bool), 1.0) == []
    assert none.learn_from([]).tolist() == []
    assert none.not_learned_from().tolist() == []
