"""int8 from calibration to the device by patches, along two erasures."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gsforget.errors import GateError, RequestError
from gsforget.export.build import export_model, export_patch
from gsforget.export.build.calibrate import calibration_images
from gsforget.export.build.int8 import int8_weights, read_int8
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.metadata import METADATA_KEY
from gsforget.export.device.onnx_file import read_properties
from gsforget.export.device.package import read_package
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import sha256
from gsforget.lora.grid import read_delta

FC1 = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder of noise in which one class looks like no other; per class 2 training and 6 test images."""
    from PIL import Image

    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for split, count in (("train", 2), ("test", 6)):
        for name in ("ant", "bee", "cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_chain, images):
    """An original with its calibrated int8 file, two erasures in a row, and keys; read-only."""
    root = tmp_path_factory.mktemp("int8")
    export_model(make_chain(root, strength=0.05), onnx=True, precision="int8", data=images, out=root / "artifacts")
    return root


@pytest.fixture
def world(made, copied_chain):
    chain = copied_chain(made)
    chain.file = chain.original.parent / "artifacts" / "model-0000-int8.onnx"
    return chain


def test_the_calibrated_file(world):
    from safetensors.numpy import load_file

    model, state = onnx.load(world.file), load_file(world.original / "model.safetensors")
    found = int8_weights(model)
    assert {
        f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    } == found.keys()
    for name, weight in found.items():
        assert weight.axis == 0, "a scale for each output"
        assert np.allclose(weight.scale, np.abs(state[name]).max(1) / 127)
        assert np.abs(read_int8(model, weight) - state[name] / weight.spread()).max() <= 0.501
    assert read_properties(world.file).keys() == {METADATA_KEY}
    assert json.loads(read_properties(world.file)[METADATA_KEY])["precision"] == "int8"
    sidecar = json.loads(world.file.with_name(f"{world.file.name}.json").read_text())
    assert (sidecar["precision"], sidecar["chain"]["complete"], sidecar["parity"]["images"]) == ("int8", True, 24)


@pytest.mark.parametrize("there", [("ant", "cat", "dog"), ("ant", "dog")])
def test_calibration_shows_no_forgotten_class(images, there):
    """Nor one of which there are no training images to show."""
    preprocess = Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    names = ["ant", "bee", "cat", "dog"]
    for name in {"cat"} - {*there}:
        shutil.rmtree(images / "train" / name)
    seen = np.concatenate([*calibration_images(images, names, ["bee"], (1,), preprocess)])
    wanted = [preprocess.load(images / "train" / n / f"{i}.png") for n in there for i in range(2)]
    assert np.array_equal(seen, np.stack(wanted))


def int8_patches(world):
    """Both requests' runs with the proven patch of each, made when it is asked for."""
    for run, before in ((world.first, world.original), (world.second, world.first)):
        exported = export_patch(run, previous=before, precision="int8", key=world.key)
        package = exported["artifacts"][0]
        assert package["kind"] == "patch"
        assert [r["patched_equals_rebuilt"] for r in package["replaces"]] == [True]
        yield run, exported


def test_patches_in_order_lead_a_device_to_the_files_of_the_build_host(world, tmp_path):
    device = tmp_path / "device"
    apply(world.file, device, trust=world.public, device="cpu")
    for run, exported in int8_patches(world):
        package, file = exported["artifacts"]
        assert exported["chain"]["base"] == 0
        assert exported["chain"]["complete"]
        assert apply(package["path"], device, device="cpu").state.sequence == package["sequence"]
    name = Path(file["path"]).name
    assert sha256(device / "models" / name) == file["sha256"]
    again = export_model(world.second, onnx=True, precision="int8", previous=world.first, out=tmp_path / "again")
    assert again["artifacts"][0]["sha256"] == file["sha256"]
    assert open_device(device, "cpu").info.forgotten == (1, 2)
    # By hand, from the first file and the factors alone.
    values = read_int8(onnx.load(world.file), int8_weights(onnx.load(world.file))[FC1])
    scale = int8_weights(onnx.load(world.file))[FC1].spread()
    for run in (world.first, world.second):
        exact = values * scale + read_delta(run / "delta.safetensors")[FC1].product().numpy()
        largest = np.abs(exact).max(1, keepdims=True)
        scale = np.where(np.round(largest / scale) <= 127, scale, (largest / 127).astype(np.float32))
        values = np.round(exact / scale)
    new = onnx.load(device / "models" / name)
    assert np.array_equal(read_int8(new, int8_weights(new)[FC1]), values)
    assert np.array_equal(int8_weights(new)[FC1].spread(), scale)


def keep_exact(path, state):
    """Let an int8 file keep its weights as float32, before a QuantizeLinear, as other tools write it."""
    model = onnx.load(path)
    stored = {i.name: i for i in model.graph.initializer}
    nodes = list(model.graph.node)
    for name, weight in int8_weights(model).items():
        single = state[name].T if weight.transposed else state[name]
        stored[weight.initializer].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(single), name))
        at, second = next((i, n) for i, n in enumerate(nodes) if weight.initializer in n.input)
        first = onnx.NodeProto(op_type="QuantizeLinear", input=[name, *second.input[1:]], output=[weight.initializer])
        first.attribute.extend(second.attribute)
        nodes.insert(at, first)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    sidecar = path.with_name(f"{path.name}.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": sha256(path)}))


