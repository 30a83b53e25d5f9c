"""The calls that make an engine from an ONNX file, for TensorRT 10, TensorRT 11 and TensorRT for RTX alike.

What a version offers is asked of the module itself, never of its version number.  Networks are strongly typed:
precision is what the ONNX says, quantisation included.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsforget.errors import GsforgetError, RequestError
from gsforget.export.device.files import write_file
from gsforget.export.device.gpu import own_gpu
from gsforget.export.device.targets import MODULES, Plan, load_builder

QUANTISED = {"INT8": "int8", "FP8": "fp8"}  # output type of a QUANTIZE layer, and what a model is called that has some
EVERY = 1.0  # seconds between two reports of progress
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a builder made.

    Attributes:
        builder, version: the module and its version.
        batch: smallest, usual and largest.
        gpu: name of the GPU that a standard engine was built on; None for engines built ahead of time.
        refittable: tensors that can be replaced in the engine later, by name.
        quantised: ``int8`` or ``fp8`` where the ONNX quantises, else None.
        input_type: TensorRT's name of the input's type, such as ``FLOAT``.
    """

    builder: str
    version: str
    batch: tuple[int, int, int]
    gpu: str | None
    refittable: list[str]
    quantised: str | None
    input_type: str

    def to_json(self) -> dict[str, Any]:
        """The fields of the sidecar."""
        return {
            "builder": self.builder,
            "builder_version": self.version,
            "batch": list(self.batch),
            "gpu": self.gpu,
            "refittable": self.refittable,
            "input_type": self.input_type,
        }


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    plan: Plan,
    batch: tuple[int, int, int],
    erasable: Sequence[str] = (),
    progress: Progress | None = None,
) -> Built:
    """Build an engine from an ONNX file with one input [N, C, H, W] and a dynamic N, and write it whole.

    Args:
        erasable: weights that erasures change; a standard engine lets them be replaced one by one where the builder
            offers that.  Engines for RTX are patched by bytes instead: their builder makes refittable engines only where
            a CUDA driver is, and the bytes must not depend on the machine that built them.
        progress: told, at most once a second, which phase the builder is in.

    Returns:
        What the sidecar should say.  The file holds the plan and nothing else.

    Raises:
        RequestError: the builder cannot parse the model, or the model's batch is fixed to another size.
        GsforgetError: the builder failed; its last message is repeated.
    """
    trt = load_builder(plan.backend)
    messages = _Messages()
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RequestError(
            f"{MODULES[plan.backend]} cannot read the model: {reasons[0] if reasons else 'no reason was given'}",
            "Use the ONNX file itself: gsforget export --onnx.",
            "not_buildable",
        )
    settings = builder.create_builder_config()
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *_shapes(tuple(images.shape), batch, onnx_path))
    settings.add_optimization_profile(profile)
    cache = refittable = None
    if plan.backend == "rtx":
        settings.num_compute_capabilities = len(plan.targets)
        for i, target in enumerate(plan.targets):
            settings.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    else:
        refittable = _mark_refittable(trt, network, settings, erasable)
        cache = _TimingCache(trt, settings)
    monitor = _watch(trt, settings, progress)
    with _ctrl_c_stops(monitor):
        engine = builder.build_serialized_network(network, settings)
    if monitor is not None and monitor.stopped is not None:
        raise monitor.stopped
    if engine is None:
        raise GsforgetError(
            f"{MODULES[plan.backend]} could not build the engine for {', '.join(plan.targets)}: {messages.last}",
            "Try fewer --targets, or use the ONNX file: gsforget export --onnx.",
            "build_failed",
        )
    write_file(engine_path, memoryview(engine))
    if cache is not None:
        cache.keep(settings, progress)
    gpu = own_gpu() if plan.backend == "trt" else None
    return Built(
        MODULES[plan.backend],
        trt.__version__,
        batch,
        gpu.name if gpu else None,
        refittable or [],
        _quantised(trt, network),
        images.dtype.name,
    )


