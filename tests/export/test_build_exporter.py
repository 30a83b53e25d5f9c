"""An export measures what it publishes, and publishes nothing that fails."""

import hashlib
import json
import re
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import from_array, to_array

from gsforget.errors import GateError, RequestError
from gsforget.export.build import artifacts, export_model, parity
from gsforget.export.device.runtime import open_model
from gsforget.folder import load_model
from gsforget.predict import TorchPredictor


@pytest.fixture
def run(original, tmp_path, make_run):
    return make_run(original, tmp_path / "runs" / "forget-0001", 1, seed=1)


def files(folder):
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


def loose(run):
    """Random weights have forgotten nothing: let them pass the gates of the run."""
    request = json.loads((run / "request.json").read_text())
    request["thresholds"] = {"max_forget_acc": 100.0, "max_retain_drop": 100.0, "max_class_drop": 100.0}
    (run / "request.json").write_text(json.dumps(request))


def test_an_export_measures_the_artifact_and_describes_it(run, images):
    loose(run)
    made = export_model(run, onnx=True, data=images)
    (entry,) = made["artifacts"]
    path = run / "artifacts" / "model-0001-fp32.onnx"
    assert entry["path"] == str(path)
    assert (entry["kind"], entry["precision"], entry["targets"]) == ("onnx", "fp32", [])
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry["bytes"] == path.stat().st_size
    assert made["verdict"] == "pass"
    assert files(run / "artifacts") == [path.name, f"{path.name}.json"]

    info = open_model(path).info
    labels = np.repeat(np.arange(4), 6)
    batch = np.stack([info.preprocess.load(p) for p in sorted((images / "test").rglob("*.png"))])
    right = TorchPredictor(load_model(run)[0]).predict(batch).argmax(1) == labels
    assert entry["parity"]["forget_acc"] == pytest.approx(100 * right[labels == 1].mean())
    assert entry["parity"]["retain_acc"] == pytest.approx(100 * right[labels != 1].mean())
    assert entry["parity"]["top1_agreement"] == 100
    assert entry["parity"]["max_abs_diff"] < 1e-3

    sidecar = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert sidecar["sha256"] == entry["sha256"]
    assert sidecar["source_sha256"] == hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert sidecar["chain"]["position"] == 1
    assert sidecar["model"] == info.to_json()
    assert info.class_names == ["ant", "forgotten-1", "cat", "dog"]
    written = b"".join(p.read_bytes() for p in (run / "artifacts").iterdir())
    assert not re.search(rb"(?<![0-9a-f])bee(?![0-9a-f])", written)  # but a hash may hold these three digits


def test_the_data_of_the_run_is_used_where_it_still_is(original, tmp_path, make_run, images):
    run = make_run(original, tmp_path / "a", 1, seed=1, data=str(images))
    loose(run)
    assert export_model(run, onnx=True)["artifacts"][0]["parity"]["images"] == 24
    images.rename(tmp_path / "gone")
    made = export_model(run, onnx=True)
    measured = made["artifacts"][0]["parity"]
    assert (measured["forget_acc"], measured["retain_acc"], measured["inputs"]) == (None, None, "seeded noise")
    assert any("--data" in note for note in made["not_tested"])


def test_data_without_training_images_of_a_retained_class_serves_as_it_did_to_forget(run, images):
    loose(run)
    shutil.rmtree(images / "train" / "dog")
    (entry,) = export_model(run, onnx=True, data=images)["artifacts"]
    assert entry["parity"]["images"] == 24


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_the_chain(run, precision):
    from gsforget.export.build.chain import weights_at

    (entry,) = export_model(run, onnx=True, precision=precision)["artifacts"]
    found = {t.name: to_array(t) for t in onnx.load(entry["path"]).graph.initializer}
    state, _ = weights_at(run, precision)
    assert all(found[n].tobytes() == t.view(torch.int16).numpy().tobytes() for n, t in state.items())
    assert ("rounded to bf16" in entry["parity"]["measured_on"]) == (precision == "bf16")