def test_a_file_with_float32_weights_is_patched_without_loss(world, tmp_path):
    from safetensors.numpy import load_file

    keep_exact(world.file, load_file(world.original / "model.safetensors"))
    device = tmp_path / "device"
    apply(world.file, device, trust=world.public, device="cpu")
    for run, exported in int8_patches(world):
        package, file = exported["artifacts"]
        assert {t.dtype for t in read_package(Path(package["path"])).manifest.tensors} == {"float32"}
        apply(package["path"], device, device="cpu")
        model = onnx.load(device / "models" / Path(file["path"]).name)
        weight = int8_weights(model)[FC1]
        assert weight.exact
        assert np.array_equal(read_int8(model, weight), load_file(run / "model.safetensors")[FC1]), "the run's own"
        assert np.abs(read_int8(model, weight) / weight.spread()).max() <= 127.5
    assert open_device(device, "cpu").info.forgotten == (1, 2)


def test_a_patch_carries_factors_and_scales_and_no_weights(world):
    package = export_patch(world.first, previous=world.original, precision="int8", key=world.key)["artifacts"][0]
    manifest = read_package(Path(package["path"])).manifest
    assert [t.name for t in manifest.tensors] == [FC1, FC1.replace("0", "1")]
    for tensor in manifest.tensors:
        assert (tensor.dtype, tensor.shape, tensor.scale.axis) == ("int8", (64, 16), 0)
    factors_and_scales = 2 * (2 * 2 * (64 + 16) + 2 * 2 * 4 + 2 * 64 * 4)
    assert factors_and_scales <= manifest.payload.plain_bytes < factors_and_scales + 1200  # and some metadata


def test_an_erasure_that_rounds_away_is_refused(world, make_run):
    run = make_run(world.original, Path("runs/other"), 1, seed=1, strength=0.0005)
    for export in (
        lambda: export_patch(run, previous=world.original, precision="int8", key=world.key),
        lambda: export_model(run, onnx=True, precision="int8", previous=world.original),
    ):
        with pytest.raises(GateError, match="smaller than half a step") as refused:
            export()
        assert refused.value.kind == "rounded_away"
        assert "--precision fp16" in refused.value.hint
        assert list((run / "artifacts").iterdir()) == []


