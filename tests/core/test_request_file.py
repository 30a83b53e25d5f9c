"""Request files: one shape for YAML and JSON, and nothing that is misspelt or mistyped passes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.errors import RequestError
from gsforget.request import Request, Thresholds
from gsforget.requests.file import KEYS, read_requests

FULL = """
requests:
  - id: 2026-11-001
    date: 2026-11-24
    requester: pseudonym-17      # kept in request.json
    basis: "GDPR Art. 17"
    classes: [sandal, 7]
    retain: [shirt]
    max_retain_drop: 1
    shots: 4
    seed: 3
    method: gs-lora
  - classes: sneaker
"""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text, name="r.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_requests(tmp_path / name)

    return write_and_read


@pytest.fixture
def refused(read):
    def message(text, name="r.yaml") -> RequestError:
        with pytest.raises(RequestError) as caught:
            read(text, name)
        assert caught.value.hint
        assert "\n" not in caught.value.message
        return caught.value

    return message


def base():
    from gsforget.settings import Settings

    return Request([], Settings(), Thresholds(), shots=9)


def test_every_field_arrives(read):
    first, second = read(FULL)
    assert first.label == "entry 1 (2026-11-001)"
    assert first.origin == {
        "id": "2026-11-001",
        "date": "2026-11-24",
        "requester": "pseudonym-17",
        "basis": "GDPR Art. 17",
    }
    assert first.retain == ["shirt"]
    request = first.request(base())
    assert request.classes == ["sandal", "7"]
    assert request.thresholds.max_retain_drop == 1
    assert request.settings.max_retain_drop == 0.5, "training aims at half of what the gate allows"
    assert (request.shots, request.settings.seed, request.method) == (4, 3, "gs-lora")
    assert second.request(base()) == Request(["sneaker"], base().settings, Thresholds(), shots=9)


def test_one_entry_a_list_and_a_mapping_are_the_same(read):
    shapes = ["classes: [a]", "- classes: [a]", "requests: [{classes: [a]}]", "requests: {classes: a}"]
    assert len({repr(read(text)) for text in shapes}) == 1
    assert repr(read('[{"classes": ["a"]}]', "r.json")).replace("r.json", "r.yaml") == repr(read(shapes[0]))


def test_json_and_yaml_agree(read):
    import yaml

    plain = yaml.safe_load(FULL)
    plain["requests"][0]["date"] = "2026-11-24"
    by_json = read(json.dumps(plain), "r.json")
    assert [e.request(base()) for e in by_json] == [e.request(base()) for e in read(FULL)]


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ("requests: [{classes: [a]}]\nclasses: [b]", "beside 'requests' there is 'classes'", "entry"),
        ("[{class: a}]", "'class'", "'classes'"),
        ("[{max-retain-drop: 1, classes: [a]}]", "'max-retain-drop'", "'max_retain_drop'"),
        ("[{zzz: 1, classes: [a]}]", "'zzz'", "requester"),
        ("[{classes: [a], images: l.txt}]", "both", "one of them"),
        ("[{id: x}]", "entry 1 (x): neither", "classes"),
        ("[{classes: []}]", "classes is empty", ""),
        ("[{classes: }]", "classes has no value", ""),
        ("[{classes: [no]}]", "truth value false", "quotes"),
        ("[{classes: [1.5]}]", "the number 1.5", "index"),
        ("[{classes: [2026-11-24]}]", "the date 2026-11-24", "quotes"),
        ("[{classes: {a: 1}}]", "a mapping", "quotes"),
        ("[{classes: [a], date: 24.11.2026}]", "date", "2026-11-24"),
        ("[{classes: [a], date: 5}]", "date", "2026-11-24"),
        ("[{classes: [a], basis: [x]}]", "basis is a list", "quotes"),
        ("[{classes: [a], id: true}]", "id is the truth value", "quotes"),
        ("[{classes: [a], shots: 1.5}]", "whole number", "shots: 1"),
        ("[{classes: [a], lr: fast}]", "lr is the text 'fast'", "lr: 1.0"),
        ("[{classes: [a], seed: true}]", "seed", "without quotes"),
        ("[{classes: [a], images: 3}]", "both", ""),
        ("[{images: 3}]", "images", "per line"),
        ("[{images: [3]}]", "images", "quotes"),
        ("[{id: 1, classes: [a]}, {id: 1, classes: [b]}]", "entry 2 (1): the id is that of entry 1", "id"),
        ("[{classes: [a], classes: [b]}]", "'classes' is given twice", "Remove"),
        ("[a, b]", "entry 1: it is the text 'a'", "For example"),
        ("[]", "no request", "For example"),
        ("", "no request", "For example"),
        ("{", "not valid YAML", "quotes"),
        ("[{classes: !!python/object/apply:os.system [id]}]", "not valid YAML", ""),
        (b"\xff\xfe\x00", "UTF-8", "UTF-8"),
        ("x" * (1 << 20) + "x", "larger", "list.txt"),
    ],
)
def test_what_is_wrong_is_named(refused, text, named, hint):
    error = refused(text)
    assert "r.yaml" in error.message
    assert named in error.message
    assert hint in error.hint
    assert error.kind == "bad_request_file"


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "not valid JSON"), ('{"classes": ["a"], "classes": ["b"]}', "twice"), ("[" * 100000, "not valid JSON")],
)
def test_bad_json(refused, text, named):
    assert named in refused(text, "r.json").message


def test_a_file_that_is_a_folder(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_requests(tmp_path)


def test_images_by_file_or_inline(read, tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n\n b.png \n")
    by_file, inline = read("[{images: list.txt}, {images: [c.png, d.png]}]")
    assert by_file.images.lines == ["a.png", "b.png"]
    assert by_file.images.folder == tmp_path
    assert inline.images.lines == ["c.png", "d.png"]
    assert inline.images.folder == tmp_path


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(ANYTHING)
def test_any_json_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("any") / "r.json"
    path.write_text(json.dumps(value))
    try:
        entries = read_requests(path)
    except RequestError:
        return
    assert all(bool(entry.classes) != bool(entry.images) for entry in entries)
