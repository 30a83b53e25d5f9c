"""Every family of detectors as ONNX: what ONNX Runtime finds is what torch finds."""

import pytest

import gsforget


@pytest.mark.parametrize("kind", ["rt_detr", pytest.param("detr", marks=pytest.mark.slow), "deformable_detr", "yolos"])
def test_an_exported_detector_answers_as_the_model_does(kind, detectors, unselective, tmp_path):
    folder = unselective if kind == "rt_detr" else detectors[kind]
    made = gsforget.export_model(folder, onnx=True, out=tmp_path)
    parity = made["artifacts"][0]["parity"]
    assert parity["max_abs_diff"] < 1e-4
    assert parity["top1_agreement"] == 100.0
    assert (tmp_path / "model-0000-fp32.onnx").is_file()
