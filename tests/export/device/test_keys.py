"""Key files, rotation, and whom a device trusts for which sequences."""

import json
import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import keys
from gsforget.export.device.apply import apply, trust_key
from gsforget.export.device.files import write_json
from gsforget.export.device.key_places import ENVIRONMENT
from gsforget.export.device.trust import Trust, read_rotation, rotate


@pytest.fixture
def three(tmp_path):
    """Three signing keys."""
    return [keys.read_signing_key(keys.new_keys(tmp_path / f"key{i}")[0]) for i in range(3)]


@pytest.mark.parametrize("fleet", [False, True])
def test_key_files(tmp_path, fleet):
    private, public = keys.new_keys(tmp_path / "made", fleet)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    loaded = (keys.read_fleet_key if fleet else keys.read_signing_key)(private)
    kind = "fleet" if fleet else "signing"
    assert keys.read_public_key(public, kind) == loaded.public
    assert set(json.loads(public.read_text())) == {"format", "kind", "key_id", "public"}
    assert loaded.public.key_id == keys.key_id(bytes.fromhex(json.loads(public.read_text())["public"]))
    before = private.read_bytes()
    with pytest.raises(RequestError) as caught:
        keys.new_keys(tmp_path / "made", fleet)
    assert caught.value.kind == "key_exists"
    assert private.read_bytes() == before
    with pytest.raises(RequestError):
        (keys.read_signing_key if fleet else keys.read_fleet_key)(private)
    with pytest.raises(RequestError):
        keys.read_public_key(public, "signing" if fleet else "fleet")


def test_key_files_that_are_refused(tmp_path):
    private, public = keys.new_keys(tmp_path)
    os.chmod(private, 0o644)
    with pytest.raises(RequestError, match="others than its owner") as caught:
        keys.read_signing_key(private)
    assert caught.value.hint == f"chmod 600 {private}"
    rsa = tmp_path / "rsa.key"
    form = serialization.PrivateFormat.PKCS8
    pem = generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, form, serialization.NoEncryption()
    )
    rsa.write_bytes(pem)
    (tmp_path / "text.key").write_text("hello")
    for path in (rsa, tmp_path / "text.key"):
        path.chmod(0o600)
        with pytest.raises(RequestError) as caught:
            keys.read_signing_key(path)
        assert caught.value.kind == "bad_key"
    content = json.loads(public.read_text())
    for changed in ({**content, "key_id": "0" * 16}, {**content, "public": "zz"}, {**content, "x": 1}, {}, []):
        public.write_text(json.dumps(changed))
        with pytest.raises(RequestError):
            keys.read_public_key(public)


def test_where_the_signing_key_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(RequestError) as caught:
        keys.find_signing_key()
    assert (caught.value.kind, caught.value.hint) == ("no_key", "Make one: gsforget keys new.")
    homes = [tmp_path / "config" / "gsforget", tmp_path / "env", tmp_path / "given"]
    made = [keys.read_signing_key(keys.new_keys(h)[0]).key_id for h in homes]
    assert keys.find_signing_key().key_id == made[0]
    monkeypatch.setenv(ENVIRONMENT, str(homes[1] / "signing.key"))
    assert keys.find_signing_key().key_id == made[1]
    assert keys.find_signing_key(homes[2] / "signing.key").key_id == made[2]


def test_trust_is_given_once(three):
    first, second, _ = three
    trust = Trust().add(first.public)
    assert trust.add(first.public) == trust
    with pytest.raises(SafetyError) as caught:
        trust.add(second.public)
    assert caught.value.kind == "other_trust"


def test_a_rotation_passes_trust_on_from_a_sequence(three):
    first, second, third = three
    trust = Trust().add(first.public).rotated(rotate(first, second.public, 5))
    assert trust.find(first.key_id, 4) == first.public
    assert trust.find(second.key_id, 5) == second.public
    for key, sequence in ((first, 5), (second, 4)):
        with pytest.raises(SafetyError) as caught:
            trust.find(key.key_id, sequence)
        assert caught.value.kind == "retired_key"
    assert trust.rotated(rotate(first, second.public, 5)) == trust  # told twice
    again = trust.rotated(rotate(second, third.public, 7))
    assert again.find(second.key_id, 6) == second.public
    assert Trust.from_json(again.to_json(), "trust.json") == again


def test_rotations_that_are_refused(three, tmp_path):
    first, second, third = three
    trust = Trust().add(first.public).rotated(rotate(first, second.public, 5))
    for wrong in (
        rotate(first, third.public, 6),  # signed by a retired key
        rotate(third, third.public, 6),  # by a stranger
        rotate(second, first.public, 6),  # back to a retired key
        rotate(second, third.public, 4),  # before the current key begins
    ):
        with pytest.raises(SafetyError) as caught:
            trust.rotated(wrong)
        assert caught.value.kind == "bad_rotation"
    good = rotate(second, third.public, 6)
    for path, value in (("from_sequence", 7), ("old", first.key_id), ("new", first.public.to_json())):
        changed = {**good.to_json(), path: value}
        if path == "new":
            changed["new"] = {"key_id": first.key_id, "public": first.public.public.hex()}
        (tmp_path / "rotation.json").write_text(json.dumps(changed))
        with pytest.raises(SafetyError):
            trust.rotated(read_rotation(tmp_path / "rotation.json"))
    (tmp_path / "rotation.json").write_text(json.dumps({**good.to_json(), "more": 1}))
    with pytest.raises(RequestError):
        read_rotation(tmp_path / "rotation.json")
    with pytest.raises(SafetyError):
        Trust().rotated(good)
    with pytest.raises(RequestError):
        rotate(first, second.public, 0)


def test_a_device_follows_a_rotation_and_its_counter_stays(chain, device, three, tmp_path):
    new = three[0]
    rotation = tmp_path / "rotation.json"
    write_json(rotation, rotate(chain.key, new.public, 2).to_json())
    early = chain.patch(2, "early.gsf", new)
    apply(chain.root / "patch-0001-fp32.gsf", device)
    with pytest.raises(SafetyError) as caught:
        apply(early, device)
    assert caught.value.kind == "wrong_key"
    trusted = trust_key(rotation, device)
    assert trusted.current.key == new.public
    with pytest.raises(SafetyError) as caught:
        apply(chain.root / "patch-0002-fp32.gsf", device)  # signed by the key that was retired
    assert caught.value.kind == "retired_key"
    with pytest.raises(SafetyError) as caught:
        apply(chain.patch(1, "back.gsf", new), device)  # the counter is not reset
    assert caught.value.kind in ("rollback", "retired_key")
    assert apply(early, device).state.key_id == new.key_id
    with pytest.raises(SafetyError) as caught:
        trust_key(chain.public, device)
    assert caught.value.kind == "other_trust"


def test_a_trust_file_that_was_damaged_is_refused(chain, device):
    content = json.loads((device / "trust.json").read_text())
    for changed in ("{", "[]", json.dumps({**content, "keys": [*content["keys"]] * 2}), json.dumps({"keys": []})):
        (device / "trust.json").write_text(changed)
        with pytest.raises(SafetyError) as caught:
            apply(chain.root / "patch-0001-fp32.gsf", device)
        assert caught.value.kind == "bad_trust"
