"""Which builder makes an engine for which GPUs, settled in a sentence before any work is done."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from gsforget.errors import RequestError
from gsforget.export.device.gpu import own_gpu

MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
RTX_TARGETS = ("sm86", "sm89", "sm120")
ON_DEVICE = (
    "Those build a standard TensorRT engine on the device itself, from the ONNX file and without torch: "
    "gsforget export --onnx here, then gsforget export --trt MODEL.onnx there."
)


@dataclass(frozen=True)
class Plan:
    """A builder, ``trt`` or ``rtx``, and the GPUs that it builds for (``targets`` such as ``sm86``)."""

    backend: str
    targets: tuple[str, ...]

    @property
    def label(self) -> str:
        return "-".join((self.backend, *self.targets))


def choose(backend: str, targets: tuple[str, ...], precision: str = "fp32") -> Plan:
    """Settle on a builder.

    Args:
        backend: ``auto``, ``trt`` or ``rtx``.  ``auto`` takes standard TensorRT where it is installed, has a CUDA device,
            and the targets are that device or none; else TensorRT for RTX.
        targets: ``sm86`` and the like; empty means this machine's GPU (trt) or sm86, sm89 and sm120 (rtx; at fp8 without
            sm86, which has none).
        precision: of the model.

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
            f"pip install 'gsforget[{backend}]', or on a device pip install {MODULES[backend].replace('_', '-')}.",
            "no_tensorrt",
        )
    if precision == "fp8" and backend == "rtx" and not wanted:
        wanted = tuple(t for t in RTX_TARGETS if _has_fp8(t))
    plan = Plan("rtx", _rtx_targets(wanted)) if backend == "rtx" else Plan("trt", _trt_targets(wanted))
    without = [t for t in plan.targets if precision == "fp8" and not _has_fp8(t)]
    if without:
        raise RequestError(
            f"{', '.join(without)} cannot compute fp8: GPUs can from sm89 on.",
            "Type --targets sm89,sm120, or another --precision, such as int8.",
            "no_fp8",
        )
    return plan


def load_builder(backend: str) -> Any:
    """The builder's module.  Raises RequestError where it is installed and cannot be loaded."""
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError) as error:
        raise RequestError(
            f"{MODULES[backend].replace('_', '-')} is installed and cannot be loaded ({str(error).splitlines()[0][:200]}).",
            "Install it again, with the CUDA libraries that it names.",
            "no_tensorrt",
        ) from error


def own_target() -> str | None:
    """The compute capability of this machine's GPU, such as ``sm90``; None without one."""
    gpu = own_gpu()
    return gpu.target if gpu else None


def check_batch(batch: tuple[int, ...]) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of an engine.  Raises RequestError unless 1 <= MIN <= OPT <= MAX."""
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise RequestError(
            f"--batch {','.join(map(str, batch))} is not MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX.",
            "For example --batch 1,8,64.",
            "bad_batch",
        )
    return batch[0], batch[1], batch[2]


def _has_fp8(target: str) -> bool:
    return int(target.removeprefix("sm")) >= 89


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(MODULES[backend]) is not None


def _rtx_targets(wanted: tuple[str, ...]) -> tuple[str, ...]:
    trt = load_builder("rtx")
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
            "Type --backend rtx for RTX GPUs; or gsforget export --onnx here and gsforget export --trt MODEL.onnx there.",
            "no_cuda",
        )
    if wanted not in ((), (here,)):
        raise RequestError(
            f"Standard TensorRT builds for this machine's GPU ({here}) only, not for {', '.join(wanted)}.",
            f"Type --targets {here}, or --backend rtx for RTX GPUs.  {ON_DEVICE}",
            "bad_target",
        )
    return (here,)
