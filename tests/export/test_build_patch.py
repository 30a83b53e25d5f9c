"""A patch leads a device to the very bytes of a fresh export, and what cannot be proven is not patched."""

import hashlib
import importlib.util
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gsforget.errors import GateError, RequestError, SafetyError
from gsforget.export.build import export_model, export_patch
from gsforget.export.build.answers import APART
from gsforget.export.build.artifacts import open_at
from gsforget.export.build.edits import Packer, splice
from gsforget.export.device.apply import apply
from gsforget.export.device.edit import Edits
from gsforget.export.device.files import mapped
from gsforget.export.device.keys import FleetKey, new_keys, read_fleet_key, read_public_key
from gsforget.export.device.opening import noise
from gsforget.export.device.package import read_package, verify
from gsforget.export.device.trust import Trust
from gsforget.folder import sha256

FC1 = "blocks.0.mlp.fc1.weight"
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")
ENGINE = "-rtx-sm86-sm89"


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_chain):
    """An original with its fp32 ONNX file, two erasures in a row, and keys."""
    root = tmp_path_factory.mktemp("world")
    export_model(make_chain(root), onnx=True, out=root / "artifacts")
    return root


@pytest.fixture
def copied(world, copied_chain):
    """A copy of the world to change; also the current folder."""
    return copied_chain(world)


def patched(package_file, held, public, fleet: FleetKey | None = None):
    """What a device that holds these files (SHA-256 to path) makes of a package: bytes by name, after its checks."""
    package = read_package(package_file)
    manifest = verify(package, Trust().add(read_public_key(public)))
    edits, made = Edits(manifest, package.plain(fleet)), {}
    for artifact in manifest.artifacts:
        if artifact.before is None:
            made[artifact.name] = b"".join(edits.pieces(memoryview(b""), artifact))
            continue
        with mapped(held[artifact.before.sha256]) as old:
            edits.prepare(old, artifact)
            edits.check_result(old, artifact)
            made[artifact.name] = b"".join(edits.pieces(old, artifact))
    return made


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16", "bf16"])
def test_patches_in_order_give_the_bytes_of_fresh_exports(copied, tmp_path, precision):
    engine = {"trt": True, "backend": "rtx", "targets": ("sm86", "sm89"), "batch": (1, 2, 4)} if HAS_RTX else {}
    export_model(copied.original, onnx=True, precision=precision, **engine)
    ends = (".onnx", *((f"{ENGINE}.engine",) if HAS_RTX else ()))
    device = tmp_path / "device"
    apply(
        [Path("artifacts") / f"model-0000-{precision}{end}" for end in ends], device, trust=copied.public, device="cpu"
    )
    for run, before in [(copied.first, copied.original), (copied.second, copied.first)]:
        made = export_patch(run, previous=before, precision=precision, key=copied.key)
        package = made["artifacts"][0]
        assert package["kind"] == "patch"
        assert [r["patched_equals_rebuilt"] for r in package["replaces"]] == [True] * len(ends)
        apply(package["path"], device, device="cpu")
    fresh = tmp_path / "fresh"
    export_model(copied.second, onnx=True, precision=precision, out=fresh, **engine)
    names = {f"model-0002-{precision}{end}" for end in ends}
    assert {p.name for p in (device / "models").iterdir() if p.suffix != ".json"} == names
    for name in names:
        assert sha256(device / "models" / name) == sha256(fresh / name), name


