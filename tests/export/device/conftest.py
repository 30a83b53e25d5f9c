"""A chain of erasures whose packages the tests of the device room apply, tamper with and interrupt."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def _load(name):
    """A module of this folder; tests may import it as ``device_NAME``."""
    spec = importlib.util.spec_from_file_location(f"device_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


World = _load("world").World
_load("helpers")
_load("tensorrt_double")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No waiting for the disk; whether flushes come where they must is tested by `test_kills.py`."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def start_command():
    """start_command("serve", …): the process of a gsforget command that Ctrl-C reaches; killed at the end."""
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "gsforget", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        if not process.stdout.closed:
            process.communicate()


@pytest.fixture(scope="session")
def make_world():
    """make_world(root, …): a `World`, see world.py."""
    return World


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Two erasures of a small fp32 model, with its packages written; read-only."""
    made = World(tmp_path_factory.mktemp("chain"))
    made.erase(), made.erase()
    for sequence in (1, 2):
        made.patch(sequence)
        made.full(sequence)
    return made


@pytest.fixture(scope="session")
def installed(chain, tmp_path_factory):
    from gsforget.export.device.apply import apply

    root = tmp_path_factory.mktemp("installed") / "device"
    apply(chain.artifact(0), root, trust=chain.public)
    return root


@pytest.fixture
def device(installed, tmp_path):
    """A device folder of its own with the original model of `chain` installed, and its key trusted."""
    shutil.copytree(installed, tmp_path / "device")
    return tmp_path / "device"


@pytest.fixture
def patched(chain, device):
    """The device after the first patch."""
    from gsforget.export.device.apply import apply

    apply(chain.root / "patch-0001-fp32.gsf", device)
    return device


@pytest.fixture
def patch1(chain):
    return chain.root / "patch-0001-fp32.gsf"


@pytest.fixture
def patch2(chain):
    return chain.root / "patch-0002-fp32.gsf"
