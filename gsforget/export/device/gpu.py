"""The NVIDIA GPUs of this machine, asked from the driver itself, so that no framework is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

MAJOR, MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name as the driver gives it, and its compute capability as a target, such as ``sm90``."""

    name: str
    target: str


def cuda_devices() -> int:
    """Number of NVIDIA GPUs; 0 without a driver."""
    driver, count = cuda_driver(), ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def own_gpu() -> Gpu | None:
    """The first GPU that this process may use; None without one."""
    driver = cuda_driver()
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    failed = (
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device),
    )
    return None if any(failed) else Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def cuda_driver() -> Any | None:
    """The CUDA driver's library, started; None where it is absent or does not start."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        if driver.cuInit(0) == 0:
            return driver
    return None
