"""What a device has applied is signed by it, and a server believes nobody else, and no device that says less than before."""

import json
import os
import shutil

import pytest
from device_helpers import refused

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import acknowledgements
from gsforget.export.device.acknowledgements import Register, question, report
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.keys import new_keys, read_public_key, read_signing_key


@pytest.fixture
def patches(chain):
    return [chain.root / f"patch-{n:04d}-fp32.gsf" for n in (1, 2)]


@pytest.fixture
def told(device):
    """A device that acknowledges into a folder."""
    (device / "acks").mkdir()
    return device


@pytest.fixture
def register(tmp_path):
    return Register(tmp_path / "devices.json")


def records(device):
    return [json.loads(p.read_text()) for p in sorted((device / "acks").iterdir())]


def public(device):
    return read_public_key(device / "device.pub.json", "device")


def test_a_server_follows_a_device(told, chain, patches, register):
    assert not (told / "device.key").exists(), "made when it is first used"
    for sequence, patch in enumerate(patches, 1):
        done = apply(patch, told)
        if sequence == 1:
            register.enroll(public(told))
        assert register.behind(done.state.model_id, sequence) == [public(told).key_id]
        said = register.take(records(told)[-1])
        assert said.state == done.state, "with the hashes of what it holds"
        assert register.behind(done.state.model_id, sequence) == []
    assert os.stat(told / "device.key").st_mode & 0o777 == 0o600
    again = Register(register.path)
    assert again.newest(public(told).key_id, done.state.model_id) == 2
    assert again.take(records(told)[0]).state.sequence == 1, "a late one is true, and sets nothing back"
    assert again.newest(public(told).key_id, done.state.model_id) == 2


def test_nobody_is_told_where_nobody_asked(device, patches):
    apply(patches[0], device)
    assert not (device / "device.key").exists()
    assert not (device / "acks").exists()


def test_a_server_that_cannot_be_reached_stops_no_erasure(device, patches):
    class Unreachable:
        def applied(self, record):
            raise ConnectionError("no route to host")

        def newest(self, model_id):
            return 0

    done = apply(patches[0], device, acknowledge=Unreachable())
    assert any("no route to host" in note for note in done.loaded.not_tested)
    assert open_device(device).info.sequence == 1


CHANGES = {
    "sequence": lambda r: r.update(sequence=2),
    "artifact": lambda r: r["artifacts"][0].update(sha256="0" * 64),
    "ledger": lambda r: r.update(ledger="0" * 64),
    "time": lambda r: r.update(time="2030-01-01T00:00:00Z"),
    "field": lambda r: r.update(more=1),
    "no signature": lambda r: r.pop("signature"),
    "short signature": lambda r: r.update(signature=r["signature"][2:]),
    "no hexadecimal": lambda r: r.update(signature="x"),
    "no state": lambda r: r.pop("artifacts"),
    "nonce": lambda r: r.update(nonce="00" * 16),
    "key": lambda r: r["device"].update(public="0" * 64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_device_did_not_sign_is_not_believed(told, patches, register, change):
    apply(patches[0], told)
    register.enroll(public(told))
    (record,) = records(told)
    CHANGES[change](record)
    refused("bad_acknowledgement", register.take, record)
    assert register.newest(public(told).key_id, record["model_id"]) == 0


def test_other_keys_say_nothing_in_its_name(told, patches, register, tmp_path):
    apply(patches[0], told)
    (record,) = records(told)
    refused("unknown_device", register.take, record)
    refused("unknown_device", register.take, {})
    register.enroll(public(told))
    new_keys(tmp_path / "others")
    other = read_signing_key(tmp_path / "others" / "signing.key")
    forged = acknowledgements.sign(acknowledgements.verify(record, public(told)).state, other)
    refused("unknown_device", register.take, forged)
    refused("bad_acknowledgement", register.take, {**forged, "device": record["device"]})
    with pytest.raises(RequestError):
        read_public_key(told / "device.pub.json")  # no device can be trusted to sign packages


def test_a_disk_that_was_set_back_is_found_by_asking(told, patches, register, tmp_path):
    apply(patches[0], told)
    shutil.copytree(told, tmp_path / "backup")
    apply(patches[1], told)
    register.enroll(public(told))
    for record in records(told):
        register.take(record)
    asked = question()
    answer = report(told, asked)
    assert register.take(answer, asked).state.sequence == 2
    refused("bad_acknowledgement", register.take, answer, question())  # an answer of yesterday
    refused("bad_acknowledgement", register.take, records(told)[-1], asked)
    refused("bad_acknowledgement", register.take, answer)
    shutil.rmtree(told)
    shutil.copytree(tmp_path / "backup", told)
    asked = question()
    refused("rollback", register.take, report(told, asked), asked)


def test_a_report_is_of_a_folder_that_fits_itself(told, patches, tmp_path):
    refused("empty_device", report, tmp_path, question())
    refused("empty_device", report, tmp_path / "none", question())
    apply(patches[0], told)
    (model,) = (told / "models").glob("*.onnx")
    raw = model.read_bytes()
    model.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused("hash_mismatch", report, told, question())
    model.write_bytes(raw)
    (told / "ledger.jsonl").write_text("")
    with pytest.raises(SafetyError):
        report(told, question())


def test_a_report_asks_the_device_s_counter_as_well(told, patches):
    class Counter:
        def read(self, model_id):
            return 2

        def advance(self, model_id, sequence):
            pass

    apply(patches[0], told)
    assert report(told, question())["sequence"] == 1
    refused("rollback", report, told, question(), counter=Counter())


def test_a_key_that_was_cut_off_is_made_again(told, patches):
    (told / ".device.key.partial").write_bytes(b"-----BEGIN")
    apply(patches[0], told)
    (told / "device.pub.json").unlink()
    apply(patches[1], told)
    first, second = records(told)
    assert first["device"] == second["device"]
    assert public(told).key_id == first["device"]["key_id"]


def test_files_that_are_no_register(tmp_path):
    for content in ('{"device": 1}', "[]", "none"):
        (tmp_path / "r.json").write_text(content)
        refused("bad_file", Register, tmp_path / "r.json")
