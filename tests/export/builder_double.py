"""A double of TensorRT's builder that notes what is asked of it.  `test_device_builder.py` loads it."""

import enum
import types

import onnx


class Double(types.ModuleType):
    """A `tensorrt` that offers what one version documents and notes what is asked of it.

    ``strongly_typed`` is the number of that network flag, 1 in TensorRT 10 and 0 in 11; ``flags`` are the members of
    BuilderFlag.  Weights are those of an ONNX file's initializers, a layer per node.
    """

    def __init__(self, version, strongly_typed, flags):
        super().__init__("tensorrt")
        self.__version__ = version
        self.NetworkDefinitionCreationFlag = enum.IntEnum(
            "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": strongly_typed}
        )
        self.BuilderFlag = enum.IntEnum("BuilderFlag", {n: i for i, n in enumerate(flags)})
        self.LayerType = enum.IntEnum("LayerType", ["MATRIX_MULTIPLY", "QUANTIZE", "DEQUANTIZE"])
        self.DataType = enum.IntEnum("DataType", ["FLOAT", "HALF", "BF16", "INT8", "FP8"])
        severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.calls, self.given_cache, self.cache, self.fails = [], None, b"kernel times", None
        self.Builder = lambda logger: _Builder(self, logger)
        self.OnnxParser = _Parser


class _Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        self.trt.calls.append(("create_network", flags))
        return _Network(self.trt)

    def create_builder_config(self):
        return _Settings(self.trt)

    def create_optimization_profile(self):
        return types.SimpleNamespace(set_shape=lambda *a: self.trt.calls.append(("set_shape", *a)))

    def build_serialized_network(self, network, settings):
        self.trt.calls.append(("build", settings.profiles))
        if settings.progress_monitor is not None:
            settings.progress_monitor.phase_start("Building engine", None, 3)
            for step in range(3):
                if not settings.progress_monitor.step_complete("Building engine", step):
                    return None
            settings.progress_monitor.phase_finish("Building engine")
        if self.trt.fails:
            self.logger.log(self.logger.Severity.ERROR, self.trt.fails)
            return None
        return bytearray(b"ftrt plan of " + network.name.encode())


class _Settings:
    def __init__(self, trt):
        self.trt, self.profiles, self.progress_monitor, self._cache = trt, 0, None, None

    def add_optimization_profile(self, profile):
        self.profiles += 1

    def set_flag(self, flag):
        self.trt.calls.append(("set_flag", flag.name))

    def create_timing_cache(self, raw):
        self.trt.given_cache = raw
        return None if raw == b"damaged" else types.SimpleNamespace(serialize=lambda: memoryview(self.trt.cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class _Network:
    def __init__(self, trt):
        self.trt, self.name = trt, ""

    def get_input(self, i):
        return self.input

    def get_layer(self, i):
        return self.layers[i]

    @property
    def num_layers(self):
        return len(self.layers)

    def mark_weights_refittable(self, name):
        self.trt.calls.append(("mark", name))
        return name in self.weights


class _Parser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def get_error(self, i):
        return types.SimpleNamespace(desc=lambda: "no ONNX")

    def parse_from_file(self, path):
        network, trt = self.network, self.network.trt
        try:
            graph = onnx.load(path).graph
        except Exception:
            return False
        dims = [d.dim_value or -1 for d in graph.input[0].type.tensor_type.shape.dim]
        network.input = types.SimpleNamespace(name=graph.input[0].name, shape=tuple(dims), dtype=trt.DataType.FLOAT)
        network.weights = {t.name for t in graph.initializer}
        network.name = graph.name
        kinds = {"QuantizeLinear": (trt.LayerType.QUANTIZE, trt.DataType.INT8)}
        network.layers = [
            types.SimpleNamespace(type=kind, get_output=lambda i, t=dtype: types.SimpleNamespace(dtype=t))
            for kind, dtype in (
                kinds.get(n.op_type, (trt.LayerType.MATRIX_MULTIPLY, trt.DataType.FLOAT)) for n in graph.node
            )
        ]
        return True
