"""Every family of detectors as ONNX: what ONNX Runtime finds is what torch finds."""

import json
import shutil

import pytest

import gsforget
from gsforget.errors import RequestError


@pytest.mark.parametrize("kind", ["rt_detr", pytest.param("detr", marks=pytest.mark.slow), "deformable_detr", "yolos"])
def test_an_exported_detector_answers_as_the_model_does(kind, detectors, unselective, tmp_path):
    folder = unselective if kind == "rt_detr" else detectors[kind]
    made = gsforget.export_model(folder, onnx=True, out=tmp_path)
    parity = made["artifacts"][0]["parity"]
    assert parity["max_abs_diff"] < 1e-4
    assert parity["top1_agreement"] == 100.0
    assert (tmp_path / "model-0000-fp32.onnx").is_file()


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
