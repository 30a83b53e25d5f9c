"""`apply` killed at every step that touches the disk: never a torn file loaded, never the old model after the intent.

The faults are injected into the calls of the operating system.  A kill leaves what was not flushed half written, as a power
cut does; from then on no call gets through, so that nothing cleans up.  `benchmarks/device_kills.py` kills real processes.
"""

import builtins
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gsforget.errors import RequestError
from gsforget.export.device import opening
from gsforget.export.device.apply import apply, open_device, trust_key
from gsforget.export.device.files import sha256

CALLS = ("replace", "unlink", "mkdir", "rmdir", "fsync")


class Kill(BaseException):
    """The process is gone."""


class Faults:
    """Counts the calls that change a folder, and fails at one of them.

    Args:
        root: where calls count.
        at: number of the call that fails; 0: none.
        error: None kills; else it is raised once, by that call.
    """

    def __init__(self, root: Path, at: int = 0, error: OSError | None = None):
        self.root, self.at, self.error = str(root), at, error
        self.count, self.dead = 0, False
        self.unflushed: dict[int, str] = {}  # of open files, by inode
        self.steps: list[str] = []

    def tick(self, name: str, path: object) -> None:
        if self.dead:
            raise Kill
        self.count += 1
        self.steps.append(f"{name} {path}")
        if self.count == self.at:
            if self.error is not None:
                raise self.error
            self.dead = True
            raise Kill

    def lose_unflushed(self) -> None:
        """After a kill: files that were not flushed keep a part of their bytes only."""
        for inode in self.unflushed:
            for path in Path(self.root).rglob("*"):
                if path.is_file() and path.stat().st_ino == inode:
                    os.truncate(path, path.stat().st_size // 2)

    @contextmanager
    def injected(self, monkeypatch):
        real = {name: getattr(os, name) for name in CALLS}
        real_open = builtins.open

        def counted(name):
            def call(path, *args, **kwargs):
                if name == "fsync":
                    self.tick(name, path)
                    self.unflushed.pop(os.fstat(path).st_ino, None)
                    return None  # not to the disk: quick, and nobody else's disk is in question
                if str(path).startswith(self.root) or "dir_fd" in kwargs:
                    self.tick(name, Path(path).name)
                return real[name](path, *args, **kwargs)

            return call

        def opened(path, mode="r", *args, **kwargs):
            writes = isinstance(path, (str, Path)) and str(path).startswith(self.root) and "w" in mode
            if not writes:
                return real_open(path, mode, *args, **kwargs)
            self.tick("open", Path(path).name)
            handle = real_open(path, mode, *args, **kwargs)
            self.unflushed[os.fstat(handle.fileno()).st_ino] = str(path)
            return _Writing(handle, self)

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counted(name))
            patch.setattr(builtins, "open", opened)
            yield self


