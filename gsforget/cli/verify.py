"""`gsforget verify`: whether a run folder is what its ledger says, and its artifacts what their sidecars say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gsforget.cli.output import emit_json, next_command, say, table


def verify(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest under runs/.")] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key", metavar="FILE", help="signing.pub.json that must have signed each line; may be repeated."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check a run: the ledger's chain and signatures, the hashes of its files and artifacts, the classes it counts as erased."""
    from gsforget import ledger
    from gsforget.export.device.keys import read_public_key
    from gsforget.runs import newest_run

    folder = run or newest_run()
    report = ledger.inspect(folder, [read_public_key(path) for path in key or ()])
    table(("check", "verdict", "detail"), [(c.name, c.verdict, c.detail) for c in report.checks], str(folder))
    broken = report.error()
    if json:
        emit_json({**report.to_json(), **(broken.to_json() if broken else {})})
    if broken:
        say(f"Broken: {broken.message}", "bold red")
        say(broken.hint)
        raise typer.Exit(broken.exit_status)
    say("Whole: every check that could be made passed.")
    next_command(f"gsforget history {shlex.quote(str(folder))}")
