"""Engines: the choice of a builder is settled in sentences, and TensorRT for RTX builds without a GPU."""

import hashlib
import importlib.util
import json

import pytest

from gsforget.errors import RequestError
from gsforget.export.build import export_model, trt

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture
def machine(monkeypatch):
    """machine(installed, gpu): what is installed and which GPU there is."""

    def set_up(installed, gpu=None):
        monkeypatch.setattr(trt, "_installed", lambda backend: backend in installed)
        monkeypatch.setattr(trt, "own_target", lambda: gpu)

    return set_up


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_what_is_not_installed_is_named_with_the_command(machine, backend):
    machine(())
    with pytest.raises(RequestError) as refused:
        trt.choose(backend, ())
    assert f"pip install 'gsforget[{backend}]'" in refused.value.hint


def test_standard_tensorrt_serves_only_the_gpu_that_is_there(machine):
    machine(("trt",), "sm90")
    assert trt.choose("auto", ()) == trt.Plan("trt", ("sm90",))
    assert trt.choose("auto", ("sm90",)) == trt.Plan("trt", ("sm90",))
    with pytest.raises(RequestError, match="sm86"):
        trt.choose("trt", ("sm86",))
    machine(("trt",))
    with pytest.raises(RequestError, match="has none"):
        trt.choose("trt", ())


@needs_rtx
def test_rtx_targets(machine):
    machine(("rtx",))
    assert trt.choose("auto", ()) == trt.Plan("rtx", ("sm86", "sm89", "sm120"))
    assert trt.choose("rtx", ("SM86", "sm_80", "sm86")) == trt.Plan("rtx", ("sm86", "sm80"))
    for target in ("sm87", "sm90"):
        with pytest.raises(RequestError) as refused:
            trt.choose("rtx", (target,))
        assert "standard TensorRT engine on the device" in refused.value.hint


def test_unknown_backend_and_impossible_batches():
    with pytest.raises(RequestError, match="backend"):
        trt.choose("onnx", ())
    for batch in ((0, 1, 2), (1, 2), (4, 2, 8)):
        with pytest.raises(RequestError, match="MIN,OPT,MAX"):
            trt.check_batch(batch)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_for_three_gpus_without_any(original, tmp_path, make_run, precision):
    run = make_run(original, tmp_path / "forget-0001", 1, seed=1)
    made = export_model(run, trt=True, backend="rtx", precision=precision, batch=(1, 2, 4))
    (entry,) = made["artifacts"]
    path = run / "artifacts" / f"model-0001-{precision}-rtx-sm86-sm89-sm120.engine"
    assert entry["path"] == str(path)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    sidecar = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert sidecar["targets"] == ["sm86", "sm89", "sm120"]
    assert sidecar["parity"]["measured_on"] == "onnxruntime, same precision"
    assert sidecar["batch"] == [1, 2, 4]
    assert path.read_bytes()[:1] not in (b"{", b"\0"), "the file must start with the plan itself"
    assert any("engine itself has not run" in note for note in made["not_tested"])


@needs_rtx
def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(RequestError, match="cannot read the model"):
        trt.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", trt.Plan("rtx", ("sm86",)), (1, 2, 4))
    assert not (tmp_path / "m.engine").exists()
