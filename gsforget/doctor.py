"""What this machine can do: each probe answers for itself, and says why where something is not available."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget import __version__
from gsforget.machine import available_memory, cpu_threads

if TYPE_CHECKING:
    import numpy as np

    from gsforget.data import ImageFolder
    from gsforget.source import Source


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, whether it is there, and its version or why it is not."""

    name: str
    available: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine_machine() -> list[Finding]:
    """Look at interpreter, libraries, GPUs, memory and disk.  Never raises for what is absent or broken."""
    return [_probe(name, look) for name, look in PROBES.items()]


def _probe(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except importlib.metadata.PackageNotFoundError as error:
        return Finding(name, False, f"not available: {error.name} is not installed")
    except Exception as error:  # a broken driver or library may raise anything, and must not hide the other probes
        reason = str(error).strip().splitlines()
        return Finding(name, False, f"not available: {reason[0] if reason else type(error).__name__}")


def _gpus() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("this torch was built without CUDA")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA GPU or driver")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} (sm{gpu.major}{gpu.minor}, {_size(gpu.total_memory)})" for gpu in found)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"


def _kernels() -> str:
    """Which backend computes the kernels here, why, and which others can."""
    import torch

    from gsforget.kernels import backend

    return backend.explain(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _compiled_kernels() -> str:
    """The kernels compiled ahead of time that are used on this GPU."""
    import torch

    from gsforget.errors import GsforgetError
    from gsforget.kernels.ahead.precompiled import VARIABLE, find, open_current

    named = os.environ.get(VARIABLE)
    if not named:
        raise RuntimeError(f"{VARIABLE} names no folder; kernels are compiled at their first use")
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise RuntimeError(f"there is no GPU to load those in {named} on")
    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    place = find(target, named)
    if place is None:
        raise RuntimeError(f"none for sm_{target} in {named}; gsforget kernels compile --target sm_{target}")
    try:
        found = open_current(place, target)
    except GsforgetError as error:
        raise RuntimeError(f"{error.message} {error.hint}") from error
    return f"{len(found['kernels'])} for sm_{target} in {place}, by Triton {found['triton']}"


def _triton() -> str:
    """Version, and whether kernels can be compiled here, which takes a GPU and a driver."""
    version = importlib.metadata.version("triton")
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except Exception as error:
        raise RuntimeError(f"{version} is installed, but finds no GPU to compile for ({_first_line(error)})") from error
    return f"{version}, compiles for {target.backend} {target.arch}"


def _onnxruntime() -> str:
    import onnxruntime

    return f"{onnxruntime.__version__}, built with {', '.join(onnxruntime.get_available_providers())}"


def _package(*names: str) -> Callable[[], str]:
    """Version of the first of these packages that is installed; nothing is imported."""

    def look() -> str:
        for name in names[1:]:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return importlib.metadata.version(names[0])

    return look


def _disk() -> str:
    temporary = Path(tempfile.gettempdir())
    return f"{_size(shutil.disk_usage('.').free)} free here, {_size(shutil.disk_usage(temporary).free)} in {temporary}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


PROBES: dict[str, Callable[[], str]] = {
    "Python": lambda: f"{platform.python_version()}, {platform.system()} {platform.machine()}",
    "gsforget": lambda: __version__,
    "torch": _torch,
    "CUDA GPU": _gpus,
    "kernels": _kernels,  # before Triton is imported, which settles whether it can interpret
    "compiled kernels": _compiled_kernels,
    "Triton": _triton,
    "timm": _package("timm"),
    "ONNX Runtime": _onnxruntime,
    "TensorRT": _package("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "TensorRT for RTX": _package("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "memory": lambda: f"{_size(available_memory())} free",
    "disk": _disk,
    "CPU threads": lambda: f"{cpu_threads()} of {os.cpu_count()}",
}


def examine_model(
    source: Source,
    data: ImageFolder,
    load: Callable[[Path], np.ndarray],
    skip_corrupt: bool = False,
    batch_size: int = 64,
) -> dict[str, Any]:
    """What a request against this model and data would find before it starts; nothing is changed.

    Args:
        load: reads and preprocesses one image file, float32 [C, H, W].

    Returns:
        ``groups`` (name and linear layers of each feed-forward network), ``images``, ``accuracy`` on the test split
        over the classes not forgotten so far (percent; of a face model the head's answers), and ``kappa``.

    Raises:
        RequestError: ``no_feed_forward``, ``corrupt_image``, ``class_order``, ``implausible_accuracy`` and the like.
    """
    import torch

    from gsforget.images import ImageSet
    from gsforget.lora.blocks import as_logits, find_feed_forward
    from gsforget.metrics import check_plausible, confusion_matrix, predict
    from gsforget.tasks.face.answers import FaceClassifier
    from gsforget.tasks.face.model import FaceModel

    model = FaceClassifier(source.model) if isinstance(source.model, FaceModel) else source.model
    images = ImageSet(data.test, load, skip_corrupt)
    images.check()
    groups = find_feed_forward(source.model, images.batch(torch.arange(1)))
    said: list[int] = []
    with torch.inference_mode():
        for part in torch.arange(len(images)).split(batch_size):
            said += predict(as_logits(model(images.batch(part)))).tolist()
    active = [i for i in range(len(source.names)) if i not in source.erased]
    found = check_plausible(confusion_matrix(images.labels, said, len(source.names)), active, source.names)
    return {
        "groups": [{"name": group.name, "linears": list(group.linears)} for group in groups],
        "images": {"train": len(data.train), data.test_name: len(images), "dropped": [str(p) for p in images.dropped]},
        "accuracy": found.accuracy,
        "kappa": found.kappa,
    }
