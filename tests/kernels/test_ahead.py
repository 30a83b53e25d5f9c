"""Kernels compiled ahead of time: what lands in the folder, what is refused, and that all of them fit their GPUs.

This process interprets Triton, and the compiling processes do not.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from gsforget.errors import GsforgetError, RequestError
from gsforget.kernels import ahead
from gsforget.kernels.ahead import build, targets, worker
from gsforget.kernels.ahead.load import open_folder
from gsforget.kernels.spec import Spec

SMALL = "lora_ffn_skinny_[pq]_fp16_r16"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("ahead") / "new" / "sm_87"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # must not reach what compiles
        manifest = ahead.compile_kernels(87, out, SMALL, lambda done, total, _entry: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    return out, manifest


def test_the_folder_holds_the_binaries_that_its_manifest_describes(made):
    out, manifest = made
    assert open_folder(out, 87) == manifest
    assert {p.name for p in out.iterdir()} == {ahead.FILE, *(k["file"] for k in manifest["kernels"])}
    assert [p.name for p in out.parent.iterdir()] == ["sm_87"]  # nothing temporary is left
    assert (manifest["target"], manifest["triton"]) == (87, triton.__version__)
    for entry in manifest["kernels"]:
        binary = (out / entry["file"]).read_bytes()
        assert hashlib.sha256(binary).hexdigest() == entry["sha256"]
        assert binary.startswith(b"\x7fELF")
        assert entry["entry"].encode() in binary
        assert str(Path(build.__file__).parents[3]).encode() not in binary  # where it was compiled is nobody's business
    source = Path(build.__file__).parents[1] / "lora_ffn" / "kernels.py"
    assert manifest["sources"] == {"gsforget.kernels.lora_ffn.kernels": hashlib.sha256(source.read_bytes()).hexdigest()}


def test_entries_say_what_a_launch_needs(made):
    _, manifest = made
    for entry in manifest["kernels"]:
        arguments = [name for name, kind in entry["signature"].items() if kind != "constexpr"]
        own = [p for p in entry["parameters"] if p["type"] != "scratch"]
        assert [p["name"] for p in own] == arguments
        assert all(p["bytes"] == (8 if p["type"].startswith("*") else 4) for p in own)
        assert entry["threads"] == 32 * entry["options"]["num_warps"]
        assert 16 <= entry["registers"] <= 255
        assert (entry["stack"], entry["local"]) == (0, 0)
        assert 0 < entry["shared"] <= manifest["shared_limit"]


def test_registers_are_those_that_the_assembler_reports(made):
    out, manifest = made
    for entry in manifest["kernels"]:
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", out / entry["file"]]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"REG:{entry['registers']} STACK:{entry['stack']} " in told


def test_a_folder_that_is_there_stays_as_it_is(made, tmp_path):
    out, _ = made
    with pytest.raises(RequestError, match="exists already"):
        ahead.compile_kernels(87, out, SMALL)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        ahead.compile_kernels(87, tmp_path / "file", SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_kernel_that_fails_leaves_nothing(monkeypatch, tmp_path):
    spec = Spec("odd", "gsforget.kernels.lora_ffn.kernels", "skinny_kernel", {"x": "*fp16"}, {})
    monkeypatch.setattr(build, "shipped", lambda _target, _names: [spec])
    with pytest.raises(GsforgetError, match="odd does not compile") as told:
        ahead.compile_kernels(87, tmp_path / "out")
    assert (told.value.kind, told.value.exit_status) == ("kernel_resources", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"local": 8}, "spills"),
        ({"shared": 99 * 1024 + 1}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
    ],
)
def test_what_does_not_fit_a_chip(needs, said):
    entry = {"stack": 0, "local": 0, "shared": 99 * 1024, "tensor_memory": 512, **needs}
    reasons = list(build.exceeds(entry, targets.TARGETS[86]))
    assert len(reasons) == (said is not None)
    assert all(said in reason for reason in reasons)


def test_a_target_that_ptxas_does_not_know(monkeypatch, tmp_path):
    """Triton's ptxas for the older GPUs stands in for a release that has not heard of the newest one."""
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(BINARIES / "ptxas"))
    told = subprocess.run([BINARIES / "ptxas", "--help"], capture_output=True, text=True, check=True).stdout
    if "'sm_110a'" in told:
        pytest.skip("this ptxas knows sm_110")
    with pytest.raises(RequestError, match="does not know sm_110") as caught:
        ahead.compile_kernels(110, tmp_path / "out", SMALL)
    assert caught.value.kind == "kernel_target"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_interprets_says_so():
    with pytest.raises(GsforgetError, match="interpreter") as caught:
        worker.toolchain(87)  # this process does
    assert "TRITON_INTERPRET" in caught.value.hint


def test_names_of_targets():
    assert [t.number for t in targets.read_targets("sm_87, 90,SM86,sm_87")] == [87, 90, 86]
    for text in ("sm_88", "", "87,", "gpu", "sm_87a"):
        with pytest.raises(RequestError, match="no target") as caught:
            targets.read_targets(text)
        assert "sm_87" in caught.value.hint


def test_every_name_is_a_file_name_and_appears_once():
    for number in targets.TARGETS:
        names = [s.name for s in ahead.shipped(number)]
        assert len(set(names)) == len(names)
        assert all(name.replace("_", "").isalnum() for name in names)
    with pytest.raises(RequestError, match="No kernel for sm_87"):
        ahead.shipped(87, "nothing_*")


@pytest.mark.slow
@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_kernel_fits_every_target(target, tmp_path):
    """Raises where one spills or asks for too much; 110 where the Triton at hand can."""
    try:
        manifest = ahead.compile_kernels(target, tmp_path / "out")
    except RequestError as error:
        if (target, error.kind) != (110, "kernel_target"):
            raise
        pytest.skip(error.message)
    assert len(manifest["kernels"]) == len(ahead.shipped(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 120])
def test_the_proximal_step_loads_and_stores_four_numbers_at_once(target, tmp_path):
    """In the machine code, where the table of groups allows it; alone what is per group is read by itself."""
    ahead.compile_kernels(target, tmp_path / "out", "group_prox_*")
    for name in ("group_prox_adam_single", "group_prox_adam_single_odd"):
        command = [BINARIES / "cuobjdump", "--dump-sass", tmp_path / "out" / f"{name}.cubin"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        wide, narrow = (len(re.findall(kind, code)) for kind in (r"\b(?:LDG|STG)\.E\.128", r"\b(?:LDG|STG)\.E "))
        assert (wide == 0, narrow > 10) == ((True, True) if name.endswith("odd") else (False, False))


def test_asking_for_a_target_imports_no_triton():
    code = "import sys; from gsforget.kernels import ahead; ahead.read_targets('87'); print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
