"""Every attack is refused: on a package, which leaves the device as it was, and on the folder, which loads nothing."""

import json
import shutil
from datetime import UTC, datetime

import pytest
from device_helpers import refused, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.errors import SafetyError
from gsforget.export.device import keys, opening
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.metadata import sidecar_path

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


def with_artifact(chain, change):
    """The first patch with its first artifact changed, properly signed."""
    manifest, _ = chain.content(1)
    change(manifest["artifacts"][0])
    return chain.patch(1, "wrong.gsf", artifacts=manifest["artifacts"])


def wrong_file_result(chain, device, tmp):
    return with_artifact(chain, lambda artifact: artifact["after"].update(sha256="0" * 64))


def wrong_base(chain, device, tmp):
    return with_artifact(chain, lambda artifact: artifact["before"].update(sha256="0" * 64))


def wrong_rest(chain, device, tmp):
    return with_artifact(chain, lambda artifact: artifact.update(rest_sha256="0" * 64))


def overwriting(chain, device, tmp):
    """A name that is in use: the old file would be gone before the new one is complete."""
    name = chain.artifact(0).name.replace("model", "Model")
    return with_artifact(chain, lambda artifact: artifact.update(name=name))


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
