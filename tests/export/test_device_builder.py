"""Engines: the choice of a builder is settled in sentences, TensorRT for RTX builds without a GPU, and the calls of
standard TensorRT are those that its versions document, recorded by a double that offers what each version offers."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.build import export_model
from gsforget.export.device import builder, targets
from gsforget.export.device.engine import export_file
from gsforget.export.device.gpu import Gpu
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, sidecar_path
from gsforget.export.device.onnx_file import read_properties
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.targets import Plan, check_batch, choose

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
ORIN = Gpu("Orin (nvgpu)", "sm87")
FC1, FC2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"


@pytest.fixture
def machine(monkeypatch):
    """machine(installed, gpu): what is installed and which GPU there is."""

    def set_up(installed, gpu=None):
        monkeypatch.setattr(targets, "_installed", lambda backend: backend in installed)
        for room in (targets, builder):
            monkeypatch.setattr(room, "own_gpu", lambda: gpu)

    return set_up


# ---------------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_what_is_not_installed_is_named_with_the_command(machine, backend):
    machine(())
    with pytest.raises(RequestError) as refused:
        choose(backend, ())
    assert f"pip install 'gsforget[{backend}]'" in refused.value.hint


def test_standard_tensorrt_serves_only_the_gpu_that_is_there(machine):
    machine(("trt",), Gpu("NVIDIA H100", "sm90"))
    assert choose("auto", ()) == Plan("trt", ("sm90",))
    assert choose("auto", ("sm90",)) == Plan("trt", ("sm90",))
    with pytest.raises(RequestError, match="sm86"):
        choose("trt", ("sm86",))
    machine(("trt",))
    with pytest.raises(RequestError, match="has none"):
        choose("trt", ())


@needs_rtx
def test_rtx_targets(machine):
    machine(("rtx",))
    assert choose("auto", ()) == Plan("rtx", ("sm86", "sm89", "sm120"))
    assert choose("rtx", ("SM86", "sm_80", "sm86")) == Plan("rtx", ("sm86", "sm80"))
    for target in ("sm87", "sm90"):
        with pytest.raises(RequestError) as refused:
            choose("rtx", (target,))
        assert "gsforget export --trt MODEL.onnx there" in refused.value.hint


def test_unknown_backend_and_impossible_batches():
    with pytest.raises(RequestError, match="backend"):
        choose("onnx", ())
    for batch in ((0, 1, 2), (1, 2), (4, 2, 8)):
        with pytest.raises(RequestError, match="MIN,OPT,MAX"):
            check_batch(batch)


def test_a_builder_that_cannot_be_loaded_is_a_sentence(machine, monkeypatch):
    machine(("trt",), ORIN)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what a broken installation looks like to an import
    with pytest.raises(RequestError, match="cannot be loaded"):
        targets.load_builder("trt")


# ----------------------------------------------------------------------------------------------------- standard TensorRT
def _load_double():
    spec = importlib.util.spec_from_file_location("builder_double", Path(__file__).with_name("builder_double.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Double


Double = _load_double()
PRECISION_FLAGS = ("FP16", "INT8", "BF16", "FP8")
COMMON_FLAGS = ("REFIT", "TF32", "STRIP_PLAN", "REFIT_IDENTICAL")
VERSIONS = {
    "10.0": ("10.0.1", 1, (*PRECISION_FLAGS, *COMMON_FLAGS)),
    "10.14": ("10.14.1", 1, (*PRECISION_FLAGS, *COMMON_FLAGS, "REFIT_INDIVIDUAL")),
    "11": ("11.4.1", 0, (*COMMON_FLAGS, "REFIT_INDIVIDUAL")),
}


@pytest.fixture
def tensorrt(machine, monkeypatch, tmp_path):
    """tensorrt(version): a Jetson with that TensorRT, and an empty cache folder."""

    def install(version):
        double = Double(*VERSIONS[version])
        monkeypatch.setitem(sys.modules, "tensorrt", double)
        machine(("trt",), ORIN)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(builder, "EVERY", 0.0)
        return double

    return install


def write_onnx(
    path, precision="fp32", sequence=1, batch="batch", quantised=False, sidecar=True, classes=("ant", "forgotten-1")
):
    """Two layers of a feed-forward network on 4 x 4 images, as gsforget would export them."""
    rng = np.random.default_rng(0)
    weights = {FC1: rng.normal(size=(16, 8)), FC2: rng.normal(size=(8, len(classes)))}
    initializers = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    nodes, hidden = [helper.make_node("Flatten", ["images"], ["flat"])], "flat"
    if quantised:
        initializers += [
            numpy_helper.from_array(np.float32(0.05), "scale"),
            numpy_helper.from_array(np.int8(0), "zero"),
            numpy_helper.from_array(rng.integers(-99, 99, (16, 8), np.int8), "fc1.int8"),
        ]
        nodes += [
            helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("DequantizeLinear", ["fc1.int8", "scale", "zero"], ["w"]),
            helper.make_node("MatMul", ["d", "w"], ["h"]),
        ]
    else:
        nodes.append(helper.make_node("MatMul", [hidden, FC1], ["h"]))
    nodes += [helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", FC2], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(classes)])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    info = ArtifactInfo(
        list(classes), (1,), sequence, Preprocess((1, 4, 4), (0.5,), (0.5,)), precision, "0123456789abcdef"
    )
    helper.set_model_props(model, {METADATA_KEY: json.dumps(info.to_json()), "other": "ünïcode"})
    onnx.save(model, path)
    if sidecar:
        content = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "model": info.to_json(),
            "erasable": [FC1, FC2],
            "source_sha256": "5" * 64,
            "chain": {"position": sequence, "base": 0, "complete": True, "reason": ""},
            "parity": {"max_abs_diff": 1e-6, "top1_agreement": 100.0, "forget_acc": 0.0, "retain_acc": 99.0},
        }
        sidecar_path(path).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_on_the_device_from_the_file(tensorrt, tmp_path, version):
    trt, said = tensorrt(version), []
    source = write_onnx(tmp_path / "model-0003-fp16.onnx", "fp16", 3)
    made = export_file(source, trt=True, batch=(1, 2, 4), progress=said.append)
    engine = tmp_path / "model-0003-fp16-trt-sm87.engine"
    assert [a["path"] for a in made["artifacts"]] == [str(engine)]
    assert engine.read_bytes() == b"ftrt plan of tiny", "the plan and nothing else"
    assert ("create_network", 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in trt.calls
    assert ("set_shape", "images", (1, 1, 4, 4), (2, 1, 4, 4), (4, 1, 4, 4)) in trt.calls
    assert trt.calls[-1] == ("build", 1)
    offered = "REFIT_INDIVIDUAL" in trt.BuilderFlag.__members__
    assert [c[1] for c in trt.calls if c[0] == "set_flag"] == ["REFIT_INDIVIDUAL"] * offered, "precision is the ONNX's"
    sidecar = json.loads(sidecar_path(engine).read_text())
    assert sidecar["refittable"] == [FC1, FC2] * offered
    assert sidecar["sha256"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert sidecar["onnx_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (sidecar["precision"], sidecar["targets"], sidecar["gpu"]) == ("fp16", ["sm87"], ORIN.name)
    assert (sidecar["builder"], sidecar["builder_version"]) == ("tensorrt", trt.__version__)
    assert sidecar["file"] == engine.name
    assert sidecar["model"]["sequence"] == 3
    assert sidecar["chain"]["complete"]
    assert "its ONNX file" in sidecar["parity"]["measured_on"]
    assert "building engine (3 of 3)" in said
    assert sorted(p.name for p in tmp_path.glob("model*")) == sorted(
        [source.name, f"{source.name}.json", engine.name, f"{engine.name}.json"]
    )


def test_weights_that_the_builder_does_not_know_are_not_promised(tensorrt, tmp_path):
    trt, source = tensorrt("11"), write_onnx(tmp_path / "m.onnx")
    built = builder.build_engine(source, tmp_path / "e", Plan("trt", ("sm87",)), (1, 1, 1), [FC1, "head.weight"])
    assert built.refittable == [FC1]
    trt.calls.clear()
    assert builder.build_engine(source, tmp_path / "e", Plan("trt", ("sm87",)), (1, 1, 1)).refittable == []
    assert not [c for c in trt.calls if c[0] in ("mark", "set_flag")]


def test_kernel_times_are_kept_per_version_and_gpu(tensorrt, tmp_path):
    trt, source = tensorrt("10.14"), write_onnx(tmp_path / "m.onnx")
    plan, said = Plan("trt", ("sm87",)), []

    def build():
        builder.build_engine(source, tmp_path / "e", plan, (1, 1, 1), progress=said.append)

    build()
    (kept,) = (tmp_path / "cache" / "gsforget" / "tensorrt").iterdir()
    assert kept.name == "10.14.1-sm87-Orin-nvgpu-.timing"
    assert (trt.given_cache, kept.read_bytes()) == (b"", b"kernel times")
    trt.cache = b"more kernel times"
    build()
    assert (trt.given_cache, kept.read_bytes()) == (b"kernel times", b"more kernel times")
    kept.write_bytes(b"damaged")
    build()
    assert (trt.given_cache, kept.read_bytes()) == (b"", b"more kernel times")
    kept.unlink()
    kept.symlink_to("/proc/self/mem")  # a file that cannot be read, also by root
    build()
    assert trt.given_cache == b""
    trt.__version__ = "11.4.1"
    build()
    assert len(list(kept.parent.iterdir())) == 2
    trt.cache = b"again other times"
    for path in kept.parent.iterdir():
        path.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    build()
    assert any("not kept" in text for text in said)


def test_ctrl_c_and_faults_in_a_report_end_the_build_and_leave_nothing(tensorrt, tmp_path):
    tensorrt("11")
    source = write_onnx(tmp_path / "m.onnx")
    for fault in (KeyboardInterrupt, BrokenPipeError):

        def report(text, fault=fault):
            if "building engine" in text:
                raise fault

        with pytest.raises(fault):
            export_file(source, trt=True, progress=report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_why_a_build_failed(tensorrt, tmp_path):
    trt = tensorrt("11")
    trt.fails = "no kernel for this node"
    with pytest.raises(GsforgetError, match="no kernel for this node"):
        export_file(write_onnx(tmp_path / "m.onnx"), trt=True)


def test_what_the_file_quantises_to_is_its_precision(tensorrt, tmp_path):
    tensorrt("11")
    made = export_file(write_onnx(tmp_path / "m.onnx", quantised=True, sidecar=False), trt=True)
    assert made["artifacts"][0]["precision"] == "int8"
    assert made["artifacts"][0]["path"].endswith("model-0001-int8-trt-sm87.engine")
    assert made["artifacts"][0]["parity"]["max_abs_diff"] is None
    assert any("hash was not checked" in note for note in made["not_tested"])


def test_files_that_are_refused(tensorrt, tmp_path):
    tensorrt("11")
    path = write_onnx(tmp_path / "m.onnx", "fp16")
    with pytest.raises(RequestError, match="is at fp16"):
        export_file(path, trt=True, precision="fp32")
    with pytest.raises(RequestError, match="ONNX file already"):
        export_file(path)
    fixed = write_onnx(tmp_path / "fixed.onnx", batch=2)
    with pytest.raises(RequestError) as refused:
        export_file(fixed, trt=True)
    assert "--batch 2,2,2" in refused.value.hint
    assert export_file(fixed, trt=True, batch=(2, 2, 2))["artifacts"]
    path.write_bytes(path.read_bytes() + b"\x72\x00")
    with pytest.raises(SafetyError, match="not the file that its sidecar describes"):
        export_file(path, trt=True)
    device = tmp_path / "device"
    (device / "models").mkdir(parents=True)
    (device / "state.json").write_text("{}")
    with pytest.raises(RequestError, match="device folder"):
        export_file(write_onnx(device / "models" / "m.onnx"), trt=True)


def test_no_torch_is_needed(tmp_path):
    source = write_onnx(tmp_path / "m.onnx")
    code = """