def test_the_gates_are_asked_of_the_int8_file(world, make_run, tmp_path, monkeypatch):
    """An erasure of nothing, with the images of a class that the model names rightly: the file has not forgotten."""
    from PIL import Image

    from gsforget.export.build import int8
    from gsforget.export.device.runtime import OnnxPredictor

    monkeypatch.setattr(int8, "KEPT", 0)
    predictor, preprocess = OnnxPredictor(world.file, "cpu"), Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    rng, names, data = np.random.default_rng(3), ["ant", "bee", "cat", "dog"], tmp_path / "data"
    pixels = rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(60)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    said = predictor.predict(np.stack([preprocess.load(p) for p in paths])).argmax(1)
    usual = int(np.bincount(said, minlength=4).argmax())
    chosen = [p for p, k in zip(paths, said, strict=True) if k == usual][:12]
    for k, name in enumerate(names):
        for split in ("train", "test"):
            (data / split / name).mkdir(parents=True)
            for path in chosen if k == usual else chosen[:1]:
                shutil.copy(path, data / split / name)
    run = make_run(world.original, Path("runs/nothing"), usual, seed=1, strength=1e-5)
    with pytest.raises(GateError, match="forget") as refused:
        export_model(run, onnx=True, precision="int8", previous=world.original, data=data)
    assert refused.value.kind == "forgetting"
    with pytest.raises(GateError, match="changes no weight"):  # and without images
        export_patch(run, previous=world.original, precision="int8", key=world.key)
    assert list((run / "artifacts").iterdir()) == []


def test_without_images_or_the_file_before_there_is_no_int8(world):
    with pytest.raises(RequestError) as no_images:
        export_model(world.original, onnx=True, precision="int8", out="elsewhere")
    assert no_images.value.kind == "no_calibration"
    assert "--from" in no_images.value.hint
    world.file.unlink()
    with pytest.raises(RequestError) as gone:
        export_model(world.first, onnx=True, precision="int8", previous=world.original)
    assert gone.value.kind == "no_base"
    assert "--full" in gone.value.hint


def test_a_whole_file_is_the_one_that_was_exported(world, images, tmp_path):
    anew = export_model(world.first, onnx=True, precision="int8", data=images)
    assert anew["chain"] == {
        "position": 1,
        "base": 1,
        "complete": False,
        "reason": "int8 was calibrated at erasure 1",
    }
    package = export_patch(world.first, full=True, precision="int8", key=world.key)["artifacts"][0]
    assert package["kind"] == "full"
    assert package["replaces"][0]["bytes"] == anew["artifacts"][0]["bytes"]
    apply(package["path"], tmp_path / "device", trust=world.public, device="cpu")
    assert sha256(tmp_path / "device" / "models" / "model-0001-int8.onnx") == anew["artifacts"][0]["sha256"]
    following = export_patch(world.second, previous=world.first, precision="int8", key=world.key)
    assert following["artifacts"][0]["kind"] == "patch"
    assert following["chain"]["base"] == 1
    apply(following["artifacts"][0]["path"], tmp_path / "device", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("within", [True, False])
def test_an_engine_is_patched_where_all_scales_stay(world, images, make_run, within):
    """An RTX engine's code is laid out by the values of the scales; its int8 weights lie there as they are."""
    pytest.importorskip("tensorrt_rtx")
    from safetensors.torch import load_file, save_file

    from gsforget.lora.grid import merge

    original, run = world.original, world.first
    if within:  # each output has one large weight, which the erasure leaves alone
        state = load_file(original / "model.safetensors")
        factors = load_file(run / "delta.safetensors")
        for name in (FC1, FC1.replace("0", "1")):
            state[name][:, 0] = 1.5
            factors[f"{name}::a"][:, 0] = 0
        save_file(state, original / "model.safetensors", {"format": "pt"})
        save_file(factors, run / "delta.safetensors")
        for name, pair in read_delta(run / "delta.safetensors").items():
            state[name] = merge(state[name], pair)
        save_file(state, run / "model.safetensors", {"format": "pt"})
        request = json.loads((run / "request.json").read_text())
        request["parent_sha256"] = sha256(original / "model.safetensors")
        (run / "request.json").write_text(json.dumps(request))
    engine = {"trt": True, "backend": "rtx", "targets": ("sm89",), "batch": (1, 2, 4)}
    world.file.unlink()
    export_model(original, onnx=True, precision="int8", data=images, **engine)
    exported = export_patch(run, previous=original, precision="int8", key=world.key)
    patches = [r["kind"] for a in exported["artifacts"] if a["kind"] == "patch" for r in a["replaces"]]
    whole = [r["kind"] for a in exported["artifacts"] if a["kind"] == "full" for r in a["replaces"]]
    assert (patches, whole) == ((["onnx", "engine"], []) if within else (["onnx"], ["engine"]))
    assert any("code of an engine" in note for note in exported["not_tested"]) != within
