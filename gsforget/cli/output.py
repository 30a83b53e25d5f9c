"""Who reads what: text for people goes to stderr, and with --json exactly one document goes to stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_A_LOG = 160  # columns of a table where stderr is not a terminal


class _Document:
    """The one JSON document of a run: where it goes, and whether it is out."""

    stream: TextIO | None = None
    emitted = False


def stderr_console() -> Console:
    """rich's console on stderr: colours and the terminal's width only where there is a terminal."""
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH_OF_A_LOG)


def say(text: str, style: str | None = None) -> None:
    """Print a line for people to stderr; `style` (rich's, such as ``bold red``) shows only on a terminal."""
    stderr_console().print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def emit_json(document: dict[str, Any]) -> None:
    """Print the run's one JSON document to stdout.

    Paths become strings and numpy scalars numbers; NaN and infinities, which JSON lacks, become null.
    Raises RuntimeError when a document is out already.
    """
    if _Document.emitted:
        raise RuntimeError("two JSON documents in one run")
    text = json.dumps(_plain(document), indent=2)
    _Document.emitted = True
    print(text, file=_Document.stream or sys.stdout, flush=True)


def emitted() -> bool:
    """Whether this run's JSON document is out."""
    return _Document.emitted


def next_command(*lines: str) -> None:
    """Say what to type next."""
    say("Next:")
    for line in lines:
        say(f"  {line}")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", numbers: Sequence[str] = ()
) -> None:
    """Print a table to stderr; the columns named in `numbers` are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(Text(column), justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    stderr_console().print(made)


@contextlib.contextmanager
def one_run(as_json: bool) -> Iterator[None]:
    """Frame of a run.  With `as_json`, stdout is kept for ``emit_json``: all other output joins stderr.

    That holds for prints of libraries too, down to the file descriptor where stdout is the process's own.
    """
    _Document.emitted = False
    if not as_json:
        yield
        return
    with contextlib.ExitStack() as stack:
        _Document.stream = stack.enter_context(_own_descriptor(sys.stdout))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            _Document.stream = None


@contextlib.contextmanager
def _own_descriptor(stdout: TextIO | None) -> Iterator[TextIO | None]:
    own = sys.__stdout__
    if own is None or stdout is not own:  # closed, or replaced by a caller such as a test
        yield stdout
        return
    own.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        own.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    if not isinstance(value, (str, int, float)) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
