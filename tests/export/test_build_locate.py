"""Tensors are found where they are, and nowhere else."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnx.numpy_helper import from_array

from gsforget.export.build.locate import NotLocated, find_all, find_matrix, onnx_metadata, onnx_places


def model_of(arrays, metadata=()):
    used = helper.make_node("Identity", [next(iter(arrays))], ["y"])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    tensors = [from_array(a, n) for n, a in arrays.items()]
    model = helper.make_model(helper.make_graph([used], "g", [], [output], tensors))
    for key, value in metadata:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model


@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.integers(0, 300), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_every_initializer_lies_where_it_is_said_to(sizes, seed):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    data = model_of(arrays).SerializeToString()
    places = onnx_places(data)
    for name, array in arrays.items():
        if array.size:
            place = places[name]
            assert data[place.at : place.at + place.size] == array.tobytes()


def test_equal_tensors_have_places_of_their_own():
    data = model_of({"a": np.ones(40, np.float32), "b": np.ones(40, np.float32)}).SerializeToString()
    places = onnx_places(data)
    assert places["a"].at != places["b"].at


def test_what_lies_outside_the_bytes_is_left_out():
    model = model_of({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)})
    model.graph.initializer[1].ClearField("raw_data")
    model.graph.initializer[1].float_data.extend([1.0] * 4)
    assert set(onnx_places(model.SerializeToString())) == {"a"}
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "weights.data"
    assert onnx_places(model.SerializeToString()) == {}


def test_a_name_that_is_there_twice_is_refused():
    model = model_of({"a": np.ones(4, np.float32)})
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(NotLocated, match="'a' twice"):
        onnx_places(model.SerializeToString())


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_files_never_name_places_outside_themselves(noise, keep):
    whole = model_of({"a": np.ones(20, np.float32), "b": np.ones(4, np.float32)}).SerializeToString()
    data = whole[:keep] + noise
    try:
        places = onnx_places(data)
    except (NotLocated, UnicodeDecodeError):
        return
    assert all(0 <= p.at <= p.at + p.size <= len(data) for p in places.values())


@given(st.lists(st.tuples(st.text("xyz", min_size=1, max_size=3), st.text(max_size=300)), max_size=4))
def test_a_metadata_entry_is_found_with_its_tag_and_length(others):
    value = "the information"
    entries = [*others, ("gsforget", value)]
    data = model_of({"a": np.ones(4, np.float32)}, entries).SerializeToString()
    place = onnx_metadata(data, "gsforget")
    without = onnx.load_from_string(data[: place.at] + data[place.at + place.size :])
    assert [(p.key, p.value) for p in without.metadata_props] == others
    longer = model_of({"a": np.ones(4, np.float32)}, [("gsforget", value * 30)]).SerializeToString()
    given_entry = onnx_metadata(longer, "gsforget")
    spliced = (
        data[: place.at] + longer[given_entry.at : given_entry.at + given_entry.size] + data[place.at + place.size :]
    )
    assert [(p.key, p.value) for p in onnx.load_from_string(spliced).metadata_props][-1] == ("gsforget", value * 30)
    with pytest.raises(NotLocated, match="0 metadata entries"):
        onnx_metadata(data, "another")


def matrix(rows=7, columns=5, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float16)


@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_a_matrix_is_found_in_either_order(rows, columns, transposed, before, seed):
    wanted = matrix(rows, columns, seed)
    noise = np.random.default_rng(seed + 1).bytes(before + 100)
    stored = (wanted.T if transposed else wanted).tobytes()
    data = noise[:before] + stored + noise[before:]
    if len(stored) < 16:
        return  # may be there by chance
    place = find_matrix(data, wanted)
    assert (place.at, place.size) == (before, len(stored))
    assert place.transposed == (transposed and stored != wanted.tobytes())


def test_a_matrix_that_is_there_twice_or_not_at_all_is_not_guessed():
    wanted = matrix()
    with pytest.raises(NotLocated, match="2 times"):
        find_matrix(wanted.tobytes() + b"between" + wanted.tobytes(), wanted)
    changed = bytearray(wanted.tobytes())
    changed[-1] ^= 1  # outside the part that is searched for first
    with pytest.raises(NotLocated, match="not there"):
        find_matrix(bytes(100) + bytes(changed), wanted)
    with pytest.raises(NotLocated, match="too uniform"):
        find_matrix(bytes(10_000), np.zeros((30, 30), np.float16))


def test_overlapping_places_are_all_counted():
    assert find_all(b"aaaa", b"aa") == [0, 1, 2]
