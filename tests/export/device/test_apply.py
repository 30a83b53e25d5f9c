"""What a device does with what arrives: the right bytes, every attack refused, and nothing that falls back."""

import json
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.errors import GsforgetError, SafetyError
from gsforget.export.device import apply as module
from gsforget.export.device import keys, opening
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.metadata import sidecar_path
from gsforget.export.device.store import DeviceFolder


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file of a device folder but the lock."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "lock"}


def refused(kind, call, *args, **kwargs):
    kinds = (kind,) if isinstance(kind, str) else kind
    with pytest.raises(GsforgetError) as caught:
        call(*args, **kwargs)
    assert caught.value.kind in kinds, caught.value.message
    return caught.value


def logits(predictor, seed=3):
    return predictor.predict(opening.noise(seed, 4, predictor.info.preprocess.input_size))


@pytest.fixture
def patched(chain, device):
    """The device after the first patch."""
    apply(chain.root / "patch-0001-fp32.gsf", device)
    return device


@pytest.fixture
def patch1(chain):
    return chain.root / "patch-0001-fp32.gsf"


@pytest.fixture
def patch2(chain):
    return chain.root / "patch-0002-fp32.gsf"


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


# --- attacks; each leaves the device as it was


def other_model(chain, device, tmp):
    return chain.patch(1, "other.gsf", model_id="cd" * 8, info={**chain.info(1).to_json(), "model_id": "cd" * 8})


def wrong_key(chain, device, tmp):
    keys.new_keys(tmp / "keys")
    return chain.patch(1, "strange.gsf", keys.read_signing_key(tmp / "keys" / "signing.key"))


def expired(chain, device, tmp):
    return chain.patch(1, "expired.gsf", expires="2026-11-25T00:00:01Z")


def swapped_classes(chain, device, tmp):
    """The signed manifest with another class list, its lengths right."""
    path = tmp / "swapped.gsf"
    raw = (chain.root / "patch-0001-fp32.gsf").read_bytes()
    assert raw.count(b'"bee","cat"') == 1
    path.write_bytes(raw.replace(b'"bee","cat"', b'"cat","bee"'))
    return path


def truncated(chain, device, tmp):
    path = tmp / "cut.gsf"
    path.write_bytes((chain.root / "patch-0001-fp32.gsf").read_bytes()[:-1])
    return path


def wrong_tensor_result(chain, device, tmp):
    """Properly signed, but by a build whose arithmetic was wrong."""
    manifest, _ = chain.content(1)
    manifest["tensors"][0]["after"] = "0" * 64
    return chain.patch(1, "wrong.gsf", tensors=manifest["tensors"])


def wrong_file_result(chain, device, tmp):
    manifest, _ = chain.content(1)
    manifest["artifacts"][0]["after"]["sha256"] = "0" * 64
    return chain.patch(1, "wrong.gsf", artifacts=manifest["artifacts"])


def wrong_base(chain, device, tmp):
    manifest, _ = chain.content(1)
    manifest["artifacts"][0]["before"]["sha256"] = "0" * 64
    return chain.patch(1, "wrong.gsf", artifacts=manifest["artifacts"])


def wrong_rest(chain, device, tmp):
    manifest, _ = chain.content(1)
    manifest["artifacts"][0]["rest_sha256"] = "0" * 64
    return chain.patch(1, "wrong.gsf", artifacts=manifest["artifacts"])


def overwriting(chain, device, tmp):
    """A name that is in use: the old file would be gone before the new one is complete."""
    manifest, _ = chain.content(1)
    manifest["artifacts"][0]["name"] = chain.artifact(0).name.replace("model", "Model")
    return chain.patch(1, "wrong.gsf", artifacts=manifest["artifacts"])


@pytest.mark.parametrize(
    ("attack", "kind", "status"),
    [
        (other_model, "wrong_model", 4),
        (wrong_key, "wrong_key", 4),
        (expired, "expired", 4),
        (swapped_classes, "bad_signature", 4),
        (truncated, "bad_package", 4),
        (wrong_tensor_result, "wrong_result", 4),
        (wrong_file_result, "wrong_result", 4),
        (wrong_base, "wrong_base", 4),
        (wrong_rest, "wrong_base", 4),
        (overwriting, "name_in_use", 4),
        (lambda chain, *_: chain.root / "patch-0002-fp32.gsf", "sequence_gap", 2),
        (
            lambda chain, *_: chain.full(0, "full-0000.gsf", known_answers={"tolerance": 1.0, "tests": []}),
            "rollback",
            4,
        ),
    ],
)
def test_a_package_that_is_refused_leaves_the_device_as_it_was(chain, device, tmp_path, attack, kind, status):
    path = attack(chain, device, tmp_path)
    before = snapshot(device)
    late = datetime(2026, 12, 1, tzinfo=UTC)
    assert refused(kind, apply, path, device, now=late).exit_status == status
    assert snapshot(device) == before
    assert open_device(device).info == chain.info(0)
    apply(chain.root / "patch-0001-fp32.gsf", device)  # and it still takes the right one


