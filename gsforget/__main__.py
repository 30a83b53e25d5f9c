"""The command `gsforget`: runs one command line and turns every failure into one sentence and an exit status."""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gsforget import processes
from gsforget.errors import GsforgetError

if TYPE_CHECKING:
    from typer import BadParameter

INTERRUPTED = 130
TRACEBACK = "GSFORGET_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own by default) and return the exit status.

    With ``--json`` in it, exactly one JSON document goes to stdout, whatever happens.
    """
    from gsforget.cli import output

    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other soon sleep: beside one busy process, spinning made a run twice as slow.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = sys.argv[1:] if argv is None else list(argv)
    options = args[: args.index("--")] if "--" in args else args
    as_json = "--json" in options and not {"--help", "-h"} & set(options)
    try:
        with output.one_run(as_json and processes.is_first()):
            return processes.together(lambda: _guarded(args, as_json), shared=args[:1] == ["forget"])
    except OSError as error:  # stdout itself takes nothing more
        if not isinstance(error, BrokenPipeError):
            output.say(f"Error: the output could not be written ({error.strerror}).", style="bold red")
        return 1


def _guarded(args: Sequence[str], as_json: bool) -> int:
    from gsforget.cli import output

    try:
        from gsforget.cli.app import run

        return run(args)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        status, failure = explain(error)
        processes.report_failure(status, failure)
        output.say(f"Error: {failure.message}", style="bold red")
        if failure.hint:
            output.say(failure.hint)
        if as_json and not output.emitted():
            output.emit_json(failure.to_json())
        return status


def explain(error: BaseException) -> tuple[int, GsforgetError]:
    """The exit status of a failure, and the sentence for the person at the keyboard."""
    import typer

    # BadParameter, UsageError, ClickException: Typer exports only the first of click's classes.
    usage_error, click_error = typer.BadParameter.__mro__[1:3]
    if isinstance(error, GsforgetError):
        return error.exit_status, error
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED, GsforgetError("Stopped by Ctrl-C.", "", "interrupted")
    if isinstance(error, usage_error):
        return 2, _usage(error)  # type: ignore[arg-type]
    if isinstance(error, click_error):
        return 2, GsforgetError(str(error), "Type gsforget --help.", "usage")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gsforget"):
        package = error.name.partition(".")[0]
        message = f"The package {package} is needed for this and is not installed."
        return 2, GsforgetError(
            message, "pip install gsforget brings everything but the runtimes of devices.", "no_package"
        )
    if _disk_is_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return 1, GsforgetError(
            f"The disk is full{where}, nothing was published.", "Free some space and run it again.", "disk_full"
        )
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return 1, GsforgetError(
            "There is not enough memory.", "Use a smaller --batch-size, or --device cpu.", "out_of_memory"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1, GsforgetError(
            f"{where}{error.strerror or error}.", "Check the path, its permissions and the disk.", "os_error"
        )
    return 1, GsforgetError(
        f"gsforget failed by a fault of ours: {type(error).__name__}: {error}".rstrip(": "),
        f"Set {TRACEBACK}=1 to see where, and report it.",
        "internal",
    )


def _usage(error: BadParameter) -> GsforgetError:
    context: Any = error.ctx
    message = " ".join(error.format_message().split())
    message = message.replace(": Value error, ", ": ", 1)  # pydantic's prefix, which tells a person nothing
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):  # click's NoSuchOption
        known = sorted({name for p in context.command.get_params(context) for name in p.opts}) if context else []
        near = difflib.get_close_matches(error.option_name, [k for k in known if k.startswith("--")], n=1, cutoff=0.3)
        message = f"There is no option {error.option_name}."
        if near:
            return GsforgetError(message, f"Did you mean {near[0]}?", "usage")
    return GsforgetError(message, f"Type {context.command_path if context else 'gsforget'} --help.", "usage")


def _disk_is_full(error: BaseException) -> bool:
    # Writers in other languages (safetensors) report it only in words.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


if __name__ == "__main__":
    sys.exit(main())
