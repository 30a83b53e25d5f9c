"""Engines: TensorRT for RTX ahead of time and without a GPU, standard TensorRT for the GPU in this machine.

Both builders share their calls; what a version offers is asked of the module itself, never of its version number.
Networks are strongly typed: precision is what the ONNX says.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import write_file

MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
RTX_TARGETS = ("sm86", "sm89", "sm120")
ON_DEVICE = (
    "Those build a standard TensorRT engine on the device itself: export --onnx here and run "
    "trtexec --onnx=model.onnx --stronglyTyped there, or gsforget export --trt --backend trt where torch is installed."
)


@dataclass(frozen=True)
class Plan:
    """Which builder makes an engine for which GPUs (``targets`` such as ``sm86``)."""

    backend: str
    targets: tuple[str, ...]

    @property
    def label(self) -> str:
        return "-".join((self.backend, *self.targets))


@dataclass
class _Messages:
    """What the builder complained about; the last complaint explains a failure."""

    errors: list[str] = field(default_factory=list)


def choose(backend: str, targets: tuple[str, ...]) -> Plan:
    """Settle on a builder before any work is done.

    Args:
        backend: ``auto``, ``trt`` or ``rtx``.  ``auto`` takes standard TensorRT where it is installed, has a CUDA device,
            and the targets are that device or none; else TensorRT for RTX.
        targets: ``sm86`` and the like; empty means this machine's GPU (trt) or sm86, sm89 and sm120 (rtx).

    Raises:
        RequestError: not installed, no GPU, or a target that the builder cannot build for.
    """
    if backend not in ("auto", *MODULES):
        raise RequestError(f"There is no backend {backend!r}.", "Type --backend auto, trt or rtx.", "bad_backend")
    wanted = tuple(dict.fromkeys(t.strip().lower().replace("_", "") for t in targets))
    if backend == "auto":
        here = own_target() if _installed("trt") else None
        backend = "trt" if here and wanted in ((), (here,)) else "rtx"
    if not _installed(backend):
        raise RequestError(
            f"An engine needs {MODULES[backend].replace('_', '-')}, which is not installed.",
            f"pip install 'gsforget[{backend}]'" + ("" if backend == "rtx" else ", or --backend rtx."),
            "no_tensorrt",
        )
    return Plan("rtx", _rtx_targets(wanted)) if backend == "rtx" else Plan("trt", _trt_targets(wanted))


def own_target() -> str | None:
    """The compute capability of this machine's GPU, such as ``sm90``; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def check_batch(batch: tuple[int, ...]) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of an engine.  Raises RequestError unless 1 <= MIN <= OPT <= MAX."""
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise RequestError(
            f"--batch {','.join(map(str, batch))} is not MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX.",
            "For example --batch 1,8,64.",
            "bad_batch",
        )
    return batch[0], batch[1], batch[2]


def build_engine(onnx_path: Path, engine_path: Path, plan: Plan, batch: tuple[int, int, int]) -> dict[str, Any]:
    """Build an engine from an ONNX file with one input and a dynamic batch, and write it whole.

    Returns:
        ``builder``, ``builder_version`` and ``batch`` for the sidecar.  The file holds the plan and nothing else.

    Raises:
        RequestError: the builder cannot parse the model.
        GsforgetError: the builder failed; its last message is repeated.
    """
    trt = importlib.import_module(MODULES[plan.backend])
    messages = _Messages()
    builder = trt.Builder(_logger(trt, messages))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _logger(trt, messages))
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
    shapes = [(n, *tuple(images.shape)[1:]) for n in batch]
    profile.set_shape(images.name, *shapes)
    settings.add_optimization_profile(profile)
    if plan.backend == "rtx":
        settings.num_compute_capabilities = len(plan.targets)
        for i, target in enumerate(plan.targets):
            settings.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        why = messages.errors[-1] if messages.errors else "no reason was given"
        raise GsforgetError(
            f"{MODULES[plan.backend]} could not build the engine for {', '.join(plan.targets)}: {why}",
            "Try fewer --targets, or use the ONNX file: gsforget export --onnx.",
            "build_failed",
        )
    write_file(engine_path, bytes(engine))
    return {"builder": MODULES[plan.backend], "builder_version": trt.__version__, "batch": list(batch)}


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(MODULES[backend]) is not None


def _rtx_targets(wanted: tuple[str, ...]) -> tuple[str, ...]:
    trt = importlib.import_module(MODULES["rtx"])
    known = [n.lower() for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
    unknown = [t for t in wanted if t not in known]
    if unknown:
        raise RequestError(
            f"TensorRT for RTX does not build for {', '.join(unknown)} (it knows {', '.join(known)}).",
            ON_DEVICE,
            "bad_target",
        )
    return wanted or RTX_TARGETS


def _trt_targets(wanted: tuple[str, ...]) -> tuple[str, ...]:
    here = own_target()
    if here is None:
        raise RequestError(
            "Standard TensorRT builds for the GPU of the machine it runs on, and this machine has none.",
            "Type --backend rtx for RTX GPUs, or export --onnx and build on the device.",
            "no_cuda",
        )
    if wanted not in ((), (here,)):
        raise RequestError(
            f"Standard TensorRT builds for this machine's GPU ({here}) only, not for {', '.join(wanted)}.",
            f"Type --targets {here}, or --backend rtx for RTX GPUs.",
            "bad_target",
        )
    return (here,)


def _logger(trt: Any, messages: _Messages) -> Any:
    """A logger that keeps errors for our own sentence and drops the rest."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.errors.append(text.strip())

    return Logger()
