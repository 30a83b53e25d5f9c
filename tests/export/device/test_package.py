"""The container: what was signed is what is read, and nothing else is believed."""

import json
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.canonical import canonical
from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device import keys
from gsforget.export.device.files import is_plain_name
from gsforget.export.device.manifest import Manifest
from gsforget.export.device.package import HEADER, MAGIC, SIGNED, read_package, verify, write_package
from gsforget.export.device.trust import Trust


@pytest.fixture(scope="module")
def trust(chain):
    return Trust().add(chain.key.public)


def believe(path, trust, fleet=None):
    """All that a device believes of a package: its manifest and payload."""
    package = read_package(path)
    return verify(package, trust), package.plain(fleet)


def sign_anew(path, manifest: bytes, key, payload: bytes = b"", magic=MAGIC, number=1):
    """A file of any manifest, with a signature that holds."""
    header = struct.pack("<8sII", magic, number, len(manifest))
    path.write_bytes(header + manifest + key.sign(SIGNED + manifest) + payload)
    return path


def test_what_is_written_is_read(chain, trust):
    for sequence in (1, 2):
        manifest, payload = chain.content(sequence)
        read, plain = believe(chain.root / f"patch-{sequence:04d}-fp32.gsf", trust)
        assert plain == payload
        shown = read.to_json()
        assert {k: v for k, v in shown.items() if k != "payload"} == manifest
        assert shown["payload"]["encryption"] is None
        assert Manifest.from_json(shown) == read


def test_a_package_is_as_short_as_its_parts(chain):
    path = chain.root / "patch-0001-fp32.gsf"
    package = read_package(path)
    assert path.stat().st_size == HEADER.size + len(package.signed) + 64 + package.manifest.payload.bytes


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_refused(chain, trust, tmp_path_factory, data):
    """In header, manifest, signature and payload alike."""
    raw = bytearray((chain.root / "patch-0001-fp32.gsf").read_bytes())
    package = read_package(chain.root / "patch-0001-fp32.gsf")
    regions = [0, HEADER.size, HEADER.size + len(package.signed), package.payload_at, len(raw)]
    region = data.draw(st.integers(0, 3))
    at = data.draw(st.integers(regions[region], regions[region + 1] - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("changed") / "p.gsf"
    path.write_bytes(raw)
    with pytest.raises(SafetyError):
        believe(path, trust)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_length_but_its_own_is_refused(chain, trust, tmp_path_factory, data):
    raw = (chain.root / "patch-0001-fp32.gsf").read_bytes()
    path = tmp_path_factory.mktemp("cut") / "p.gsf"
    length = data.draw(st.integers(0, len(raw) - 1))
    for content in (raw[:length], raw + raw[: length + 1]):
        path.write_bytes(content)
        with pytest.raises(SafetyError) as caught:
            believe(path, trust)
        assert caught.value.kind == "bad_package"


def test_lengths_are_checked_before_they_are_believed(tmp_path):
    path = tmp_path / "p.gsf"
    for length in (0, 5, 2**32 - 1):
        path.write_bytes(struct.pack("<8sII", MAGIC, 1, length) + b"x" * 40)
        with pytest.raises(SafetyError) as caught:
            read_package(path)
        assert caught.value.kind == "bad_package"
    with pytest.raises(RequestError, match="cannot be read"):
        read_package(tmp_path / "none.gsf")


def test_another_kind_or_format_is_refused(chain, tmp_path):
    manifest = canonical(chain.content(1)[0]).encode()
    for magic, number in ((b"GSFPATCX", 1), (MAGIC, 2), (MAGIC, 0)):
        with pytest.raises(SafetyError):
            read_package(sign_anew(tmp_path / "p.gsf", manifest, chain.key, b"", magic, number))


@pytest.mark.parametrize("form", ["spaces", "order", "twice", "nan", "deep", "latin", "escape", "number", "list"])
def test_a_manifest_has_one_spelling(chain, tmp_path, form):
    """Signed by the right key, but written otherwise: two readers could read two things."""
    package = read_package(chain.root / "patch-0001-fp32.gsf")
    text, content = package.signed.decode(), json.loads(package.signed)
    raw = {
        "spaces": lambda: json.dumps(content, sort_keys=True).encode(),
        "order": lambda: json.dumps(dict(reversed(content.items())), separators=(",", ":")).encode(),
        "twice": lambda: (text[:-1] + ',"sequence":1}').encode(),
        "nan": lambda: text.replace('"tolerance":0.001', '"tolerance":NaN').encode(),
        "deep": lambda: b"[" * 200_000,
        "latin": lambda: text.replace("cat", "c\xe4t").encode("latin-1"),
        "escape": lambda: text.replace("cat", "c\\u0061t").encode(),
        "number": lambda: text.replace('"sequence":1', '"sequence":1e0').encode(),
        "list": lambda: b"[]",
    }[form]()
    assert raw != package.signed
    path = sign_anew(tmp_path / "p.gsf", raw, chain.key, package.stored())
    with pytest.raises(SafetyError) as caught:
        read_package(path)
    assert caught.value.kind == "bad_package"


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "..\\model.onnx",
        "/etc/model.onnx",
        "a/b.onnx",
        "C:model.onnx",
        ".model.onnx",
        "..onnx",
        "nul.onnx",
        "COM1.onnx",
        " model.onnx",
        "model\n.onnx",
        "model\0.onnx",
        "model.engine",
        "model.onnx.json",
        "model",
        ".onnx",
        "m" * 300 + ".onnx",
        "modèl\u202exnno.onnx",
        "",
        7,
        None,
        ["model.onnx"],
    ],
)
def test_path_tricks_in_names_are_refused(chain, tmp_path, name):
    manifest, payload = chain.content(1)
    manifest["artifacts"][0]["name"] = name
    with pytest.raises(SafetyError) as caught:
        write_package(tmp_path / "p.gsf", manifest, payload, chain.key.sign)
    assert caught.value.kind == "bad_package"
    assert not (tmp_path / "p.gsf").exists()


