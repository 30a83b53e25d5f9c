"""A device has no torch: every command that it needs runs without it, and installs by two documented lines."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gsforget
from gsforget.errors import RequestError
from gsforget.export.device.serve import Server

ROOT = Path(gsforget.__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "gsforget" / "export" / "device" / "requirements.txt"
ABSENT = ("torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "sklearn", "matplotlib", "triton")
LIMIT = 400e6  # bytes of a device's virtual environment


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def walk(run, chain, tmp_path, image):
    """What a device does, by run(*args) -> (status, document): install, infer, patch, infer, trust, build."""
    device = tmp_path / "device"
    status, document = run("apply", chain.artifact(0), "--device-dir", device, "--trust", chain.public)
    assert (status, document["sequence"]) == (0, 0), document
    status, document = run("infer", device, image)
    assert (status, len(document["images"][0]["top"])) == (0, 4), document
    status, document = run("apply", chain.patch(1), "--device-dir", device)
    assert (status, document["sequence"]) == (0, 1), document
    status, document = run("infer", device, image)
    assert {t["class"] for t in document["images"][0]["top"]} == {"bee", "cat", "dog"}
    status, document = run("keys", "trust", chain.public, "--device-dir", device)
    assert status == 0, document
    status, document = run("export", "--trt", chain.artifact(1), "--backend", "trt")
    assert (status, document["error"]["kind"]) == (2, "no_tensorrt"), document
    return device


def test_without_torch_or_onnx(chain, tmp_path, image):
    code = f"""
import io, json, sys
from contextlib import redirect_stdout
for name in {(*ABSENT, "tensorrt", "tensorrt_rtx")!r}:
    sys.modules[name] = None
from gsforget.__main__ import main
for line in sys.stdin:
    kept = io.StringIO()
    with redirect_stdout(kept):
        status = main([*json.loads(line), "--json"])
    print(json.dumps([status, json.loads(kept.getvalue())]), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*args):
        process.stdin.write(json.dumps([str(a) for a in args]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        walk(run, chain, tmp_path, image)
    finally:
        process.communicate(timeout=20)


def test_what_is_listed_is_what_is_imported():
    """The device's list names what the project's dependencies name, with the same lower bounds, and one runtime."""
    listed = {line.strip() for line in REQUIREMENTS.read_text().splitlines() if line.strip() and line[0] != "#"}
    project = (ROOT / "pyproject.toml").read_text()
    assert {line for line in listed if f'"{line}"' not in project and f'"{line};' not in project} == set()
    assert not [name for name in ABSENT if any(line.startswith((f"{name}>", f"{name}=")) for line in listed)]
    assert [line for line in listed if line.startswith("onnxruntime>=")]


@pytest.mark.slow
def test_a_fresh_virtual_environment(chain, tmp_path, image):
    """As documented: the list of requirements, then the project without its dependencies."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "gsforget", source / "gsforget", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = folder / "bin" / "gsforget"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
    subprocess.run([*pip, "--no-deps", source], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*args):
        done = subprocess.run(
            [command, *map(str, args), "--json"], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    assert [n for n in ABSENT if list((folder / "lib").glob(f"python*/site-packages/{n}"))] == []
    device = walk(run, chain, tmp_path, image)
    size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    assert size < LIMIT
    serving = subprocess.Popen(
        [command, "serve", device, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        lines = [serving.stdout.readline()]
        while lines[-1] not in ("}\n", ""):
            lines.append(serving.stdout.readline())
        assert json.loads("".join(lines))["sequence"] == 1
        with pytest.raises(RequestError, match="served already"):
            Server(device, port=0)
        assert run("apply", chain.patch(2), "--device-dir", device)[1]["serving"]["sequence"] == 2
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(20) == 0
    finally:
        serving.kill()
        serving.communicate()
