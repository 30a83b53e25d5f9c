"""Ranking images: a forgotten class never appears, scores sum to one over the rest, files are found predictably."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gsforget.errors import RequestError
from gsforget.export.device.infer import classify, find_images
from gsforget.export.device.preprocess import Preprocess

NAMES = ["a", "forgotten-1", "c", "d"]
PREPROCESS = Preprocess((1, 2, 2), (0.0,), (1.0,), "nearest")


class Fixed:
    """Gives the same logits for every image and remembers the batch sizes."""

    def __init__(self, logits):
        self.logits = np.asarray(logits, np.float32)
        self.sizes = []

    def predict(self, batch):
        self.sizes.append(len(batch))
        return np.tile(self.logits, (len(batch), 1))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (4, 4), 128).save(path)
    return path


def test_a_forgotten_best_class_is_passed_over(image):
    (only,) = classify(Fixed([1, 99, 3, 2]), PREPROCESS, (1,), NAMES, [image])["images"]
    assert only["path"] == str(image)
    assert [t["class"] for t in only["top"]] == ["c", "d", "a"]
    expected = np.exp([3, 2, 1]) / np.exp([3, 2, 1]).sum()
    np.testing.assert_allclose([t["score"] for t in only["top"]], expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=8),
    data=st.data(),
    top=st.integers(1, 10),
)
def test_scores_are_a_distribution_without_forgotten_classes(tmp_path_factory, logits, data, top):
    path = tmp_path_factory.mktemp("one") / "x.png"
    Image.new("L", (2, 2)).save(path)
    forgotten = data.draw(st.sets(st.integers(0, len(logits) - 1)))
    names = [f"forgotten-{i}" if i in forgotten else f"name-{i}" for i in range(len(logits))]
    (only,) = classify(Fixed(logits), PREPROCESS, forgotten, names, [path], top=top)["images"]
    scores = [t["score"] for t in only["top"]]
    assert len(scores) == min(top, len(logits) - len(forgotten))
    assert not any(t["class"].startswith("forgotten") for t in only["top"])
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= s <= 1 for s in scores)
    if top >= len(logits) > len(forgotten):
        assert sum(scores) == pytest.approx(1)


def test_batches(image):
    predictor = Fixed([1, 2, 3, 4])
    assert len(classify(predictor, PREPROCESS, (), NAMES, [image] * 7, batch_size=3)["images"]) == 7
    assert predictor.sizes == [3, 3, 1]


def test_corrupt_images_stop_or_are_left_out(tmp_path, image):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(RequestError, match=r"broken\.png") as caught:
        classify(Fixed([1, 2, 3, 4]), PREPROCESS, (), NAMES, [image, broken])
    assert caught.value.kind == "corrupt_image"
    assert "--skip-corrupt" in caught.value.hint
    skipped = []
    found = classify(
        Fixed([1, 2, 3, 4]), PREPROCESS, (), NAMES, [broken, image], skip_corrupt=True, on_skip=skipped.append
    )
    assert [i["path"] for i in found["images"]] == [str(image)]
    assert "broken.png" in skipped[0].message
    with pytest.raises(RequestError, match="No image could be read"):
        classify(Fixed([1, 2, 3, 4]), PREPROCESS, (), NAMES, [broken], skip_corrupt=True)


@pytest.mark.parametrize(
    ("logits", "kind"),
    [([1, 2, 3], "wrong_classes"), ([1, np.nan, 3, 4], "nan_logits"), ([1, 2, np.inf, 4], "nan_logits")],
)
def test_unusable_logits_are_refused(image, logits, kind):
    with pytest.raises(RequestError) as caught:
        classify(Fixed(logits), PREPROCESS, (), NAMES, [image])
    assert caught.value.kind == kind


def test_top_must_be_positive(image):
    with pytest.raises(RequestError, match="at least 1"):
        classify(Fixed([1, 2, 3, 4]), PREPROCESS, (), NAMES, [image], top=0)


def test_find_images(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a/3.webp", "4.bmp", "5.jpg", "notes.txt", ".hidden.png", ".cache/6.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    found = [p.relative_to(tmp_path).as_posix() for p in find_images([tmp_path])]
    assert found == ["4.bmp", "5.jpg", "a/3.webp", "b/1.jpeg", "b/2.PNG"]
    first = tmp_path / "b" / "2.PNG"
    assert find_images([first, tmp_path / "b", str(first)]) == [first, tmp_path / "b" / "1.jpeg"]


def test_find_images_refuses_what_is_absent_or_empty(tmp_path):
    with pytest.raises(RequestError, match=r"none\.png"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(RequestError, match="no images") as caught:
        find_images([tmp_path])
    assert caught.value.kind == "no_images"
