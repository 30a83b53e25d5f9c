"""int8 along a chain of erasures: each step in closed form, and in files however their weights lie."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from gsforget.export.build.int8 import Int8Weight, after_erasure, int8_weights, next_scale, next_weight, read_int8
from gsforget.export.build.locate import NotLocated
from gsforget.export.device.factors import Factors
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo
from gsforget.export.device.preprocess import Preprocess
from gsforget.lora.grid import to_grid

INFO = ArtifactInfo(["a", "forgotten-1"], (1,), 1, Preprocess((3, 4, 4), (0.5,) * 3, (0.5,) * 3), "int8", "0" * 16)


# ------------------------------------------------------------------------------------------------------------- one step
def exactly(value: int, before: float, after: float, change: Fraction, least: int) -> int:
    """clip(round((s W + D) / s')) in rational arithmetic, to nearest even."""
    return min(127, max(least, round((Fraction(before) * value + change) / Fraction(after))))


@given(hnp.arrays(np.int8, (5, 3)), st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 1]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_step_is_one_rounding_of_the_exact_sum_and_the_device_does_the_same(values, seed, axis, frozen):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.1, 1 if axis is None else (5, 3)[axis]).astype(np.float32)
    weight = Int8Weight("w_quantized", "w_scale", False, scale, axis)
    f = Factors(
        rng.integers(-99, 100, (2, 3), dtype=np.int16),
        rng.integers(-99, 100, (5, 2), dtype=np.int16),
        np.array([-7, -8], np.int32),
        np.array([-5, -6], np.int32),
    )
    powers = [Fraction(2) ** int(e) for e in f.ea + f.eb]
    products = [[sum(int(f.b[i, r]) * int(f.a[r, j]) * powers[r] for r in (0, 1)) for j in range(3)] for i in range(5)]
    grown = scale if frozen else next_scale(values, weight, f.product())
    before, after = (np.broadcast_to(replace(weight, scale=s).spread(), (5, 3)) for s in (scale, grown))
    least = -128 if (values == -128).any() else -127
    wanted = [
        [exactly(int(values[i, j]), before[i, j], after[i, j], products[i][j], least) for j in range(3)]
        for i in range(5)
    ]
    made = next_weight(values, before, after, f.product())
    assert made.dtype == np.int8
    assert made.tolist() == wanted
    spread = tuple(replace(weight, scale=s).spread().astype(np.float32) for s in (scale, grown))
    assert f.apply(values, "int8", spread).tolist() == wanted


@given(hnp.arrays(np.int8, (5, 3)), st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 1]))
@settings(max_examples=40, deadline=None)
def test_scales_stay_where_the_range_suffices_and_grow_to_what_is_needed(values, seed, axis):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.1, 1 if axis is None else (5, 3)[axis]).astype(np.float32)
    weight = Int8Weight("w_quantized", "w_scale", False, scale, axis)
    product = rng.standard_normal((5, 3))
    exact = values * weight.spread() + product
    grown = next_scale(values, weight, product)
    groups = {None: [exact], 0: list(exact), 1: list(exact.T)}[axis]
    for group, was, now in zip(groups, scale, grown, strict=True):
        needed = np.abs(group).max()
        assert now == (was if np.round(needed / was) <= 127 else np.float32(needed / 127))
    new = next_weight(values, weight.spread(), replace(weight, scale=grown).spread(), product)
    error = np.abs(new * replace(weight, scale=grown).spread() - exact)
    assert (error <= (0.5 + 1e-4) * replace(weight, scale=grown).spread()).all(), "nothing is cut off"


def test_ties_go_to_even_and_what_is_too_large_is_cut_off():
    step = np.array([[0.125]])
    values = np.array([[1, 2, 127, -127, 100]], np.int8)
    change = np.array([[0.0625, 0.0625, 0.125, -0.125, 100.0]])  # half a step, a step, and far more
    assert next_weight(values, step, step, change).tolist() == [[2, 2, 127, -127, 127]]
    lower = next_weight(np.array([[-128, -127]], np.int8), step, step, np.array([[-0.125, -0.125]]))
    assert lower.tolist() == [[-128, -128]]


