"""Annotations are found in both layouts, and what does not fit is said in one sentence."""

import json
import shutil

import numpy as np
import pytest

from gsforget.errors import RequestError
from gsforget.lineage import annotations_of
from gsforget.tasks.detect.coco import open_scenes

KINDS = ["red", "green", "blue", "white"]


@pytest.fixture
def data(squares, tmp_path):
    shutil.copytree(squares, tmp_path / "data")
    return tmp_path / "data"


def change(root, edit, split="train"):
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_boxes_kinds_and_files_arrive_as_annotated(squares):
    read = open_scenes(squares, None, KINDS)
    content = json.loads((squares / "annotations" / "train.json").read_text())
    assert [s.path.name for s in read.train.scenes] == [i["file_name"] for i in content["images"]]
    first = [a for a in content["annotations"] if a["image_id"] == 0]
    scene = read.train.scenes[0]
    np.testing.assert_array_equal(scene.boxes, [a["bbox"] for a in first])
    np.testing.assert_array_equal(scene.kinds, [a["category_id"] - 1 for a in first])
    assert not scene.crowd.any()
    assert (len(read.train.scenes), len(read.test.scenes)) == (160, 80)


def test_the_layout_of_coco(data):
    """annotations/instances_train2017.json with train2017/, and val2017/ for what is measured."""
    for split, year in (("train", "train2017"), ("test", "val2017")):
        (data / split).rename(data / year)
        (data / "annotations" / f"{split}.json").rename(data / "annotations" / f"instances_{year}.json")
    read = open_scenes(data, None, KINDS)
    assert read.train.scenes[0].path == data / "train2017" / "000.png"
    assert read.test.scenes[0].path == data / "val2017" / "000.png"
    (data / "images").mkdir()
    for year in ("train2017", "val2017"):
        (data / year).rename(data / "images" / year)
    assert open_scenes(data, "annotations", KINDS).test.scenes[0].path.is_file()


def test_two_files_by_name(data):
    for split in ("train", "test"):
        shutil.move(data / "annotations" / f"{split}.json", data / f"{split}.json")
    assert len(open_scenes(data, "train.json,test.json", KINDS).test.scenes) == 80


def test_categories_are_matched_by_name_and_by_number_where_the_model_has_no_names(data):
    other = open_scenes(data, None, ["white", "blue", "green", "red"])
    same = open_scenes(data, None, KINDS)
    np.testing.assert_array_equal(other.train.scenes[0].kinds, 3 - same.train.scenes[0].kinds)
    unnamed = open_scenes(data, None, [f"LABEL_{i}" for i in range(5)])
    np.testing.assert_array_equal(unnamed.train.scenes[0].kinds, same.train.scenes[0].kinds + 1)


def test_crowds_and_boxes_without_an_area(data):
    def edit(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = 0

    change(data, edit)
    read = open_scenes(data, None, KINDS)
    assert read.train.scenes[0].crowd[0]
    assert read.train.dropped == 1


def missing_image(c):
    c["images"][3]["file_name"] = "gone.png"


def annotation_of_no_image(c):
    c["annotations"][0]["image_id"] = 9999


def outside(c):
    c["annotations"][0]["bbox"] = [20, 20, 30, 5]


def negative(c):
    c["annotations"][0]["bbox"] = [5, 5, -3, 5]


def unknown_id(c):
    c["annotations"][0]["category_id"] = 77


def unknown_name(c):
    c["categories"][0]["name"] = "mauve"


def no_box(c):
    del c["annotations"][0]["bbox"]


def no_images(c):
    del c["images"]


def two_of_an_id(c):
    c["images"][1]["id"] = c["images"][0]["id"]


def one_file_twice(c):
    c["images"][1]["file_name"] = c["images"][0]["file_name"]


def two_kinds_of_an_id(c):
    c["categories"][1]["id"] = c["categories"][0]["id"]


def no_mapping(c):
    c["annotations"][0] = "box"


def endless(c):
    c["images"][0]["width"] = float("inf")


def no_number(c):
    c["annotations"][0]["bbox"] = [float("nan"), 1, 2, 3]


def crowd_in_words(c):
    c["annotations"][0]["iscrowd"] = "no"


@pytest.mark.parametrize(
    ("edit", "kind", "named"),
    [
        (missing_image, "missing_image", "gone.png"),
        (annotation_of_no_image, "missing_image", "9999"),
        (outside, "bad_box", "[20, 20, 30, 5]"),
        (negative, "bad_box", "outside its image"),
        (unknown_id, "unknown_category", "77"),
        (unknown_name, "unknown_category", "'mauve'"),
        (no_box, "bad_annotations", "bbox"),
        (no_images, "bad_annotations", "images, annotations and categories"),
        (two_of_an_id, "listed_twice", "image id 0"),
        (one_file_twice, "listed_twice", "000.png"),
        (two_kinds_of_an_id, "listed_twice", "category id 1"),
        (no_mapping, "bad_annotations", "not as COCO has it"),
        (endless, "bad_annotations", "not as COCO has it"),
        (no_number, "bad_box", "nan"),
        (crowd_in_words, "bad_annotations", "'no'"),
    ],
)
def test_one_sentence_for_what_does_not_fit(data, edit, kind, named):
    change(data, edit)
    with pytest.raises(RequestError) as caught:
        open_scenes(data, None, KINDS)
    assert caught.value.kind == kind
    assert named in caught.value.message
    assert "train.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("given", "kind"), [("nothing", "no_annotations"), ("a.json,b.json", "no_annotations"), (None, "no_annotations")]
)
def test_absent_annotations(data, given, kind):
    shutil.rmtree(data / "annotations")
    with pytest.raises(RequestError) as caught:
        open_scenes(data, given, KINDS)
    assert caught.value.kind == kind


def test_absent_images_and_files_that_are_no_json(data):
    shutil.rmtree(data / "test")
    with pytest.raises(RequestError, match="There is no folder"):
        open_scenes(data, None, KINDS)
    (data / "annotations" / "train.json").write_text("{")
    with pytest.raises(RequestError, match="not a readable JSON"):
        open_scenes(data, None, KINDS)


def test_a_run_remembers_its_annotations_for_its_own_images_alone(data, tmp_path):
    noted = data / "annotations"
    request = {"data": str(data), "annotations": f"{noted / 'train.json'},{noted / 'test.json'}"}
    assert annotations_of(request, data, None) == request["annotations"]
    assert annotations_of(request, data, "others") == "others"
    assert annotations_of(request, tmp_path, None) is None
    (noted / "test.json").unlink()
    assert annotations_of(request, data, None) is None
    assert annotations_of({}, data, None) is None
