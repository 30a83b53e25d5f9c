"""What a device does with what arrives: the right bytes, installs, and one call at a time."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from device_helpers import logits, refused, snapshot

from gsforget.export.device import apply as module
from gsforget.export.device import keys, opening
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.metadata import sidecar_path
from gsforget.export.device.store import DeviceFolder

# --- what works


def test_a_chain_of_patches_ends_in_the_very_bytes_of_a_fresh_build(chain, device, patch1, patch2):
    before = logits(open_device(device))
    for sequence, path in ((1, patch1), (2, patch2)):
        done = apply(path, device)
        made = device / "models" / chain.artifact(sequence).name
        assert made.read_bytes() == chain.artifact(sequence).read_bytes()
        assert done.removed == [chain.artifact(sequence - 1).name]
        assert sorted(p.name for p in (device / "models").iterdir()) == [made.name, f"{made.name}.json"]
        predictor = open_device(device)
        assert predictor.info == chain.info(sequence)
        assert not np.allclose(logits(predictor), before)
        document = done.to_json()
        assert (document["sequence"], document["verdict"], document["not_tested"]) == (sequence, "pass", [])
        assert [a["answered"] for a in document["artifacts"]] == [True]
    assert {p.name for p in device.iterdir()} == {"ledger.jsonl", "lock", "models", "state.json", "trust.json"}
    lines = [json.loads(line) for line in (device / "ledger.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["sequence"]) for e in lines] == [("install", 0), ("patch", 1), ("patch", 2)]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_engine_beside_the_model_is_patched_and_proven_by_its_hash(make_world, tmp_path, precision):
    world = make_world(tmp_path / "world", precision, engine=True)
    world.erase()
    root = tmp_path / "device"
    installed = apply(world.artifacts(0), root, trust=world.public)
    assert [a.kind for a in installed.state.artifacts] == ["onnx", "engine"]
    done = apply(world.patch(1), root)
    for path in world.artifacts(1):
        assert (root / "models" / path.name).read_bytes() == path.read_bytes()
    assert done.loaded.answered == [world.artifact(1).name]
    (note,) = done.loaded.not_tested
    assert world.artifact(1, "engine").name in note
    assert "GPU" in note
    assert open_device(root).info.sequence == 1
    assert world.artifact(0, "engine").name in done.removed


def test_a_device_with_an_engine_alone_is_patched_but_runs_nothing_here(make_world, tmp_path):
    world = make_world(tmp_path / "world", engine=True)
    world.erase()
    root = tmp_path / "device"
    apply(world.artifact(0, "engine"), root, trust=world.public)
    done = apply(world.patch(1), root)
    assert (root / "models" / world.artifact(1, "engine").name).read_bytes() == world.engine_bytes(1)
    assert done.loaded.predictor is None
    assert done.loaded.answered == []
    assert "engines run on the device with a GPU" in refused("cannot_run", open_device, root).message


def test_an_install_from_a_signed_full_package_and_on_by_patch(chain, tmp_path, patch2):
    root = tmp_path / "device"
    refused("no_trust", apply, chain.root / "full-0001-fp32.gsf", root)
    apply(chain.root / "full-0001-fp32.gsf", root, trust=chain.public)
    assert open_device(root).info == chain.info(1)
    apply(patch2, root)
    assert open_device(root).info == chain.info(2)


def test_an_encrypted_patch(chain, device, tmp_path):
    keys.new_keys(tmp_path, fleet=True)
    sealed = chain.patch(1, "fleet.gsf", recipient=keys.read_public_key(tmp_path / "fleet.pub.json", "fleet"))
    before = snapshot(device)
    refused("no_fleet_key", apply, sealed, device)
    assert snapshot(device) == before
    shutil.copy(tmp_path / "fleet.key", device / "fleet.key")
    apply(sealed, device)
    assert open_device(device).info == chain.info(1)


def test_every_artifact_has_a_cache_of_its_own_that_goes_with_it(chain, device, patch1, monkeypatch):
    seen = []
    real = opening.open_model

    def open_model(path, where, cache):
        seen.append((Path(path).name, cache))
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "engine.bin").write_bytes(b"built from these weights")
        return real(path, where, cache=cache)

    monkeypatch.setattr(opening, "open_model", open_model)
    state = DeviceFolder(device).state()
    open_device(device)
    done = apply(patch1, device)
    digests = [state.artifacts[0].sha256, done.state.artifacts[0].sha256]
    assert [(name, cache) for name, cache in seen] == [
        (chain.artifact(i).name, device / "cache" / d) for i, d in enumerate(digests)
    ]
    assert [p.name for p in (device / "cache").iterdir()] == [digests[1]]


def test_the_new_model_is_handed_over_before_the_old_one_is_destroyed(chain, device, patch1):
    seen = {}

    def swap(predictor):
        seen["old"] = (device / "models" / chain.artifact(0).name).exists()
        seen["handed"] = predictor.info.sequence
        opened = []
        other = threading.Thread(target=lambda: opened.append(open_device(device, wait=20)))
        other.start()
        other.join(20)
        seen["opened"] = [p.info.sequence for p in opened]

    done = apply(patch1, device, swap=swap)
    assert seen == {"old": True, "handed": 1, "opened": [1]}
    assert done.loaded.predictor.info.sequence == 1


# --- installs that are refused


def test_what_cannot_be_installed(chain, device, tmp_path):
    root = tmp_path / "new"
    copy = Path(shutil.copy(chain.artifact(0), tmp_path))
    refused("no_sidecar", apply, copy, root)
    sidecar = json.loads(sidecar_path(chain.artifact(0)).read_text())
    sidecar_path(copy).write_text(json.dumps({**sidecar, "sha256": "0" * 64}))
    refused("hash_mismatch", apply, copy, root)
    sidecar_path(copy).write_text(json.dumps({**sidecar, "data_files": {}}))
    refused("not_empty", apply, chain.artifact(0), device)
    refused("mixed_artifacts", apply, [chain.artifact(0), chain.artifact(1)], root)
    refused("bad_files", apply, [chain.artifact(0), chain.root / "patch-0001-fp32.gsf"], root)
    refused("bad_files", apply, [], root)
    refused("no_model", apply, tmp_path / "none.onnx", root)
    refused("bad_package", apply, chain.public, root)
    assert not root.exists() or snapshot(root) == {}


def test_an_install_that_does_not_run_is_taken_back(chain, tmp_path):
    root = tmp_path / "device"
    broken = tmp_path / chain.artifact(0).name
    broken.write_bytes(b"not an onnx file")
    from gsforget.export.device.files import sha256

    sidecar = {**json.loads(sidecar_path(chain.artifact(0)).read_text()), "sha256": sha256(broken)}
    sidecar_path(broken).write_text(json.dumps(sidecar))
    refused("bad_artifact", apply, broken, root)
    assert snapshot(root) == {}
    apply(chain.artifact(0), root)
    assert open_device(root).info.sequence == 0


def test_a_file_and_a_sidecar_that_say_different_things_are_not_installed(chain, tmp_path):
    """A sidecar is not signed: it cannot lend the first model the sequence of a later one."""
    root = tmp_path / "device"
    copy = Path(shutil.copy(chain.artifact(0), tmp_path))
    sidecar = json.loads(sidecar_path(chain.artifact(0)).read_text())
    sidecar_path(copy).write_text(json.dumps({**sidecar, "model": chain.info(2).to_json()}))
    refused("wrong_model", apply, copy, root)
    assert snapshot(root) == {}


def test_a_full_package_that_says_something_else_than_its_file_loads_nothing(chain, device):
    swapped = chain.info(1).to_json()
    swapped["class_names"][1:3] = ["cat", "bee"]
    path = chain.full(1, "lying.gsf", info=swapped, known_answers={"tolerance": 1.0, "tests": []})
    refused("wrong_model", apply, path, device)
    refused("wrong_model", open_device, device)


def test_an_empty_folder_has_nothing_to_patch_or_open(chain, tmp_path, patch1):
    refused("empty_device", apply, patch1, tmp_path / "device")
    assert not (tmp_path / "device").exists()
    refused("empty_device", open_device, tmp_path / "device")
    (tmp_path / "device").mkdir()
    refused("empty_device", open_device, tmp_path / "device")
    refused(("empty_device", "no_trust"), apply, patch1, tmp_path / "device")


# --- room and locks


def test_too_little_space_is_said_before_anything_is_written(chain, device, patch1, monkeypatch):
    usage = shutil.disk_usage(device)._replace(free=2**20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    before = snapshot(device)
    assert refused("no_space", apply, patch1, device).exit_status == 1
    assert snapshot(device) == before


def test_one_call_at_a_time(chain, device, patch1):
    with DeviceFolder(device).locked():
        refused("locked", apply, patch1, device, wait=0.05)
        refused("locked", open_device, device, wait=0.05)
    assert open_device(device).info.sequence == 0
