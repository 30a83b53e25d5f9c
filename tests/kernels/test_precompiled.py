"""Our kernels find what was compiled ahead of time: every launch of a step is shipped, and what is not is compiled."""

import contextlib
import hashlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from gsforget.errors import GsforgetError, RequestError
from gsforget.kernels.ahead import precompiled, shipped
from gsforget.kernels.ahead.precompiled import VARIABLE, Store, find, fits, open_current
from gsforget.kernels.group_prox.fused import ProximalAdam
from gsforget.kernels.lora_ffn import Layer, dispatch, lora_ffn, triton_path

torch.set_num_threads(1)
FUSED = dict.fromkeys(dispatch.DEFAULT, "fused")
VENDOR = dict.fromkeys(dispatch.DEFAULT, "vendor")


@pytest.fixture
def launched(monkeypatch):
    """Names of the shipped kernels that calls find, for sm_87; nothing is computed."""
    kernels = [vars(spec) for spec in shipped(87)]
    found = []

    def launch(kernel, grid, *args, **constants):
        function = kernel.fn.__name__
        names = [k["name"] for k in kernels if k["function"] == function and fits(k, args, constants)]
        assert len(names) == 1, (function, names, constants)
        found.append(names[0])

    monkeypatch.setattr(triton_path, "launch", launch)
    monkeypatch.setattr(precompiled, "launch", launch)
    monkeypatch.setattr(triton_path, "_upcast", lambda x: False)
    monkeypatch.setattr(dispatch, "target", lambda device: 87)
    return found


@pytest.mark.parametrize(
    ("ways", "gated"), [(dispatch.DEFAULT, False), (FUSED, False), (VENDOR, False), (VENDOR, True)]
)
@pytest.mark.parametrize("rank", [1, 8, 16, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_a_vit(launched, ways, gated, rank, dtype):
    def layer(fan_in, fan_out):
        a, b = torch.zeros(rank, fan_in, dtype=dtype), torch.zeros(fan_out, rank, dtype=dtype)
        weight, bias = torch.zeros(fan_out, fan_in, dtype=dtype), torch.zeros(fan_out, dtype=dtype)
        return Layer(weight, bias, a.requires_grad_(), b.requires_grad_())

    x = torch.zeros(2, 197, 192, dtype=dtype, requires_grad=True)
    firsts = [layer(192, 384) for _ in range(1 + gated)]
    with dispatch.forced(**ways):
        lora_ffn(x, firsts, layer(384, 192), "silu" if gated else "gelu", backend="interpret").sum().backward()
    kinds = {name.split("_")[2] for name in launched}
    assert kinds >= {"skinny", "gradient", "product" if ways["up"] == "fused" else "activate"}


@pytest.mark.parametrize(("metric", "programs", "length"), [("adam", 11, 64), ("euclidean", 1, 64), ("adam", 5, 63)])
def test_the_proximal_step(launched, metric, programs, length):
    lengths = torch.full((3,), length)
    prox = ProximalAdam(lengths, lengths.double(), metric=metric, backend="interpret", programs=programs)
    prox.backend = "triton"
    flat, grad = torch.zeros(2, 3 * length)
    prox.step(flat, grad.clone(), torch.ones(3, dtype=torch.bool), 1e-3, torch.tensor(1e-4, dtype=torch.float64))
    ways = "single" if programs == 1 else "shared"
    assert launched == [f"group_prox_{metric}_{ways}{'_odd' if length % 4 else ''}"]


SIGNATURE = {"x": "*bf16", "factor": "fp32", "N": "i32", "big": "i64", "stride": "constexpr", "BLOCK": "constexpr"}
ENTRY = {
    "name": "scale", "module": "far", "function": "scale_kernel", "signature": SIGNATURE, "aligned": ["x", "N"],
    "constants": {"stride": 1, "BLOCK": 256}, "options": {"num_warps": 4}, "file": "scale.cubin",
    "sha256": hashlib.sha256(b"binary").hexdigest(),
}  # fmt: skip
CONSTANTS = {"BLOCK": 256, "num_warps": 4, "num_stages": 3}


def arguments(dtype=torch.bfloat16, offset=0, n=64, big=2**40, stride=1):
    return [torch.zeros(128, dtype=dtype)[offset:], 0.25, n, big, stride]


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        (arguments(torch.float16), CONSTANTS),
        (arguments(offset=1), CONSTANTS),
        (arguments(n=63), CONSTANTS),
        (arguments(n=2**31), CONSTANTS),
        (arguments(stride=2), CONSTANTS),
        (arguments(), CONSTANTS | {"BLOCK": 128}),
        (arguments(), CONSTANTS | {"num_warps": 8}),
        (arguments(), {"BLOCK": 256, "OTHER": 1}),
        (arguments()[:-1], CONSTANTS),
    ],
    ids=["type", "address", "multiple", "too long", "stride", "constant", "warps", "unknown", "lacking"],
)
def test_what_was_not_compiled_does_not_fit(args, constants):
    assert fits(ENTRY, arguments(), CONSTANTS)
    assert not fits(ENTRY, args, constants)


