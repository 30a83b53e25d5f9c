"""Which implementation of a kernel runs: Triton on a GPU, Triton's interpreter, or plain PyTorch.

The choice follows the device of the tensors, at the first call and not at import, so that importing asks no driver.
`GSFORGET_KERNELS` or an argument overrides it.  Every choice is logged once, with its reason.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING

from gsforget.errors import RequestError

if TYPE_CHECKING:
    import torch

BACKENDS = ("triton", "interpret", "torch")
VARIABLE = "GSFORGET_KERNELS"
OLDEST = (7, 5)  # compute capability of the oldest GPU that Triton compiles for

log = logging.getLogger("gsforget.kernels")


def choose(device: torch.device, asked: str | None = None) -> str:
    """The backend for tensors on a device: one of `BACKENDS`.

    Args:
        device: where the tensors are.
        asked: what a caller insists on; None: what `GSFORGET_KERNELS` says, else by device.

    Raises:
        RequestError: kind ``kernel_backend`` where the name is unknown, or what was asked for cannot run here.
    """
    asked = asked or os.environ.get(VARIABLE) or None
    if asked is None:
        backend, reason = _by_device(device)
    else:
        backend, reason = asked, "asked for"
        _check(backend, device)
    _say(backend, str(device.type), reason)
    return backend


def explain(device: torch.device) -> str:
    """One sentence for people: which backend a device gets, why, and which others can run.  Raises as ``choose``."""
    backend = choose(device)
    reason = f"{VARIABLE} asks for it" if os.environ.get(VARIABLE) else _by_device(device)[1]
    others = [b for b in available(device) if b != backend]
    return (
        f"{backend} on {device.type} ({reason}); {' and '.join(others) or 'no other'} can run{' too' if others else ''}"
    )


def available(device: torch.device) -> list[str]:
    """The backends that can run on a device here, the one that is taken by itself first."""
    first = _by_device(device)[0]
    can = [b for b in BACKENDS if b != first and _why_not(b, device) is None]
    return [first, *can]


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter in this process, which is settled when it is first imported."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET") == "1"
    import triton

    return triton.knobs.runtime.interpret


def _by_device(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "torch", "no GPU"
    missing = _why_not("triton", device)
    return ("triton", "a GPU") if missing is None else ("torch", missing)


def _check(backend: str, device: torch.device) -> None:
    if backend not in BACKENDS:
        raise RequestError(
            f"There is no kernel backend named {backend}.", f"Give one of {', '.join(BACKENDS)}.", "kernel_backend"
        )
    missing = _why_not(backend, device)
    if missing is None and backend == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the kernels do after this
    if missing is not None:
        raise RequestError(
            f"The kernel backend {backend} cannot run on {device}: {missing}.",
            f"Leave {VARIABLE} out, or set it to torch.",
            "kernel_backend",
        )


def _why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None where it can."""
    if backend == "torch":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "interpret":
        if "triton" in sys.modules and not interpreting():
            return "triton was imported before without TRITON_INTERPRET=1"
        return None
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    return _too_old(device.index)


@functools.cache
def _too_old(index: int | None) -> str | None:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None


@functools.cache
def _say(backend: str, device: str, reason: str) -> None:
    log.info("kernels on %s: %s (%s)", device, backend, reason)
