"""A double of standard TensorRT and of the CUDA driver that computes: a plan holds an ONNX file, and a refit its new weights.

It behaves as the documentation and headers say where that matters: weights are read when the refit runs and not before, a
refit that fails has replaced some of them, the calls of a context take addresses.  ``faults`` says what goes wrong.
"""

import ctypes
import enum
import types

import numpy as np
import onnx
from onnx import numpy_helper

from gsforget.export.device.gpu import Gpu

GPU = Gpu("NVIDIA Double", "sm90")
MAGIC = b"ftrt"


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8 = range(4)


KINDS = {"FLOAT": (DataType.FLOAT, np.float32), "FLOAT16": (DataType.HALF, np.float16)}


def kind_of(tensor):
    return KINDS[onnx.TensorProto.DataType.Name(tensor.data_type)]


class Weights:
    def __init__(self, array):
        self.array, self.size = array, array.size


class Engine:
    """A model, and which of its weights may be replaced."""

    def __init__(self, trt, model, refittable):
        self.trt, self.model, self.refittable = trt, model, refittable
        self.num_io_tensors = 2

    @classmethod
    def load(cls, trt, plan):
        plan = bytes(plan)
        size = int.from_bytes(plan[4:8], "little")
        names = [n for n in plan[8 : 8 + size].decode().split(",") if n]
        return cls(trt, onnx.load_model_from_string(plan[8 + size :]), names)

    def plan(self):
        names = ",".join(self.refittable).encode()
        return MAGIC + len(names).to_bytes(4, "little") + names + self.model.SerializeToString()

    def initializer(self, name):
        return next(t for t in self.model.graph.initializer if t.name == name)

    def get_tensor_name(self, i):
        return [self.model.graph.input[0].name, self.model.graph.output[0].name][i]

    def get_tensor_dtype(self, name):
        return DataType.FLOAT

    def create_execution_context(self):
        return Context(self)

    def create_serialization_config(self):
        return types.SimpleNamespace(set_flag=lambda flag: None, clear_flag=lambda flag: None)

    def serialize_with_config(self, config):
        return None if "serialise" in self.trt.faults else self.plan()


class Context:
    def __init__(self, engine):
        import onnxruntime

        self.engine, self.at = engine, {}
        self.session = onnxruntime.InferenceSession(engine.model.SerializeToString())

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        return (self.shape[0], 4)

    def set_tensor_address(self, name, address):
        self.at[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream
        if "run" in self.engine.trt.faults:
            return False
        name, output = (self.engine.get_tensor_name(i) for i in range(2))
        raw = ctypes.string_at(self.at[name], 4 * int(np.prod(self.shape)))
        (logits,) = self.session.run([output], {name: np.frombuffer(raw, np.float32).reshape(self.shape)})
        ctypes.memmove(self.at[output], logits.ctypes.data, logits.nbytes)
        return True


class Refitter:
    def __init__(self, engine, logger):
        self.engine, self.trt, self.set = engine, engine.trt, {}

    def get_all_weights(self):
        return self.engine.refittable

    def get_missing_weights(self):
        return []

    def get_weights_prototype(self, name):
        tensor = self.engine.initializer(name)
        return types.SimpleNamespace(dtype=kind_of(tensor)[0], size=int(np.prod(tensor.dims)))

    def set_named_weights(self, name, weights):
        self.set[name] = weights
        return True

    def refit_cuda_engine(self):
        self.trt.refits.append(sorted(self.set))
        for i, (name, weights) in enumerate(self.set.items()):
            if "refit" in self.trt.faults and i:
                return False  # after the first one
            if "crash" in self.trt.faults and i:
                raise RuntimeError("pybind11: an error inside TensorRT")
            if "stale" not in self.trt.faults or i:
                tensor = self.engine.initializer(name)
                array = weights.array.view(kind_of(tensor)[1]).reshape(tensor.dims)
                tensor.CopyFrom(numpy_helper.from_array(array, name))
        return True


class Network:
    def __init__(self, trt):
        self.trt, self.marked, self.num_layers = trt, [], 0

    def get_input(self, i):
        return types.SimpleNamespace(name="images", shape=(-1, 3, 4, 4), dtype=DataType.FLOAT)

    def mark_weights_refittable(self, name):
        known = name in {t.name for t in self.model.graph.initializer}
        self.marked += [name] if known else []
        return known


class Parser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        self.network.model = onnx.load(path)
        return True


class Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        return Network(self.trt)

    def create_builder_config(self):
        return types.SimpleNamespace(add_optimization_profile=lambda p: None, set_flag=lambda flag: None)

    def create_optimization_profile(self):
        return types.SimpleNamespace(set_shape=lambda *shapes: None)

    def build_serialized_network(self, network, settings):
        self.trt.builds += 1
        if "build" in self.trt.faults:
            self.logger.log(self.logger.Severity.ERROR, "out of memory")
            return None
        return Engine(self.trt, network.model, network.marked).plan()


class TensorRT(types.ModuleType):
    """The module `tensorrt`."""

    DataType, Weights, OnnxParser, Refitter = DataType, Weights, Parser, Refitter

    def __init__(self):
        super().__init__("tensorrt")
        self.__version__, self.faults, self.refits, self.builds = "11.4.1", set(), [], 0
        self.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", {"STRONGLY_TYPED": 0})
        self.BuilderFlag = enum.IntEnum("BuilderFlag", ["REFIT_INDIVIDUAL"])
        self.SerializationFlag = enum.Enum("SerializationFlag", ["EXCLUDE_WEIGHTS", "INCLUDE_REFIT"])
        severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR"])
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.LayerType = enum.IntEnum("LayerType", ["QUANTIZE"])
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})
        self.Builder = lambda logger: Builder(self, logger)
        self.Runtime = lambda logger: types.SimpleNamespace(
            deserialize_cuda_engine=lambda plan: Engine.load(self, plan)
        )


class Cuda:
    """The CUDA driver, with this process's memory for the GPU's; ``held`` is what was not given back."""

    def __init__(self):
        self.held = {}

    def _value(self, cell):
        return cell._obj

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.held["context"] = self._value(context).value = 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        del self.held["context"]
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.held["pushed"] = context
        return 0

    def cuCtxPopCurrent_v2(self, context):
        del self.held["pushed"]
        return 0

    def cuStreamCreate(self, stream, flags):
        self.held["stream"] = self._value(stream).value = 7
        return 0

    def cuStreamDestroy_v2(self, stream):
        del self.held["stream"]
        return 0

    def cuStreamSynchronize(self, stream):
        return 0 if stream.value == 7 else 400

    def cuMemAlloc_v2(self, at, size):
        room = ctypes.create_string_buffer(size.value)
        self._value(at).value = ctypes.addressof(room)
        self.held[ctypes.addressof(room)] = room
        return 0

    def cuMemFree_v2(self, at):
        del self.held[at.value]
        return 0

    def cuMemcpyHtoD_v2(self, at, source, size):
        ctypes.memmove(at.value, source.value, size.value)
        return 0

    cuMemcpyDtoH_v2 = cuMemcpyHtoD_v2