def user_cache() -> Path:
    """The folder where this user's programs keep what can be made again."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gsforget"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsforget"


class _TimingCache:
    """Measured kernel times, kept per TensorRT version and GPU: the next build for this machine takes seconds.

    It holds times of kernels and no weights.  A file that cannot be read, or that the builder does not take, is as good as none.
    """

    def __init__(self, trt: Any, settings: Any):
        gpu = own_gpu()
        name = f"{trt.__version__}-{gpu.target}-{gpu.name}" if gpu else trt.__version__
        self.path = user_cache() / "tensorrt" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.timing"
        self.stored = b""
        self.used = False
        if not hasattr(settings, "create_timing_cache"):
            return
        with contextlib.suppress(OSError):  # on a device, no erasure stops at it
            self.stored = self.path.read_bytes() if self.path.is_file() else b""
        for raw in dict.fromkeys((self.stored, b"")):
            cache = settings.create_timing_cache(raw)
            if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=False):
                self.used = True
                return

    def keep(self, settings: Any, progress: Progress | None) -> None:
        cache = settings.get_timing_cache() if self.used else None
        content = bytes(cache.serialize()) if cache is not None else b""
        if content in (b"", self.stored):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, content)
        except OSError as error:
            if progress:
                progress(f"kernel times are not kept for the next build ({self.path}: {error.strerror})")


@dataclass
class _Messages:
    """What the builder complained about; the last complaint explains a failure."""

    errors: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        return self.errors[-1] if self.errors else "no reason was given"


def _shapes(shape: tuple[int, ...], batch: tuple[int, int, int], path: Path) -> list[tuple[int, ...]]:
    fixed = shape[0]
    if fixed >= 0 and set(batch) != {fixed}:
        raise RequestError(
            f"{path} takes batches of {fixed} and no others.", f"Type --batch {fixed},{fixed},{fixed}.", "bad_batch"
        )
    return [(n, *shape[1:]) for n in batch]


def _mark_refittable(trt: Any, network: Any, settings: Any, names: Sequence[str]) -> list[str]:
    """Let these weights be replaced in the engine; returns those that the builder agreed to."""
    flags = trt.BuilderFlag.__members__
    if "REFIT_INDIVIDUAL" not in flags or not hasattr(network, "mark_weights_refittable"):
        return []
    marked = [name for name in names if network.mark_weights_refittable(name)]
    if marked:
        settings.set_flag(flags["REFIT_INDIVIDUAL"])
    return marked


def _quantised(trt: Any, network: Any) -> str | None:
    """What the network quantises to, read from its QUANTIZE layers."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    types = {layer.get_output(0).dtype.name for layer in layers if layer.type == trt.LayerType.QUANTIZE}
    return next((QUANTISED[t] for t in sorted(types) if t in QUANTISED), None)


def _watch(trt: Any, settings: Any, progress: Progress | None) -> Any:
    """Let the builder report what it does; None where this version cannot.

    The builder calls from its own code, through which no exception may pass: it would end the process.  What happens
    in a report is therefore kept in ``stopped``, and the build is asked to end.
    """
    if not hasattr(trt, "IProgressMonitor") or not hasattr(settings, "progress_monitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._lock = threading.Lock()
            self._next = time.monotonic() + EVERY

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                with self._lock:
                    if progress and time.monotonic() >= self._next:
                        self._next = time.monotonic() + EVERY
                        progress(f"{phase_name.lower()} ({step + 1} of {self._steps.get(phase_name, '?')})")
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._steps.pop(phase_name, None)

    monitor = Monitor()
    settings.progress_monitor = monitor
    return monitor


@contextlib.contextmanager
def _ctrl_c_stops(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C ask the builder to end; raised inside one of its calls, it would end the process instead."""
    if monitor is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        monitor.stopped = KeyboardInterrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _logger(trt: Any, messages: _Messages) -> Any:
    """A logger that keeps errors for our own sentence and drops the rest."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.errors.append(text.strip())

    return Logger()
