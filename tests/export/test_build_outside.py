"""Models whose weights lie in a file beside the ONNX file, as beyond 1.5 GB: patched, packed, installed, and no way out of
their folder."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build import export_model, export_patch
from gsforget.export.build import onnx as writer
from gsforget.export.build.locate import OnnxBytes
from gsforget.export.device import rollforward
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.files import sha256
from gsforget.export.device.metadata import check_outside, read_sidecar, sidecar_path
from gsforget.export.device.onnx_file import outside_files, read_tensors
from gsforget.export.device.package import read_package
from gsforget.export.device.runtime import open_model


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Every model is too large for one file."""
    monkeypatch.setattr(writer, "EXTERNAL_FROM", 1000)


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_chain):
    """An original with its fp32 ONNX file, two erasures in a row, and keys."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EXTERNAL_FROM", 1000)
        export_model(make_chain(root), onnx=True, out=root / "artifacts")
    return root


@pytest.fixture
def chain(world, copied_chain):
    return copied_chain(world)


def held(root):
    return sorted(p.name for p in (root / "models").iterdir() if p.suffix != ".json")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_patches_lead_a_device_to_both_files_of_a_fresh_export(chain, tmp_path, precision):
    root = tmp_path / "device"
    if precision != "fp32":
        export_model(chain.original, onnx=True, precision=precision)
    apply(f"artifacts/model-0000-{precision}.onnx", root, trust=chain.public)
    assert [name.rsplit(".", 1)[1] for name in held(root)] == ["data", "onnx"]
    for sequence, run, previous in ((1, chain.first, chain.original), (2, chain.second, chain.first)):
        made = export_patch(run, previous=previous, key=chain.key, precision=precision)
        patch = made["artifacts"][0]
        assert patch["kind"] == "patch"
        fresh = {p.name: p for p in (run / "artifacts").iterdir() if p.suffix in (".onnx", ".data")}
        assert {r["name"]: r["patched_equals_rebuilt"] for r in patch["replaces"]} == dict.fromkeys(fresh, True)
        whole = sum(p.stat().st_size for p in fresh.values())
        assert patch["bytes"] < whole, "the manifest names the new file at each tensor, and no weights travel"
        done = apply(patch["path"], root)
        assert held(root) == sorted(fresh)
        for name, path in fresh.items():
            assert (root / "models" / name).read_bytes() == path.read_bytes()
        assert len(done.removed) == 2
        if precision == "fp32":  # a CPU computes no bf16
            assert done.loaded.answered == [f"model-{sequence:04d}-{precision}.onnx"]
            assert open_device(root).info.sequence == sequence


def test_a_whole_package_holds_both_files(chain, tmp_path):
    made = export_patch(chain.first, full=True, key=chain.key)
    package = read_package(chain.first / "artifacts" / "model-0001-fp32.gsf")
    assert [a.kind for a in package.manifest.artifacts] == ["onnx", "data"]
    assert made["artifacts"][0]["kind"] == "full"
    root = tmp_path / "device"
    apply(package.path, root, trust=chain.public)
    assert open_device(root).info.sequence == 1
    for name in held(root):
        assert (root / "models" / name).read_bytes() == (chain.first / "artifacts" / name).read_bytes()
    second = export_patch(chain.second, previous=chain.first, key=chain.key)
    apply(second["artifacts"][0]["path"], root)
    assert open_device(root).info.sequence == 2


@pytest.mark.parametrize("which", ["data", "onnx"])
def test_a_changed_byte_in_either_file_is_refused(chain, tmp_path, which):
    root, model = tmp_path / "device", "artifacts/model-0000-fp32.onnx"
    apply(model, root, trust=chain.public)
    patch = export_patch(chain.first, previous=chain.original, key=chain.key)["artifacts"][0]["path"]
    path = next(p for p in (root / "models").iterdir() if p.suffix == f".{which}")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    for call in (lambda: apply(patch, root), lambda: open_device(root)):
        with pytest.raises(SafetyError) as refused:
            call()
        assert refused.value.kind in ("hash_mismatch", "wrong_base")
    assert not (root / "intent.json").exists()
    export = next(p for p in (tmp_path / "copy" / "artifacts").iterdir() if p.suffix == f".{which}")
    export.write_bytes(export.read_bytes()[:-1])
    with pytest.raises(SafetyError):
        apply(model, tmp_path / "other", trust=chain.public)


@pytest.mark.parametrize("name", ["write_pieces", "write_json", "try_out"])
def test_a_kill_between_the_two_files_is_rolled_forward(chain, tmp_path, monkeypatch, name):
    root = tmp_path / "device"
    apply("artifacts/model-0000-fp32.onnx", root, trust=chain.public)
    patch = export_patch(chain.first, previous=chain.original, key=chain.key)["artifacts"][0]["path"]
    real, calls = getattr(rollforward, name), []

    class Kill(BaseException):
        pass

    def once(*args, **kwargs):
        calls.append(args)
        real(*args, **kwargs)
        raise Kill

    with monkeypatch.context() as during:
        during.setattr(rollforward, name, once)
        with pytest.raises(Kill):
            apply(patch, root)
    assert len(calls) == 1
    assert open_device(root).info.sequence == 1
    fresh = {p.name for p in (chain.first / "artifacts").iterdir() if p.suffix in (".onnx", ".data")}
    assert held(root) == sorted(fresh)
    assert not (root / "intent.json").exists()


@pytest.mark.slow
def test_an_rtx_engine_of_such_a_model_is_patched_beside_it(chain, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    build = {"trt": True, "backend": "rtx", "targets": ("sm89",), "batch": (1, 2, 4)}
    export_model(chain.original, onnx=True, precision="fp16", **build)
    made = export_patch(chain.first, previous=chain.original, key=chain.key, precision="fp16")
    assert [a["kind"] for a in made["artifacts"]] == ["patch", "onnx", "engine"]
    assert sorted(r["kind"] for r in made["artifacts"][0]["replaces"]) == ["data", "engine", "onnx"]
    root, files = tmp_path / "device", sorted(p for p in (chain.original.parent / "artifacts").glob("*fp16*.*"))
    apply([p for p in files if p.suffix in (".onnx", ".engine")], root, trust=chain.public)
    apply(made["artifacts"][0]["path"], root)
    for name in held(root):
        assert (root / "models" / name).read_bytes() == (chain.first / "artifacts" / name).read_bytes()


def test_tensors_are_read_where_they_lie(chain):
    path = chain.original.parent / "artifacts" / "model-0000-fp32.onnx"
    read = OnnxBytes.read(path)
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    beside = [name for name in read.tensors if read.tensors[name].file]
    assert beside
    for name in read.tensors:
        assert bytes(read.bytes(name)) == arrays[name].tobytes()
        place = read.tensors[name]
        if place.file:
            assert read.data[slice(*place.named)].decode() == place.file


def tricked(source, path, location):
    """A copy of a model that says its weights lie elsewhere, with a sidecar that fits."""
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save_model(model, path)
    old = read_sidecar(source)
    data = {location: next(iter(old["data_files"].values()))}
    sidecar_path(path).write_text(json.dumps({**old, "sha256": sha256(path), "data_files": data}))


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../weights.data", "below/weights.data", ".hidden.data", "", "a\\b.data"]
)
def test_weights_outside_the_folder_are_refused(chain, tmp_path, location):
    source, path = chain.original.parent / "artifacts" / "model-0000-fp32.onnx", tmp_path / "model.onnx"
    tricked(source, path, location)
    for call in (lambda: apply(path, tmp_path / "device", trust=chain.public), lambda: open_model(path, "cpu")):
        with pytest.raises((SafetyError, RequestError)) as refused:
            call()
        assert refused.value.kind in ("bad_sidecar", "bad_location"), refused.value
    sidecar_path(path).unlink()
    with pytest.raises(SafetyError) as refused:
        open_model(path, "cpu")
    assert refused.value.kind == "bad_location"


def test_links_and_files_that_the_sidecar_does_not_name_are_refused(chain, tmp_path):
    source = chain.original.parent / "artifacts" / "model-0000-fp32.onnx"
    (name,) = outside_files(source)
    copy = tmp_path / source.name
    shutil.copy(source, copy)
    (tmp_path / name).symlink_to(source.with_name(name))
    with pytest.raises(SafetyError, match="no plain file"):
        open_model(copy, "cpu")
    (tmp_path / name).unlink()
    shutil.copy(source.with_name(name), tmp_path)
    sidecar_path(copy).write_text(json.dumps({**read_sidecar(source), "data_files": {}}))
    with pytest.raises(SafetyError, match="does not name"):
        open_model(copy, "cpu")
    with pytest.raises(SafetyError, match="does not name"):
        apply(copy, tmp_path / "device", trust=chain.public)


def test_tensors_hidden_in_nodes_are_found(tmp_path):
    hidden = numpy_helper.from_array(np.ones(8, np.float32), "c")
    set_external_data(hidden, "../secret.bin", 0, 32)
    hidden.ClearField("raw_data")
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=hidden)], "inner", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert outside_files(path) == {"../secret.bin"}
    assert read_tensors(path.read_bytes()) == {}
    with pytest.raises(SafetyError, match="secret"):
        check_outside(path, None)


def field(number, value):
    """A protobuf field, below 16: of bytes, or of a number below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    size, length = len(value), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def disguised(entry):
    """An ONNX model x + w, whose w lies in w.data by a location entry as it stands in the file."""
    known = b"".join(field(13, field(1, k) + field(2, v)) for k, v in ((b"offset", b"0"), (b"length", b"16")))
    w = field(1, 4) + field(2, 1) + field(8, b"w") + entry + known + field(14, 1)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    raw = graph.SerializeToString()
    model.ClearField("graph")
    return model.SerializeToString() + field(7, raw + field(5, w))


