"""Compiles kernels for a GPU generation into a folder that is complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gsforget import __version__
from gsforget.errors import GsforgetError, RequestError
from gsforget.kernels.ahead import worker
from gsforget.kernels.ahead.shipped import shipped
from gsforget.kernels.ahead.targets import Target, find_target
from gsforget.kernels.spec import Spec

FORMAT = 1
FILE = "manifest.json"
WORKERS = 2
TENSOR_MEMORY = 512  # columns of a Blackwell multiprocessor
SHOWN = 5  # failures that a message names

Progress = Callable[[int, int, dict[str, Any]], None]


def compile_kernels(
    target: int, out: str | Path, names: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile every shipped kernel for a GPU generation; no GPU is needed.

    Args:
        target: compute capability without its dot, such as 87.
        out: folder to make: ``<name>.cubin`` for each kernel and ``manifest.json``.  It appears whole, or not at all.
        names: shell pattern of the kernels to compile; None: all.
        progress: called with how many are done, how many there are, and the manifest's entry of the one just done.

    Returns:
        The manifest: versions, target, hashes of the kernels' sources, and for each kernel entry point, signature,
        constants, parameters, hash, registers, and bytes of stack, local and shared memory.

    Raises:
        RequestError: kind ``kernel_target``, ``no_kernel``, ``no_triton``, or ``out_exists``.
        GsforgetError: kind ``kernel_resources`` where a kernel does not compile, spills, or needs more shared memory
            than the GPU has; ``interpreting`` where Triton cannot compile in a new process.
    """
    chip, place = find_target(target), Path(out)
    check_absent(place)
    specs = shipped(target, names)
    place.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".kernels-", dir=place.absolute().parent))
    try:
        entries, tools = _compile_all(specs, chip, scratch, progress)
        manifest = {
            "format": FORMAT,
            "target": chip.number,
            "gsforget": __version__,
            "triton": tools.triton,
            "ptxas": tools.ptxas,
            "names": names,
            "shared_limit": chip.shared,
            "sources": {module: source_sha256(module) for module in sorted({s.module for s in specs})},
            "kernels": entries,
        }
        _write(scratch / FILE, json.dumps(manifest, indent=1).encode())
        scratch.chmod(0o755)  # mkdtemp's folder is for its owner only
        check_absent(place)
        os.rename(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def check_absent(place: Path) -> None:
    """Raises RequestError (kind ``out_exists``) for what a folder cannot be renamed to."""
    if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
        raise RequestError(f"{place} exists already.", "Remove it, or give another folder with --out.", "out_exists")


def _compile_all(
    specs: Sequence[Spec], chip: Target, folder: Path, progress: Progress | None
) -> tuple[list[dict[str, Any]], worker.Toolchain]:
    """Entries in the order of `specs`; the binaries are in `folder` then."""
    entries: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    with _workers(min(WORKERS, len(specs))) as pool:
        tools = pool.submit(worker.toolchain, chip.number).result()
        waiting: dict[Future[tuple[dict[str, Any], bytes]], Spec] = {
            pool.submit(worker.compile_one, spec, chip.number): spec for spec in specs
        }
        for done, future in enumerate(as_completed(waiting), 1):
            spec = waiting[future]
            try:
                entry, binary = future.result()
            except GsforgetError as error:
                failures.append(error.message.rstrip("."))
                continue
            _write(folder / entry["file"], binary)
            entries[spec.name] = entry
            failures += [f"{spec.name} {reason}" for reason in exceeds(entry, chip)]
            if progress is not None:
                progress(done, len(specs), entry)
    if failures:
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        raise GsforgetError(
            f"Not every kernel fits {chip.name}: {'; '.join(sorted(failures)[:SHOWN])}{more}.",
            "Give the ones that fit with --names PATTERN; this is a fault of ours, please report it.",
            "kernel_resources",
        )
    return [entries[s.name] for s in specs], tools


def exceeds(entry: dict[str, Any], chip: Target) -> Iterator[str]:
    """Why a compiled kernel is not shipped for a GPU, if so: registers spilled, or too much memory on the chip."""
    if entry["stack"] or entry["local"]:
        yield f"spills registers ({entry['stack']} bytes of stack, {entry['local']} of local memory)"
    if entry["shared"] > chip.shared:
        yield f"needs {entry['shared']} bytes of shared memory, where a block may have {chip.shared}"
    if entry["tensor_memory"] > TENSOR_MEMORY:
        yield f"needs {entry['tensor_memory']} columns of tensor memory, where there are {TENSOR_MEMORY}"


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: a fork would inherit a Triton that interprets.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), worker.start)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise GsforgetError(
            "A process that compiles kernels was ended from outside, most likely for want of memory.",
            "Free some memory and run it again; kernels that were compiled are not compiled again.",
            "kernel_compile",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def source_sha256(module: str) -> str | None:
    """SHA-256 of a module's file as it is installed; None where there is none."""
    found = importlib.util.find_spec(module)
    return None if found is None or not found.origin else hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
