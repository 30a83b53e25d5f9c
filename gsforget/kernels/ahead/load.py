"""Opens a folder of compiled kernels, and launches one through the CUDA driver: no Triton, no compiler.

`precompiled` launches our own kernels this way where it can; a program on a device may do so without torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.kernels.ahead.build import FILE, FORMAT

DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ALIGNMENT = 16
INTEGERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
FLOATS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double}
HANDLE, SIZE = ctypes.c_void_p, ctypes.c_uint
PROTOTYPES = {  # driver API, without the int that each returns
    "cuModuleLoadData": (ctypes.POINTER(HANDLE), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(HANDLE), HANDLE, ctypes.c_char_p),
    "cuFuncSetAttribute": (HANDLE, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (HANDLE, *(SIZE,) * 7, HANDLE, ctypes.POINTER(HANDLE), ctypes.POINTER(HANDLE)),
    "cuLaunchCooperativeKernel": (HANDLE, *(SIZE,) * 7, HANDLE, ctypes.POINTER(HANDLE)),
}


def open_folder(folder: str | Path, target: int | None = None) -> dict[str, Any]:
    """The manifest of a folder whose files are all there and unchanged.

    Args:
        target: compute capability of the GPU at hand without its dot; None: do not ask.

    Raises:
        RequestError: kind ``no_manifest``, or ``kernel_target`` where the folder was made for another GPU.
        SafetyError: kind ``hash`` where a file is not the one that the manifest describes.
    """
    place = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads((place / FILE).read_bytes())
        made_for, files = manifest["target"], [(k["file"], k["sha256"]) for k in manifest["kernels"]]
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = "Make one: gsforget kernels compile --target sm_87."
        raise RequestError(f"{place} is no folder of compiled kernels.", again, "no_manifest") from error
    if not known:
        raise RequestError(f"{place} has a format of another gsforget.", "Compile the kernels again.", "no_manifest")
    if target is not None and made_for != target:
        raise RequestError(
            f"{place} was compiled for sm_{made_for}, and the GPU is sm_{target}.",
            f"Type gsforget kernels compile --target sm_{target}.",
            "kernel_target",
        )
    for name, sha256 in files:
        _read(place / name, sha256)
    return manifest


class Kernel:
    """One compiled kernel, loaded into the CUDA context that is current in this thread.

    Args:
        folder, entry: where the binary is, and its entry of the manifest.
        driver: libcuda; None: the system's.
    """

    def __init__(self, folder: str | Path, entry: Mapping[str, Any], driver: Any = None):
        if any(entry["scratch"].values()) or entry["cluster"] != 1:
            raise GsforgetError(f"{entry['name']} needs scratch memory or a cluster of blocks.", "", "kernel_launch")
        self.entry, self.driver = entry, driver if driver is not None else _libcuda()
        for name, types in PROTOTYPES.items():
            getattr(self.driver, name).argtypes = types
        self.image = _read(Path(folder) / entry["file"], entry["sha256"])
        self.module, self.function = HANDLE(), HANDLE()
        self._call("cuModuleLoadData", ctypes.byref(self.module), self.image)
        self._call("cuModuleGetFunction", ctypes.byref(self.function), self.module, entry["entry"].encode())
        self._call("cuFuncSetAttribute", self.function, DYNAMIC_SHARED, entry["shared"])

    def launch(self, grid: tuple[int, int, int], arguments: Mapping[str, Any], stream: int | None = None) -> None:
        """Launch on a stream, by default torch's current one.

        Args:
            grid: blocks along x, y and z.
            arguments: a tensor, address or number for every argument that was not fixed by compiling, by name.

        Raises:
            RequestError: kind ``kernel_argument`` where one is missing, too much, misaligned or out of its type's range.
            GsforgetError: kind ``kernel_launch`` with the driver's error number.
        """
        packed = self._pack(arguments)
        if stream is None:
            import torch

            stream = torch.cuda.current_stream().cuda_stream
        addresses = (HANDLE * len(packed))(*(ctypes.addressof(p) for p in packed))
        sizes = (*grid, self.entry["threads"], 1, 1, self.entry["shared"])
        # Programs that wait for each other run all at once, or none does.
        if self.entry["options"].get("launch_cooperative_grid"):
            self._call("cuLaunchCooperativeKernel", self.function, *sizes, stream, addresses)
        else:
            self._call("cuLaunchKernel", self.function, *sizes, stream, addresses, None)

    def _pack(self, arguments: Mapping[str, Any]) -> list[Any]:
        expected = [p["name"] for p in self.entry["parameters"] if p["type"] != "scratch"]
        if set(arguments) != set(expected):
            odd = ", ".join(sorted(set(arguments) ^ set(expected)))
            raise self._refused(f"is missing or too much: {odd}")
        return [self._value(p, arguments.get(p["name"], 0)) for p in self.entry["parameters"]]

    def _value(self, parameter: Mapping[str, Any], value: Any) -> Any:
        name, kind = parameter["name"], parameter["type"]
        if kind in FLOATS:
            return FLOATS[kind](value)
        number = value.data_ptr() if hasattr(value, "data_ptr") else int(value)
        if name in self.entry["aligned"] and number % ALIGNMENT:
            raise self._refused(f"{name} = {number} is no multiple of {ALIGNMENT}")
        if kind.startswith("*") or kind == "scratch":
            return ctypes.c_uint64(number)
        if kind not in INTEGERS:
            raise self._refused(f"{name} has the type {kind}, which cannot be passed")
        made = INTEGERS[kind](number)
        if made.value != number:
            raise self._refused(f"{name} = {number} does not fit {kind}")
        return made

    def _refused(self, reason: str) -> RequestError:
        known = "The manifest lists the parameters."
        return RequestError(f"An argument of {self.entry['name']}: {reason}.", known, "kernel_argument")

    def _call(self, name: str, *values: Any) -> None:
        status = getattr(self.driver, name)(*values)
        if status:
            raise GsforgetError(f"{name} of {self.entry['name']} failed with CUDA error {status}.", "", "kernel_launch")


def _libcuda() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RequestError("There is no NVIDIA driver here.", "Launch on a machine with a GPU.", "no_gpu") from error


def _read(path: Path, sha256: str) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SafetyError(
            f"{path} is not the file that its manifest describes.", "Compile or copy the folder again.", "hash"
        )
    return data
