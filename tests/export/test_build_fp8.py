"""fp8: the same layers and ranges as at int8, in FLOAT8E4M3FN; an engine for the GPUs that have it."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file

from gsforget.errors import RequestError
from gsforget.export.build import export_model, export_patch
from gsforget.export.device import targets
from gsforget.export.device.engine import export_file
from gsforget.export.device.gpu import Gpu
from gsforget.export.device.metadata import read_sidecar
from gsforget.export.device.runtime import open_model
from gsforget.export.device.targets import Plan, choose

LAYERS = {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


@pytest.fixture
def exported(original, images, tmp_path):
    made = export_model(original, onnx=True, precision="fp8", data=images, out=tmp_path / "out")
    return original, tmp_path / "out" / "model-0000-fp8.onnx", made


def test_the_calibrated_file(exported, images, tmp_path):
    original, path, made = exported
    state, model = load_file(original / "model.safetensors"), onnx.load(path)
    stored = {i.name: i for i in model.graph.initializer}
    weights = {n.removesuffix("_quantized"): t for n, t in stored.items() if n.endswith("_quantized")}
    assert weights.keys() == LAYERS
    for name, tensor in weights.items():
        assert tensor.data_type == TensorProto.FLOAT8E4M3FN
        values = numpy_helper.to_array(tensor).astype(np.float64).T
        scale = numpy_helper.to_array(stored[f"{name}_scale"]).astype(np.float64)[:, None]
        assert np.allclose(scale, np.abs(state[name]).max(1, keepdims=True) / 448), "a scale for each output"
        exact = state[name] / scale
        # 3 bits after the leading one: half a step is 1/16 of the number, or of the smallest normal one.
        assert (np.abs(values - exact) <= np.maximum(np.abs(exact), 2.0**-6) / 16 + 1e-6).all()
    assert TensorProto.INT8 not in {t.data_type for t in stored.values()}
    # Ranges of activations are those of int8.
    export_model(original, onnx=True, precision="int8", data=images, out=tmp_path / "out")
    int8 = {i.name: i for i in onnx.load(tmp_path / "out" / "model-0000-int8.onnx").graph.initializer}
    ranges = [n for n in int8 if n.endswith("_scale") and n.removesuffix("_scale") not in LAYERS]
    assert ranges
    for name in ranges:
        ratio = numpy_helper.to_array(stored[name]) * 448 / (numpy_helper.to_array(int8[name]) * 127)
        assert ratio == pytest.approx(1, abs=1e-5)
    sidecar = read_sidecar(path)
    assert (sidecar["precision"], sidecar["parity"]["images"]) == ("fp8", 24)
    assert made["artifacts"][0]["parity"]["top1_agreement"] >= 95
    assert json.loads(model.metadata_props[0].value)["precision"] == "fp8"


def test_it_answers_here_as_the_file_says(exported):
    """ONNX Runtime's usual optimisation takes fp8 for int8 and then refuses the graph; answers are the operators' own."""
    from gsforget.export.device.runtime import OnnxPredictor

    _, path, _ = exported
    noise = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    logits = open_model(path, "cpu").predict(noise)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits, OnnxPredictor(path, "cpu", optimised=False).predict(noise), atol=2e-2)
    assert logits.std() > 0


def test_the_type_rounds_to_nearest_even_and_does_not_overflow():
    values = np.array([448, 464, 1.0625, 1.1875, 2.0**-9, -448], np.float32).clip(-448, 448)
    assert values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist() == [448, 448, 1.0, 1.25, 2.0**-9, -448]


def test_an_rtx_engine_for_gpus_that_have_fp8(exported, images, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    original, path, _ = exported
    made = export_file(path, trt=True, backend="rtx", batch=(1, 2, 4))
    (engine,) = made["artifacts"]
    assert (engine["precision"], engine["targets"]) == ("fp8", ["sm89", "sm120"])
    assert engine["path"].endswith("model-0000-fp8-rtx-sm89-sm120.engine")
    with pytest.raises(RequestError) as refused:
        export_model(original, trt=True, backend="rtx", precision="fp8", targets=("sm86", "sm89"), data=images)
    assert refused.value.kind == "no_fp8"
    assert "sm86 cannot compute fp8" in refused.value.message


def test_gpus_without_fp8_are_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda backend: True)
    monkeypatch.setattr(targets, "own_gpu", lambda: Gpu("Orin (nvgpu)", "sm87"))
    with pytest.raises(RequestError, match="sm87 cannot compute fp8"):
        choose("trt", (), "fp8")
    monkeypatch.setattr(targets, "own_gpu", lambda: Gpu("NVIDIA H100", "sm90"))
    assert choose("trt", (), "fp8") == Plan("trt", ("sm90",))


def test_what_fp8_has_not(exported, images):
    original, path, _ = exported
    for kind, call in (
        ("no_calibration", lambda: export_model(original, onnx=True, precision="fp8", out=path.parent)),
        ("no_base_needed", lambda: export_model(original, onnx=True, precision="fp8", data=images, previous=path)),
        ("features_int8", lambda: export_model(original, onnx=True, precision="fp8", data=images, with_features=True)),
        ("bad_precision", lambda: export_patch(original, full=True, precision="fp8")),
    ):
        with pytest.raises(RequestError) as refused:
            call()
        assert refused.value.kind == kind
