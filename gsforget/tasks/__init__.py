"""Tasks: what a request means for one kind of model.  Loop, groups, grid, ledger, gates and patches know none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from gsforget.tasks.base import Kind

KINDS = {  # `--task` and the module that offers a `Kind`
    "classify": "gsforget.tasks.classify.kind",
    "face": "gsforget.tasks.face.kind",
    "detect": "gsforget.tasks.detect.kind",
}


def find_task(name: str) -> Kind:
    """The task that `--task` and config.json call by a name.  Raises RequestError ``unknown_task``."""
    if name not in KINDS:
        raise RequestError(f"There is no task {name!r}.", f"Type --task {' or --task '.join(KINDS)}.", "unknown_task")
    return cast("Kind", import_module(KINDS[name]))
