"""`gsforget infer`: model folders with torch, .onnx files without, and a forgotten class in neither answer."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from gsforget.__main__ import main
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, sidecar_path
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, save_model
from gsforget.models import create_timm
from gsforget.predict import TorchPredictor

NAMES = ["ant", "forgotten-1", "cat"]
KWARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "in_chans": 1}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (12, 9), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def model_folder(tmp_path):
    """A tiny ViT whose head strongly prefers the forgotten class."""
    torch.manual_seed(0)
    model = create_timm("vit_tiny_patch16_224", 3, KWARGS)
    with torch.no_grad():
        model.head.bias[1] = 50
    folder = tmp_path / "runs" / "forget-0001"
    folder.mkdir(parents=True)
    config = ModelConfig(
        "vit_tiny_patch16_224", KWARGS, NAMES, (1, 8, 8), (0.5,), (0.5,), "bilinear", forgotten=(1,), sequence=1
    )
    save_model(model.state_dict(), config, folder)
    return folder


@pytest.fixture
def onnx_file(tmp_path):
    """A linear classifier that strongly prefers the forgotten class."""
    info = ArtifactInfo(NAMES, (1,), 1, Preprocess((1, 8, 8), (0.5,), (0.5,), "bilinear"), "fp32", "m")
    weight = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.float32([0, 99, 0]), "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: json.dumps(info.to_json())})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", ["model_folder", "onnx_file"])
def test_json_holds_what_the_contract_says(kind, request, images, capsys):
    model = request.getfixturevalue(kind)
    assert main(["infer", str(model), str(images), "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"images"}
    assert [i["path"] for i in document["images"]] == [str(images / "a.png"), str(images / "b.jpg")]
    for image in document["images"]:
        assert set(image) == {"path", "top"}
        assert {t["class"] for t in image["top"]} == {"ant", "cat"}
        assert all(set(t) == {"class", "score"} for t in image["top"])
        assert sum(t["score"] for t in image["top"]) == pytest.approx(1)


@pytest.mark.parametrize(("kind", "then"), [("model_folder", "gsforget export"), ("onnx_file", "gsforget infer")])
def test_people_get_a_table_and_the_next_command(kind, then, request, images, capsys):
    model = request.getfixturevalue(kind)
    assert main(["infer", str(model), str(images / "a.png"), "--top", "1", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a.png" in printed.err
    assert " %" in printed.err
    assert "forgotten" not in printed.err
    assert then in printed.err.split("Next:")[1]


def test_corrupt_images(onnx_file, images, capsys):
    (images / "c.png").write_bytes(b"")
    command = ["infer", str(onnx_file), str(images), "--json"]
    assert main(command) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "corrupt_image"
    assert "c.png" in error["message"]
    assert main([*command, "--skip-corrupt"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["images"]) == 2
    assert "c.png" in printed.err


def test_a_tampered_file_is_refused(onnx_file, images, capsys):
    sidecar_path(onnx_file).write_text(json.dumps({"sha256": "0" * 64}))
    assert main(["infer", str(onnx_file), str(images), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "hash_mismatch"


@pytest.mark.parametrize("name", ["none", "none.onnx", "images", "images/a.png"])
def test_what_is_no_model(tmp_path, images, name, capsys):
    assert main(["infer", str(tmp_path / name), str(images), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no_model"


def test_an_onnx_file_needs_no_torch(onnx_file, images):
    code = """
import sys
from gsforget.__main__ import main
assert main(["infer", sys.argv[1], sys.argv[2], "--json"]) == 0
loaded = {"torch", "timm", "onnx", "torchvision"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(onnx_file), str(images)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["images"]) == 2


def test_torch_predictor_repeats_itself_and_equals_the_model(model_folder):
    from gsforget.folder import load_model

    model, _ = load_model(model_folder)
    batch = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    predictor = TorchPredictor(model.train(), "cpu")
    first = predictor.predict(batch)
    assert first.dtype == np.float32
    assert first.shape == (4, 3)
    np.testing.assert_array_equal(first, predictor.predict(batch))
    with torch.no_grad():
        np.testing.assert_array_equal(first, model.eval()(torch.from_numpy(batch)).numpy())
