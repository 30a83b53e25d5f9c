"""A standard TensorRT engine asked once, on the GPU of this machine: known answers after a refit.  Not run yet.

No framework: TensorRT computes, and memory is the CUDA driver's, called by ctypes.  Nothing is served from here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gsforget.errors import GsforgetError
from gsforget.export.device.files import sha256
from gsforget.export.device.gpu import cuda_driver
from gsforget.export.device.metadata import ArtifactInfo

HINT = "Use the ONNX file of the same export."
NUMPY = {"FLOAT": np.float32, "HALF": np.float16}  # TensorRT's names of what images and logits may be


class EnginePredictor:
    """An engine with one input [N, C, H, W] and one output [N, K], as `gsforget export` builds it.

    Args:
        trt: the module `tensorrt`, 10 or 11.
        path: the engine.
        info: what it is.

    Raises GsforgetError ``cannot_ask`` where it does not load, or its input or output is not what ``info`` says.
    """

    def __init__(self, trt: Any, path: Path, info: ArtifactInfo, logger: Any = None):
        self.path, self.sha256, self.info = path, sha256(path), info
        self._trt = trt
        self._runtime = trt.Runtime(logger or trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise _cannot_ask(f"TensorRT cannot load {path.name} on this machine")
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        if names != {info.input_name, info.output_name}:
            raise _cannot_ask(f"{path.name} has other inputs and outputs than {info.input_name} and {info.output_name}")

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """float32 images [N, C, H, W] to float32 logits [N, K].  Raises GsforgetError ``cannot_ask`` where CUDA fails."""
        context = self._engine.create_execution_context()
        name_in, name_out = self.info.input_name, self.info.output_name
        images = np.ascontiguousarray(batch, self._dtype(name_in))
        if context is None or not context.set_input_shape(name_in, tuple(images.shape)):
            raise _cannot_ask(f"{self.path.name} does not take a batch of {len(images)}")
        logits = np.empty(tuple(context.get_tensor_shape(name_out)), self._dtype(name_out))
        with _Cuda.open() as cuda:
            at_in, at_out = cuda.put(images), cuda.room(logits.nbytes)
            ready = context.set_tensor_address(name_in, at_in) and context.set_tensor_address(name_out, at_out)
            if not ready or not context.execute_async_v3(cuda.stream):
                raise _cannot_ask(f"TensorRT could not run {self.path.name}")
            cuda.get(at_out, logits)
        return logits.astype(np.float32, copy=False)

    def features(self, batch: np.ndarray) -> None:
        """None: engines have no such output."""

    def _dtype(self, name: str) -> Any:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in NUMPY:
            raise _cannot_ask(f"{name} of {self.path.name} is {kind}")
        return NUMPY[kind]


class _Cuda:
    """A context of the first GPU, a stream, and memory that goes with it."""

    def __init__(self, driver: Any, stream: int, stack: ExitStack):
        self._driver, self.stream, self._stack = driver, stream, stack

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[_Cuda]:
        driver = cuda_driver()
        if driver is None:
            raise _cannot_ask("this machine has no CUDA driver")
        context, before, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        with ExitStack() as stack:
            _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
            stack.callback(driver.cuDevicePrimaryCtxRelease_v2, 0)
            _check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
            stack.callback(driver.cuCtxPopCurrent_v2, ctypes.byref(before))
            _check(driver.cuStreamCreate(ctypes.byref(stream), 0), "cuStreamCreate")
            stack.callback(driver.cuStreamDestroy_v2, stream)
            yield cls(driver, stream.value or 0, stack)

    def room(self, size: int) -> int:
        """The address of ``size`` bytes on the GPU."""
        at = ctypes.c_uint64()
        _check(self._driver.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(size)), "cuMemAlloc")
        self._stack.callback(self._driver.cuMemFree_v2, at)
        return at.value

    def put(self, array: np.ndarray) -> int:
        """The address of a copy on the GPU."""
        at = self.room(array.nbytes)
        source = ctypes.c_void_p(array.ctypes.data)
        failed = self._driver.cuMemcpyHtoD_v2(ctypes.c_uint64(at), source, ctypes.c_size_t(array.nbytes))
        _check(failed, "cuMemcpyHtoD")
        return at

    def get(self, at: int, array: np.ndarray) -> None:
        """Wait for the stream and fill an array from the GPU."""
        _check(self._driver.cuStreamSynchronize(ctypes.c_void_p(self.stream)), "cuStreamSynchronize")
        target = ctypes.c_void_p(array.ctypes.data)
        failed = self._driver.cuMemcpyDtoH_v2(target, ctypes.c_uint64(at), ctypes.c_size_t(array.nbytes))
        _check(failed, "cuMemcpyDtoH")


def _check(status: int, call: str) -> None:
    if status:
        raise _cannot_ask(f"CUDA's {call} failed with error {status}")


def _cannot_ask(why: str) -> GsforgetError:
    return GsforgetError(f"The engine could not be asked: {why}.", HINT, "cannot_ask")
