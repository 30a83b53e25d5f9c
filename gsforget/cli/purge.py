"""`gsforget purge`: remove what makes an erasure reversible."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gsforget.cli.options import JsonOption
from gsforget.cli.output import emit_json, next_command, say, table


def purge(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest under runs/.")] = None,
    chain: Annotated[
        bool,
        typer.Option("--chain", help="Also the earlier runs behind it, their weights included; never the original."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove what makes an erasure reversible: factors, patches, prototypes, cached features, pre-erasure artifacts."""
    from gsforget.purge import plan
    from gsforget.purge import purge as carry_out
    from gsforget.runs import newest_run

    folder = run or newest_run()
    made = plan(folder, chain)
    todo = bool(made.items or made.unfinished)
    if made.items:
        rows = [(_shown(item.path), _size(item.bytes), item.why) for item in made.items]
        table(("file", "size", "what it is"), rows, "Would be removed" if dry_run else "To be removed", ("size",))
    for sentence in made.left:
        say(f"Stays: {sentence}.")
    if todo and not dry_run:
        if not yes:
            _confirm(folder, chain, json, len(made.items), made.bytes)
        carry_out(made)
        say(f"Removed {_files(len(made.items))}, {_size(made.bytes)}; noted in audit/purged.json.")
        say(
            "This run can be used, exported and continued as before; it can no longer be turned back with its own files."
        )
    elif not todo:
        say(f"Nothing is left in {folder} that would turn the erasure back.")
    say("Out of reach of this command:", "bold")
    for sentence in made.out_of_reach:
        say(f"  - {sentence}.")
    if json:
        emit_json({"dry_run": dry_run, **made.to_json()})
    name = shlex.quote(str(folder))
    again = f"gsforget purge {name}{' --chain' if chain else ''}"
    next_command(again if dry_run and todo else f"gsforget verify {name}")


def _confirm(folder: Path, chain: bool, as_json: bool, files: int, size: int) -> None:
    """Ask on a terminal.  Raises RequestError ``not_confirmed`` on a no, or where there is nobody to ask."""
    from gsforget.errors import RequestError

    again = f"gsforget purge {shlex.quote(str(folder))}{' --chain' if chain else ''}"
    if as_json or not sys.stdin.isatty():
        raise RequestError(
            "Purging removes files for good, and there is no terminal to ask on; nothing was removed.",
            f"Type {again} --yes, or {again} --dry-run to see the list.",
            "not_confirmed",
        )
    print(f"Remove {_files(files)} ({_size(size)}) for good? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RequestError("Nothing was removed.", f"To purge, type {again} and answer y.", "not_confirmed")


def _shown(path: Path) -> str:
    """A path as it is typed from here: relative where it lies below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path)


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