def test_the_document_and_the_sidecar_of_a_patch(copied):
    told = []
    made = export_patch(copied.first, previous=copied.original, key=copied.key, expires=30, progress=told.append)
    package, artifact = made["artifacts"]
    path = copied.first / "artifacts" / "patch-0001-fp32.gsf"
    assert package["path"] == str(path)
    assert (package["bytes"], package["sha256"]) == (path.stat().st_size, sha256(path))
    assert (package["precision"], package["targets"], package["sequence"], package["requires"]) == ("fp32", [], 1, 0)
    assert artifact["kind"] == "onnx"
    assert Path(artifact["path"]).parent == path.parent, "the base of the next patch lies where it is looked for"
    assert package["replaces"][0]["ratio"] == pytest.approx(artifact["bytes"] / package["bytes"], abs=0.1)
    sidecar = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert {k: sidecar[k] for k in ("kind", "sha256", "tensors")} == {
        k: package[k] for k in ("kind", "sha256", "tensors")
    }
    assert package["tensors"] == [FC1, FC1.replace("0", "1")]
    manifest = read_package(path).manifest
    assert manifest.expires is not None
    left = manifest.expires - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    assert manifest.info.class_names == ["ant", "forgotten-1", "cat", "dog"]
    assert any("seeds" in text for text in told)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        f"{name}{end}" for name in (path.name, "model-0001-fp32.onnx") for end in ("", ".json")
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_known_answers_tell_the_new_model_from_the_old_one(copied, precision):
    if precision != "fp32":
        export_model(copied.original, onnx=True, precision=precision)
    made = export_patch(copied.first, previous=copied.original, key=copied.key, precision=precision)
    answers = read_package(Path(made["artifacts"][0]["path"])).manifest.known_answers
    old, _ = open_at(Path("artifacts") / f"model-0000-{precision}.onnx", precision, Path())
    new, _ = open_at(Path(made["artifacts"][1]["path"]), precision, Path())
    assert answers.tests
    for test in answers.tests:
        images = noise(test.seed, test.batch, (3, 16, 16))
        assert np.array_equal(
            images, np.random.default_rng(test.seed).standard_normal((test.batch, 3, 16, 16)).astype(np.float32)
        )
        wanted = np.array(test.new)
        assert np.abs(new.predict(images) - wanted).max() <= answers.tolerance / 100
        distance = np.abs(old.predict(images) - wanted).max()
        assert distance >= (APART - 0.01) * answers.tolerance
        assert distance == pytest.approx(test.old_distance, rel=1e-2)
        assert (old.predict(images).argmax(1) != wanted.argmax(1)).any(), "seeds with another first class come first"


def test_an_erasure_that_no_answer_shows_is_refused(copied, tmp_path):
    tensors = load_file(copied.first / "delta.safetensors")
    for name in list(tensors):
        if name.endswith(("::ea", "::eb")):
            tensors[name] -= 10
    rewrite(copied, tensors)
    with pytest.raises(GateError) as refused:
        export_patch(copied.first, previous=copied.original, key=copied.key)
    assert refused.value.kind == "no_known_answers"
    assert not (copied.first / "artifacts").exists() or not list((copied.first / "artifacts").iterdir())


def rewrite(copied, tensors):
    """Another delta, and the weights that it leads to."""
    from gsforget.lora.grid import merge, read_delta

    save_file(tensors, copied.first / "delta.safetensors")
    state = load_file(copied.original / "model.safetensors")
    for name, factors in read_delta(copied.first / "delta.safetensors").items():
        state[name] = merge(state[name], factors)
    save_file(state, copied.first / "model.safetensors", {"format": "pt"})


def test_the_onnx_file_before_is_made_again_where_it_is_gone(copied):
    export_model(copied.original, onnx=True, precision="fp16")
    wanted = sha256(Path("artifacts/model-0000-fp16.onnx"))
    Path("artifacts/model-0000-fp16.onnx").unlink()
    made = export_patch(copied.first, previous=copied.original, key=copied.key, precision="fp16")
    (artifact,) = read_package(Path(made["artifacts"][0]["path"])).manifest.artifacts
    assert artifact.before is not None
    assert artifact.before.sha256 == wanted
    assert not any("made again" in note for note in made["not_tested"])

    sidecar = Path("artifacts/model-0000-fp16.onnx.json")
    sidecar.write_text(sidecar.read_text().replace(wanted, "0" * 64))
    with pytest.raises(RequestError, match="another file than its sidecar describes"):
        export_patch(copied.first, previous=copied.original, key=copied.key, precision="fp16")
    sidecar.unlink()
    made = export_patch(copied.first, previous=copied.original, key=copied.key, precision="fp16")
    assert any("made again" in note and wanted[:16] in note for note in made["not_tested"])


def test_a_file_instead_of_a_folder(copied):
    shutil.move("artifacts", "elsewhere")
    given = Path("elsewhere/model-0000-fp32.onnx")
    made = export_patch(copied.first, previous=given, key=copied.key)
    assert made["artifacts"][0]["kind"] == "patch"
    with pytest.raises(RequestError) as wrong:
        export_patch(copied.first, previous=given, key=copied.key, precision="fp16")
    assert (wrong.value.kind, wrong.value.hint) == ("wrong_precision", "Type --precision fp32.")
    given.with_name(f"{given.name}.json").unlink()
    with pytest.raises(RequestError, match="no sidecar"):
        export_patch(copied.first, previous=given, key=copied.key)


