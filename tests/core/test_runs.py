"""Run folders are complete or absent: full disks, kill -9, and processes that publish at once."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gsforget import runs
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import CONFIG, WEIGHTS
from gsforget.runs import check_out, newest_run, publish


def write(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / CONFIG).write_text("{}")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "a").write_text("a")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_runs_are_numbered_and_nothing_else_is_left(tmp_path):
    root = tmp_path / "deep" / "runs"
    assert publish(write, root) == root / "forget-0001"
    assert publish(write, root, prefix="failed") == root / "failed-0001"
    (root / "forget-0009").mkdir()
    assert publish(write, root).name == "forget-0010"
    assert names(root) == ["failed-0001", "forget-0001", "forget-0009", "forget-0010"]
    assert (root / "forget-0010/artifacts/a").read_text() == "a"


def test_out_is_used_as_given_and_never_overwritten(tmp_path):
    out = tmp_path / "x" / "mine"
    assert publish(write, tmp_path / "runs", out) == out
    assert not (tmp_path / "runs").exists()
    for action in (lambda: check_out(out), lambda: publish(write, out=out)):
        with pytest.raises(RequestError) as caught:
            action()
        assert caught.value.kind == "out_exists"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="exists already"):
        check_out(tmp_path / "link")


def test_out_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "mine"

    def slow(folder: Path) -> None:
        write(folder)
        out.mkdir()
        (out / "theirs").touch()

    with pytest.raises(RequestError) as caught:
        publish(slow, out=out)
    assert caught.value.kind == "out_exists"
    assert names(out) == ["theirs"]
    assert names(tmp_path) == ["mine"]


def test_places_that_take_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError) as caught:
        check_out(tmp_path / "file" / "run")
    assert caught.value.kind == "out_not_writable"
    check_out(tmp_path / "not" / "yet" / "there")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RequestError, match="is not writable"):
        check_out(tmp_path / "run")
    with pytest.raises(RequestError, match="is not writable"):
        publish(write, tmp_path / "runs")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, code):
    def full(folder: Path) -> None:
        write(folder)
        raise OSError(code, "full")

    with pytest.raises(GsforgetError) as caught:
        publish(full, tmp_path)
    assert (caught.value.kind, caught.value.exit_status) == ("disk_full", 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.EIO, "io")])
def test_what_goes_wrong_passes_through_and_leaves_nothing(tmp_path, error):
    def fails(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)):
        publish(fails, tmp_path)
    assert names(tmp_path) == []


def test_everything_is_flushed_before_it_is_named(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    publish(write, tmp_path)
    before = {Path(e).name for e in events[: events.index("rename")]}
    assert {WEIGHTS, CONFIG, "a", "artifacts"} <= before
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


SCRIPT = """
import sys, time
from pathlib import Path
from gsforget.runs import publish
def write(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "config.json").write_text("{}")
for _ in range(int(sys.argv[3])):
    print(publish(write, Path(sys.argv[1])).name, flush=True)
"""


def start(root: Path, seconds: float, count: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(root), str(seconds), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_in_the_middle_leaves_nothing_visible_and_the_next_run_cleans_up(tmp_path):
    process = start(tmp_path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    other = publish(write, tmp_path)  # the folder of a living process is left alone
    hidden = [n for n in names(tmp_path) if n.startswith(".")]
    assert len(hidden) == 1
    assert str(process.pid) in hidden[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == [*hidden, other.name]
    assert newest_run(tmp_path) == other
    publish(write, tmp_path)
    assert names(tmp_path) == ["forget-0001", "forget-0002"]


def test_folders_of_other_machines_are_left_alone(tmp_path):
    theirs = tmp_path / ".gsforget-elsewhere-999999999-0123abcd.tmp"
    theirs.mkdir()
    publish(write, tmp_path)
    assert theirs.is_dir()


def test_two_processes_get_different_numbers(tmp_path):
    outputs = [p.communicate()[0] for p in [start(tmp_path, 0, 15), start(tmp_path, 0, 15)]]
    published = [line for text in outputs for line in text.split() if line != "writing"]
    assert sorted(published) == [f"forget-{i:04d}" for i in range(1, 31)]
    assert names(tmp_path) == sorted(published)


def test_losing_the_race_for_a_number_takes_the_next(tmp_path, monkeypatch):
    publish(write, tmp_path)
    listings = [runs._numbers, lambda *_: {}]  # first seen before the other process took 0001
    monkeypatch.setattr(runs, "_numbers", lambda *a: listings[-1](*a) if len(listings) == 1 else listings.pop()(*a))
    assert publish(write, tmp_path).name == "forget-0002"
    assert (tmp_path / "forget-0001" / WEIGHTS).read_bytes() == b"weights"


def test_newest_run_is_the_highest_complete_one(tmp_path):
    for number in ("0002", "0010", "10000"):
        (tmp_path / f"forget-{number}").mkdir()
        write(tmp_path / f"forget-{number}")
    (tmp_path / "forget-10001").mkdir()
    (tmp_path / "forget-x").mkdir()
    assert newest_run(tmp_path).name == "forget-10000"


def test_no_run_says_what_to_type(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError) as caught:
            newest_run(root)
        assert caught.value.kind == "no_run"
        assert "gsforget forget" in caught.value.hint
