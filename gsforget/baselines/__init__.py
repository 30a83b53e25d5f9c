"""Other ways to forget, to measure beside: one file each, see `base.Method`, and `docs/adding-a-method.md`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from gsforget.baselines.base import Method

# Where each method lies: module of this room, and the name of its `Method` there.
PLACES = {
    "gs-lora": ("own", "WITHOUT_FEATURES"),
    "gs-lora++": ("own", "METHOD"),
    "head-mask": ("head_mask", "METHOD"),
    "finetune": ("finetune", "METHOD"),
    "neggrad+": ("neggrad", "METHOD"),
    "l2": ("l2", "METHOD"),
    "ewc": ("ewc", "METHOD"),
    "mas": ("mas", "METHOD"),
    "lwf": ("lwf", "METHOD"),
    "der": ("der", "METHOD"),
    "der++": ("der", "PLUS"),
    "fdr": ("fdr", "METHOD"),
    "random-label": ("random_label", "METHOD"),
    "salun": ("salun", "METHOD"),
    "ssd": ("ssd", "METHOD"),
    "scrub": ("scrub", "METHOD"),
    "scrub-s": ("scrub", "SMOOTHED"),
    "bad-teacher": ("bad_teacher", "METHOD"),
    "retrain": ("retrain", "METHOD"),
    "lirf": ("lirf", "METHOD"),
    "fg-oriu": ("fg_oriu", "METHOD"),
    "published-gs-lora": ("published", "WITHOUT_PROTOTYPES"),
    "published-gs-lora++": ("published", "METHOD"),
}


def method_names() -> list[str]:
    """All names that `find_method` knows."""
    return list(PLACES)


def find_method(name: str) -> Method:
    """A method by name, or `METHOD` of a Python file of the user's own, which runs its code.

    Raises:
        RequestError: kind ``unknown_method`` with the nearest names, ``bad_method`` for a file that defines none.
    """
    if name.endswith(".py"):
        return _of_file(Path(name))
    if name not in PLACES:
        near = difflib.get_close_matches(name, PLACES, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(PLACES)}."
        raise RequestError(f"There is no method called {name}.", hint, "unknown_method")
    module, attribute = PLACES[name]
    return getattr(importlib.import_module(f"gsforget.baselines.{module}"), attribute)


def _of_file(path: Path) -> Method:
    from gsforget.baselines.base import Method

    if not path.is_file():
        raise RequestError(f"There is no file {path}.", "Give a Python file that defines METHOD.", "unknown_method")
    spec = importlib.util.spec_from_file_location(f"gsforget_method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up postponed annotations
    spec.loader.exec_module(module)
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise RequestError(
            f"{path} defines no METHOD.", "Define METHOD = Method(…), see docs/adding-a-method.md.", "bad_method"
        )
    return method