def test_a_tampered_onnx_fails_the_parity_gate(run, tmp_path):
    export_model(run, onnx=True, out=tmp_path / "out")
    model, config = load_model(run)
    proto = onnx.load(tmp_path / "out" / "model-0001-fp32.onnx")
    tensor = next(t for t in proto.graph.initializer if t.name == "blocks.0.mlp.fc1.weight")
    tensor.CopyFrom(from_array(1.05 * to_array(tensor), tensor.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    artifact = open_model(tmp_path / "tampered.onnx", "cpu")
    found, peak, _ = parity.evaluate(TorchPredictor(model), artifact, artifact.info.preprocess, "fp32", None)
    with pytest.raises(GateError, match="does not answer as the model does"):
        parity.check_parity(found, peak, "fp32", "tampered.onnx")
    assert config.sequence == 1


def test_a_failed_gate_publishes_nothing_and_keeps_what_was_there(run, monkeypatch):
    export_model(run, onnx=True)
    before = {p.name: p.read_bytes() for p in (run / "artifacts").iterdir()}
    fit = artifacts._fit

    def drifted(model, state, precision):
        exact = {n: t.clone() for n, t in fit(model, state, precision).items()}
        exact["head.bias"] += torch.tensor([0.0, 0.01, 0.0, 0.0])
        return exact

    monkeypatch.setattr(artifacts, "_fit", drifted)
    with pytest.raises(GateError, match="Nothing was published"):
        export_model(run, onnx=True)
    assert {p.name: p.read_bytes() for p in (run / "artifacts").iterdir()} == before


def test_an_artifact_that_remembers_is_not_published(run, images):
    for path in (images / "test").rglob("*.png"):  # all images of one class, as the model sees them
        path.unlink()
    model, config = load_model(run)
    predictor, info = TorchPredictor(model), artifacts.Export(run, "fp32", False, print).info
    rng = np.random.default_rng(5)
    from PIL import Image

    kept = dict.fromkeys(range(4), 0)
    for i in range(400):
        image = Image.fromarray(np.repeat(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8), 8, 0).repeat(8, 1))
        said = int(predictor.predict(info.preprocess(image)[None]).argmax())
        image.save(images / "test" / ["ant", "bee", "cat", "dog"][said] / f"{i}.png")
        kept[said] += 1
    if not kept[1] or sum(kept.values()) == kept[1]:
        pytest.fail("the random model never answers both the forgotten class and others; change the seed")
    for k, name in enumerate(("ant", "bee", "cat", "dog")):
        if not kept[k]:
            Image.new("RGB", (16, 16)).save(images / "test" / name / "0.png")
    with pytest.raises(GateError, match="forget_acc"):
        export_model(run, onnx=True, data=images)
    assert files(run / "artifacts") == []
    assert config.forgotten == (1,)


def test_an_original_model_is_never_written_to(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(original)
    made = export_model(original, onnx=True)
    assert made["artifacts"][0]["path"] == "artifacts/model-0000-fp32.onnx"
    with pytest.raises(RequestError, match="never written to"):
        export_model(original, onnx=True, out=original / "artifacts")
    assert files(original) == before


def test_refusals_before_any_work(run, tmp_path):
    with pytest.raises(RequestError) as nothing:
        export_model(run)
    assert "--onnx" in nothing.value.hint
    with pytest.raises(RequestError, match="fp4"):
        export_model(run, onnx=True, precision="fp4")
    with pytest.raises(RequestError) as no_images:
        export_model(run, onnx=True, precision="int8")
    assert "--data DIR" in no_images.value.hint
    with pytest.raises(RequestError, match="from the run alone"):
        export_model(run, onnx=True, previous=run)
    with pytest.raises(RequestError) as no_engine:
        export_model(run, onnx=True, targets=("sm86",))
    assert no_engine.value.hint == "Add --trt."
    with pytest.raises(RequestError, match="never change"):
        export_model(run, onnx=True, out=run)
    with pytest.raises(RequestError, match="MIN,OPT,MAX"):
        export_model(run, onnx=True, batch=(8, 1, 64))
    with pytest.raises(RequestError, match="not a model folder"):
        export_model(tmp_path, onnx=True)
    assert files(run / "artifacts") == []


def test_compare():
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5001]])
    found = np.array([[1.0, 0.0], [2.0, 1.0], [0.5002, 0.5001]])
    measured = parity.compare(reference, found)
    assert measured["max_abs_diff"] == 2
    assert measured["mean_abs_diff"] == pytest.approx(2.0002 / 6)
    assert measured["top1_agreement"] == pytest.approx(100 / 3)
    assert parity.compare(reference, found, tie=1e-3)["top1_agreement"] == pytest.approx(200 / 3)
    assert parity.compare(reference, np.full((3, 2), np.nan))["top1_agreement"] == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        parity.compare(reference, found[:2])
