"""Images of people: a folder per person.  Who has a test folder and no training folder was never seen by the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from gsforget.data import ImageFolder, Split, scan
from gsforget.errors import RequestError
from gsforget.export.device.infer import find_images
from gsforget.request import refuse_annotations


def open_data(
    root: Path,
    names: list[str] | None,
    optional: Collection[str] = (),
    never_seen: Collection[str] = (),
    annotations: str | None = None,
) -> ImageFolder:
    """See `gsforget.tasks.base.Kind`; `never_seen` are left out, and so are all whom only the test folder holds."""
    refuse_annotations(annotations)
    trained = _folders(root / "train")
    renamed = {f"forgotten-{i}" for i in range(len(names or []))}
    new = [n for n in _test_folders(root) if n not in trained and n not in (names or []) and n not in renamed]
    return scan(root, names, optional, True, {*never_seen, *new} - set(names or []))


def strangers(data: ImageFolder, names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """People whom the model never saw: those asked for, else all whom only the test folder holds."""
    if asked:
        known = next((name for name in asked if name in names), None)
        if known is not None:
            raise RequestError(
                f"'{known}' is one of the people whom the model was trained on.",
                "Give --never-seen other folders.",
                "not_never_seen",
            )
        return list(asked)
    there = {*_folders(data.root / "train"), *names, *(f"forgotten-{i}" for i in range(len(names)))}
    return [n for n in _test_folders(data.root) if n not in there]


def stranger_images(data: ImageFolder, people: Sequence[str], first: int) -> Split:
    """The test images of never-seen people, labelled `first`, `first` + 1, …  RequestError ``no_image`` without any."""
    found = [find_images([data.root / data.test_name / name]) for name in people]
    labels = np.repeat(np.arange(len(people)) + first, [len(paths) for paths in found])
    return Split([path for paths in found for path in paths], labels.astype(np.int64))


def _test_folders(root: Path) -> list[str]:
    return _folders(root / "test") or _folders(root / "val")


def _folders(split: Path) -> list[str]:
    if not split.is_dir():
        return []
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))