LOCATION = field(1, b"location") + field(2, b"w.data")
DISGUISES = {
    "key": field(13, LOCATION + field(1, 1)),  # the same field again, as a number, which readers pass over
    "value": field(13, LOCATION + field(2, 1)),
    "tag": b"\xea\x80\x80\x80\x10" + field(13, LOCATION)[1:],  # 13, and a bit that readers may cut off
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_location_that_onnx_runtime_follows_is_seen(tmp_path, disguise):
    import onnxruntime

    path = tmp_path / "m.onnx"
    path.write_bytes(disguised(DISGUISES[disguise]))
    (tmp_path / "w.data").write_bytes(np.full(4, 7, np.float32).tobytes())
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": np.zeros(4, np.float32)})[0]
    assert found.tolist() == [7] * 4
    with pytest.raises((SafetyError, RequestError)) as refused:
        check_outside(path, {})
    assert refused.value.kind in ("bad_location", "bad_artifact")


def test_a_file_nested_without_end_is_refused_in_a_sentence(tmp_path):
    inner = b""
    for _ in range(1000):
        inner = field(1, field(5, field(6, inner)))  # a graph in an attribute of a node
    (tmp_path / "m.onnx").write_bytes(field(7, inner))
    with pytest.raises(RequestError) as refused:
        outside_files(tmp_path / "m.onnx")
    assert refused.value.kind == "bad_artifact"
