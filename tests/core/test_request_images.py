"""Lists of images: known by content, and whole classes told from parts."""

import shutil
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from gsforget.data import scan
from gsforget.errors import RequestError
from gsforget.request import Request, Thresholds
from gsforget.requests.images import coverage, find_rows, read_image_list
from gsforget.requests.target import resolve_target


@pytest.fixture
def root(tmp_path):
    """Classes a, b, c; three training images and one test image each, all different."""
    for split, count in (("train", 3), ("test", 1)):
        for k, name in enumerate("abc"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (4, 4), 50 * k + 10 * i + (split == "test")).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def listed(tmp_path):
    def write(*lines):
        (tmp_path / "list.txt").write_text("\n".join(map(str, lines)))
        return read_image_list(tmp_path / "list.txt")

    return write


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


def test_paths_from_anywhere_and_hashes_mean_the_same(root, listed, tmp_path):
    images = listed(
        "train/a/0.png",  # from the data folder
        "data/train/a/1.png",  # from the list's folder
        root / "train/b/0.png",
        digest(root / "train/c/2.png").upper(),
        f"{digest(root / 'train/c/1.png')}  train/c/1.png",  # as sha256sum writes it
        "data/train/../train/a/1.png",
    )
    assert find_rows(images, scan(root, None)).tolist() == [0, 1, 3, 7, 8]


def test_copies_are_meant_as_well(root, listed):
    shutil.copyfile(root / "train/a/0.png", root / "train/c/copy.png")
    data = scan(root, None)
    rows = find_rows(listed("train/a/0.png"), data)
    assert [data.train.paths[i].name for i in rows] == ["0.png", "copy.png"]
    shutil.copyfile(root / "train/b/2.png", root / "elsewhere.png")
    assert find_rows(listed("data/elsewhere.png"), data).tolist() == [5]


@pytest.mark.parametrize(
    ("line", "named", "hint"),
    [
        ("train/a/7.png", "there is no image 'train/a/7.png'", "one image path"),
        ("test/a/0.png", "'test/a/0.png' is not one of the 9", "test image"),
        ("f" * 64, "f" * 64, "train folder"),
        ("train/a", "there is no image", "one image path"),
    ],
)
def test_unknown_images_are_named(root, listed, line, named, hint):
    with pytest.raises(RequestError) as caught:
        find_rows(listed("train/a/0.png", line), scan(root, None))
    assert caught.value.kind == "unknown_image"
    assert "list.txt" in caught.value.message
    assert named in caught.value.message
    assert hint in caught.value.hint


def test_coverage_counts_by_class():
    labels = np.array([0, 0, 0, 1, 1, 2])
    found = coverage(np.array([0, 1, 3, 4]), labels)
    assert found.whole == [1]
    assert found.partly == [0]
    assert found.describe(found.partly, ["a", "b", "c"]) == "2 of 3 of 'a'"


def request(images, classes=()):
    from gsforget.settings import Settings

    return Request(list(classes), Settings(), Thresholds(), images=images)


def test_all_images_of_classes_are_the_classes(root, listed):
    images = listed(*(f"train/{name}/{i}.png" for name in "ca" for i in range(3)))
    target = resolve_target(request(images), ["a", "b", "c"], {}, scan(root, None))
    assert target.classes == [0, 2]
    assert "all training images of 'a', 'c'" in target.notes[0]


@pytest.mark.parametrize(
    ("lines", "erased", "kind", "named", "hint"),
    [
        (["train/a/0.png", "train/b/1.png"], {}, "part_of_a_class", "1 of 3 of 'a', 1 of 3 of 'b'", "--classes a,b"),
        (["train/a/0.png"], {0: "a"}, "already_forgotten", "'a'", "Remove"),
        ([f"train/{n}/{i}.png" for n in "abc" for i in range(3)], {}, "all_classes", "all 3", "Keep"),
    ],
)
def test_impossible_lists(root, listed, lines, erased, kind, named, hint):
    with pytest.raises(RequestError) as caught:
        resolve_target(request(listed(*lines)), ["a", "b", "c"], erased, scan(root, None))
    assert caught.value.kind == kind
    assert named in caught.value.message
    assert hint in caught.value.hint
