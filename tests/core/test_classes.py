"""Class requests: exact names first, then indices; impossible requests are refused with a name to type instead."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.classes import read_names, resolve_classes
from gsforget.errors import RequestError

NAMES = ["cat", "dog", "2", "cow"]


def kind(*args) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve_classes(*args)
    return caught.value


def test_a_name_that_looks_like_an_index_wins():
    assert resolve_classes(["2", "0"], ["cat", "dog", "cow", "2"], {}) == [0, 3]


def test_duplicates_are_merged_and_order_does_not_matter():
    assert resolve_classes(["dog", " 1", "cat"], NAMES, {}) == resolve_classes(["cat", "dog"], NAMES, {}) == [0, 1]


@pytest.mark.parametrize("wanted", [[], ["", "  "]])
def test_nothing_asked(wanted):
    assert kind(wanted, NAMES, {}).kind == "no_class"


@pytest.mark.parametrize(
    ("word", "hint"), [("Dgo", "'dog'"), ("4", "0 to 3"), ("-1", "0 to 3"), ("zzz", "'cow'"), ("²", "0 to 3")]
)
def test_unknown_class_says_what_there_is(word, hint):
    error = kind([word], NAMES, {})
    assert error.kind == "unknown_class"
    assert word in error.message
    assert hint in error.hint


def test_names_with_commas_are_sent_to_a_file():
    assert "--classes-file" in kind(["qqq"], ["tench, Tinca", "ray"], {}).hint


def test_all_remaining_classes_are_refused_but_one_less_is_not():
    names = ["a", "forgotten-1", "c"]
    assert kind(["a", "c"], names, {1: "b"}).kind == "all_classes"
    assert resolve_classes(["a"], names, {1: "b"}) == [0]


@pytest.mark.parametrize("word", ["b", "1", "forgotten-1"])
def test_already_forgotten_is_named(word):
    error = kind([word], ["a", "forgotten-1", "c"], {1: "b"})
    assert error.kind == "already_forgotten"
    assert "'b'" in error.message
    assert "forgotten-1" in error.message


@given(st.sets(st.integers(0, 19), min_size=1, max_size=19))
def test_names_and_indices_agree(chosen):
    names = [f"class {i}" for i in range(20)]
    by_name = resolve_classes([names[i] for i in chosen], names, {})
    assert by_name == resolve_classes([str(i) for i in chosen], names, {}) == sorted(chosen)


def test_names_file_lines_json_and_byte_order_mark(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\n\r\n tench, Tinca \n".encode())
    assert read_names(path) == ["cat", "tench, Tinca"]
    path.write_text(json.dumps(["cat", 3]))
    assert read_names(path) == ["cat", "3"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b'["a",', b'["a", {}]', b"[true]", b"\xff\xfe"])
def test_bad_names_files(tmp_path, content):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_names(path)
    assert caught.value.kind == "bad_names_file"
    assert str(path) in caught.value.message


def test_missing_names_file(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_names(tmp_path / "none")
