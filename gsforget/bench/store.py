"""Cells in one JSON file, written after each, so that a bench that was stopped goes on where it was."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gsforget
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import is_model_folder, write_file

FORMAT = 1
MODELS = "models"
Cell = dict[str, Any]
Say = Callable[[str], None]
Link = Callable[[int, Path | None, Path], Cell]


class Store:
    """The results of one bench.

    Args:
        path: `bench.json`; need not exist.
        setting: what all cells have in common (data, model, protocol, budget): cells of another are never mixed in.

    Raises RequestError: kind ``other_bench`` where the file belongs to another setting or version, ``bad_bench`` where it
    cannot be read.
    """

    def __init__(self, path: Path, setting: dict[str, Any]):
        self.path = path
        setting = json.loads(json.dumps(setting))
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "gsforget": gsforget.__version__,
            "machine": machine(),
            "setting": setting,
            "references": {},
            "tuning": {},
            "cells": {},
        }
        if path.is_file():
            there = read(path)
            differs = sorted(k for k in {*setting, *there["setting"]} if setting.get(k) != there["setting"].get(k))
            if differs:
                raise RequestError(
                    f"{path} was measured in another setting ({', '.join(differs)}).",
                    "Give another --out, or the options that it was begun with.",
                    "other_bench",
                )
            self.content = there

    def cell(self, part: str, key: str, measure: Callable[[], Cell]) -> Cell:
        """A cell of "references", "tuning" or "cells": as it is stored, else measured and stored.

        What a method gets wrong is stored as ``{"failed": sentence}``; errors of the disk are not.
        """
        cells = self.content[part]
        if key not in cells:
            try:
                cells[key] = measure()
            except (RequestError, GsforgetError) as error:
                cells[key] = {"failed": error.message, "kind": error.kind}
            except OSError:
                raise
            except Exception as error:  # a method that somebody brought along: the rest goes on
                cells[key] = {"failed": f"{type(error).__name__}: {error}", "kind": "error"}
            cells[key]["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
            self.save()
        return cells[key]

    def drop(self, part: str, key: str) -> None:
        self.content[part].pop(key, None)

    def drop_method(self, name: str) -> None:
        """Drop the cells of a method, so that it is measured anew."""
        for part in ("tuning", "cells"):
            for key in [k for k in self.content[part] if k.startswith(f"{name}/")]:
                self.drop(part, key)
        self.save()

    def is_older(self, name: str, code_sha256: str) -> bool:
        """Whether cells of a method were measured by other code than that with this hash."""
        cells = self.content["cells"].items()
        by = {c["code_sha256"] for key, c in cells if key.startswith(f"{name}/") and "code_sha256" in c}
        return by not in (set(), {code_sha256})

    def chain(self, name: str, seed: int, steps: Sequence[str], out: Path, say: Say, measure: Link) -> None:
        """One seed of a method, request by request, up to one that fails; models go to `out` / models / name / seed.

        Where a model is gone that the next request needs, it is made again.

        Args:
            steps: what each request is called, for `say`.
            measure: the cell of a request from its number, the folder of the model before (None: the first request) and
                the folder to fill.
        """
        place, count = out / MODELS / name / str(seed), len(steps)
        keys = [f"{name}/{seed}/{n}" for n in range(count)]
        first = next((n for n, key in enumerate(keys) if key not in self.content["cells"]), count)
        while 0 < first < count and not is_model_folder(place / str(first - 1)):
            if "failed" in self.content["cells"][keys[first - 1]]:
                return
            first -= 1
            self.drop("cells", keys[first])
        for n in range(first, count):
            say(f"{name}: seed {seed}, {steps[n]}")
            before = place / str(n - 1) if n else None
            if "failed" in self.cell("cells", keys[n], functools.partial(measure, n, before, place / str(n))):
                return

    def save(self) -> None:
        write_file(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The content of a `bench.json`.  Raises RequestError as `Store`."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        version = there["format"], there["gsforget"]
        if not all(isinstance(there[k], dict) for k in ("setting", "references", "tuning", "cells")):
            raise TypeError("no cells")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path} cannot be read as the results of a bench.", "Give another --out.", "bad_bench"
        ) from error
    if version != (FORMAT, gsforget.__version__):
        raise RequestError(
            f"{path} was written by gsforget {version[1]} (format {version[0]}), and its figures are not mixed with those "
            f"of gsforget {gsforget.__version__} (format {FORMAT}).",
            "Give another --out.",
            "other_bench",
        )
    return there


def machine() -> dict[str, Any]:
    import torch

    from gsforget.machine import cpu_threads

    return {
        "processor": platform.machine(),
        "cores": cpu_threads(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
