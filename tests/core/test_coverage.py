"""What the images allow: refused where nothing could be learned, else a sentence on what to expect."""

from pathlib import Path

import numpy as np
import pytest

from gsforget.coverage import check_counts, check_identical, count_warnings
from gsforget.data import Split
from gsforget.errors import RequestError

NAMES = ["a", "b", "c", "d"]


def labels(*counts):
    return np.repeat(np.arange(len(counts)), counts)


def split(*counts):
    truth = labels(*counts)
    return Split([Path(f"train/{NAMES[k]}/{i}.png") for i, k in enumerate(truth)], truth)


@pytest.mark.parametrize(("counts", "named"), [((5, 0, 5, 5), "b"), ((0, 5, 0, 0), "retained")])
def test_nothing_to_learn_from(counts, named):
    with pytest.raises(RequestError, match=named) as caught:
        check_counts(labels(*counts), [1], [0, 2, 3], NAMES)
    assert caught.value.kind == "no_images"


def test_enough_is_enough():
    check_counts(labels(1, 1, 0, 0), [1], [0, 2, 3], NAMES)
    assert count_warnings(labels(5, 5, 5, 5), [1], [0, 2, 3], NAMES) == []


def test_missing_and_few_are_told_apart():
    missing, forgotten, retained = count_warnings(labels(4, 2, 0, 9), [1], [0, 2, 3], NAMES)
    assert "1 of 3 retained classes have no training images: 'c'" in missing
    assert "'b'" in forgotten
    assert "no validation part ('b')" in forgotten
    assert "'a'" in retained
    assert "validation" not in retained
    assert "fixed rule" in count_warnings(labels(2, 2, 2, 2), [1], [0, 2, 3], NAMES)[-1]


def test_identical_images_are_counted_once_per_image_to_forget():
    images = split(2, 3, 2)
    hashes = ["x", "y", "x", "p", "x", "q", "x"]
    (found,) = check_identical(images, hashes, [1], [0, 2], NAMES, "train")
    assert found.startswith("2 image file(s) in train")
    assert "b/2.png, the same as a/0.png" in found
    assert check_identical(images, list("1234567"), [1], [0, 2], NAMES, "train") == []
    assert check_identical(images, list("1122234"), [1], [2], NAMES, "train") == [], "copies on one side are no matter"


def test_a_class_that_is_wholly_retained_cannot_be_forgotten():
    images = split(2, 1, 2)
    hashes = ["x", "y", "x", "p", "q"]
    with pytest.raises(RequestError, match="'b'") as caught:
        check_identical(images, hashes, [1], [0, 2], NAMES, "train")
    assert "forget 'a'" in caught.value.hint
    assert len(check_identical(images, hashes, [1], [0, 2], NAMES, "test")) == 1
