"""Refit never leaves old weights unnoticed.

TensorRT needs a GPU; here a double records the calls and behaves as the documentation and headers say: weights are read
when the refit runs and not before, a refit that fails has replaced some of them, and what a version lacks is absent.
"""

import ctypes
import enum
import gc
import weakref

import numpy as np
import pytest

from gsforget.errors import GsforgetError, SafetyError
from gsforget.export.device.refit import refit_plan

FC1, FC2, HEAD = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8 = range(4)


NUMPY = {np.dtype("float32"): DataType.FLOAT, np.dtype("float16"): DataType.HALF}
CTYPES = {DataType.FLOAT: "<f4", DataType.HALF: "<f2", DataType.BF16: "<u2"}


class Weights:
    """A type, an address and a count; nothing is copied, and nothing keeps the array alive."""

    def __init__(self, first, address=None, count=None):
        if address is None:
            self.dtype, self.address, self.size = NUMPY[first.dtype], first.ctypes.data, first.size
            self.alive = weakref.ref(first)
        else:
            self.dtype, self.address, self.size, self.alive = first, address, count, lambda: True

    def read(self):
        gc.collect()
        assert self.alive() is not None, "the array was freed before the refit read it"
        dtype = np.dtype(CTYPES[self.dtype])
        raw = ctypes.string_at(self.address, self.size * dtype.itemsize)
        return np.frombuffer(raw, dtype)


class Prototype:
    def __init__(self, dtype, size):
        self.dtype, self.size = dtype, size


class Config:
    def __init__(self, flags):
        self.flags = set(flags)

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def clear_flag(self, flag):
        self.flags.discard(flag.name)


class Engine:
    def __init__(self, trt, weights):
        self.trt, self.weights = trt, dict(weights)

    def create_serialization_config(self):
        return Config({"EXCLUDE_WEIGHTS"})  # as for an engine that was built with STRIP_PLAN

    def serialize_with_config(self, config):
        self.trt.serialised = config.flags, self
        return b"plan" if self.trt.serialises else None


class Double:
    """The module `tensorrt`."""

    DataType, Weights = DataType, Weights

    def __init__(
        self, flags=("EXCLUDE_WEIGHTS", "INCLUDE_REFIT"), prototypes=True, refits=True, missing=(), takes=True
    ):
        self.SerializationFlag = enum.Enum("SerializationFlag", list(flags))
        self.refits, self.missing, self.takes, self.serialises, self.loads = refits, missing, takes, True, True
        self.refittable = {FC1: (DataType.HALF, 6), FC2: (DataType.HALF, 6)}
        self.engine = Engine(self, {name: np.zeros(6, np.float16) for name in (FC1, FC2, HEAD)})
        self.serialised = None
        outer = self

        class Logger:
            ERROR = 1

            def __init__(self, severity):
                self.severity = severity

        class Runtime:
            def __init__(self, logger):
                assert isinstance(logger, Logger)

            def deserialize_cuda_engine(self, plan):
                return outer.engine if outer.loads else None

        class Refitter:
            def __init__(self, engine, logger):
                self.engine, self.set = engine, {}

            def get_all_weights(self):
                return list(outer.refittable)

            def get_missing_weights(self):
                return [name for name in outer.missing if name not in self.set]

            def set_named_weights(self, name, weights):
                self.set[name] = weights
                return outer.takes

            def refit_cuda_engine(self):
                for name, weights in self.set.items():
                    self.engine.weights[name] = weights.read()
                    if not outer.refits:
                        return False  # after the first one
                return True

        if prototypes:
            Refitter.get_weights_prototype = lambda self, name: Prototype(*outer.refittable[name])
        self.Logger, self.Runtime, self.Refitter = Logger, Runtime, Refitter


def new_weights(*names):
    return {name: (np.arange(6, dtype=np.float16) + i).reshape(2, 3) for i, name in enumerate(names, 1)}


def test_exactly_the_changed_tensors_are_replaced():
    trt = Double()
    assert refit_plan(trt, b"old", new_weights(FC1, FC2), "float16") == b"plan"
    flags, engine = trt.serialised
    assert engine.weights[FC1].tolist() == [1, 2, 3, 4, 5, 6]
    assert engine.weights[FC2].tolist() == [2, 3, 4, 5, 6, 7]
    assert engine.weights[HEAD].tolist() == [0] * 6
    assert flags == {"INCLUDE_REFIT"}, "weights are in the plan, and the next erasure can refit it"


def test_arrays_that_are_not_contiguous_live_until_the_refit_has_read_them():
    trt = Double()
    columns_first = {FC1: np.arange(6, dtype=np.float16).reshape(3, 2).T}
    refit_plan(trt, b"old", columns_first, "float16")
    assert trt.engine.weights[FC1].tolist() == [0, 2, 4, 1, 3, 5]


def test_bfloat16_is_named_by_its_bits():
    trt = Double()
    trt.refittable[FC1] = (DataType.BF16, 6)
    refit_plan(trt, b"old", {FC1: np.array([[0x3F80, 0, 1], [2, 3, 4]], np.uint16)}, "bfloat16")
    assert trt.engine.weights[FC1].tolist() == [0x3F80, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("double", "weights", "kind"),
    [
        ({}, (FC1, HEAD), "not_refittable"),  # the engine would keep the old head
        ({}, (), "not_refittable"),
        ({"missing": (FC2,)}, (FC1,), "stale_weights"),
        ({"takes": False}, (FC1,), "stale_weights"),
    ],
)
def test_weights_that_would_stay_old_are_refused_before_anything_changes(double, weights, kind):
    trt = Double(**double)
    with pytest.raises(SafetyError) as refused:
        refit_plan(trt, b"old", new_weights(*weights), "float16")
    assert refused.value.kind == kind
    assert all(not w.any() for w in trt.engine.weights.values())
    assert trt.serialised is None


@pytest.mark.parametrize("expected", [(DataType.FLOAT, 6), (DataType.HALF, 5)])
def test_another_type_or_size_is_refused(expected):
    trt = Double()
    trt.refittable[FC1] = expected
    with pytest.raises(SafetyError, match=str(expected[1])):
        refit_plan(trt, b"old", new_weights(FC1), "float16")


def test_a_refit_that_fails_half_way_hands_out_no_plan():
    trt = Double(refits=False)
    with pytest.raises(GsforgetError) as failed:
        refit_plan(trt, b"old", new_weights(FC1, FC2), "float16")
    assert failed.value.kind == "refit_failed"
    assert trt.engine.weights[FC1].any()
    assert not trt.engine.weights[FC2].any(), "the double leaves a mixture, as TensorRT may"
    assert trt.serialised is None


def test_engines_that_do_not_load_or_serialise():
    for change in ("loads", "serialises"):
        trt = Double()
        setattr(trt, change, False)
        with pytest.raises(GsforgetError) as failed:
            refit_plan(trt, b"old", new_weights(FC1), "float16")
        assert failed.value.kind == "refit_failed"


def test_older_versions_lack_names_and_are_not_asked_for_them():
    trt = Double(flags=("EXCLUDE_WEIGHTS", "EXCLUDE_LEAN_RUNTIME"), prototypes=False)
    assert refit_plan(trt, b"old", new_weights(FC1), "float16") == b"plan"
    assert trt.serialised[0] == set()
