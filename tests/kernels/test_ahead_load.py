"""A folder of compiled kernels is checked when it is opened, and a launch passes what the manifest says.

libcuda is a double behind C calls: it reads each parameter from the address that it was given, as the driver does.
"""

import ctypes
import hashlib
import json
import types

import pytest
import torch

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.kernels.ahead.load import PROTOTYPES, Kernel, open_folder

IMAGE = b"\x7fELF of a kernel"
KINDS = {"x": "*fp16", "M": "i32", "stride": "i64", "rate": "fp32", "scratch0": "scratch"}
READ = {"*fp16": ctypes.c_uint64, "scratch": ctypes.c_uint64, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


@pytest.fixture
def folder(tmp_path):
    entry = {
        "name": "k", "file": "k.cubin", "sha256": hashlib.sha256(IMAGE).hexdigest(), "entry": "kernel_of_k",
        "threads": 128, "cluster": 1, "shared": 70000, "scratch": {"global": 0, "profile": 0}, "aligned": ["x", "stride"],
        "options": {},
        "parameters": [{"name": n, "type": t} for n, t in KINDS.items()],
    }  # fmt: skip
    (tmp_path / "k.cubin").write_bytes(IMAGE)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "target": 87, "kernels": [entry]}))
    return tmp_path


class Driver(types.SimpleNamespace):
    """libcuda with one function; `status` is what a launch returns."""

    def __init__(self, status=0):
        self.status, self.seen = status, {}
        for name, arguments in PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, f"_{name}")))

    def _cuModuleLoadData(self, module, image):
        self.seen["image"] = image
        module[0] = 11
        return 0

    def _cuModuleGetFunction(self, function, module, name):
        self.seen["function"] = module, name
        function[0] = 22
        return 0

    def _cuFuncSetAttribute(self, function, attribute, value):
        self.seen["attribute"] = function, attribute, value
        return 0

    def _cuLaunchKernel(self, function, *rest):
        *sizes, stream, addresses, extra = rest
        types = [READ.get(kind, ctypes.c_float) for kind in KINDS.values()]
        values = [ctypes.cast(addresses[i], ctypes.POINTER(t))[0] for i, t in enumerate(types)]
        self.seen["launch"] = function, sizes, stream, values, bool(extra)
        return self.status

    def _cuLaunchCooperativeKernel(self, *arguments):
        self.seen["together"] = True
        return self._cuLaunchKernel(*arguments, None)


def load(folder, driver=None):
    return Kernel(folder, open_folder(folder)["kernels"][0], driver or Driver())


def test_a_launch_passes_every_parameter_in_order_and_type(folder):
    driver = Driver()
    x = torch.zeros(64, dtype=torch.float16)
    load(folder, driver).launch((3, 2, 1), {"rate": 0.5, "M": -7, "x": x, "stride": 2**40}, stream=99)
    assert driver.seen["image"] == IMAGE
    assert driver.seen["function"] == (11, b"kernel_of_k")
    assert driver.seen["attribute"] == (22, 8, 70000)
    assert driver.seen["launch"] == (22, [3, 2, 1, 128, 1, 1, 70000], 99, [x.data_ptr(), -7, 2**40, 0.5, 0], False)


def test_programs_that_wait_for_each_other_are_launched_together(folder):
    driver = Driver()
    entry = open_folder(folder)["kernels"][0] | {"options": {"launch_cooperative_grid": True}}
    Kernel(folder, entry, driver).launch((3, 2, 1), {"x": 32, "M": 1, "stride": 16, "rate": 0.5}, stream=99)
    assert driver.seen["together"]
    assert driver.seen["launch"] == (22, [3, 2, 1, 128, 1, 1, 70000], 99, [32, 1, 16, 0.5, 0], False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"M": 2**31}, "does not fit i32"),
        ({"x": 1000}, "no multiple of 16"),
        ({"stride": 8}, "no multiple of 16"),
        ({"BM": 64}, "too much: BM"),
        ({"x": None}, "missing"),
    ],
)
def test_wrong_arguments_never_reach_the_driver(folder, changed, said):
    driver = Driver()
    arguments = {k: v for k, v in {"x": 4096, "M": 1, "stride": 16, "rate": 1.0, **changed}.items() if v is not None}
    with pytest.raises(RequestError, match=said):
        load(folder, driver).launch((1, 1, 1), arguments, stream=0)
    assert "launch" not in driver.seen


def test_errors_of_the_driver_are_told(folder):
    with pytest.raises(GsforgetError, match="cuLaunchKernel of k failed with CUDA error 700"):
        load(folder, Driver(700)).launch((1, 1, 1), {"x": 0, "M": 1, "stride": 16, "rate": 1.0}, stream=0)


def test_a_changed_or_missing_binary_is_refused(folder):
    kernel = open_folder(folder, 87)["kernels"][0]
    (folder / "k.cubin").write_bytes(IMAGE + b"!")
    for act in (lambda: open_folder(folder), lambda: Kernel(folder, kernel, Driver())):
        with pytest.raises(SafetyError, match=r"k\.cubin is not the file"):
            act()
    (folder / "k.cubin").unlink()
    with pytest.raises(SafetyError, match=r"k\.cubin is not the file"):
        open_folder(folder)


def test_a_folder_for_another_gpu_or_without_a_manifest(folder, tmp_path_factory):
    with pytest.raises(RequestError, match="compiled for sm_87, and the GPU is sm_90"):
        open_folder(folder, 90)
    with pytest.raises(RequestError, match="no folder of compiled kernels"):
        open_folder(tmp_path_factory.mktemp("empty"))
    (folder / "manifest.json").write_text('{"format": 2, "target": 87, "kernels": []}')
    with pytest.raises(RequestError, match="another gsforget"):
        open_folder(folder)


def test_scratch_memory_is_refused(folder):
    entry = open_folder(folder)["kernels"][0] | {"scratch": {"global": 64, "profile": 0}}
    with pytest.raises(GsforgetError, match="scratch"):
        Kernel(folder, entry, Driver())
