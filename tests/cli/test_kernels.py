"""`gsforget kernels` as typed: lists, a small compilation for two GPUs, refusals."""

import json
import os
import subprocess
import sys

import pytest

from gsforget.__main__ import main

NAME = "lora_ffn_skinny_q_fp16_r16"


def gsforget(*args):
    return subprocess.run([sys.executable, "-m", "gsforget", *args], capture_output=True, text=True, env=os.environ)


def test_targets_and_kernels_are_listed(capsys):
    assert main(["kernels", "list", "--json"]) == 0
    printed = capsys.readouterr()
    targets = {t["name"]: t for t in json.loads(printed.out)["targets"]}
    assert {"sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120"} == set(targets)
    assert targets["sm_87"]["shared_limit"] == 163 * 1024
    assert "Jetson Orin" in printed.err
    assert main(["kernels", "list", "--target", "sm_75", "--json"]) == 0
    printed = capsys.readouterr()
    (found,) = json.loads(printed.out)["targets"]
    assert len(found["kernels"]) == targets["sm_75"]["kernels"]
    assert NAME in [k["name"] for k in found["kernels"]]
    assert not [k for k in found["kernels"] if "bf16" in k["name"]]  # that generation has none
    assert "gsforget kernels compile --target sm_75" in printed.err


def test_two_targets_are_compiled_with_one_document(tmp_path):
    done = gsforget("kernels", "compile", "--target", "sm_87,sm_90", "--out", str(tmp_path), "--names", NAME, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [t["target"] for t in document["targets"]] == [87, 90]
    for made in document["targets"]:
        assert [k["name"] for k in made["kernels"]] == [NAME]
        assert set(os.listdir(made["folder"])) == {"manifest.json", f"{NAME}.cubin"}
    assert "no registers spilled" in done.stderr
    assert "Next:" in done.stderr
    assert gsforget("kernels", "compile", "--target", "87", "--out", str(tmp_path), "--names", NAME).returncode == 2


@pytest.mark.parametrize(
    ("args", "kind", "hint"),
    [
        (("--target", "sm_88"), "kernel_target", "sm_87"),
        (("--target", "sm_87", "--names", "nothing*"), "no_kernel", "gsforget kernels list"),
        ((), "usage", "--help"),
    ],
)
def test_refusals(args, kind, hint, capsys, tmp_path):
    assert main(["kernels", "compile", "--out", str(tmp_path / "out"), "--json", *args]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == kind
    assert hint in error["hint"]
    assert not (tmp_path / "out").exists()
