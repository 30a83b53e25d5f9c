"""Runs that end in the middle: Ctrl-C, a kill, a full disk.  A run folder is complete or absent."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# Runs a command line in a process of its own and says "here" on stderr at the moment in question.
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
import {module} as module
original = module.{function}
def marked(*args, **kwargs):
    value = original(*args, **kwargs)
    print("here", file=sys.stderr, flush=True)
    {then}
    return value
module.{function} = marked
from gsforget.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
IN_TRAINING = {"module": "gsforget.training", "function": "Loop._report", "then": "pass"}
IN_WRITING = {"module": "gsforget.records", "function": "save_model", "then": "time.sleep(60)"}
OPEN_GATES = ("--max-forget-acc", "100", "--max-retain-drop", "100", "--max-class-drop", "100")


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def command(world, *more):
    return [
        "forget",
        "--model",
        str(world.model),
        "--data",
        str(world.data),
        "--classes",
        "bee",
        "--prox",
        "0.001",
        *more,
    ]


def stopped_by(signal_number, moment, world, cwd, *more):
    """Run the command, send the signal at the moment, and return (exit status, stdout, stderr)."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(**moment), *command(world, *more), "--json"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while (line := process.stderr.readline()) and line != "here\n":
            pass
        assert line, "the process ended before the moment"
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def test_ctrl_c_in_training(world, tmp_path):
    status, out, err = stopped_by(signal.SIGINT, IN_TRAINING, world, tmp_path, "--epochs", "100000")
    assert status == 130
    assert json.loads(out)["error"]["kind"] == "interrupted"
    assert "Traceback" not in err
    assert listing(tmp_path) == []


def test_ctrl_c_in_writing(world, tmp_path):
    status, out, _ = stopped_by(signal.SIGINT, IN_WRITING, world, tmp_path, "--epochs", "1", *OPEN_GATES)
    assert status == 130
    assert json.loads(out)["error"]["kind"] == "interrupted"
    assert listing(tmp_path) == []


@pytest.mark.parametrize("moment", [IN_TRAINING, IN_WRITING], ids=["training", "writing"])
def test_a_kill_leaves_nothing_that_is_seen_and_the_next_run_is_the_first(world, cli, tmp_path, moment):
    status, out, _ = stopped_by(signal.SIGKILL, moment, world, tmp_path, "--epochs", "1", *OPEN_GATES)
    assert status == -signal.SIGKILL
    assert out == ""
    seen = [p.name for p in (tmp_path / "runs").glob("[!.]*")] if (tmp_path / "runs").exists() else []
    assert seen == []
    again = cli(tmp_path, *command(world, "--epochs", "1", *OPEN_GATES))
    assert again.status == 0, again.err
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["forget-0001"], "hidden remains were removed as well"


@pytest.mark.parametrize("file", ["model.safetensors", "delta.safetensors", "metrics.json", "ledger.jsonl"])
def test_a_full_disk_while_writing(world, cli, tmp_path, monkeypatch, file):
    from gsforget import folder, records

    def write(path, data):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    original = folder.write_file
    monkeypatch.setattr(records, "write_file", write)
    monkeypatch.setattr(folder, "write_file", write)
    result = cli(tmp_path, *command(world, "--epochs", "1", *OPEN_GATES))
    assert result.status == 1
    assert result.document["error"]["kind"] == "disk_full"
    assert "nothing was published" in result.document["error"]["message"]
    assert "\n" not in result.document["error"]["message"]
    assert listing(tmp_path) == []


def test_a_file_that_may_not_grow(world, cli, tmp_path):
    """The system refuses in the middle of a real write: the weights are larger than a file may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = cli(tmp_path, *command(world, "--epochs", "1", *OPEN_GATES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 1
    assert result.document["error"]["kind"] in ("os_error", "disk_full")
    assert "\n" not in result.document["error"]["message"]
    assert listing(tmp_path) == []


def test_a_really_full_disk(world, cli, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )  # fmt: skip
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        result = cli(small, *command(world, "--epochs", "1", *OPEN_GATES))
        left = listing(small)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert (result.status, result.document["error"]["kind"]) == (1, "disk_full")
    assert left == []
