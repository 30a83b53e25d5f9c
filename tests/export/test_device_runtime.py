"""An .onnx file alone suffices; its sidecar's hash is checked; nothing here loads torch."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import runtime
from gsforget.export.device.files import sha256
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, check_hash, sidecar_path
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.runtime import open_model

INFO = ArtifactInfo(
    class_names=["ant", "forgotten-1", "cat"],
    forgotten=(1,),
    sequence=2,
    preprocess=Preprocess((1, 4, 4), (0.5,), (0.5,), "bilinear", 0.9, "squash"),
    precision="fp32",
    model_id="abc",
)
WEIGHT = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def write_onnx(path, info=INFO, precision=np.float32, output="logits"):
    """A linear classifier; `info` None leaves the metadata out."""
    kind = TensorProto.FLOAT if precision == np.float32 else TensorProto.FLOAT16
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], [output]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", kind, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info(output, kind, ["batch", 3])],
        [numpy_helper.from_array(WEIGHT.astype(precision), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if info is not None:
        helper.set_model_props(model, {METADATA_KEY: json.dumps(info.to_json())})
    onnx.save(model, path)
    return path


def write_sidecar(path, **changes):
    content = {"model": INFO.to_json(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} | changes
    sidecar_path(path).write_text(json.dumps(content))


@pytest.mark.parametrize(("precision", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-2)])
def test_a_lone_file_suffices(tmp_path, precision, tolerance):
    path = write_onnx(tmp_path / "model.onnx", precision=precision)
    predictor = open_model(path, "cpu")
    assert predictor.info == INFO
    for count in (1, 5):
        batch = np.random.default_rng(count).normal(size=(count, 1, 4, 4)).astype(np.float32)
        logits = predictor.predict(batch)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, batch.reshape(count, 16) @ WEIGHT, atol=tolerance)


def test_sidecar_stands_in_for_metadata(tmp_path):
    path = write_onnx(tmp_path / "model.onnx", info=None)
    with pytest.raises(RequestError, match="was not exported by gsforget") as caught:
        open_model(path)
    assert caught.value.kind == "not_ours"
    write_sidecar(path)
    assert open_model(path).info == INFO


@pytest.mark.parametrize("opener", [open_model, check_hash])
def test_other_bytes_than_the_sidecar_says_are_refused(tmp_path, opener):
    path = write_onnx(tmp_path / "model.onnx")
    write_sidecar(path)
    opener(path)
    with open(path, "ab") as handle:
        handle.write(b"\0")
    with pytest.raises(SafetyError, match=r"model\.onnx") as caught:
        opener(path)
    assert caught.value.kind == "hash_mismatch"
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"sha256": null}'])
def test_a_damaged_sidecar_is_refused(tmp_path, text):
    path = write_onnx(tmp_path / "model.onnx")
    sidecar_path(path).write_text(text)
    with pytest.raises(SafetyError) as caught:
        open_model(path)
    assert caught.value.kind == "bad_sidecar"


def test_weights_beside_the_file_are_checked_as_well(tmp_path):
    path, data = write_onnx(tmp_path / "model.onnx"), tmp_path / "model.data"
    data.write_bytes(b"weights")
    stated = {"sha256": sha256(path), "data_files": {data.name: sha256(data)}}
    sidecar_path(path).write_text(json.dumps(stated))
    open_model(path)
    for change in (lambda: data.write_bytes(b"Weights"), data.unlink):
        change()
        with pytest.raises(SafetyError, match=r"model\.data") as caught:
            open_model(path)
        assert caught.value.kind == "hash_mismatch"
    sidecar_path(path).write_text(json.dumps({**stated, "data_files": {"../model.data": "0" * 64}}))
    with pytest.raises(SafetyError, match="outside"):
        open_model(path)


def test_info_survives_json():
    assert ArtifactInfo.from_json(json.loads(json.dumps(INFO.to_json()))) == INFO


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"format": 99}, "bad_metadata"),
        ({"forgotten": [3]}, "bad_metadata"),
        ({"forgotten": None}, "bad_metadata"),
        ({"class_names": 3}, "bad_metadata"),
        ({"preprocess": {}}, "bad_config"),
    ],
)
def test_contradictory_info_is_refused(change, kind):
    with pytest.raises(RequestError) as caught:
        ArtifactInfo.from_json(INFO.to_json() | change)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("a.onnx", b"not a protobuf", "bad_artifact"), ("a.onnx", b"", "bad_artifact"), ("a.bin", b"x", "no_model")],
)
def test_files_that_are_no_models(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=name) as caught:
        open_model(path)
    assert caught.value.kind == kind


def test_absent_file_other_names_and_other_shapes(tmp_path):
    with pytest.raises(RequestError, match="There is no file"):
        open_model(tmp_path / "none.onnx")
    with pytest.raises(RequestError, match="logits"):
        open_model(write_onnx(tmp_path / "names.onnx", output="scores"))
    predictor = open_model(write_onnx(tmp_path / "model.onnx"))
    with pytest.raises(RequestError, match=r"\[2, 3, 4, 4\]"):
        predictor.predict(np.zeros((2, 3, 4, 4), np.float32))


def test_devices_and_engines_say_what_is_missing(tmp_path, monkeypatch):
    path = write_onnx(tmp_path / "model.onnx")
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"x")
    with pytest.raises(RequestError, match="no device 'tpu'"):
        open_model(path, "tpu")
    monkeypatch.setattr(runtime, "cuda_devices", lambda: 0)
    with pytest.raises(RequestError, match="no NVIDIA GPU"):
        open_model(path, "cuda")
    with pytest.raises(RequestError, match="this machine has none"):
        open_model(engine)
    monkeypatch.setattr(runtime, "cuda_devices", lambda: 1)
    with pytest.raises(RequestError) as caught:
        open_model(engine)
    assert caught.value.kind == "no_engine_runtime"


def test_the_device_room_never_loads_torch_timm_or_onnx(tmp_path):
    """Importing every file of the room and classifying with an .onnx file, in a fresh interpreter."""
    write_onnx(tmp_path / "model.onnx")
    Image.new("L", (9, 5), 77).save(tmp_path / "a.png")
    code = """
import importlib, pkgutil, sys
import gsforget.export.device as room
for module in pkgutil.iter_modules(room.__path__):
    importlib.import_module(f"{room.__name__}.{module.name}")
from gsforget.export.device.infer import classify, find_images
from gsforget.export.device.runtime import open_model
predictor = open_model(sys.argv[1] + "/model.onnx")
info = predictor.info
found = classify(predictor, info.preprocess, info.forgotten, info.class_names, find_images([sys.argv[1]]))
assert len(found["images"][0]["top"]) == 2
allowed = ("gsforget.errors", "gsforget.canonical", "gsforget.export")
core = {m for m in sys.modules if m.startswith("gsforget.") and not m.startswith(allowed)}
unwanted = {"torch", "timm", "onnx", "torchvision", "safetensors", "typer"} & set(sys.modules)
assert not core | unwanted, core | unwanted
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
