"""The frame around the commands: which there are, and how a command line is run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gsforget import __version__

# In the order of --help.  Each is a function of that name in the file of that name, which imports what is heavy
# inside the function, so that --help stays quick.
COMMANDS = (
    "demo",
    "forget",
    "audit",
    "export",
    "apply",
    "infer",
    "serve",
    "history",
    "verify",
    "doctor",
    "purge",
    "keys",
    "kernels",
    "bench",
)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit status; all failures leave as exceptions."""
    # Typer's own `app()` would print errors and exit by itself.
    status = typer.main.get_command(build_app()).main(list(args) or ["--help"], "gsforget", standalone_mode=False)
    if status == 130:  # Typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def build_app() -> typer.Typer:
    """The typer app with all commands."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.callback()(_root)
    for name in COMMANDS:
        command: Any = getattr(importlib.import_module(f"gsforget.cli.{name}"), name)
        if isinstance(command, typer.Typer):  # a command with commands of its own
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gsforget {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make a trained vision transformer forget classes, show the evidence, and ship the result."""
