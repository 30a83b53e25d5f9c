"""`gsforget kernels`: compile the GPU kernels ahead of time, and list what there is to compile."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsforget.cli.options import JsonOption
from gsforget.cli.output import emit_json, next_command, say, table

if TYPE_CHECKING:
    from gsforget.kernels.ahead import Target

FOLDER = Path("compiled-kernels")

kernels = typer.Typer(
    help="Compile the GPU kernels ahead of time, and list what there is to compile.", no_args_is_help=True
)


@kernels.command("compile")
def compile_(
    target: Annotated[
        str, typer.Option("--target", metavar="TARGET,…", help="GPU generations, such as sm_87 or sm_87,sm_90.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where each target gets a folder of its own.")
    ] = FOLDER,
    names: Annotated[
        str | None, typer.Option("--names", metavar="PATTERN", help="Only these, such as 'lora_ffn_*_bf16_*'.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compile the kernels for GPUs that need not be here; fails where one spills registers or does not fit."""
    from gsforget.kernels.ahead import FILE, compile_kernels, read_targets, shipped
    from gsforget.kernels.ahead.build import check_absent

    chips = read_targets(target)
    for chip in chips:  # what is wrong with the request is said before minutes of compiling
        check_absent(out / chip.name)
        shipped(chip.number, names)
    made: list[dict[str, Any]] = []
    for chip in chips:
        with _progress(chip.name) as report:
            manifest = compile_kernels(chip.number, out / chip.name, names, report)
        found = manifest["kernels"]
        most = {k: max(entry[k] for entry in found) for k in ("registers", "shared")}
        say(
            f"{out / chip.name}: {_count(len(found))}, no registers spilled; at most {most['registers']} registers and "
            f"{_kilobytes(most['shared'])} of {_kilobytes(chip.shared)} KB shared memory."
        )
        made.append({"folder": str(out / chip.name), "manifest": str(out / chip.name / FILE), **manifest})
    if json:
        emit_json({"targets": made})
    next_command(f"cp -r {shlex.quote(str(out / chips[0].name))} DEVICE_DIR")


@kernels.command("list")
def list_(
    target: Annotated[str | None, typer.Option("--target", metavar="TARGET,…", help="Its kernels, by name.")] = None,
    json: JsonOption = False,
) -> None:
    """List the targets, or with --target the kernels that are compiled for it."""
    from gsforget.kernels.ahead import TARGETS, read_targets, shipped

    chips = list(TARGETS.values()) if target is None else read_targets(target)
    listed = {chip.name: shipped(chip.number) for chip in chips}
    rows: list[tuple[object, ...]]
    if target is None:
        rows = [(c.name, c.gpus, _kilobytes(c.shared), len(listed[c.name])) for c in chips]
        table(
            ("target", "such as", "shared memory (KB)", "kernels"), rows, "Targets", ("shared memory (KB)", "kernels")
        )
    else:
        for name, specs in listed.items():
            rows = [(s.name, s.function, s.options.get("num_warps"), s.options.get("num_stages")) for s in specs]
            table(
                ("name", "function", "warps", "stages"), rows, f"{_count(len(specs))} for {name}", ("warps", "stages")
            )
    if json:
        emit_json({"targets": [_document(chip, listed[chip.name], target is not None) for chip in chips]})
    next_command(f"gsforget kernels compile --target {','.join(c.name for c in chips) if target else 'sm_87'}")


def _document(chip: Target, specs: list[Any], each: bool) -> dict[str, Any]:
    document = {"target": chip.number, "name": chip.name, "gpus": chip.gpus, "shared_limit": chip.shared}
    fields = ("name", "module", "function", "constants", "options")
    return {**document, "kernels": [{k: getattr(s, k) for k in fields} for s in specs] if each else len(specs)}


@contextlib.contextmanager
def _progress(target: str) -> Iterator[Callable[[int, int, dict[str, Any]], None]]:
    """A bar on a terminal, and in a log one line at the start."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gsforget.cli.output import stderr_console

    console = stderr_console()
    if not console.is_terminal:
        say(f"Compiling kernels for {target} …")
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"compiling for {target}", total=None)
        yield lambda done, total, _entry: bar.update(task, completed=done, total=total)


def _count(kernels: int) -> str:
    return f"{kernels} kernel{'' if kernels == 1 else 's'}"


def _kilobytes(size: int) -> str:
    return f"{size / 1024:g}" if size % 1024 == 0 else f"{size / 1024:.1f}"
