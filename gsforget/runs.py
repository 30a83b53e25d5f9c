"""Run folders: written under a hidden temporary name, flushed, renamed into place: complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from gsforget.errors import GsforgetError, RequestError
from gsforget.export.device.files import flush_folder
from gsforget.folder import is_model_folder

ROOT = Path("runs")
TEMPORARY = re.compile(r"\.gsforget-(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def check_out(out: Path) -> None:
    """Refuse an unusable `--out` before any work: RequestError ``out_exists`` or ``out_not_writable``."""
    if os.path.lexists(out):
        raise RequestError(
            f"{out} exists already; a run is never overwritten.",
            "Give another --out, or leave it out: runs are numbered by themselves.",
            "out_exists",
        )
    check_writable(out.absolute().parent)


def check_writable(folder: Path) -> None:
    """RequestError ``out_not_writable`` unless the folder, or the nearest parent that exists, takes new entries."""
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is not writable" if there.is_dir() else "is not a folder"
        raise RequestError(
            f"{folder} cannot be written to: {there} {reason}.", "Give a writable place with --out.", "out_not_writable"
        )


def publish(write: Callable[[Path], None], root: Path = ROOT, out: Path | None = None, prefix: str = "forget") -> Path:
    """Let ``write`` fill a folder and publish it whole.

    Args:
        write: writes all files below the empty folder it is given.
        root: where runs are numbered; made when it is absent.
        out: publish here instead of under a number.
        prefix: `forget` gives `forget-0001`, `failed` gives `failed-0001`: one above the highest there is.

    Returns:
        The published folder.  Two processes that publish at once get different numbers.

    Raises:
        RequestError: ``out_exists`` or ``out_not_writable``.
        GsforgetError: ``disk_full``.  Whatever ``write`` raises passes through; nothing is left behind then.
    """
    parent = root if out is None else out.absolute().parent
    if out is not None:
        check_out(out)
    else:
        check_writable(root.absolute())
    temporary = parent / f".gsforget-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    absent = [p for p in (parent, *parent.parents) if not p.exists()]
    final = None
    try:
        temporary.mkdir(parents=True)
        _remove_stale(parent)
        write(temporary)
        _flush(temporary)
        final = _rename_numbered(temporary, root, prefix) if out is None else _rename(temporary, out)
    except OSError as error:
        if error.errno in FULL:
            raise GsforgetError(
                f"The disk that holds {parent} is full; nothing was published.",
                "Free some space, or write to another disk with --out.",
                "disk_full",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if final is None:
            with contextlib.suppress(OSError):  # what another process has filled meanwhile stays
                for folder in absent:
                    folder.rmdir()
    flush_folder(parent)
    return final


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"


def _rename_numbered(temporary: Path, root: Path, prefix: str) -> Path:
    while True:
        final = root / f"{prefix}-{max([0, *_numbers(root, prefix)]) + 1:04d}"
        with contextlib.suppress(FileExistsError):  # another process was faster: take the next number
            return _move(temporary, final)


def _rename(temporary: Path, out: Path) -> Path:
    try:
        return _move(temporary, out)
    except FileExistsError:
        check_out(out)
        raise


def _move(temporary: Path, final: Path) -> Path:
    """Rename without overwriting.  A folder with files in it cannot be replaced by a rename, and runs hold files."""
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno in TAKEN:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        raise
    return final


def _numbers(root: Path, prefix: str) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{re.escape(prefix)}-(\d{{4,}})", p.name), p) for p in root.iterdir())
    return {int(m[1]): p for m, p in matches if m}


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb+") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            flush_folder(path)
    flush_folder(folder)


def _remove_stale(parent: Path) -> None:
    """Remove what processes of this machine that died in the middle of writing have left."""
    for path in parent.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found and found["host"] == _host() and not _alive(int(found["pid"])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there, signal 0 would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def newest_run(root: Path = ROOT, prefix: str = "forget") -> Path:
    """The complete run with the highest number.  Raises RequestError ``no_run`` where there is none."""
    runs = _numbers(root, prefix) if root.is_dir() else {}
    complete = [number for number, path in runs.items() if is_model_folder(path)]
    if not complete:
        raise RequestError(
            f"There is no run under {root}/ yet.",
            "Make one: gsforget forget --model NAME|FOLDER --data DIR --classes A,B; or name a run folder.",
            "no_run",
        )
    return runs[max(complete)]
