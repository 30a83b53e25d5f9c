"""Refit: new weights in an engine of standard TensorRT, without a builder.  Not run yet: it needs a GPU.

Weights that stay the old ones unnoticed are the danger here, so that every step says what it did: exactly the changed
tensors are set, each is known to the engine, none is missing, and an engine that could not be refitted whole is thrown
away, because a refit that fails may leave some weights new and others old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gsforget.errors import GsforgetError, SafetyError

TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8"}  # as TensorRT calls them
HINT = "Build the engine again from the patched ONNX file: gsforget export --trt MODEL.onnx."


def refit_plan(trt: Any, plan: bytes, weights: Mapping[str, np.ndarray], dtype: str, logger: Any = None) -> bytes:
    """A serialised engine with other weights, which can be refitted again.

    Args:
        trt: the module `tensorrt`, 10 or 11.
        plan: of an engine that was built with these weights marked as refittable.
        weights: what an erasure changed, by their names in the ONNX file and in its layout; bfloat16 as bit patterns.
        dtype: of all of them, a key of ``TYPES``.

    Returns:
        The new plan.  The engine object is not handed out: the plan is what is checked and loaded.

    Raises:
        SafetyError: ``not_refittable``: the engine does not know one of the tensors, or not in this type and size;
            ``stale_weights``: TensorRT would not take them all.
        GsforgetError: ``refit_failed``: the engine does not load, or could not be refitted or serialised.
    """
    logger = logger or trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise GsforgetError("TensorRT cannot load the engine on this machine.", HINT, "refit_failed")
    refit(trt, engine, weights, dtype, logger)
    return serialise(trt, engine)


def refit(trt: Any, engine: Any, weights: Mapping[str, np.ndarray], dtype: str, logger: Any) -> None:
    """Replace exactly these weights; no context of the engine may run meanwhile.

    Raises as ``refit_plan`` does.  After any error the engine must not be used: it may hold old and new weights.
    """
    refitter = trt.Refitter(engine, logger)
    known = set(refitter.get_all_weights())
    unknown = sorted(set(weights) - known)
    if unknown or not weights:
        raise SafetyError(
            f"The engine cannot be refitted: it does not let {unknown[0] if unknown else 'any tensor'} be replaced.",
            HINT,
            "not_refittable",
        )
    # TensorRT copies nothing before refit_cuda_engine returns: the arrays must live until then.
    kept = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    for name, array in kept.items():
        _check_prototype(trt, refitter, name, array, dtype)
        if not refitter.set_named_weights(name, _weights(trt, array, dtype)):
            raise SafetyError(f"TensorRT does not take the new weights of {name}.", HINT, "stale_weights")
    missing = sorted(refitter.get_missing_weights())
    if missing:
        raise SafetyError(
            f"The engine wants {missing[0]} to be replaced as well, which the erasure does not change.",
            HINT,
            "stale_weights",
        )
    if not refitter.refit_cuda_engine():
        raise GsforgetError("TensorRT could not refit the engine; it is thrown away.", HINT, "refit_failed")
    kept.clear()


def serialise(trt: Any, engine: Any) -> bytes:
    """The plan of a refitted engine, with all weights, and refittable again where this version can say so."""
    settings = engine.create_serialization_config()
    flags = trt.SerializationFlag.__members__
    if "EXCLUDE_WEIGHTS" in flags:
        settings.clear_flag(flags["EXCLUDE_WEIGHTS"])
    if "INCLUDE_REFIT" in flags:
        settings.set_flag(flags["INCLUDE_REFIT"])
    plan = engine.serialize_with_config(settings)
    if plan is None:
        raise GsforgetError("TensorRT could not serialise the refitted engine.", HINT, "refit_failed")
    return bytes(plan)


def _check_prototype(trt: Any, refitter: Any, name: str, array: np.ndarray, dtype: str) -> None:
    """The type and size that the engine expects, where this version tells."""
    if not hasattr(refitter, "get_weights_prototype"):
        return
    wanted = refitter.get_weights_prototype(name)
    if wanted.dtype != getattr(trt.DataType, TYPES[dtype]) or wanted.size != array.size:
        raise SafetyError(
            f"The engine holds {name} as {wanted.size} numbers of {wanted.dtype}, and the erasure gives {array.size} of "
            f"{dtype}.",
            HINT,
            "not_refittable",
        )


def _weights(trt: Any, array: np.ndarray, dtype: str) -> Any:
    """TensorRT's view of an array; numpy has no bfloat16, so that its bit patterns are named by type and address."""
    if dtype == "bfloat16":
        return trt.Weights(trt.DataType.BF16, array.ctypes.data, array.size)
    return trt.Weights(array)