class _Writing:
    """A file that is being written; a write that fails gets half of its bytes through."""

    def __init__(self, handle, faults):
        self.handle, self.faults = handle, faults

    def write(self, data):
        try:
            self.faults.tick("write", len(data))
        except BaseException:
            if not self.handle.closed:
                self.handle.write(bytes(data[: len(data) // 2]))
            raise
        return self.handle.write(data)

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.close()


@pytest.fixture
def loads(monkeypatch):
    """SHA-256 of every file that was loaded, in order."""
    seen = []
    real = opening.open_model

    def open_model(path, device, cache):
        seen.append(sha256(path))
        return real(path, device, cache=cache)

    monkeypatch.setattr(opening, "open_model", open_model)
    return seen


@pytest.fixture
def calls(chain):
    """Three calls, each with the sequences before (None: nothing) and after it."""
    return {
        "install": (None, 0, lambda root: apply(chain.artifact(0), root, trust=chain.public)),
        "patch": (0, 1, lambda root: apply(chain.root / "patch-0001-fp32.gsf", root)),
        "full": (0, 2, lambda root: apply(chain.root / "full-0002-fp32.gsf", root)),
    }


def fresh(installed, root, before):
    shutil.rmtree(root, ignore_errors=True)
    if before is None:
        root.mkdir()
    else:
        shutil.copytree(installed, root)


def interrupted(call, root, monkeypatch, at, error=None):
    """Whether a call ended before its end, at its step number ``at``."""
    with Faults(root, at, error).injected(monkeypatch) as faults, suppress(Kill, OSError):
        call(root)
    if faults.dead:
        faults.lose_unflushed()
    return faults.count >= at


def newest(root):
    """What opens now: a sequence, None for an empty folder."""
    try:
        return open_device(root).info.sequence
    except RequestError as error:
        if error.kind != "empty_device":
            raise
        return None


def check_after(chain, root, loads, before, after, begun):
    """What must hold at the next start-up after any kill; returns what opened."""
    hashes = {sha256(chain.artifact(i)): i for i in range(3)}
    del loads[:]
    found = newest(root)
    assert found in ((after,) if begun and before is not None else (before, after)), found
    assert all(digest in hashes for digest in loads), "a torn file was loaded"
    assert set(map(hashes.get, loads)) <= {found}
    assert not (root / "intent.json").exists()
    assert not (root / "pending.gsf").exists()
    assert not [p for p in root.rglob(".*") if p.is_file()]
    expected = set() if found is None else {chain.artifact(found).name, f"{chain.artifact(found).name}.json"}
    assert {p.name for p in (root / "models").glob("*")} == expected
    return found


@pytest.mark.parametrize("name", ["install", "patch", "full"])
def test_a_kill_at_every_step(chain, installed, calls, loads, tmp_path, monkeypatch, name):
    before, after, call = calls[name]
    root = tmp_path / "device"
    outcomes = Counter()
    at = 1
    while True:
        fresh(installed, root, before)
        if not interrupted(call, root, monkeypatch, at):
            break
        begun = (root / "intent.json").exists()
        found = check_after(chain, root, loads, before, after, begun)
        outcomes[begun, found] += 1
        if found != after:
            call(root)  # nothing stands in the way of another try
            assert newest(root) == after
        at += 1
    assert newest(root) == after
    assert at > 25
    assert outcomes[True, after] > 5
    assert outcomes[False, before] > 2


def test_a_kill_at_every_step_of_rolling_forward(chain, installed, calls, loads, tmp_path, monkeypatch):
    """The start-up after a kill is killed as well, at every step, and so on once more."""
    before, after, call = calls["patch"]
    root = tmp_path / "device"
    fresh(installed, root, before)
    first = 1
    while not (root / "intent.json").exists():  # the first step after which the intent is there
        fresh(installed, root, before)
        interrupted(call, root, monkeypatch, first)
        first += 1
    torn = tmp_path / "torn"
    shutil.copytree(root, torn)
    at, killed = 1, 0
    while True:
        shutil.rmtree(root)
        shutil.copytree(torn, root)
        if not interrupted(open_device, root, monkeypatch, at):
            break
        if (root / "intent.json").exists():
            interrupted(open_device, root, monkeypatch, 1 + at // 2)
        assert check_after(chain, root, loads, before, after, begun=True) == after
        killed += 1
        at += 1
    assert killed > 15


@pytest.mark.parametrize("name", ["install", "patch", "full"])
def test_a_full_disk_at_every_step(chain, installed, calls, loads, tmp_path, monkeypatch, name):
    """Before the intent the old model stays usable; afterwards the next start finishes, or an install is taken back."""
    before, after, call = calls[name]
    root = tmp_path / "device"
    begun_any, at = Counter(), 1
    while True:
        fresh(installed, root, before)
        if not interrupted(call, root, monkeypatch, at, OSError(errno.ENOSPC, "No space left on device")):
            break
        begun = (root / "intent.json").exists()
        begun_any[begun] += 1
        if check_after(chain, root, loads, before, after, begun) != after:
            call(root)
        assert newest(root) == after
        at += 1
    assert begun_any[False] > 2
    assert name == "install" or begun_any[True] > 5


def test_a_kill_while_trust_is_given(chain, tmp_path, monkeypatch):
    at = 1
    while True:
        root = tmp_path / f"device{at}"
        killed = interrupted(lambda r: trust_key(chain.public, r), root, monkeypatch, at)
        assert trust_key(chain.public, root).current.key == chain.key.public
        if not killed:
            break
        at += 1
    assert at > 4


@pytest.mark.slow
def test_real_kills_of_real_processes(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "device_kills.py"
    out = tmp_path / "kills.json"
    command = [sys.executable, str(script), "--kills", "30", "--seed", str(random.randrange(1000)), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] == 30
    assert result["torn_loaded"] == result["old_loaded_after_intent"] == result["not_finished"] == 0