def test_refusals(copied, monkeypatch):
    def refused(error, **options):
        with pytest.raises(error) as found:
            export_patch(copied.first, **{"previous": copied.original, "key": copied.key, **options})
        return found.value

    monkeypatch.setenv("XDG_CONFIG_HOME", str(copied.first.parent / "nothing"))
    monkeypatch.delenv("GSFORGET_KEY", raising=False)
    assert "gsforget keys new" in refused(RequestError, key=None).hint
    assert refused(RequestError, previous=None).kind == "no_from"
    not_parent = refused(RequestError, previous=copied.second)
    assert (not_parent.kind, not_parent.hint) == ("not_parent", f"Type --from {copied.original}.")
    assert refused(RequestError, previous=copied.first).kind == "not_parent"
    assert refused(RequestError, expires=0).kind == "bad_expires"
    assert "its scales with it" in refused(RequestError, precision="int8").message
    assert refused(RequestError, precision="fp8").kind == "bad_precision"
    assert refused(RequestError, encrypt_for=copied.public).kind == "bad_key"
    with pytest.raises(RequestError) as original:
        export_patch(copied.original, previous=copied.original, key=copied.key)
    assert original.value.kind == "not_a_run"

    file = Path("artifacts/model-0000-fp32.onnx")
    file.write_bytes(file.read_bytes() + b"\0")
    assert refused(SafetyError).kind == "hash_mismatch"
    assert not (copied.first / "artifacts").exists()


def test_tampered_and_purged_factors_are_refused(copied):
    tensors = load_file(copied.first / "delta.safetensors")
    tensors[f"{FC1}::b"][0, 0] += 1
    save_file(tensors, copied.first / "delta.safetensors")
    with pytest.raises(SafetyError) as tampered:
        export_patch(copied.first, previous=copied.original, key=copied.key)
    assert tampered.value.kind == "delta_mismatch"
    (copied.first / "delta.safetensors").unlink()
    (copied.first / "audit").mkdir()
    entry = {"path": "delta.safetensors", "sha256": "0" * 64, "bytes": 1, "why": "", "date": "2026-01-31T12:00:00Z"}
    (copied.first / "audit" / "purged.json").write_text(json.dumps({"complete": True, "removed": [entry]}))
    with pytest.raises(RequestError, match="removed by gsforget purge on 2026-01-31") as purged:
        export_patch(copied.first, previous=copied.original, key=copied.key)
    assert "--full" in purged.value.hint


def test_a_tensor_that_changed_beside_the_factors_is_refused(copied):
    state = load_file(copied.first / "model.safetensors")
    state["head.bias"][0] += 1
    save_file(state, copied.first / "model.safetensors", {"format": "pt"})
    with pytest.raises(SafetyError, match=r"head\.bias"):
        export_patch(copied.first, previous=copied.original, key=copied.key)


def test_what_cannot_be_proven_is_packed_whole(copied):
    file = Path("artifacts/model-0000-fp32.onnx")
    model = onnx.load(file)
    model.graph.node[0].doc_string = "as another version of the exporter would write it"
    onnx.save(model, file)
    sidecar = json.loads(file.with_name(f"{file.name}.json").read_text())
    file.with_name(f"{file.name}.json").write_text(json.dumps({**sidecar, "sha256": sha256(file)}))
    made = export_patch(copied.first, previous=copied.original, key=copied.key)
    package, artifact = made["artifacts"]
    assert (package["kind"], Path(package["path"]).name) == ("full", "model-0001-fp32.gsf")
    assert package["replaces"][0]["patched_equals_rebuilt"] is None
    assert any("whole file is packed" in note for note in made["not_tested"])
    results = patched(Path(package["path"]), {}, copied.public)
    assert {n: digest(c) for n, c in results.items()} == {"model-0001-fp32.onnx": artifact["sha256"]}