# ---------------------------------------------------------------------------------------------------------------- files
def write_layers(weights: dict, quantised_in_file: bool = True) -> onnx.ModelProto:
    """Three layers in a row that read int8 as MatMul [in, out], as Gemm with transB [out, in], and through a Transpose.

    Weights: name to (int8 [out, in], float32 scales, axis of [out, in] or None).
    """
    nodes, stored, value = [], [], "images"
    for name, (weight, scale, axis) in weights.items():
        kind = name[0]
        lies = weight.T if kind == "a" else weight
        wide = np.ascontiguousarray(lies)
        stored += [numpy_helper.from_array(wide, f"{name}_quantized"), numpy_helper.from_array(scale, f"{name}_scale")]
        stored.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{name}_zero_point"))
        along = {} if axis is None else {"axis": axis if lies is weight else 1 - axis}
        if not quantised_in_file:
            stored[-3] = numpy_helper.from_array(wide.astype(np.float32), name)
            given = [name, f"{name}_scale", f"{name}_zero_point"]
            nodes.append(helper.make_node("QuantizeLinear", given, [f"{name}_quantized"], **along))
        given = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
        nodes.append(helper.make_node("DequantizeLinear", given, [f"{name}_wide"], **along))
        if kind == "a":
            nodes.append(helper.make_node("MatMul", [value, f"{name}_wide"], [f"{name}_out"]))
        elif kind == "b":
            nodes.append(helper.make_node("Gemm", [value, f"{name}_wide"], [f"{name}_out"], transB=1))
        else:
            nodes.append(helper.make_node("Transpose", [f"{name}_wide"], [f"{name}_turned"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [value, f"{name}_turned"], [f"{name}_out"]))
        value = f"{name}_out"
    (first, *_), *_, (last, *_) = weights.values()
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", first.shape[1]])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", last.shape[0]])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: "{}"})
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)

    def draw(rows, columns, axis):
        count = () if axis is None else ((rows, columns)[axis],)
        values = rng.integers(-100, 101, (rows, columns)).astype(np.int8)
        return values, rng.uniform(0.01, 0.02, count).astype(np.float32), axis

    return {"a": draw(6, 5, 0), "b": draw(4, 6, None), "c": draw(4, 4, 0), "c2": draw(3, 4, 1)}


def dequantised(values, scale, axis):
    return values * (scale if axis is None else scale.reshape((-1, 1) if axis == 0 else (1, -1))).astype(np.float64)


def test_weights_are_found_however_they_lie(weights):
    model = write_layers(weights)
    found = int8_weights(model)
    assert found.keys() == weights.keys()
    images = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    wanted = images.astype(np.float64)
    for name, (values, scale, axis) in weights.items():
        assert np.array_equal(read_int8(model, found[name]), values), name
        assert (found[name].axis, found[name].scale.tolist()) == (axis, scale.reshape(-1).tolist())
        wanted = wanted @ (read_int8(model, found[name]) * found[name].spread()).T
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    assert np.allclose(session.run(None, {"images": images})[0], wanted, rtol=1e-4, atol=1e-3)


def test_an_erasure_changes_the_weights_in_steps_of_their_scales_and_the_metadata(weights):
    import torch

    old = write_layers(weights)
    generator = torch.Generator().manual_seed(0)
    delta = {
        name: to_grid(
            torch.randn(2, v.shape[1], generator=generator), 0.1 * torch.randn(v.shape[0], 2, generator=generator)
        )
        for name, (v, _, _) in weights.items()
    }
    made, kept = after_erasure(old.SerializeToString(), delta, INFO)
    new = onnx.load_model_from_string(made)
    along = whole = 0.0
    for name, (values, scale, axis) in weights.items():
        wide, product = dequantised(values, scale, axis), delta[name].product().numpy()
        step = dequantised(np.ones(values.shape), scale, axis)
        rows = {None: None, 0: 1, 1: 0}[axis]
        largest = np.abs(wide + product).max(rows, keepdims=True)
        step = np.where(np.round(largest / step) <= 127, step, (largest / 127).astype(np.float32))
        after = read_int8(new, int8_weights(new)[name])
        assert np.array_equal(after, np.round((wide + product) / step)), name
        along, whole = along + ((after * step - wide) * product).sum(), whole + (product**2).sum()
    assert kept == pytest.approx(along / whole)
    assert kept > 0.98
    assert json.loads(new.metadata_props[0].value) == INFO.to_json()
    for model in (old, new):
        del model.metadata_props[:]
        for tensor in model.graph.initializer:
            if tensor.name.endswith(("_quantized", "_scale")):
                tensor.raw_data = b""
    assert old.SerializeToString() == new.SerializeToString(), "nothing else"


