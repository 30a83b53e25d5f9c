"""Image folders: what does not fit is named; images are read once, on demand, and in the order asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gsforget import data, machine
from gsforget.data import Split, few_shot, manifest_sha256, scan, split_validation
from gsforget.errors import RequestError
from gsforget.images import ImageSet


@pytest.fixture
def root(tmp_path) -> Path:
    """Classes a, b, c; three training images and one test image each; pixel value = 10 * class + number."""
    for split, count in (("train", 3), ("test", 1)):
        for k, name in enumerate("abc"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (4, 4), 10 * k + i).save(folder / f"{i}.png")
    return tmp_path


def load(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image, dtype=np.float32)[None]
    except OSError as error:
        raise RequestError(f"The image {path} is corrupt.", kind="corrupt_image") from error


def refused(*args, **kwargs) -> RequestError:
    with pytest.raises(RequestError) as caught:
        scan(*args, **kwargs)
    return caught.value


def test_scan_lists_in_index_order(root):
    (root / "train/a/big.JPEG").write_bytes(b"x")
    (root / "train/a/.hidden.png").write_bytes(b"x")
    (root / "train/a/notes.txt").write_bytes(b"x")
    (root / "train/a/nested.png").mkdir()
    (root / "train/.cache").mkdir()
    found = scan(root, ["c", "a", "b"])
    assert found.class_names == ["c", "a", "b"]
    assert found.root == root
    assert [found.train.count(k) for k in range(3)] == [3, 4, 3]
    assert [p.name for p in found.train.select(found.train.per_class(1)).paths] == [
        "0.png",
        "1.png",
        "2.png",
        "big.JPEG",
    ]
    assert found.test.labels.tolist() == [0, 1, 2]
    assert found.train.labels.dtype == np.int64
    assert scan(root, None).class_names == ["a", "b", "c"]


def test_val_stands_in_for_test_and_test_wins(root):
    shutil.copytree(root / "test", root / "val")
    assert scan(root, None).test_name == "test"
    shutil.rmtree(root / "test")
    assert scan(root, None).test_name == "val"


@pytest.mark.parametrize(
    ("broken", "kind", "words"),
    [
        (lambda r: shutil.rmtree(r), "no_data", "no data folder"),
        (lambda r: shutil.rmtree(r / "train"), "no_train", "train/"),
        (lambda r: shutil.rmtree(r / "test"), "no_test", "val/"),
        (lambda r: (shutil.rmtree(r / "train"), (r / "train").mkdir()), "no_images", "no class folders"),
        (lambda r: (shutil.rmtree(r / "test"), (r / "test").mkdir()), "no_images", "no class folders"),
        (lambda r: (r / "test/b/0.png").unlink(), "no_images", "test/b"),
        (lambda r: shutil.rmtree(r / "test/b"), "class_names_differ", "'b'"),
        (lambda r: (r / "test/extra").mkdir(), "class_names_differ", "'extra'"),
        (lambda r: [shutil.rmtree(r / s / n) for s in ("train", "test") for n in "bc"], "one_class", "'a'"),
    ],
)
def test_what_is_missing_is_named(root, broken, kind, words):
    broken(root)
    error = refused(root, None)
    assert error.kind == kind
    assert words in error.message
    assert error.hint


def test_names_that_do_not_fit(root):
    error = refused(root, ["a", "b", "d"])
    assert error.kind == "class_names_differ"
    assert "'d'" in error.message
    assert "'c'" in error.message
    both = refused(root, ["x", "y"])
    assert "'x', 'y'" in both.message
    assert "'a', 'b', 'c'" in both.message
    assert "--class-names" in both.hint
    extra = refused(root, ["a", "b"])
    assert "'c'" in extra.message
    assert "(2 class names, 3 folders)" in extra.message
    assert refused(root, ["a", "b", "a"]).kind == "duplicate_names"


def test_erased_classes_may_be_gone(root):
    shutil.rmtree(root / "train/b")
    (root / "test/b/0.png").unlink()
    assert refused(root, ["a", "b", "c"]).kind == "class_names_differ"
    found = scan(root, ["a", "b", "c"], optional={"b"})
    assert found.train.count(1) == found.test.count(1) == 0
    assert "forgotten-1" in refused(root, ["a", "forgotten-1"], optional=["forgotten-1"]).hint


@pytest.fixture(params=[0.25, 0.0], ids=["in memory", "decoded each time"])
def fraction(request):
    return request.param


def test_batches_come_in_the_order_asked_for(root, fraction):
    reads: list[Path] = []

    def counting(path: Path) -> np.ndarray:
        reads.append(path)
        return load(path)

    images = ImageSet(scan(root, None).train, counting, memory_fraction=fraction)
    assert images.labels.dtype == torch.int64
    assert not reads  # lazy
    batch = images.batch(torch.tensor([8, 0, 3, 0]))
    assert batch.dtype == torch.float32
    assert batch.shape == (4, 1, 4, 4)
    assert batch[:, 0, 0, 0].tolist() == [22, 0, 10, 0]
    assert torch.equal(images.batch(torch.tensor([8, 0, 3, 0])), batch)
    batch.zero_()
    assert images.batch(torch.tensor([8]))[0, 0, 0, 0] == 22  # a batch is the caller's own
    if fraction:
        assert reads.count(scan(root, None).train.paths[8]) == 1
        assert len(reads) == 4  # three images, and the one that told the size


def test_check_names_the_first_corrupt_image_and_counts_the_others(root, fraction):
    for name in ("a/1.png", "b/0.png", "c/2.png"):
        (root / "train" / name).write_bytes(b"no image")
    images = ImageSet(scan(root, None).train, load, memory_fraction=fraction)
    with pytest.raises(RequestError) as caught:
        images.check()
    assert caught.value.kind == "corrupt_image"
    assert "train/a/1.png" in caught.value.message
    assert "And 2 more" in caught.value.message
    assert "--skip-corrupt" in caught.value.hint


def test_skip_corrupt_drops_and_keeps_labels_in_step(root, fraction):
    gone = [root / "train/a/0.png", root / "train/b/0.png"]
    gone[0].write_bytes(b"")
    whole = gone[1].read_bytes()
    gone[1].write_bytes(whole[: len(whole) - 20])  # a cut file with a sound header
    images = ImageSet(scan(root, None).train, load, skip_corrupt=True, memory_fraction=fraction)
    done = []
    assert images.check(lambda *step: done.append(step)) == gone == images.dropped
    assert done[-1] == (9, 9)
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert images.batch(torch.arange(len(images)))[:, 0, 0, 0].tolist() == [1, 2, 11, 12, 20, 21, 22]
    assert images.check() == []


def test_a_class_is_never_dropped_whole(root, fraction):
    for i in range(3):
        (root / f"train/b/{i}.png").write_bytes(b"")
    images = ImageSet(scan(root, None).train, load, skip_corrupt=True, memory_fraction=fraction)
    with pytest.raises(RequestError, match="train/b can be decoded"):
        images.check()


def test_other_errors_are_not_taken_for_corrupt_images(root):
    def misconfigured(path: Path) -> np.ndarray:
        raise RequestError("mean is not finite.", kind="bad_config")

    with pytest.raises(RequestError, match="mean is not finite"):
        ImageSet(scan(root, None).train, misconfigured, skip_corrupt=True).check()


def test_an_empty_split_has_no_batches():
    images = ImageSet(Split([], np.zeros(0, dtype=np.int64)), load)
    assert images.check() == []
    assert len(images.batch(torch.zeros(0, dtype=torch.int64))) == 0


labels = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array)


@given(labels, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_validation_is_stratified(truth, fraction, seed):
    train, validation = split_validation(truth, fraction, seed)
    assert sorted([*train, *validation]) == list(range(len(truth)))
    for k in np.unique(truth):
        count, taken = (truth == k).sum(), (truth[validation] == k).sum()
        if count < 3:
            assert taken == 0
        else:
            assert 1 <= taken < count
            assert abs(taken - fraction * count) <= 1
    again = split_validation(torch.from_numpy(truth), fraction, seed)
    assert np.array_equal(train, again[0])


def test_another_seed_takes_other_images():
    truth = np.zeros(100, dtype=np.int64)
    assert not np.array_equal(split_validation(truth, seed=0)[1], split_validation(truth, seed=1)[1])


@given(labels, st.integers(1, 6), st.integers(0, 1000))
def test_shots_are_nested(truth, shots, seed):
    chosen = few_shot(truth, shots, seed)
    assert [(truth[chosen] == k).sum() for k in range(6)] == [min(shots, (truth == k).sum()) for k in range(6)]
    assert set(chosen) <= set(few_shot(truth, shots + 1, seed))


def test_no_shots_are_refused():
    with pytest.raises(RequestError, match="--shots 0"):
        few_shot([0, 1], 0)


def test_manifest_follows_content_and_names_only(root, tmp_path):
    split = scan(root, None).train
    first = manifest_sha256(split)
    assert manifest_sha256(split.select(np.arange(len(split))[::-1])) == first
    shutil.copytree(root, tmp_path / "copy")
    assert manifest_sha256(scan(tmp_path / "copy", None).train) == first
    split.paths[0].rename(split.paths[0].with_name("9.png"))
    renamed = manifest_sha256(scan(root, None).train)
    Image.new("L", (4, 4), 99).save(root / "train/a/9.png")
    assert len({first, renamed, manifest_sha256(scan(root, None).train)}) == 3


def test_memory_is_counted_in_bytes():
    assert 2**20 < machine.available_memory() < 2**50
    assert machine.cpu_threads() >= 1


def test_classes_without_training_images_may_be_missing(root):
    shutil.rmtree(root / "train/b")
    shutil.rmtree(root / "test/b")
    for path in (root / "train/c").iterdir():
        path.unlink()
    names = ["a", "b", "c"]
    assert refused(root, names).kind == "class_names_differ"
    found = scan(root, names, missing_ok=True)
    assert [found.train.count(k) for k in range(3)] == [3, 0, 0]
    assert [found.test.count(k) for k in range(3)] == [1, 0, 1]
    (root / "train/bb").mkdir()
    error = refused(root, names, missing_ok=True)
    assert "'b'" in error.message, "beside a folder that fits no name a class is misspelt, not missing"
    assert "'bb'" in error.message


def test_a_class_with_training_images_needs_test_images(root):
    (root / "test/b/0.png").unlink()
    assert refused(root, None, missing_ok=True).kind == "no_images"


def test_the_folder_of_an_erased_class_may_have_its_new_name(root):
    (root / "train/b").rename(root / "train/forgotten-1")
    (root / "test/b").rename(root / "test/forgotten-1")
    names = ["a", "b", "c"]
    found = scan(root, names, optional=["b"])
    assert [found.train.count(k) for k in range(3)] == [3, 3, 3]
    assert found.test.labels.tolist() == [0, 1, 2]
    assert "'forgotten-1'" in refused(root, names).message
    assert "'forgotten-1'" in refused(root, names, optional=["a"]).message, "that is the name of another index"
    assert scan(root, ["a", "forgotten-1", "c"], optional=["forgotten-1"]).train.count(1) == 3


def test_hashes_are_used_again(root):
    split = scan(root, None).train
    hashes = data.content_sha256(split.paths)
    assert len(set(hashes)) == len(split)
    assert manifest_sha256(split, hashes) == manifest_sha256(split)
