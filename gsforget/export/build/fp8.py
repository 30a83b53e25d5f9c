"""A first fp8 ONNX file: the layers and ranges of an int8 file, in FLOAT8E4M3FN.

Weights have one scale for each output, activations one for the tensor, all around 0: the largest value becomes 448, the
largest that the type holds.  fp8 carries 4 significant bits at every size, where int8 carries 8 of the largest value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gsforget.export.build.int8 import SUFFIX

if TYPE_CHECKING:
    import onnx

LARGEST = 448.0  # of FLOAT8E4M3FN
QUANTISING = ("QuantizeLinear", "DequantizeLinear")


def to_fp8(model: onnx.ModelProto, plain: onnx.ModelProto) -> None:
    """Rewrite a calibrated int8 graph in place, see `calibrate`.

    Args:
        model: with int8 weights and zero points, whose scales are the largest value / 127.
        plain: the float32 graph that it was made from, in which a weight has its name without ``SUFFIX``.
    """
    import ml_dtypes
    from onnx import TensorProto, numpy_helper

    stored = {i.name: i for i in model.graph.initializer}
    exact = {i.name: i for i in plain.graph.initializer}
    done: set[str] = set()

    def store(name: str, array: np.ndarray) -> None:
        stored[name].CopyFrom(numpy_helper.from_array(array, name))
        done.add(name)

    for node in model.graph.node:
        if node.op_type not in QUANTISING:
            continue
        what, scale, zero = node.input
        if scale in done:  # of the other half of a pair
            continue
        if what in stored:
            weight = numpy_helper.to_array(exact[what.removesuffix(SUFFIX)])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            per_output = numpy_helper.to_array(stored[scale]).ndim > 0
            largest = np.abs(weight).max(axis=1 - axis % 2, keepdims=True) if per_output else np.abs(weight).max()
            step = np.maximum(largest / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
            store(what, (weight / step).clip(-LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn))
            store(scale, step.reshape(stored[scale].dims))
        else:
            store(scale, (numpy_helper.to_array(stored[scale]) * np.float32(127 / LARGEST)).astype(np.float32))
        if zero not in done:
            store(zero, np.zeros(tuple(stored[zero].dims), ml_dtypes.float8_e4m3fn))
    left = {i.name for i in model.graph.initializer if i.data_type == TensorProto.INT8}
    assert not left, left