import sys
for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "safetensors", "sklearn", "tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None
from gsforget.__main__ import main
sys.exit(main(["export", "--trt", sys.argv[1], "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, json.loads(done.stdout)["error"]["kind"]) == (2, "no_tensorrt"), done.stderr


# ------------------------------------------------------------------------------------------------------ properties alone
def test_properties_without_the_onnx_package(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    assert read_properties(path) == {p.key: p.value for p in onnx.load(path).metadata_props}
    assert read_properties(path)["other"] == "ünïcode"


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x72\xff\xff\xff\xff\x0f", b"\x80" * 12, b"\x72\x02\x0a\xff"]
)
def test_bytes_that_are_no_onnx_file(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="not an ONNX file"):
        read_properties(path)


# ------------------------------------------------------------------------------------------------------ TensorRT for RTX
@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
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
    assert sidecar["batch"] == [1, 2, 4]
    assert (sidecar["refittable"], sidecar["gpu"]) == ([], None), (
        "the bytes must not depend on the machine that built them"
    )
    assert path.read_bytes()[:1] not in (b"{", b"\0"), "the file must start with the plan itself"
    assert any("engine itself has not run" in note for note in made["not_tested"])


@needs_rtx
def test_the_file_gives_the_engine_that_the_run_gives(original, tmp_path, make_run):
    run = make_run(original, tmp_path / "forget-0001", 1, seed=1)
    first = export_model(run, onnx=True, trt=True, backend="rtx", precision="fp16", targets=["sm89"], batch=(1, 2, 4))
    onnx_file, engine = (a["path"] for a in first["artifacts"])
    erasable = json.loads(sidecar_path(onnx_file).read_text())["erasable"]
    assert erasable == [f"blocks.{i}.mlp.{layer}.weight" for i in range(2) for layer in ("fc1", "fc2")]
    again = export_file(onnx_file, trt=True, backend="rtx", targets=["sm89"], batch=(1, 2, 4), out=tmp_path / "device")
    assert [a["sha256"] for a in again["artifacts"]] == [first["artifacts"][1]["sha256"]]
    assert os.path.basename(again["artifacts"][0]["path"]) == os.path.basename(engine)


@needs_rtx
def test_a_quantised_file_builds_as_it_is(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", quantised=True)
    made = export_file(path, trt=True, backend="rtx", targets=["sm89"], batch=(1, 2, 4))
    assert made["artifacts"][0]["precision"] == "int8"


@needs_rtx
def test_ctrl_c_ends_a_real_build(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "EVERY", 0.0)

    def report(text):
        if "(" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.build_engine(
            write_onnx(tmp_path / "m.onnx"), tmp_path / "e", Plan("rtx", ("sm86",)), (1, 2, 4), progress=report
        )
    assert not (tmp_path / "e").exists()


@needs_rtx
def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(RequestError, match="cannot read the model"):
        builder.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", Plan("rtx", ("sm86",)), (1, 2, 4))
    assert not (tmp_path / "m.engine").exists()
