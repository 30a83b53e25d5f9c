"""Forget a kind with a trained tiny detector, forget another one, export, infer: what is promised holds at each step."""

import numpy as np
import pytest
import torch
from PIL import Image

import gsforget
from gsforget.folder import load_model, read_config
from gsforget.settings import Settings

pytestmark = pytest.mark.slow  # a minute and a half: the detector is trained, two kinds forgotten


SETTINGS = Settings(batch_size=32, rank=8)


@pytest.fixture(scope="module")
def deep(trained, squares, tmp_path_factory):
    """One request by the default method, which takes the kind from the queries as well."""
    return gsforget.forget(
        trained, squares, ["red"], task="detect", runs=tmp_path_factory.mktemp("deep"), settings=SETTINGS
    )


def test_the_default_method_goes_deeper_and_keeps_the_others(deep):
    """A detector of eight queries ranks them all, so that a few percent of AP50 are chance."""
    m = deep.document["metrics"]
    assert deep.passed, (m, deep.document["gates"])
    assert deep.metrics["chosen"]["depth"] >= 1
    assert m["forget_ap50_before"] > 30
    assert m["forget_ap50_after"] <= 5
    assert m["retain_ap_before"] - m["retain_ap_after"] <= 1.5
    assert deep.document["detection"]["detections"]["of_forgotten_kinds"]["after"] == 0


@pytest.fixture(scope="module")
def chain(trained, squares, tmp_path_factory):
    """Two requests in a row, of which the answers are forgotten."""
    runs = tmp_path_factory.mktemp("runs")
    options = {"runs": runs, "settings": SETTINGS, "method": "gs-lora"}
    first = gsforget.forget(trained, squares, ["red"], task="detect", **options)
    second = gsforget.forget(first.folder, squares, ["blue"], **options) if first.folder else None
    return first, second


def test_the_kinds_are_gone_and_the_others_stay(chain):
    second = chain[1]
    for outcome in chain:
        m = outcome.document["metrics"]
        assert outcome.passed, (m, outcome.document["gates"])
        assert m["forget_ap50_before"] > 30
        assert m["forget_ap50_after"] <= 1
        assert m["retain_ap_before"] - m["retain_ap_after"] <= 1.5
    assert second.document["metrics"]["old_ap50_after"] <= 1
    assert [c["role"] for c in second.metrics["classes"]] == ["old", "retain", "forget", "retain"]


def test_heads_and_groups_that_died_stay_bit_identical(chain, trained):
    first, _ = chain
    before, after = load_model(trained)[0].state_dict(), load_model(first.folder)[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(first.document["changed_tensors"])
    assert changed
    assert all(".mlp.fc" in name and ("encoder" in name or "decoder" in name) for name in changed)


def test_the_documents_say_what_was_measured(chain):
    first, second = chain
    d = first.document
    assert d["task"] == "detect"
    assert d["metrics"]["forget_acc_after"] == d["metrics"]["forget_ap50_after"]
    assert {g["name"] for g in d["gates"]} == {"forget_ap50", "retain_ap_drop", "class_ap_drop"}
    assert "old_ap50" in {g["name"] for g in second.document["gates"]}
    assert d["detection"]["detections"]["of_forgotten_kinds"]["after"] == 0
    assert any("--tier standard" in note for note in d["not_tested"])
    assert d["audit"]["linear_probe"] is None
    assert read_config(second.folder).forgotten == (0, 2)
    assert read_config(second.folder).class_names == ["forgotten-0", "green", "forgotten-2", "white"]


def test_an_audit_shows_ap_per_kind_and_boxes_and_no_erased_name(chain, squares, tmp_path):
    _, second = chain
    document = gsforget.audit_model(second.folder, squares, with_images=True, out=tmp_path)
    checks = {c["name"]: c["verdict"] for c in document["checks"]}
    assert document["verdict"] == "pass"
    assert checks == dict.fromkeys(("forget_ap50", "retain_ap_drop", "class_ap_drop", "old_ap50"), "pass")
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "audit.json").read_text()
    for name in ("red", "blue"):
        assert f">{name}<" not in page
        assert f'"{name}"' not in text
    for part in ("What is still found", "forgotten-0", "forgotten-2", "green", "AP50, before", "data:image/png;base64"):
        assert part in page