@given(st.text(max_size=40))
def test_a_plain_name_stays_in_its_folder(name):
    from pathlib import Path, PureWindowsPath

    if is_plain_name(name):
        for flavour in (Path, PureWindowsPath):
            path = flavour("models") / name
            assert path.name == name
            assert path.parent == flavour("models")
            assert len(path.parts) == 2


def fields(value, path=()):
    """Every place in a manifest: (path, value)."""
    yield path, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from fields(part, (*path, key))


def put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


WRONG = [None, True, -1, 1.5, 2**60, "", "x", [], {}, ["x"], {"x": 1}, float("inf")]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_wrong_type_anywhere_is_refused_or_means_the_same(chain, data):
    """Whatever parses says again exactly what it was parsed from, and anything else is one kind of error."""
    manifest = read_package(chain.root / "patch-0001-fp32.gsf").manifest.to_json()
    path, _ = data.draw(st.sampled_from([f for f in fields(manifest) if f[0]]))
    put(manifest, path, data.draw(st.sampled_from(WRONG)))
    try:
        read = Manifest.from_json(manifest)
    except SafetyError as error:
        kind, same = error.kind, True
    else:
        kind, same = "bad_package", read.to_json() == manifest
    assert (kind, same) == ("bad_package", True)


def change(path, value):
    return lambda m: put(m, path, value)


def swap_edits(m):
    m["artifacts"][0]["edits"].reverse()


def overlap(m):
    first, second = m["artifacts"][0]["edits"][:2]
    second["at"] = first["at"] + first["take"] - 1


def second_info(m):
    m["info"]["class_names"][0] = "ant"


