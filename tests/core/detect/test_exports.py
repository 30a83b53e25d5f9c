"""Every family of detectors as ONNX: what ONNX Runtime finds is what torch finds."""

import json
import shutil

import numpy as np
import onnx
import pytest
from PIL import Image

import gsforget
from gsforget.errors import RequestError


@pytest.mark.parametrize("kind", ["rt_detr", pytest.param("detr", marks=pytest.mark.slow), "deformable_detr", "yolos"])
def test_an_exported_detector_answers_as_the_model_does(kind, detectors, unselective, tmp_path):
    folder = unselective if kind == "rt_detr" else detectors[kind]
    made = gsforget.export_model(folder, onnx=True, out=tmp_path)
    parity = made["artifacts"][0]["parity"]
    assert parity["max_abs_diff"] < 1e-4
    assert parity["top1_agreement"] == 100.0
    file = tmp_path / "model-0000-fp32.onnx"
    assert onnx.load(file).graph.input[0].type.tensor_type.shape.dim[0].dim_param, "a batch of any size is taken"


def test_annotations_that_lie_elsewhere(unselective, squares, tmp_path):
    shutil.copytree(squares, tmp_path / "data")
    (tmp_path / "data" / "annotations").rename(tmp_path / "labels")
    for split, count in (("train", 1), ("test", 9)):  # enough to compare on
        path = tmp_path / "labels" / f"{split}.json"
        content = json.loads(path.read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        for entry, key in [(c, "id") for c in content["categories"]] + [
            (a, "category_id") for a in content["annotations"]
        ]:
            entry[key] -= 1  # this detector's classes are called by their numbers
        path.write_text(json.dumps(content))
    options = {"onnx": True, "data": tmp_path / "data", "out": tmp_path / "out"}
    with pytest.raises(RequestError, match="no annotations"):
        gsforget.export_model(unselective, **options)
    made = gsforget.export_model(unselective, annotations=str(tmp_path / "labels"), **options)
    parity = made["artifacts"][0]["parity"]
    assert (parity["inputs"], parity["images"]) == ("test images", 9)


@pytest.fixture(scope="module")
def exported(unselective, tmp_path_factory):
    """A detector's file, and a folder with two images of different sizes."""
    root = tmp_path_factory.mktemp("exported")
    gsforget.export_model(unselective, onnx=True, out=root)
    (root / "inbox").mkdir()
    for n, size in enumerate(((40, 20), (32, 32))):
        pixels = np.random.default_rng(n).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "inbox" / f"{n}.png")
    return root / "model-0000-fp32.onnx", root / "inbox"


def test_a_served_and_a_watched_detector_say_what_infer_says(exported):
    from gsforget.export.device.answering import Wish
    from gsforget.export.device.batcher import Batcher, Picture
    from gsforget.export.device.detect import detect
    from gsforget.export.device.slot import Slot
    from gsforget.export.device.source import Source
    from gsforget.export.device.watch import Watcher

    file, inbox = exported
    source = Source(file, "cpu")
    model = source.load()
    paths = sorted(inbox.glob("*.png"))
    info = model.info
    wanted = [e["detections"] for e in detect(model, info.preprocess, (), info.class_names, paths, 0.0)["images"]]
    assert all(len(found) == 21 for found in wanted)
    assert max(e["box"][2] for e in wanted[0]) <= 40
    batcher = Batcher(Slot(model))
    pictures = [Picture(p.name, p.read_bytes()) for p in paths]
    answers = batcher.answer(pictures, Wish(min_score=0.0))
    assert [a.said for a in answers] == [{"detections": found} for found in wanted]
    middle = sorted(e["score"] for e in wanted[0])[10]
    (one,) = batcher.answer(pictures[:1], Wish(min_score=middle))
    assert one.said["detections"] == [e for e in wanted[0] if e["score"] >= middle]
    batcher.stop()
    watcher = Watcher(source, inbox, min_score=0.0)
    watcher.look()
    assert [line["detections"] for line in watcher.look()] == wanted


@pytest.mark.parametrize("asked", [{"with_features": True}, {"precision": "int8"}])
def test_what_is_made_for_models_with_one_output(unselective, squares, tmp_path, asked):
    with pytest.raises(RequestError, match="models with one output") as caught:
        gsforget.export_model(unselective, onnx=True, data=squares, out=tmp_path, **asked)
    assert caught.value.kind == "several_outputs"
    assert not list(tmp_path.iterdir())
