"""Purging removes exactly what turns an erasure back, notes it so that the ledger still verifies, and can be resumed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from gsforget import ledger, purge
from gsforget.canonical import canonical
from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.folder import WEIGHTS, read_config, sha256
from gsforget.lineage import ancestors
from gsforget.purged import PURGED, find_purged, read_purged
from gsforget.runs import newest_run

DELTA = "delta.safetensors"


def write_artifact(run: Path, name: str, source: str | None, kind: str = "onnx") -> Path:
    path = run / "artifacts" / name
    path.write_bytes(name.encode())
    sidecar = {"kind": kind, "file": name, "sha256": sha256(path), "source_sha256": source}
    path.with_name(f"{name}.json").write_text(json.dumps(sidecar))
    return path


def carry_out(run: Path, chain: bool = False) -> purge.Plan:
    made = purge.plan(run, chain)
    purge.purge(made)
    return made


def names(made: purge.Plan) -> set[str]:
    return {f"{item.run.name}/{item.name}" for item in made.items}


def test_factors_go_and_the_run_still_verifies(runs):
    _, first, second = runs
    digest = sha256(second / DELTA)
    made = carry_out(second)
    assert names(made) == {"forget-0002/delta.safetensors"}
    assert not (second / DELTA).exists()
    assert (first / DELTA).exists()
    verdicts = {c.name: c.verdict for c in ledger.verify(second).checks if c.name != "signature"}
    assert verdicts == {
        **dict.fromkeys(["chain", "model", "config", "request", "forgotten"], "pass"),
        "delta": "purged",
    }
    (entry,) = read_purged(second)
    assert (entry.sha256, entry.path) == (digest, DELTA)
    assert json.loads((second / PURGED).read_text())["complete"] is True
    assert ledger.parent_lines(second) == ledger.read_lines(second / "ledger.jsonl"), "the next request may start here"
    assert [e["sequence"] for e in ledger.history(second)] == [1, 2]


def test_nothing_is_left_for_a_second_purge(runs):
    carry_out(runs[2])
    before = (runs[2] / PURGED).read_bytes()
    made = carry_out(runs[2])
    assert not made.items
    assert not made.unfinished
    assert (runs[2] / PURGED).read_bytes() == before


def test_what_is_sensitive_goes_and_what_is_evidence_stays(runs):
    _, first, second = runs
    model = sha256(second / WEIGHTS)
    current = write_artifact(second, "model.onnx", model)
    gone = [
        write_artifact(second, "old.onnx", sha256(first / WEIGHTS)),
        write_artifact(second, "to-0002.bin", model, "patch"),
        write_artifact(second, "x.patch", None),
        second / "audit" / "features-test.npz",
        second / "prototypes.safetensors",
        second / "cache" / "block3.npy",
        second / "optimizer.pt",
        second / ".delta.safetensors.partial",
        second / "copy.safetensors",
    ]
    (second / "cache").mkdir()
    for path in gone[3:-1]:
        path.write_bytes(b"numbers")
    gone[-1].write_bytes((first / WEIGHTS).read_bytes())
    stays = [second / "audit" / "audit.json", second / "audit" / "report.html", second / "notes.txt", current]
    for path in stays[:3]:
        path.write_text("{}")
    foreign = second / "artifacts" / "bare.onnx"
    foreign.write_bytes(b"?")
    made = carry_out(second)
    sidecars = [p.with_name(f"{p.name}.json") for p in gone[:3]]
    assert {item.path for item in made.items} == {*gone, *sidecars, second / DELTA}
    assert not any(p.exists() for p in (*gone, *sidecars))
    assert all(p.exists() for p in (*stays, foreign, current.with_name("model.onnx.json")))
    assert [left.partition(":")[0] for left in made.left] == [str(foreign), str(second / "notes.txt")]
    ledger.verify(second)


def write_full_package(path: Path) -> Path:
    """A signed package that holds a whole model, and no factors."""
    from gsforget.export.device.keys import new_keys, read_signing_key
    from gsforget.export.device.metadata import ArtifactInfo
    from gsforget.export.device.package import write_package
    from gsforget.export.device.preprocess import Preprocess

    key = read_signing_key(new_keys(path.parents[2] / "keys")[0])
    payload = b"a whole model"
    after = {"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
    artifact = {"kind": "onnx", "name": "m.onnx", "targets": [], "builder": None, "before": None, "after": after}
    manifest = {
        "format": 1,
        "kind": "full",
        "model_id": "0" * 16,
        "sequence": 2,
        "requires": None,
        "precision": "fp32",
        "created": "2026-11-25T00:00:00Z",
        "expires": None,
        "key_id": key.key_id,
        "info": ArtifactInfo(
            ["forgotten-0", "b"], (0,), 2, Preprocess((3, 4, 4), (0.5,) * 3, (0.5,) * 3), "fp32", "0" * 16
        ).to_json(),
        "tensors": [],
        "artifacts": [{**artifact, "edits": [], "rest_sha256": None}],
        "known_answers": {"tolerance": 1.0, "tests": []},
    }
    write_package(path, manifest, payload, key.sign)
    return path


def test_patches_for_devices_go_and_whole_models_after_the_erasure_stay(runs):
    _, _, second = runs
    model = sha256(second / WEIGHTS)
    patch = write_artifact(second, "patch-0002-fp16.gsf", model, "full")  # whatever its sidecar says
    moved = second / "patch-0002-fp16.gsf"
    moved.write_bytes(patch.read_bytes())
    full = write_full_package(second / "artifacts" / "full-0002-fp32.gsf")
    sidecar = {"kind": "full", "file": full.name, "sha256": sha256(full), "source_sha256": model}
    full.with_name(f"{full.name}.json").write_text(json.dumps(sidecar))
    made = carry_out(second)
    assert names(made) == {
        "forget-0002/delta.safetensors",
        "forget-0002/artifacts/patch-0002-fp16.gsf",
        "forget-0002/artifacts/patch-0002-fp16.gsf.json",
        "forget-0002/patch-0002-fp16.gsf",
    }
    assert full.exists()
    assert not made.left
    assert any("patches that were sent out or are on devices" in sentence for sentence in made.out_of_reach)


def test_weights_beside_an_onnx_file_go_with_it(runs):
    _, first, second = runs
    for name, source in (("old", sha256(first / WEIGHTS)), ("new", sha256(second / WEIGHTS))):
        file = write_artifact(second, f"{name}.onnx", source)
        (file.with_name(f"{name}-abc.data")).write_bytes(b"weights")
        sidecar = file.with_name(f"{file.name}.json")
        sidecar.write_text(
            json.dumps({**json.loads(sidecar.read_text()), "data_files": {f"{name}-abc.data": "0" * 64}})
        )
    made = carry_out(second)
    gone = {f"forget-0002/artifacts/{name}" for name in ("old.onnx", "old.onnx.json", "old-abc.data")}
    assert names(made) == {"forget-0002/delta.safetensors", *gone}
    assert not made.left


def test_what_is_out_of_reach_is_named(runs, tmp_path, write_run):
    original, first, second = runs
    other = write_run(tmp_path / "runs" / "forget-0003", first, 0)
    text = "\n".join(purge.plan(second).out_of_reach)
    assert f"the original model ({original})" in text
    assert f"the earlier run {first}: its weights still know" in text
    assert "--chain" in text
    assert f"{other}, another run from the same original: it still knows forgotten-1" in text
    for word in ("devices", "backups", "galleries", "not overwritten"):
        assert word in text
    for name in ("cat", "dog", "cow", "ant"):
        assert f" {name}" not in text


def test_the_chain_is_purged_but_never_the_original(runs):
    original, first, second = runs
    write_artifact(first, "model.onnx", sha256(first / WEIGHTS))
    made = carry_out(second, chain=True)
    assert names(made) == {
        "forget-0001/delta.safetensors",
        "forget-0001/model.safetensors",
        "forget-0001/artifacts/model.onnx",
        "forget-0001/artifacts/model.onnx.json",
        "forget-0002/delta.safetensors",
    }
    assert (original / WEIGHTS).exists()
    assert (second / WEIGHTS).exists()
    assert ledger.verify(second).passed
    verdicts = {c.name: c.verdict for c in ledger.verify(first).checks}
    assert (verdicts["model"], verdicts["delta"], verdicts["config"]) == ("purged", "purged", "pass")
    assert newest_run(first.parent) == second
    with pytest.raises(RequestError, match="gsforget purge removed its weights") as caught:
        read_config(first)
    assert caught.value.kind == "no_model"
    found = ancestors(second)
    assert [(a.sequence, a.found, a.weights) for a in found] == [(1, True, False), (0, True, True)]
    assert not carry_out(second, chain=True).items


def test_a_copied_chain_is_purged_where_it_lies_and_not_where_it_came_from(runs, tmp_path):
    _, first, second = runs
    shutil.copytree(first.parent, tmp_path / "copy" / "runs")
    copied = tmp_path / "copy" / "runs" / second.name
    made = carry_out(copied, chain=True)
    assert {item.run for item in made.items} == {copied, copied.parent / first.name}
    assert (first / WEIGHTS).exists()
    assert (first / DELTA).exists()
    assert any(str(first) in sentence and "copied" in sentence for sentence in made.out_of_reach)


def test_a_report_that_shows_images_stays_and_is_named(runs):
    second = runs[2]
    (second / "audit" / "report.html").write_text("<p>no images</p>")
    (second / "audit" / "shown.html").write_text('<img src="data:image/png;base64,AA==">')
    (left,) = purge.plan(second).left
    assert left.startswith(f"{second / 'audit' / 'shown.html'}: a report that shows test images")


def test_a_lost_ancestor_is_said(runs, tmp_path):
    _, first, second = runs
    (first / WEIGHTS).write_bytes(b"other")
    made = purge.plan(second, chain=True)
    assert names(made) == {"forget-0002/delta.safetensors"}
    assert "it was not found there" in made.out_of_reach[0]


def test_a_parent_that_is_another_chain_is_not_purged(runs):
    _, first, second = runs
    entries = ledger.parse(ledger.read_lines(first / "ledger.jsonl"))
    changed = {**entries[0], "method": "other"}
    (first / "ledger.jsonl").write_text(canonical(changed) + "\n")
    with pytest.raises(SafetyError, match="not the beginning of the chain"):
        purge.plan(second, chain=True)
    assert (first / WEIGHTS).exists()


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_an_interrupted_purge_verifies_and_is_completed(runs, killed_at, monkeypatch):
    second = runs[2]
    patch = write_artifact(second, "a.patch", None)
    sensitive = [patch, patch.with_name("a.patch.json"), second / DELTA]
    digests = {p: sha256(p) for p in sensitive}
    made = purge.plan(second)
    assert [item.path for item in made.items] == sensitive
    unlink, calls = Path.unlink, []

    def kill(path, missing_ok=False):
        if path in sensitive:
            calls.append(path)
            if len(calls) > killed_at:
                raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", kill)
    with pytest.raises(KeyboardInterrupt):
        purge.purge(made)
    monkeypatch.undo()
    assert ledger.verify(second).passed
    assert json.loads((second / PURGED).read_text())["complete"] is False
    carry_out(second)
    assert not any(p.exists() for p in sensitive)
    assert json.loads((second / PURGED).read_text())["complete"] is True
    assert {(e.path, e.sha256) for e in read_purged(second)} == {
        (p.relative_to(second).as_posix(), d) for p, d in digests.items()
    }


def test_only_the_note_was_left_open(runs):
    second = runs[2]
    carry_out(second)
    note = json.loads((second / PURGED).read_text())
    (second / PURGED).write_text(json.dumps({**note, "complete": False}))
    made = carry_out(second)
    assert made.unfinished == [second]
    assert json.loads((second / PURGED).read_text())["complete"] is True


def test_a_file_that_cannot_be_removed_does_not_keep_the_others(runs, monkeypatch):
    second = runs[2]
    patch = write_artifact(second, "a.patch", None)
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path == patch:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    made = purge.plan(second)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(GsforgetError, match=r"1 of 3 files could not be removed, first .*a\.patch") as caught:
        purge.purge(made)
    assert caught.value.kind == "purge_incomplete"
    assert not (second / DELTA).exists()
    monkeypatch.undo()
    carry_out(second)
    assert not patch.exists()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_links_are_removed_and_not_followed(runs, tmp_path):
    second = runs[2]
    secret = tmp_path / "features.npz"
    secret.write_bytes(b"far away")
    (second / "features.npz").symlink_to(secret)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "delta.safetensors").write_bytes(b"not ours")
    (second / "elsewhere").symlink_to(tmp_path / "store")
    made = carry_out(second)
    assert not (second / "features.npz").is_symlink()
    assert secret.exists()
    assert (tmp_path / "store" / "delta.safetensors").exists()
    assert any(str(secret) in sentence for sentence in made.out_of_reach)


def test_a_new_artifact_under_a_purged_name_stays(runs):
    second = runs[2]
    write_artifact(second, "model.onnx", sha256(runs[1] / WEIGHTS))
    carry_out(second)
    write_artifact(second, "model.onnx", sha256(second / WEIGHTS)).write_bytes(b"new")
    sidecar = {"kind": "onnx", "sha256": sha256(second / "artifacts" / "model.onnx")}
    sidecar["source_sha256"] = sha256(second / WEIGHTS)
    (second / "artifacts" / "model.onnx.json").write_text(json.dumps(sidecar))
    assert not purge.plan(second).items


def test_a_removal_that_no_purge_noted_is_told_apart(runs):
    (runs[2] / DELTA).unlink()
    check = next(c for c in ledger.verify(runs[2]).checks if c.name == "delta")
    assert check.verdict == "not checked"
    assert "no purge noted" in check.detail


def test_a_note_that_does_not_fit_the_ledger_is_found(runs):
    second = runs[2]
    carry_out(second)
    text = (second / PURGED).read_text()
    (second / PURGED).write_text(text.replace(find_purged(second, DELTA).sha256, "0" * 64))
    assert [c.name for c in ledger.inspect(second).checks if c.verdict == "fail"] == ["delta"]
    (second / PURGED).write_text("[]")
    with pytest.raises(SafetyError, match=r"purged\.json"):
        ledger.inspect(second)


def test_what_is_no_sound_run_is_refused(runs, tmp_path):
    original, _, second = runs
    with pytest.raises(RequestError) as caught:
        purge.plan(original)
    assert caught.value.kind == "no_ledger"
    with pytest.raises(RequestError, match="not a model folder"):
        purge.plan(tmp_path / "nowhere")
    (second / WEIGHTS).write_bytes(b"other")
    with pytest.raises(SafetyError):
        purge.plan(second)
    assert (second / DELTA).exists()
