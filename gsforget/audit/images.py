"""The images of an audit: a data folder read leniently, because an audit says what it cannot conclude instead of stopping.

Classes without a folder or without images are left out and named; only what would make every figure wrong is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsforget.data import LAYOUT, SUFFIXES, Split, few_shot, listed
from gsforget.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PER_CLASS = 50  # images of a class whose features are looked at, as in evaluation.md, 2.10


@dataclass(frozen=True)
class AuditImages:
    """Images of both splits by class index; a split that is not there is empty.

    Attributes:
        train: at most `PER_CLASS` seeded images per class; all_train: every one.
        test: every image.
        never_seen_train, never_seen_test: of classes that the model never saw, labelled K, K + 1, …; at most
            `PER_CLASS` each.
        missing: sentences on what is not there.
    """

    root: Path
    train: Split
    test: Split
    all_train: Split
    never_seen_train: Split
    never_seen_test: Split
    missing: list[str]

    def deep_test(self, seed: int) -> NDArray[np.int64]:
        """Positions of at most `PER_CLASS` seeded test images per class."""
        return few_shot(self.test.labels, PER_CLASS, seed) if len(self.test) else np.zeros(0, np.int64)


def list_images(
    root: Path, names: Sequence[str], erased: Mapping[int, str], never_seen: Sequence[str] = (), seed: int = 0
) -> AuditImages:
    """List the images of a data folder for an audit.

    Args:
        root: folder with `train` and `test` (or `val`); one of them may be absent.
        names: class folders in index order; erased: index to name of those whose folder may be called
            `forgotten-<index>` instead.
        never_seen: further class folders.

    Raises:
        RequestError: there are no images, the folders do not fit the names, or a never-seen class has none.
    """
    if not root.is_dir():
        raise RequestError(f"There is no data folder {root}.", "Check --data.", "no_data")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    if not train.is_dir() and not test.is_dir():
        raise RequestError(f"{root} has neither a train/ nor a test/ folder.", LAYOUT, "no_train")
    unseen = list_never_seen(train, test, names, erased, never_seen, seed)
    for split in (train, test):
        _check_folders(split, names, erased, never_seen)
    places = [[name, *([f"forgotten-{i}"] if i in erased else [])] for i, name in enumerate(names)]
    all_train, all_test = _list(train, places), _list(test, places)
    if not len(all_train) and not len(all_test):
        raise RequestError(f"{root} holds no images of the model's classes.", LAYOUT, "no_images")
    return AuditImages(
        root,
        _capped(all_train, seed),
        all_test,
        all_train,
        *unseen,
        [*_lacking("training", all_train, train, names), *_lacking("test", all_test, test, names)],
    )


def list_never_seen(
    train: Path, test: Path, names: Sequence[str], erased: Mapping[int, str], never_seen: Sequence[str], seed: int = 0
) -> tuple[Split, Split]:
    """Training and test images of never-seen classes, labelled K, K + 1, …; at most `PER_CLASS` seeded ones each.

    Args:
        train, test: the folders of both splits; the others as for `list_images`.

    Raises:
        RequestError: ``seen_class`` for a class of the model, ``no_images`` for one without images.
    """
    _check_never_seen(never_seen, names, erased)
    unseen = [_list(split, [[name] for name in never_seen], len(names)) for split in (train, test)]
    for k, name in enumerate(never_seen, len(names)):
        for split, found in zip((train, test), unseen):
            if not found.count(k):
                raise RequestError(
                    f"{split / name} holds no images.",
                    "A never-seen class needs images under train/ and test/, as every other class.",
                    "no_images",
                )
    return _capped(unseen[0], seed), _capped(unseen[1], seed)


def _check_never_seen(never_seen: Sequence[str], names: Sequence[str], erased: Mapping[int, str]) -> None:
    known = next((n for n in never_seen if n in names or n in erased.values()), None)
    if known is not None:
        raise RequestError(
            f"'{known}' is a class of the model, so the model has seen it.",
            "Give --never-seen folders under train/ and test/ that are none of its classes.",
            "seen_class",
        )


def _check_folders(split: Path, names: Sequence[str], erased: Mapping[int, str], never_seen: Collection[str]) -> None:
    """Refuse folders that no class name fits: their images would be left out in silence."""
    if not split.is_dir():
        return
    known = {*names, *(f"forgotten-{i}" for i in erased)}
    there = sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))
    extra = [n for n in there if n not in known and n not in never_seen]
    hint = "Give the names in the model's index order, as the folders are named: --class-names FILE, one per line."
    if there and not known & set(there):
        raise RequestError(
            f"None of the {len(names)} class names ({listed(list(names))}) has a folder in {split}, "
            f"which holds {len(there)} ({listed(there)}).",
            hint,
            "class_names_differ",
        )
    if extra:
        raise RequestError(
            f"{split} has {len(extra)} folder(s) that no class name fits: {listed(extra)}.",
            f"{hint} Classes that the model never saw: --never-seen A,B.",
            "class_names_differ",
        )


def _list(split: Path, places: Sequence[Sequence[str]], first: int = 0) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for k, folders in enumerate(places, first):
        inside = [p for name in folders if (split / name).is_dir() for p in (split / name).iterdir()]
        found = sorted(p for p in inside if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
        paths += found
        labels += [k] * len(found)
    return Split(paths, np.asarray(labels, dtype=np.int64))


def _capped(split: Split, seed: int) -> Split:
    return split.select(few_shot(split.labels, PER_CLASS, seed)) if len(split) else split


def _lacking(kind: str, split: Split, folder: Path, names: Sequence[str]) -> list[str]:
    absent = [name for k, name in enumerate(names) if not split.count(k)]
    if not absent:
        return []
    if len(absent) == len(names):
        return [f"there are no {kind} images: {folder} is not there or empty"]
    return [f"{len(absent)} class(es) without {kind} images are left out: {listed(absent)}"]