def test_replays_and_older_packages_are_refused(chain, patched, patch1, patch2):
    refused("rollback", apply, patch1, patched)
    apply(patch2, patched)
    before = snapshot(patched)
    for path in (patch1, patch2, *(chain.root / f"full-000{i}-fp32.gsf" for i in (1, 2))):
        refused("rollback", apply, path, patched)
    assert snapshot(patched) == before
    assert open_device(patched).info == chain.info(2)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_changed_byte_of_a_patch_leaves_the_device_as_it_was(chain, installed, tmp_path_factory, data):
    raw = bytearray((chain.root / "patch-0001-fp32.gsf").read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("changed") / "p.gsf"
    path.write_bytes(raw)
    before = snapshot(installed)
    with pytest.raises(SafetyError):
        apply(path, installed)
    assert snapshot(installed) == before


def set_back_state(chain, root, old):
    (root / "state.json").write_bytes(old["state.json"])


def set_back_state_and_model(chain, root, old):
    for name, raw in old.items():
        if name != "ledger.jsonl":
            (root / name).write_bytes(raw)
    for path in (root / "models").iterdir():
        if f"models/{path.name}" not in old:
            path.unlink()


def edit_counter(chain, root, old):
    content = json.loads((root / "state.json").read_text())
    (root / "state.json").write_text(json.dumps({**content, "sequence": 0}))


def cut_ledger(chain, root, old):
    lines = (root / "ledger.jsonl").read_text().splitlines(keepends=True)
    (root / "ledger.jsonl").write_text("".join(lines[:-1]))


def cut_ledger_in_a_line(chain, root, old):
    (root / "ledger.jsonl").write_bytes((root / "ledger.jsonl").read_bytes()[:-20])


def change_ledger(chain, root, old):
    text = (root / "ledger.jsonl").read_text()
    (root / "ledger.jsonl").write_text(text.replace('"install"', '"patch"', 1))


def no_ledger(chain, root, old):
    (root / "ledger.jsonl").unlink()


def no_state(chain, root, old):
    (root / "state.json").unlink()


def old_model_under_the_new_name(chain, root, old):
    (root / "models" / chain.artifact(1).name).write_bytes(chain.artifact(0).read_bytes())


def old_model_and_sidecar_under_the_new_name(chain, root, old):
    path = root / "models" / chain.artifact(1).name
    path.write_bytes(chain.artifact(0).read_bytes())
    sidecar_path(path).write_bytes(sidecar_path(chain.artifact(0)).read_bytes())


def engine_copied_in(chain, root, old):
    (root / "models" / "model-0000.engine").write_bytes(b"NGNE un-erased")


def link_copied_in(chain, root, old):
    path = root / "models" / chain.artifact(1).name
    shutil.move(path, root.parent / "elsewhere.onnx")
    path.symlink_to(root.parent / "elsewhere.onnx")


def swapped_sidecar(chain, root, old):
    path = sidecar_path(root / "models" / chain.artifact(1).name)
    path.write_text(path.read_text().replace("forgotten-0", "ant"))


@pytest.mark.parametrize(
    ("attack", "kind"),
    [
        (set_back_state, "rollback"),
        (set_back_state_and_model, "rollback"),
        (edit_counter, "broken_state"),
        (cut_ledger, "broken_ledger"),
        (cut_ledger_in_a_line, "broken_ledger"),
        (change_ledger, "broken_ledger"),
        (no_ledger, "broken_ledger"),
        (no_state, "broken_state"),
        (old_model_under_the_new_name, "hash_mismatch"),
        (old_model_and_sidecar_under_the_new_name, "hash_mismatch"),
        (engine_copied_in, "foreign_file"),
        (link_copied_in, "base_gone"),
        (swapped_sidecar, "hash_mismatch"),
    ],
)
def test_a_device_folder_that_was_tampered_with_loads_nothing(chain, device, patch1, patch2, monkeypatch, attack, kind):
    old = snapshot(device)
    apply(patch1, device)
    attack(chain, device, old)
    with monkeypatch.context() as patch:
        patch.setattr(opening, "open_model", lambda *_args, **_kwargs: pytest.fail("something was loaded"))
        assert refused(kind, open_device, device).exit_status == 4
        refused((kind, "wrong_base"), apply, patch2, device)
    refused("rollback", apply, chain.full(0, "full-0000.gsf", known_answers={"tolerance": 1.0, "tests": []}), device)
    # A full package of at least the counter repairs; an older one never does.
    done = apply(chain.root / "full-0001-fp32.gsf", device)
    assert done.state.sequence == 1
    assert open_device(device).info == chain.info(1)
    assert sorted(p.name for p in (device / "models").iterdir()) == [
        chain.artifact(1).name,
        f"{chain.artifact(1).name}.json",
    ]
    apply(patch2, device)
    assert open_device(device).info == chain.info(2)


class Counter:
    """A hardware counter, or a server, that outlives the disk."""

    def __init__(self):
        self.values = {}

    def read(self, model_id):
        return self.values.get(model_id, 0)

    newest = read

    def advance(self, model_id, sequence):
        self.values[model_id] = max(sequence, self.read(model_id))

    def applied(self, record):
        self.advance(record["model_id"], record["sequence"])


@pytest.mark.parametrize("role", ["counter", "acknowledge"])
def test_a_disk_that_was_set_back_is_seen_with_a_counter_outside_it_only(chain, device, tmp_path, patch1, role):
    backup = tmp_path / "backup"
    shutil.copytree(device, backup)
    outside = {role: Counter()}
    apply(patch1, device, **outside)
    shutil.rmtree(device)
    shutil.copytree(backup, device)
    assert open_device(device).info.sequence == 0  # as the threat model says: the disk alone cannot tell
    refused("rollback", open_device, device, **outside)
    refused("rollback", apply, chain.root / "patch-0002-fp32.gsf", device, **outside)
    refused("rollback", apply, chain.artifact(0), tmp_path / "fresh", **outside)
    apply(chain.root / "full-0001-fp32.gsf", device, **outside)
    assert open_device(device, **outside).info.sequence == 1


def test_a_hardware_counter_has_advanced_before_the_new_model_is_made(chain, device, patch1, monkeypatch):
    """So that deleting the intent record by hand does not bring the old model back."""
    counter = Counter()
    monkeypatch.setattr("gsforget.export.device.rollforward.write_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(patch1, device, counter=counter)
    monkeypatch.undo()
    (device / "intent.json").unlink()
    refused("rollback", open_device, device, counter=counter)


# --- after the intent record


def test_wrong_answers_load_nothing_and_a_full_package_repairs(chain, device, patch2):
    answers = chain.answers(1)
    answers["tests"][0]["new"][0][0] += 1
    bad = chain.patch(1, "answers.gsf", known_answers=answers)
    assert "answers a known test otherwise" in refused("known_answers", apply, bad, device).message
    for _ in range(2):
        refused("known_answers", open_device, device)
    refused("known_answers", apply, chain.root / "patch-0001-fp32.gsf", device)
    refused("known_answers", apply, bad, device)
    assert refused("rollback", apply, chain.full(0, "full-0000.gsf"), device)
    apply(chain.root / "full-0001-fp32.gsf", device)
    assert open_device(device).info == chain.info(1)
    apply(patch2, device)


@pytest.mark.parametrize("gone", ["base", "package", "both"])
def test_what_cannot_be_finished_loads_nothing_and_a_full_package_repairs(chain, device, patch1, monkeypatch, gone):
    monkeypatch.setattr("gsforget.export.device.rollforward.write_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(patch1, device)
    monkeypatch.undo()
    assert (device / "intent.json").is_file()
    if gone in ("base", "both"):
        (device / "models" / chain.artifact(0).name).unlink()
    if gone in ("package", "both"):
        (device / "pending.gsf").write_bytes((chain.root / "patch-0002-fp32.gsf").read_bytes())
    refused(("base_gone", "cannot_finish"), open_device, device)
    refused(("base_gone", "cannot_finish"), apply, patch1, device)
    refused("rollback", apply, chain.full(0, "full-0000.gsf"), device)
    apply(chain.root / "full-0001-fp32.gsf", device)
    assert open_device(device).info == chain.info(1)
    assert not (device / "intent.json").exists()


def test_a_package_that_was_accepted_is_finished_after_it_expired(chain, device, monkeypatch):
    path = chain.patch(1, "soon.gsf", expires="2026-11-26T00:00:00Z")
    monkeypatch.setattr("gsforget.export.device.rollforward.write_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(path, device, now=datetime(2026, 11, 25, tzinfo=UTC))
    monkeypatch.undo()
    monkeypatch.setattr("gsforget.export.device.package.datetime", None)  # no clock is asked
    assert open_device(device).info == chain.info(1)


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
