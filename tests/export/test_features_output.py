"""A features output is what the classifier reads, under its own file name; without it nothing changes."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from gsforget.errors import GateError, RequestError
from gsforget.export.build import export_model, parity
from gsforget.export.build.onnx import export_onnx
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.runtime import open_model
from gsforget.features import features_and_logits, find_classifier
from gsforget.folder import load_model


def noise(count, size=16):
    return np.random.default_rng(3).standard_normal((count, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features_are_what_the_classifier_reads(original, tmp_path, precision):
    made = export_model(original, onnx=True, with_features=True, precision=precision, out=tmp_path / "out")
    (entry,) = made["artifacts"]
    assert entry["path"].endswith(f"model-0000-{precision}-features.onnx")
    predictor = open_model(entry["path"], "cpu")
    model, _ = load_model(original)
    for count in (1, 5):
        images = torch.from_numpy(noise(count))
        features, logits = (t.numpy() for t in features_and_logits(model, find_classifier(model, images), images))
        limit = {"fp32": 1e-4, "fp16": 0.05}[precision]
        np.testing.assert_allclose(predictor.features(noise(count)), features, atol=limit * np.abs(features).max())
        np.testing.assert_allclose(predictor.predict(noise(count)), logits, atol=limit * np.abs(logits).max())
        both = predictor.features_and_logits(noise(count))
        np.testing.assert_array_equal(both[0], predictor.features(noise(count)))
        np.testing.assert_array_equal(both[1], predictor.predict(noise(count)))
    types = {o.name: o.type.tensor_type.elem_type for o in onnx.load(entry["path"]).graph.output}
    assert types == {"logits": onnx.TensorProto.FLOAT, "features": onnx.TensorProto.FLOAT}
    assert entry["parity"]["features_max_abs_diff"] <= 0.05 * np.abs(features).max()
    assert json.loads((tmp_path / "out" / f"model-0000-{precision}-features.onnx.json").read_text())["model"] == (
        predictor.info.to_json()
    )


def test_without_them_there_is_one_output_and_no_word_of_another(original, tmp_path):
    (entry,) = export_model(original, onnx=True, out=tmp_path / "out")["artifacts"]
    predictor = open_model(entry["path"], "cpu")
    assert predictor.features(noise(2)) is None
    features, logits = predictor.features_and_logits(noise(2))
    assert features is None
    assert logits.shape == (2, 4)
    assert "features_name" not in predictor.info.to_json()
    assert ArtifactInfo.from_json(predictor.info.to_json()).features_name is None


def test_other_features_than_the_models_are_refused(original):
    model, config = load_model(original)
    preprocess = Preprocess.from_dict(config.to_json())

    class Other:
        def features(self, batch):
            return np.zeros((len(batch), 16), np.float32)

    with pytest.raises(GateError, match="features of x"):
        parity.check_features(model, Other(), preprocess, "fp32", None, "x.onnx")


def test_a_model_without_a_classifier_has_none_to_give(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Softmax(1)).eval()
    info = ArtifactInfo(
        ["a", "b", "c"], (), 0, Preprocess((3, 4, 4), (0.5,) * 3, (0.5,) * 3), "fp32", "x", features_name="features"
    )
    with pytest.raises(RequestError, match="no penultimate features"):
        export_onnx(model, model.state_dict(), info, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_an_engine_gets_no_features(original):
    with pytest.raises(RequestError) as caught:
        export_model(original, trt=True, with_features=True)
    assert caught.value.kind == "features_in_engine"
