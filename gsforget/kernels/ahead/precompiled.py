"""Launches kernels that were compiled ahead of time, and leaves to Triton's own compiler what was not.

``launch(kernel, grid, *args, **constants)`` is what ``kernel[grid](*args, **constants)`` is, and falls back to it: where
no folder is named, where its content is refused (logged once), and where no compiled kernel fits the arguments.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsforget.errors import GsforgetError, RequestError
from gsforget.kernels.ahead.build import FILE, source_sha256
from gsforget.kernels.ahead.load import ALIGNMENT, FLOATS, Kernel, open_folder

VARIABLE = "GSFORGET_KERNEL_DIR"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_cooperative_grid")
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}  # fmt: skip
BITS = {"i32": 31, "i64": 63}

log = logging.getLogger("gsforget.kernels")


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Run a kernel on the current stream of its tensors' device, compiled ahead of time where it can be.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along up to three axes.
        args: tensors and numbers, in the order of the kernel's arguments.
        constants: constexpr arguments and options (``num_warps``, ``num_stages``) by name.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[grid](*args, **constants)
    elif device.index == torch.cuda.current_device():
        _launch_here(device, kernel, grid, args, constants)
    else:  # Triton, like the driver, launches on the current device, wherever the tensors are
        with torch.cuda.device(device):
            _launch_here(device, kernel, grid, args, constants)


def _launch_here(
    device: torch.device, kernel: Any, grid: Sequence[int], args: Sequence[Any], constants: Mapping[str, Any]
) -> None:
    store = store_for(device)
    if store is None or not store.run(kernel.fn.__module__, kernel.fn.__name__, grid, args, constants):
        kernel[grid](*args, **constants)


def find(target: int, folder: str | Path | None = None) -> Path | None:
    """The folder with a manifest for a GPU generation: ``FOLDER/sm_87``, or FOLDER itself; None where there is none.

    Args:
        folder: where to look; None: where ``GSFORGET_KERNEL_DIR`` says.
    """
    named = folder or os.environ.get(VARIABLE)
    if not named:
        return None
    return next((p for p in (Path(named) / f"sm_{target}", Path(named)) if (p / FILE).is_file()), None)


def open_current(place: Path, target: int) -> dict[str, Any]:
    """As `load.open_folder`, for kernels of the very sources that are installed here.

    Raises:
        RequestError, SafetyError: as `load.open_folder`, and kind ``kernel_stale`` for other sources.
    """
    manifest = open_folder(place, target)
    for module, digest in manifest["sources"].items():
        if source_sha256(module) != digest:
            raise RequestError(
                f"The kernels in {place} were compiled from another version of {module}.",
                f"Type gsforget kernels compile --target sm_{target}.",
                "kernel_stale",
            )
    return manifest


def store_for(device: torch.device, folder: str | Path | None = None) -> Store | None:
    """The compiled kernels for a GPU, verified once; None where there are none that may be used.

    Args:
        folder: where they are; None: where ``GSFORGET_KERNEL_DIR`` says.
    """
    named = str(folder or os.environ.get(VARIABLE) or "")
    if not named:
        return None
    return _store(torch.cuda.current_device() if device.index is None else device.index, named)


@functools.cache
def _store(index: int, named: str) -> Store | None:
    major, minor = torch.cuda.get_device_capability(index)
    target = 10 * major + minor
    place = find(target, named)
    if place is None:
        log.warning("no compiled kernels for sm_%s in %s: they are compiled at their first use", target, named)
        return None
    try:
        store = Store(place, open_current(place, target))
    except GsforgetError as error:
        log.warning("compiled kernels are not used: %s %s", error.message, error.hint)
        return None
    log.info("kernels of sm_%s: %s compiled ones from %s", target, len(store.entries), place)
    return store


class Store:
    """The kernels of a folder on one GPU; each is loaded when it is first launched.

    Args:
        manifest: of the folder, verified already.
        load: makes a launchable kernel of the folder and an entry.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], load: Callable[[Path, Any], Any] | None = None):
        self.folder, self.entries = folder, list(manifest["kernels"])
        self.loaded: dict[str, Any] = {}
        self._load = load or Kernel
        self._fitting: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def run(
        self, module: str, function: str, grid: Sequence[int], args: Sequence[Any], constants: Mapping[str, Any]
    ) -> bool:
        """Launch the kernel that fits; False where none does.  `args` and `constants` as for `launch`."""
        key = (module, function, *map(_sort, args), *constants.items())
        if key not in self._fitting:
            candidates = (e for e in self.entries if (e["module"], e["function"]) == (module, function))
            self._fitting[key] = next((e for e in candidates if fits(e, args, constants)), None)
            if self._fitting[key] is None:
                log.info("no compiled kernel fits a call of %s: it is compiled now", function)
        entry = self._fitting[key]
        if entry is None:
            return False
        if entry["name"] not in self.loaded:
            try:
                self.loaded[entry["name"]] = self._load(self.folder, entry)
            except GsforgetError as error:
                log.warning("%s is compiled at its first use: %s", entry["name"], error.message)
                self._fitting[key] = None
                return False
        passed = {n: v for (n, kind), v in zip(entry["signature"].items(), args) if kind != "constexpr"}
        x, y, z = (*grid, 1, 1)[:3]
        self.loaded[entry["name"]].launch((x, y, z), passed)
        return True


def fits(entry: Mapping[str, Any], args: Sequence[Any], constants: Mapping[str, Any]) -> bool:
    """Whether a compiled kernel computes this call: types, constants, alignment and options."""
    signature, options = entry["signature"], entry["options"]
    if any(options.get(name, value) != value for name, value in constants.items() if name in OPTIONS):
        return False
    given = dict(zip(signature, args)) | {k: v for k, v in constants.items() if k not in OPTIONS}
    if len(args) > len(signature) or set(given) != set(signature):
        return False
    for i, (name, kind) in enumerate(signature.items()):
        value = given[name]
        if kind == "constexpr":
            # A number among the arguments is fixed at 1 or not at all, as Triton does it, and as `_sort` tells apart.
            if entry["constants"][name] != value or (i < len(args) and value != 1):
                return False
        elif i >= len(args) or not _is(value, kind) or (name in entry["aligned"] and not _aligned(value)):
            return False
    return True


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, Tensor):
        return POINTERS.get(value.dtype) == kind
    if isinstance(value, float):
        return kind in FLOATS
    return kind in BITS and isinstance(value, int) and -(2 ** BITS[kind]) <= value < 2 ** BITS[kind]


def _aligned(value: Any) -> bool:
    return (value.data_ptr() if isinstance(value, Tensor) else value) % ALIGNMENT == 0


def _sort(value: Any) -> tuple[Any, ...]:
    """What decides which kernel fits, of one argument."""
    if isinstance(value, Tensor):
        return value.dtype, _aligned(value)
    if isinstance(value, int):
        return int, _aligned(value), value == 1, -(2**31) <= value < 2**31
    return (type(value),)