@needs_rtx
def test_an_engine_with_merged_tensors_is_packed_whole_beside_the_patch_of_the_onnx_file(copied, tmp_path):
    state = load_file(copied.original / "model.safetensors")
    state[FC1.replace("0", "1")] = state[FC1].clone()
    save_file(state, copied.original / "model.safetensors", {"format": "pt"})
    rewrite(copied, load_file(copied.first / "delta.safetensors"))
    request = json.loads((copied.first / "request.json").read_text())
    request["parent_sha256"] = sha256(copied.original / "model.safetensors")
    (copied.first / "request.json").write_text(json.dumps(request))
    export_model(copied.original, onnx=True, trt=True, backend="rtx", targets=("sm86",), batch=(1, 2, 4))
    made = export_patch(copied.first, previous=copied.original, key=copied.key)
    kinds = {Path(a["path"]).name: a["kind"] for a in made["artifacts"]}
    assert kinds["patch-0001-fp32.gsf"] == "patch"
    assert kinds["model-0001-fp32-rtx-sm86.gsf"] == "full"
    results = patched(Path(made["artifacts"][1]["path"]), {}, copied.public)
    engine = next(a for a in made["artifacts"] if a["kind"] == "engine")
    assert {n: digest(c) for n, c in results.items()} == {Path(engine["path"]).name: engine["sha256"]}


@given(
    st.lists(st.sampled_from(["ant", "bee", "", '"', "forgotten-1", "a,b"]), max_size=12),
    st.lists(st.sampled_from(["ant", "bee", "", '"', "forgotten-1", "a,b"]), max_size=12),
    st.binary(max_size=5),
)
def test_a_splice_leads_from_any_text_to_any_other(old, new, before):
    was, now = (",".join(words).encode() for words in (old, new))
    packer = Packer("float32")
    packer.give(b"other")
    made, position, data = b"", 0, before + was + b"after"
    for edit in splice(was, now, len(before), packer):
        start, size = edit.give
        made += data[position : edit.at] + bytes(packer.payload[start : start + size])
        position = edit.at + edit.take
    assert made + data[position:] == before + now + b"after"


def test_of_many_class_names_only_the_changed_one_travels():
    names = [f"class {i}" for i in range(1000)]
    was = json.dumps({"class_names": names, "sequence": 0}).encode()
    now = json.dumps({"class_names": [*names[:7], "forgotten-7", *names[8:]], "sequence": 1}).encode()
    packer = Packer("float32")
    splice(was, now, 0, packer)
    assert len(packer.payload) < 60


def test_a_payload_for_a_fleet(copied, tmp_path):
    private, public = new_keys(tmp_path / "fleet", fleet=True)
    made = export_patch(copied.first, previous=copied.original, key=copied.key, encrypt_for=public)
    package = Path(made["artifacts"][0]["path"])
    assert made["artifacts"][0]["encrypted_for"] == read_fleet_key(private).public.key_id
    held = {sha256(path): path for path in Path("artifacts").glob("*.onnx")}
    results = patched(package, held, copied.public, read_fleet_key(private))
    assert digest(results["model-0001-fp32.onnx"]) == made["artifacts"][1]["sha256"]
    factors = load_file(copied.first / "delta.safetensors")[f"{FC1}::b"].numpy().tobytes()
    assert factors not in package.read_bytes()


def test_a_full_package_holds_the_model_and_its_engines(copied):
    made = export_patch(copied.first, full=True, key=copied.key, precision="fp16")
    package, artifact = made["artifacts"]
    results = patched(Path(package["path"]), {}, copied.public)
    assert {n: digest(c) for n, c in results.items()} == {"model-0001-fp16.onnx": artifact["sha256"]}
    manifest = read_package(Path(package["path"])).manifest
    assert (manifest.kind, manifest.requires, manifest.sequence) == ("full", None, 1)
    assert len(manifest.known_answers.tests) == 2


def test_a_patch_names_no_erased_class_and_no_place(copied):
    made = export_patch(copied.first, previous=copied.original, key=copied.key)
    written = read_package(Path(made["artifacts"][0]["path"])).signed
    assert b'"bee"' not in written
    assert str(copied.first.parent).encode() not in written


def test_the_head_stays_as_it_was(copied):
    assert torch.equal(
        load_file(copied.first / "model.safetensors")["head.weight"],
        load_file(copied.original / "model.safetensors")["head.weight"],
    )
