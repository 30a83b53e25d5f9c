"""Engines of standard TensorRT on a device follow their ONNX file: refitted, else built again, else destroyed; the engine
before never answers, and what gives other answers than the package says is not kept."""

import json
import shutil
import sys

import device_tensorrt_double as double
import numpy as np
import onnx
import pytest

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import builder, follow, rollforward, targets, trt_run
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.engine import export_file
from gsforget.export.device.files import sha256
from gsforget.export.device.metadata import read_sidecar

LAYERS = ["fc1.weight", "fc2.weight"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(gpu): a device with the double of TensorRT, and that GPU or none; returns the double and its CUDA driver."""
    trt, cuda = double.TensorRT(), double.Cuda()

    def set_up(gpu=double.GPU):
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for room in (targets, builder):
            monkeypatch.setattr(room, "own_gpu", lambda: gpu)
        monkeypatch.setattr(targets, "_installed", lambda backend: backend == "trt")
        monkeypatch.setattr(trt_run, "cuda_driver", lambda: cuda)
        return trt, cuda

    return set_up


@pytest.fixture(params=["fp32", "fp16"])
def world(make_world, tmp_path, request):
    made = make_world(tmp_path / "world", request.param)
    made.erase(), made.erase()
    return made


@pytest.fixture
def device(world, machine, tmp_path):
    """A device that has built an engine from its ONNX file, and installed both."""
    machine()
    made = export_file(world.artifact(0), trt=True, backend="trt", out=tmp_path / "built")
    root = tmp_path / "device"
    apply([world.artifact(0), made["artifacts"][0]["path"]], root, trust=world.public)
    return root


def engine_of(root, sequence, world):
    return root / "models" / f"model-{sequence:04d}-{world.precision}-trt-sm90.engine"


def weights_of(path):
    model = double.Engine.load(None, path.read_bytes()).model
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def expected(world, sequence):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(world.artifact(sequence)).graph.initializer}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def check(root, world, sequence):
    """The device holds the ONNX file and its engine, both of a sequence, and nothing else."""
    onnx_file, engine = root / "models" / world.artifact(sequence).name, engine_of(root, sequence, world)
    assert {p.name for p in (root / "models").iterdir()} == {
        name for p in (onnx_file, engine) for name in (p.name, f"{p.name}.json")
    }
    assert same(weights_of(engine), expected(world, sequence))
    sidecar = read_sidecar(engine)
    assert (sidecar["sha256"], sidecar["onnx_sha256"]) == (sha256(engine), sha256(onnx_file))
    assert sidecar["model"]["sequence"] == sequence
    assert open_device(root, "cpu").info.sequence == sequence


def test_two_erasures_by_refit_of_exactly_the_changed_tensors(device, world, machine):
    trt, cuda = machine()
    for sequence in (1, 2):
        done = apply(world.patch(sequence), device)
        check(device, world, sequence)
        assert engine_of(device, sequence, world).name in done.loaded.answered, (
            "the engine itself gave the known answers"
        )
        assert done.loaded.not_tested == []
        assert sorted(done.removed) == sorted(
            [world.artifact(sequence - 1).name, engine_of(device, sequence - 1, world).name]
        )
    assert trt.refits == [LAYERS, LAYERS]
    assert (trt.builds, cuda.held) == (1, {}), "nothing was built but the first engine, and all memory is given back"


def test_a_tensor_that_does_not_change_is_not_touched(world):
    changed, kind = follow.changed_tensors(world.artifact(0), world.artifact(1), world.precision)
    assert (sorted(changed), kind) == (LAYERS, world.dtype)
    one = onnx.load(world.artifact(1))
    one.graph.initializer[1].CopyFrom(onnx.load(world.artifact(0)).graph.initializer[1])
    onnx.save(one, world.root / "half.onnx")
    assert list(follow.changed_tensors(world.artifact(0), world.root / "half.onnx", world.precision)[0]) == LAYERS[:1]
    del one.graph.initializer[1]
    onnx.save(one, world.root / "less.onnx")
    with pytest.raises(ValueError, match="other tensors"):
        follow.changed_tensors(world.artifact(0), world.root / "less.onnx", world.precision)


@pytest.mark.parametrize("fault", ["refit", "crash", "stale", "serialise"])
def test_a_refit_that_went_wrong_is_thrown_away_and_the_engine_is_built_again(device, world, machine, fault):
    trt, cuda = machine()
    trt.faults = {fault}
    done = apply(world.patch(1), device)
    check(device, world, 1)
    assert (len(trt.refits), trt.builds, cuda.held) == (1, 2, {})
    assert read_sidecar(engine_of(device, 1, world))["made"] == "built again"
    assert done.loaded.not_tested == []


def test_where_weights_may_not_be_replaced_the_engine_is_built_again(device, world, machine):
    trt, _ = machine()
    engine = engine_of(device, 0, world)
    sidecar = read_sidecar(engine)
    assert sidecar["refittable"] == LAYERS
    changed = {**sidecar, "refittable": LAYERS[:1]}
    root = device.parent / "other"
    built = device.parent / "built" / engine.name
    built.with_name(f"{built.name}.json").write_text(json.dumps(changed))
    apply([world.artifact(0), built], root, trust=world.public)
    apply(world.patch(1), root)
    check(root, world, 1)
    assert (trt.refits, trt.builds) == ([], 2)


@pytest.mark.parametrize(
    ("faults", "gpu", "said"),
    [
        ({"refit", "build"}, double.GPU, "out of memory"),
        ({"stale", "build"}, double.GPU, "answers a known test otherwise"),
        (set(), None, "this machine has no GPU"),
        (set(), double.Gpu("another", "sm87"), "the GPU here is sm87"),
    ],
)
def test_an_engine_that_cannot_follow_is_destroyed_and_the_onnx_file_answers(device, world, machine, faults, gpu, said):
    trt, _ = machine(gpu)
    trt.faults = faults
    done = apply(world.patch(1), device)
    assert [p.suffix for p in (device / "models").iterdir() if p.suffix != ".json"] == [".onnx"]
    (note,) = done.loaded.not_tested
    assert said in note
    assert engine_of(device, 1, world).name in note
    assert engine_of(device, 0, world).name in done.removed
    assert open_device(device, "cpu").info.sequence == 1
    apply(world.patch(2), device)
    assert open_device(device, "cpu").info.sequence == 2


def test_a_new_engine_that_cannot_be_asked_is_kept_where_it_was_built_and_not_where_it_was_refitted(
    device, world, machine
):
    trt, cuda = machine()
    trt.faults = {"run"}
    done = apply(world.patch(1), device)
    check(device, world, 1)
    assert (len(trt.refits), trt.builds, cuda.held) == (1, 2, {})
    (note,) = done.loaded.not_tested
    assert "TensorRT could not run" in note


def test_an_engine_built_from_a_device_s_own_file_can_be_refitted(device, world, machine, tmp_path):
    trt, _ = machine(None)
    apply(world.patch(1), device)  # without its GPU, the engine is destroyed
    trt, _ = machine()
    onnx_file = device / "models" / world.artifact(1).name
    made = export_file(onnx_file, trt=True, backend="trt", out=tmp_path / "again")["artifacts"][0]["path"]
    apply([onnx_file, made], tmp_path / "second", trust=world.public)
    apply(world.patch(2), tmp_path / "second")
    check(tmp_path / "second", world, 2)
    assert trt.refits == [LAYERS]


def test_an_engine_is_built_from_an_onnx_file_that_comes_whole(device, world, machine):
    trt, _ = machine()
    done = apply(world.full(2), device)
    check(device, world, 2)
    assert (trt.refits, trt.builds) == ([], 2)
    assert engine_of(device, 2, world).name in done.loaded.answered


def test_a_kill_at_any_step_of_an_engine_never_brings_the_old_model_back(device, world, machine, monkeypatch, tmp_path):
    """The process ends before a refit, in it, after it, before and after the ledger's line."""
    trt, _ = machine()
    trt.faults = {"stale"}
    patch = world.patch(1)

    class Kill(BaseException):
        pass

    from gsforget.export.device.store import DeviceFolder

    places = [
        (double.Refitter, "set_named_weights"),
        (double.Refitter, "refit_cuda_engine"),
        (follow, "write_file"),
        (follow, "ask"),
        (double.Builder, "build_serialized_network"),
        (follow, "write_json"),
        (rollforward, "make_engine"),
        (DeviceFolder, "append"),
        (DeviceFolder, "write_state"),
        (DeviceFolder, "clean"),
    ]
    for number, (where, name) in enumerate(places):
        for after in (False, True):
            root = tmp_path / f"{number}-{after}"
            shutil.copytree(device, root)
            real = getattr(where, name)

            def killed(*args, real=real, after=after, **kwargs):
                if after:
                    real(*args, **kwargs)
                raise Kill

            with monkeypatch.context() as during:
                during.setattr(where, name, killed)
                with pytest.raises(Kill):
                    apply(patch, root)
            assert (root / "intent.json").exists()
            assert open_device(root, "cpu").info.sequence == 1, (name, after)
            check(root, world, 1)
            assert not (root / "intent.json").exists()


def test_an_engine_without_its_onnx_file_is_not_installed(world, machine, tmp_path):
    machine()
    made = export_file(world.artifact(0), trt=True, backend="trt", out=tmp_path / "built")
    with pytest.raises(RequestError) as refused:
        apply(made["artifacts"][0]["path"], tmp_path / "device", trust=world.public)
    assert refused.value.kind == "no_onnx"
    with pytest.raises(RequestError) as refused:  # of another model
        apply([world.artifact(1), made["artifacts"][0]["path"]], tmp_path / "device", trust=world.public)
    assert refused.value.kind == "mixed_artifacts"


def test_a_sidecar_that_was_changed_afterwards_makes_no_engine_follow(device, world, machine):
    engine = engine_of(device, 0, world)
    path = engine.with_name(f"{engine.name}.json")
    path.write_text(json.dumps({**read_sidecar(engine), "refittable": []}))
    with pytest.raises(SafetyError) as refused:
        apply(world.patch(1), device)
    assert refused.value.kind == "hash_mismatch"
    assert not (device / "intent.json").exists()


def test_an_engine_whose_bytes_are_others_is_never_opened(device, world, machine, monkeypatch, tmp_path):
    trt, _ = machine()
    begun = tmp_path / "begun"
    shutil.copytree(device, begun)
    monkeypatch.setattr(rollforward, "make_engine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(world.patch(1), begun)
    monkeypatch.undo(), machine()
    for root in (device, begun):
        engine = engine_of(root, 0, world)
        raw = engine.read_bytes()
        engine.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert open_device(begun, "cpu").info.sequence == 1
    assert [p.suffix for p in (begun / "models").iterdir() if p.suffix != ".json"] == [".onnx"]
    with pytest.raises(SafetyError) as refused:
        apply(world.patch(1), device)
    assert refused.value.kind == "hash_mismatch"
    assert not (device / "intent.json").exists()
    assert (trt.refits, trt.builds) == ([], 1)


def test_two_engines_that_were_renamed_both_follow(world, machine, tmp_path):
    trt, _ = machine()
    made = export_file(world.artifact(0), trt=True, backend="trt", out=tmp_path / "built")["artifacts"][0]["path"]
    engines = [tmp_path / "mine.engine", tmp_path / "yours.engine"]
    for path in engines:
        shutil.copy(made, path)
        shutil.copy(f"{made}.json", f"{path}.json")
    apply([world.artifact(0), *engines], tmp_path / "device", trust=world.public)
    for sequence in (1, 2):
        apply(world.patch(sequence), tmp_path / "device")
        found = sorted((tmp_path / "device" / "models").glob("*.engine"))
        start = f"model-{sequence:04d}-{world.precision}-trt"
        assert [p.name for p in found] == [f"{start}-2.engine", f"{start}.engine"]
        assert all(same(weights_of(p), expected(world, sequence)) for p in found)
    assert (trt.builds, len(trt.refits)) == (1, 4)


@pytest.mark.parametrize(
    ("engine", "before", "after", "name"),
    [
        (
            "model-0001-fp16-trt-sm90.engine",
            "model-0001-fp16.onnx",
            "model-0002-fp16.onnx",
            "model-0002-fp16-trt-sm90.engine",
        ),
        ("mine.engine", "model-0001-fp16.onnx", "model-0002-fp16.onnx", "model-0002-fp16-trt.engine"),
        ("model-0001-fp16.engine", "model-0001-fp16.onnx", "model-0002-fp16.onnx", "model-0002-fp16-trt.engine"),
    ],
)
def test_an_engine_keeps_its_label(engine, before, after, name):
    assert follow.next_name(engine, before, after) == name