@pytest.mark.parametrize(
    "tamper",
    [
        change(("extra",), 1),
        change(("model_id",), "AB" * 8),
        change(("sequence",), 2),
        change(("requires",), 1),
        change(("requires",), None),
        change(("precision",), "fp16"),
        change(("created",), "2026-13-01T00:00:00Z"),
        change(("expires",), "tomorrow"),
        change(("info", "forgotten"), [0, 9]),
        change(("info", "forgotten"), [-1]),
        change(("info", "forgotten"), []),
        change(("info", "extra"), 1),
        change(("tensors", 0, "shape"), [13, 48]),
        change(("tensors", 0, "shape"), [0, 48]),
        change(("tensors", 0, "rank"), 3000),
        change(("tensors", 0, "at"), [0, 0, 0, 10**6]),
        change(("tensors", 0, "dtype"), "float16"),
        change(("tensors", 0, "dtype"), "int8"),
        change(("tensors", 0, "scale"), {"at": 0, "axis": None}),
        change(("tensors", 1, "name"), "fc1.weight"),
        change(("artifacts",), []),
        change(("artifacts", 0, "before"), None),
        change(("artifacts", 0, "edits"), []),
        change(("artifacts", 0, "edits", 0, "at"), 10**6),
        change(("artifacts", 0, "edits", 0, "take"), 4),
        change(("artifacts", 0, "edits", 0, "order"), "big"),
        change(("artifacts", 0, "edits", 0, "tensor"), "head.weight"),
        change(("artifacts", 0, "edits", 0, "transposed"), 1),
        change(("artifacts", 0, "edits", 2, "give"), [0, 10**6]),
        change(("artifacts", 0, "after", "bytes"), 3),
        change(("artifacts", 0, "targets"), ["../sm86"]),
        change(("known_answers", "tests"), []),
        change(("known_answers", "tolerance"), 0),
        change(("known_answers", "tests", 0, "batch"), 10**6),
        change(("known_answers", "tests", 0, "new"), [[1.0], [2.0]]),
        swap_edits,
        overlap,
        second_info,
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_each_other_are_refused(chain, tmp_path, tamper):
    manifest, payload = chain.content(1)
    tamper(manifest)
    with pytest.raises(SafetyError) as caught:
        write_package(tmp_path / "p.gsf", manifest, payload, chain.key.sign)
    assert caught.value.kind == "bad_package"


def test_a_full_package_is_its_payload(chain, trust, tmp_path):
    path = chain.full(1, "one.gsf")
    manifest, plain = believe(path, trust)
    assert plain == chain.artifact(1).read_bytes()
    assert manifest.requires is None
    content = manifest.to_json()
    for tamper in (
        change(("requires",), 0),
        change(("artifacts", 0, "after", "sha256"), "0" * 64),
        change(("artifacts",), content["artifacts"] * 2),
    ):
        changed = json.loads(json.dumps(content))
        tamper(changed)
        with pytest.raises(SafetyError):
            write_package(tmp_path / "p.gsf", changed, plain, chain.key.sign)


def test_signature_key_and_expiry(chain, trust, tmp_path):
    keys.new_keys(tmp_path)
    other = keys.read_signing_key(tmp_path / "signing.key")
    strange = chain.patch(1, "strange.gsf", other)
    posing = chain.root / "posing.gsf"
    manifest, payload = chain.content(1)
    write_package(posing, manifest, payload, other.sign)
    for path, trusted, kind in (
        (strange, trust, "wrong_key"),
        (posing, trust, "bad_signature"),
        (strange, Trust(), "no_trust"),
    ):
        with pytest.raises(SafetyError) as caught:
            believe(path, trusted)
        assert caught.value.kind == kind
    ending = read_package(chain.patch(1, "ending.gsf", expires="2026-12-01T00:00:00Z"))
    verify(ending, trust, datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
    with pytest.raises(SafetyError, match="expired on 01 December 2026") as caught:
        verify(ending, trust, datetime(2026, 12, 1, tzinfo=UTC))
    assert caught.value.kind == "expired"


def test_an_encrypted_payload_opens_for_its_fleet_and_in_its_own_package_only(chain, trust, tmp_path):
    keys.new_keys(tmp_path, fleet=True)
    fleet = keys.read_fleet_key(tmp_path / "fleet.key")
    path = chain.patch(1, "sealed.gsf", recipient=fleet.public)
    manifest, plain = believe(path, trust, fleet)
    content, payload = chain.content(1)
    assert plain == payload
    assert payload[:200] not in path.read_bytes()
    keys.new_keys(tmp_path / "other", fleet=True)
    for wrong, kind in ((None, "no_fleet_key"), (keys.read_fleet_key(tmp_path / "other/fleet.key"), "wrong_fleet_key")):
        with pytest.raises(SafetyError) as caught:
            believe(path, trust, wrong)
        assert caught.value.kind == kind
    # The same sealed bytes under another manifest, properly signed: bound to what they were sealed for.
    stored = read_package(path).stored()
    other = {**manifest.to_json(), "created": "2026-11-26T00:00:00Z"}
    moved = sign_anew(tmp_path / "moved.gsf", canonical(other).encode(), chain.key, stored)
    with pytest.raises(SafetyError, match="does not open") as caught:
        believe(moved, trust, fleet)
    assert caught.value.kind == "bad_payload"
    assert content["sequence"] == 1


@pytest.mark.parametrize("content", [b"", b"x", b"GSFPATCH", b"\x00" * 4096])
def test_files_that_are_no_packages(tmp_path, content):
    (tmp_path / "p.gsf").write_bytes(content)
    with pytest.raises(GsforgetError, match="not a valid package"):
        read_package(tmp_path / "p.gsf")