class Loaded:
    """What is loaded and launched of a folder."""

    def __init__(self, refuse=False):
        self.refuse, self.loads, self.launches = refuse, [], []

    def __call__(self, folder, entry):
        self.loads.append(entry["name"])
        if self.refuse:
            raise GsforgetError("the driver refuses it")
        return SimpleNamespace(launch=lambda grid, passed: self.launches.append((grid, passed)))


def test_a_kernel_is_loaded_once_and_gets_its_arguments_by_name(tmp_path):
    loaded = Loaded()
    store = Store(tmp_path, {"kernels": [ENTRY]}, loaded)
    args = arguments()
    for n in (16, 32):
        assert store.run("far", "scale_kernel", (3,), [*args[:2], n, *args[3:]], CONSTANTS)
    assert loaded.loads == ["scale"]
    assert [(g, p["N"], list(p)) for g, p in loaded.launches] == [
        ((3, 1, 1), n, ["x", "factor", "N", "big"]) for n in (16, 32)
    ]
    assert not store.run("far", "scale_kernel", (3,), arguments(n=17), CONSTANTS)
    assert not store.run("far", "other_kernel", (3,), args, CONSTANTS)
    assert len(loaded.launches) == 2


def test_a_binary_that_the_driver_refuses_is_left_to_the_compiler(tmp_path, caplog):
    loaded = Loaded(refuse=True)
    store = Store(tmp_path, {"kernels": [ENTRY]}, loaded)
    assert not any(store.run("far", "scale_kernel", (3,), arguments(), CONSTANTS) for _ in range(2))
    assert loaded.loads == ["scale"]
    assert [r.getMessage() for r in caplog.records] == ["scale is compiled at its first use: the driver refuses it"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for sm_87, of one kernel whose source is importable."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "far.py").write_text("SOURCE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "sources"))
    place = tmp_path / "sm_87"
    place.mkdir()
    sources = {"far": hashlib.sha256(b"SOURCE = 1\n").hexdigest()}
    content = {"format": 1, "target": 87, "triton": "3.6.0", "sources": sources, "kernels": [ENTRY]}
    (place / "manifest.json").write_text(json.dumps(content))
    (place / "scale.cubin").write_bytes(b"binary")
    return place


def test_kernels_of_another_source_are_refused(folder):
    assert open_current(folder, 87)["triton"] == "3.6.0"
    (folder.parent / "sources" / "far.py").write_text("SOURCE = 2\n")
    with pytest.raises(RequestError, match="another version of far") as told:
        open_current(folder, 87)
    assert told.value.kind == "kernel_stale"


def test_where_a_folder_is_looked_for(folder, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find(87) is None
    assert find(87, folder.parent) == find(87, folder) == folder
    monkeypatch.setenv(VARIABLE, str(folder.parent))
    assert find(87) == folder
    assert find(90) is None


class Jitted:
    """A kernel of Triton's, as far as a launch goes."""

    def __init__(self):
        self.fn = SimpleNamespace(__module__="far", __name__="scale_kernel")
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append(constants["BLOCK"])


class OnGpu(torch.Tensor):
    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """torch sees a Jetson Orin; gives what is loaded and launched."""
    loaded = Loaded()
    precompiled._store.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(precompiled, "Kernel", loaded)
    yield loaded
    precompiled._store.cache_clear()


def call(kernel, block=256, on_gpu=True):
    x, *rest = arguments()
    precompiled.launch(kernel, (3,), x.as_subclass(OnGpu) if on_gpu else x, *rest, **CONSTANTS | {"BLOCK": block})


def test_launch_takes_what_is_compiled_and_else_the_compiler(folder, gpu, monkeypatch, caplog):
    kernel = Jitted()
    monkeypatch.delenv(VARIABLE, raising=False)
    call(kernel, 256)  # no folder is named
    monkeypatch.setenv(VARIABLE, str(folder.parent))
    call(kernel, 256)
    assert len(gpu.launches) == len(kernel.launches) == 1
    call(kernel, 512)
    call(kernel, 1024, on_gpu=False)
    assert kernel.launches == [256, 512, 1024]
    assert not caplog.records


@pytest.mark.parametrize("named", [False, True])
def test_a_launch_is_on_the_device_of_its_tensors(folder, gpu, monkeypatch, named):
    """Whichever is the current one, to which it is given back."""
    current, seen = [1], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setenv(VARIABLE, str(folder.parent) if named else "")
    kernel = Jitted()
    kernel.launches = gpu.launches = SimpleNamespace(append=lambda _: seen.append(current[0]))
    call(kernel)
    assert (seen, current) == ([0], [1])


def test_a_refused_folder_is_said_once_and_compiled_around(folder, gpu, monkeypatch, caplog):
    (folder / "scale.cubin").write_bytes(b"another")
    monkeypatch.setenv(VARIABLE, str(folder))
    kernel = Jitted()
    with caplog.at_level(logging.WARNING, "gsforget.kernels"):
        for _ in range(3):
            call(kernel)
    assert len(kernel.launches) == 3
    assert not gpu.loads
    (record,) = caplog.records
    assert "compiled kernels are not used" in record.getMessage()
