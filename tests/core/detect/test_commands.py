"""Detection as a person types it: what is refused, in one sentence, with exit status 2 and nothing left behind."""

import json
import shutil

import pytest
from PIL import Image


@pytest.fixture
def data(squares, tmp_path):
    """A small copy to spoil."""
    shutil.copytree(squares, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def refuse(cli, detectors, tmp_path):
    """refuse(data, kind, named, *args): the command ends with status 2, and says one thing."""

    def check(data, kind, named, *args, model=detectors["rt_detr"], task=("--task", "detect")):
        (tmp_path / "cwd").mkdir()
        found = cli(tmp_path / "cwd", "forget", "--model", model, "--data", data, *task, "--device", "cpu", *args)
        error = found.document["error"]
        assert (found.status, error["kind"]) == (2, kind), error
        assert named in error["message"]
        assert error["hint"]
        assert not list((tmp_path / "cwd").iterdir())

    return check


@pytest.fixture
def names(detectors, tmp_path):
    """The detector with the names of the squares."""
    folder = tmp_path / "named"
    shutil.copytree(detectors["rt_detr"], folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = ["red", "green", "blue", "white"]
    config |= {"id2label": {str(i): n for i, n in enumerate(kinds)}, "label2id": {n: i for i, n in enumerate(kinds)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit(data, split, change):
    path = data / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(kind):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != kind]

    return change


def test_a_kind_that_the_detector_does_not_know(refuse, data, names):
    refuse(data, "unknown_class", "'rod'", "--classes", "rod", model=names)


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_annotated_object_of_the_wanted_kind(refuse, data, names, split):
    edit(data, split, without(1))
    refuse(data, "no_objects", "'red'", "--classes", "red", model=names)


def test_no_image_without_the_forgotten_kind(refuse, data, names):
    def change(content):
        for n, image in enumerate(content["images"]):
            box = {"id": 9000 + n, "category_id": 1, "bbox": [0, 0, 3, 3], "area": 9, "iscrowd": 0}
            content["annotations"].append({"image_id": image["id"], **box})

    edit(data, "train", change)
    refuse(data, "no_retained_images", "none shows only what is kept", "--classes", "red", model=names)


def test_an_image_of_another_size_than_annotated(refuse, data, names):
    Image.new("RGB", (20, 20)).save(data / "test" / "003.png")
    refuse(data, "wrong_size", "003.png has 20 x 20 pixels", "--classes", "red", model=names)


def test_an_image_that_cannot_be_read(refuse, data, names):
    (data / "train" / "005.png").write_bytes(b"no image")
    refuse(data, "corrupt_image", "005.png", "--classes", "red", model=names)


def test_a_detector_that_finds_nothing(refuse, data, names):
    refuse(data, "implausible", "AP50", "--classes", "red", model=names)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--never-seen", "green"), "--never-seen"),
        (("--crop-pct", "0.9"), "--crop-pct"),
        (("--sample-mode",), "--sample"),
    ],
)
def test_what_is_about_classifiers_alone(refuse, data, names, args, named):
    refuse(data, "not_for_detection", named, "--classes", "red", *args, model=names)


def test_a_classifier_is_no_detector(refuse, data, world):
    refuse(data, "other_task", "is of the task classify", "--classes", "red", model=world.model)


def test_a_detector_is_no_model_of_timm(refuse, data):
    refuse(data, "no_model", "There is no folder vit_tiny", "--classes", "red", model="vit_tiny")


def test_annotations_are_for_detection_alone(refuse, world):
    refuse(
        world.data,
        "not_for_detection",
        "--annotations is about object detection",
        "--classes",
        "ant",
        "--annotations",
        "x",
        model=world.model,
        task=("--task", "classify"),
    )


def test_boxes_are_drawn_by_detectors_alone(cli, world, tmp_path):
    found = cli(tmp_path, "infer", world.model, world.data / "test" / "ant", "--draw", "drawn")
    assert (found.status, found.document["error"]["kind"]) == (2, "not_a_detector")


def test_infer_with_a_model_folder(cli, names, data, tmp_path):
    found = cli(
        tmp_path, "infer", names, data / "test" / "000.png", "--draw", "drawn", "--min-score", 0, "--device", "cpu"
    )
    image = found.document["images"][0]
    assert found.status == 0
    assert len(image["detections"]) == 6
    assert {e["class"] for e in image["detections"]} <= {"red", "green", "blue", "white"}
    assert all(0 <= edge <= 32 for e in image["detections"] for edge in e["box"])
    assert (tmp_path / image["drawn"]).is_file()


def written(folder, text):
    folder.mkdir()
    (folder / "list.txt").write_text("train/000.png\n")
    (folder / "requests.yaml").write_text(text)
    return folder / "requests.yaml"


@pytest.mark.parametrize(
    ("text", "kind", "named"),
    [
        (
            "- {id: A, classes: [red]}\n- {id: B, images: list.txt}\n",
            "not_for_detection",
            "entry 2 (B): --images lists whole",
        ),
        ("- {id: A, classes: [red]}\n- {id: B, classes: [red]}\n", "duplicate_request", "entry 1 (A)"),
        ("- {classes: [red], retain: [blue]}\n- {classes: [blue]}\n", "contradiction", "'blue'"),
        ("- {classes: [red]}\n- {classes: [mauve]}\n", "unknown_class", "entry 2"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_the_first_runs(refuse, data, names, tmp_path, text, kind, named):
    refuse(data, kind, named, "--request", written(tmp_path / "requests", text), model=names)


def outside(content):
    content["annotations"][0]["bbox"] = [20, 20, 30, 5]


def no_image(content):
    content["images"][3]["file_name"] = "gone.png"


def unknown_id(content):
    content["annotations"][0]["category_id"] = 77


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [(outside, "bad_box", "outside"), (no_image, "missing_image", "gone.png"), (unknown_id, "unknown_category", "77")],
)
def test_bad_annotations_as_typed(refuse, data, names, change, kind, named):
    edit(data, "test", change)
    refuse(data, kind, named, "--classes", "red", model=names)