def test_what_is_not_int8_in_the_file_is_not_taken_for_it(weights):
    import torch

    for wrong in ("zero", "scale", "reader", "axis"):
        behind = write_layers(weights, quantised_in_file=False)
        first = next(n for n in behind.graph.node if n.op_type == "QuantizeLinear")
        if wrong == "zero":  # uint8
            behind.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.zeros(6, np.uint8), "a_zero_point"))
        elif wrong == "scale":
            first.input[1] = "c_scale"
        elif wrong == "reader":
            behind.graph.node.append(helper.make_node("Neg", ["a"], ["more"]))
        else:
            first.attribute[0].i = 0
        assert int8_weights(behind).keys() == {"b", "c", "c2"} - ({"c"} if wrong == "scale" else set()), wrong
    shifted = write_layers(weights)
    for tensor in shifted.graph.initializer:
        if tensor.name == "b_zero_point":
            tensor.CopyFrom(numpy_helper.from_array(np.int8(3), tensor.name))
    shared = write_layers(weights)
    shared.graph.node.append(helper.make_node("Neg", ["a_wide"], ["more"]))
    assert int8_weights(shifted).keys() == {"a", "c", "c2"}
    assert int8_weights(shared).keys() == {"b", "c", "c2"}
    delta = {"b": to_grid(torch.ones(1, 6), torch.ones(4, 1))}
    with pytest.raises(NotLocated, match="does not carry b as int8"):
        after_erasure(shifted.SerializeToString(), delta, INFO)


def test_float32_weights_before_a_quantizelinear_take_the_chain_of_float32(weights):
    import torch

    exact = {n: (np.float32(dequantised(v, s, a)) + np.float32(1e-3), s, a) for n, (v, s, a) in weights.items()}
    old = write_layers(exact, quantised_in_file=False)
    found = int8_weights(old)
    assert {n for n, w in found.items() if w.exact} == weights.keys()
    generator = torch.Generator().manual_seed(0)
    delta = {
        n: to_grid(
            torch.randn(2, v.shape[1], generator=generator), 0.01 * torch.randn(v.shape[0], 2, generator=generator)
        )
        for n, (v, _, _) in weights.items()
    }
    made, kept = after_erasure(old.SerializeToString(), delta, INFO)
    new = int8_weights(onnx.load_model_from_string(made))
    along = whole = 0.0
    for name, (values, _, _) in exact.items():
        product = delta[name].product().numpy()
        after = read_int8(onnx.load_model_from_string(made), new[name])
        assert np.array_equal(after, (values + product).astype(np.float32)), "one rounding, to float32"
        grown = new[name].scale > found[name].scale
        assert np.array_equal(new[name].scale[~grown], found[name].scale[~grown])
        # What ONNX Runtime makes of QuantizeLinear and DequantizeLinear.
        was, now = (
            np.clip(np.rint(v / w.spread()), -128, 127) * w.spread()
            for v, w in ((values.astype(np.float64), found[name]), (after.astype(np.float64), new[name]))
        )
        along, whole = along + ((now - was) * product).sum(), whole + (product**2).sum()
    assert kept == pytest.approx(along / whole)


@pytest.mark.parametrize(("strength", "stay"), [(0.02, True), (0.5, False)])
def test_scales_stay_where_they_cut_off_next_to_nothing(strength, stay):
    import torch

    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    exact = {n: rng.standard_normal((64, 256)) for n in ("a", "b", "c")}
    weights, delta = {}, {}
    for name, weight in exact.items():
        weight = weight if name == "a" else weight[:, :64]
        scale = (np.abs(weight).max(1) / 127).astype(np.float32)
        weights[name] = (np.rint(weight / scale[:, None]).astype(np.int8), scale, 0)
        a, b = torch.randn(2, weight.shape[1], generator=generator), torch.randn(64, 2, generator=generator)
        delta[name] = to_grid(a, b * strength * np.linalg.norm(weight) / (b @ a).norm())
    made, kept = after_erasure(write_layers(weights).SerializeToString(), delta, INFO)
    new = int8_weights(onnx.load_model_from_string(made))
    assert {np.array_equal(new[n].scale, weights[n][1]) for n in weights} == {stay}, "all of them, or not one"
    if stay:
        for name, (values, scale, _) in weights.items():
            wide = values * scale[:, None].astype(np.float64) + delta[name].product().numpy()
            found = read_int8(onnx.load_model_from_string(made), new[name])
            assert np.array_equal(found, np.clip(np.rint(wide / scale[:, None].astype(np.float64)), -127, 127))
    assert kept > 0.98


def test_what_float32_weights_had_cut_off_already_stays_cut_off(weights):
    import torch

    far = {n: (np.float32(dequantised(v, s, a)) * np.float32(3), s, a) for n, (v, s, a) in weights.items()}
    old = write_layers(far, quantised_in_file=False)
    delta = {"a": to_grid(torch.zeros(1, 5), torch.zeros(6, 1))}
    made, _ = after_erasure(old.SerializeToString(), delta, INFO)
    assert np.array_equal(int8_weights(onnx.load_model_from_string(made))["a"].scale, weights["a"][1])