def test_probes_and_relearning_stand_beside_a_detector_that_never_saw_the_kind(deep, squares, never_seen, tmp_path):
    options = {"tier": "full", "reference": never_seen, "out": tmp_path}
    document = gsforget.audit_model(deep.folder, squares, **options)
    checks = {c["name"]: c for c in document["checks"]}
    for name in ("prototype_attack", "five_shot"):
        assert all(0 <= checks[name][who] <= 100 for who in ("value", "original", "reference")), checks[name]
    assert document["details"]["linear_probe"]["original"] > 50
    assert checks["linear_probe_excess"]["says"].count("objects") == 1
    relearning = document["details"]["relearning"]
    assert relearning["full"]["original"][0] > 30
    assert relearning["full_own_head"]["subject"][0] < 5
    assert max(v for v in relearning["full_own_head"]["subject"] if v is not None) > 20
    assert checks["relearn_full"]["original"] == 0
    assert document["reference"] == {"kind": "model", "path": str(never_seen)}
    assert document["sha256"]["reference"]
    page = (tmp_path / "report.html").read_text()
    assert "Relearning with all weights" in page
    assert not any(
        "relearning" in note or ("probe" in note and "layers" not in note) for note in document["not_tested"]
    )


def test_the_exported_file_and_infer(chain, squares, tmp_path):
    from gsforget.export.device.detect import detect
    from gsforget.export.device.runtime import open_model

    _, second = chain
    made = gsforget.export_model(second.folder, onnx=True, data=squares, out=tmp_path)
    artifact = made["artifacts"][0]
    assert artifact["parity"]["forget_acc"] <= 1
    assert artifact["parity"]["max_abs_diff"] < 1e-3
    model = open_model(artifact["path"])
    paths = sorted((squares / "test").glob("*.png"))[:12]
    info = model.info
    audited = gsforget.audit_model(artifact["path"], squares, original=second.folder, out=tmp_path / "audit")
    assert (audited["kind"], audited["verdict"]) == ("onnx", "pass")
    assert {c["name"] for c in audited["checks"]} == {"forget_ap50", "retain_ap_drop", "class_ap_drop"}
    assert (tmp_path / "audit" / "audit.json").is_file()
    for least in (0.0, 0.3):
        found = detect(model, info.preprocess, info.forgotten, info.class_names, paths, least, draw=tmp_path / "drawn")
        kinds = {e["class"] for image in found["images"] for e in image["detections"]}
        assert kinds <= {"green", "white"}
        assert kinds
    with Image.open(found["images"][0]["drawn"]) as drawn:
        assert drawn.size == (256, 256)
    given = model.outputs(np.stack([info.preprocess.load(p) for p in paths]))
    assert given["boxes"].shape == (12, 8, 4)
    assert (np.diff(given["scores"], axis=1) <= 0).all()
    assert not np.isin(given["labels"][given["scores"] > 0.3], info.forgotten).any()


def test_halves_are_rounded_from_the_original_in_its_own_folder(chain, squares, tmp_path):
    """Its file has other names than the model in memory, under which erasures are noted."""
    first, _ = chain
    made = gsforget.export_model(first.folder, onnx=True, precision="fp16", data=squares, out=tmp_path)
    assert made["artifacts"][0]["parity"]["forget_acc"] <= 1
    assert made["chain"]["complete"]


def test_a_patch_carries_the_second_erasure_to_a_device(chain, squares, tmp_path):
    from gsforget.export.build import export_patch
    from gsforget.export.device.apply import apply, open_device
    from gsforget.export.device.detect import detect
    from gsforget.export.device.keys import new_keys
    from gsforget.folder import sha256

    first, second = chain
    new_keys(tmp_path / "keys")
    whole = gsforget.export_model(first.folder, onnx=True, data=squares, out=tmp_path / "first")["artifacts"][0]
    made = export_patch(
        second.folder,
        previous=first.folder,
        data=squares,
        out=tmp_path / "patch",
        key=tmp_path / "keys" / "signing.key",
    )
    patch = next(a for a in made["artifacts"] if a["kind"] == "patch")
    device, public = tmp_path / "device", tmp_path / "keys" / "signing.pub.json"
    apply([whole["path"]], device, trust=public, device="cpu")
    apply([patch["path"]], device, trust=public, device="cpu")
    fresh = gsforget.export_model(second.folder, onnx=True, data=squares, out=tmp_path / "fresh")["artifacts"][0]
    model = open_device(device, "cpu")
    assert sha256(model.path) == fresh["sha256"]
    info = model.info
    paths = sorted((squares / "test").glob("*.png"))[:8]
    found = detect(model, info.preprocess, info.forgotten, info.class_names, paths, 0.0)
    assert {e["class"] for image in found["images"] for e in image["detections"]} == {"green", "white"}
