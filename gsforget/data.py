"""Image folders: `DIR/train/<class>/*` and `DIR/test/<class>/*` (or `val`), checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsforget.errors import RequestError
from gsforget.folder import sha256
from gsforget.machine import cpu_threads

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
LAYOUT = "Lay the images out as DIR/train/<class>/* and DIR/test/<class>/* (png, jpg, webp or bmp)."
MIN_FOR_VALIDATION = 3  # images of a class below which it has no validation part


@dataclass(frozen=True)
class Split:
    """Images of one split, class by class in index order: ``paths`` and ``labels``, int64 [N]."""

    paths: list[Path]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def per_class(self, k: int) -> NDArray[np.int64]:
        """Positions, int64, of the images of class ``k``."""
        return np.flatnonzero(self.labels == k)

    def count(self, k: int) -> int:
        """Number of images of class ``k``."""
        return int((self.labels == k).sum())

    def select(self, positions: ArrayLike) -> Split:
        """The images at ``positions``, in that order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Split([self.paths[i] for i in chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageFolder:
    """Both splits of the data folder ``root``; ``test_name`` says whether `test` or `val` was read."""

    root: Path
    class_names: list[str]
    train: Split
    test: Split
    test_name: str

    @cached_property
    def train_sha256(self) -> list[str]:
        """SHA-256 of each training image, read once."""
        return content_sha256(self.train.paths)

    @cached_property
    def test_sha256(self) -> list[str]:
        """SHA-256 of each test image, read once."""
        return content_sha256(self.test.paths)


def scan(
    root: Path,
    class_names: list[str] | None,
    optional: Collection[str] = (),
    missing_ok: bool = False,
    never_seen: Collection[str] = (),
) -> ImageFolder:
    """List the images of a data folder.

    Args:
        root: folder that holds `train` and `test` (or `val`).
        class_names: names in the model's index order; None takes the sorted folders of `train`.
        optional: names that may lack images or a folder, such as erased classes; the folder of the class at index 3 may
            be called `forgotten-3` then, as the model's `config.json` calls it.
        missing_ok: a class without any training images is no error (nor is it where it lacks test images, too).
        never_seen: folders that are no classes of the model, and are left out.

    Raises:
        RequestError: what is missing, empty, or does not fit the class names.
    """
    if not root.is_dir():
        raise RequestError(f"There is no data folder {root}.", "Check --data.", "no_data")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir():
        raise RequestError(f"{root} has no train/ folder.", LAYOUT, "no_train")
    if test is None:
        raise RequestError(f"{root} has neither a test/ nor a val/ folder.", LAYOUT, "no_test")
    names = list(class_names) if class_names is not None else _folders(train, never_seen)
    _check_names(names, train)
    renamed = {n: new for i, n in enumerate(names) if n in optional and (new := f"forgotten-{i}") not in {*names} - {n}}
    absent = [n for n in names if not _images(train, n, renamed)] if missing_ok and _folders(train) else []
    free = {*optional, *absent}
    for folder in (train, test):
        _check_folders(folder, names, renamed, absent, class_names is not None, never_seen)
    return ImageFolder(root, names, _list(train, names, free, renamed), _list(test, names, free, renamed), test.name)


def _folders(split: Path, without: Collection[str] = ()) -> list[str]:
    return sorted(
        p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in without
    )


def _check_names(names: list[str], train: Path) -> None:
    if not names:
        raise RequestError(f"{train} holds no class folders.", LAYOUT, "no_images")
    double = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise RequestError(
            f"The class name '{double[0]}' occurs {names.count(double[0])} times.",
            "Class names must differ; number the repeated ones.",
            "duplicate_names",
        )
    if len(names) == 1:
        raise RequestError(
            f"There is only one class, '{names[0]}'; nothing would be retained after forgetting it.",
            f"Add the other classes under {train}.",
            "one_class",
        )


def _check_folders(
    split: Path,
    names: list[str],
    renamed: dict[str, str],
    absent: Collection[str],
    given: bool,
    never_seen: Collection[str] = (),
) -> None:
    """The folders of a split must be the class names, no more and no fewer, but for classes erased or without images.

    ``renamed`` maps the names of erased classes to their new ones; ``absent`` holds those without training images.
    """
    there = _folders(split, set(never_seen) - set(names))
    extra = [n for n in there if n not in names and n not in renamed.values()]
    # Beside a folder that fits no name, a class without a folder is more likely misspelt than missing.
    free = {*renamed} if extra else {*renamed, *absent}
    missing = [n for n in names if n not in there and n not in free]
    if not missing and not extra:
        return
    hint = "Give the names in the model's index order, as the folders are named: --class-names FILE, one per line."
    if not there:
        raise RequestError(f"{split} holds no class folders.", LAYOUT, "no_images")
    if given and not any(n in names for n in there):
        raise RequestError(
            f"None of the {len(names)} class names ({listed(names)}) has a folder in {split}, "
            f"which holds {len(there)} ({listed(there)}).",
            hint,
            "class_names_differ",
        )
    parts = [f"has no folder for {listed(missing)}"] if missing else []
    if extra:
        parts.append(
            f"has {len(extra)} folder(s) that {'no class name fits' if given else 'train/ lacks'}: {listed(extra)}"
        )
        if renamed:
            hint = f"A class erased earlier may be removed, or its folder be named {listed(sorted(renamed))}."
    if not given:
        hint = "Both splits need the same class folders."
    counts = f" ({len(names)} class names, {len(there)} folders)" if len(names) != len(there) else ""
    raise RequestError(f"{split} {' and '.join(parts)}{counts}.", hint, "class_names_differ")


def listed(names: Sequence[str], most: int = 5) -> str:
    """A few names for a sentence: 'a', 'b', … (8 in all)."""
    shown = ", ".join(f"'{n}'" for n in names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"


def _list(split: Path, names: list[str], optional: Collection[str], renamed: dict[str, str]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(names):
        found = _images(split, name, renamed)
        if not found and name not in optional:
            raise RequestError(
                f"{split / name} holds no images.",
                "Add png, jpg, webp or bmp files, or remove the class.",
                "no_images",
            )
        paths += found
        labels += [index] * len(found)
    return Split(paths, np.asarray(labels, dtype=np.int64))


def _images(split: Path, name: str, renamed: dict[str, str]) -> list[Path]:
    """The images of a class, sorted by name; of an erased class also those in the folder of its new name."""
    folders = [split / folder for folder in dict.fromkeys((name, renamed.get(name, name)))]
    return [p for folder in folders if folder.is_dir() for p in sorted(folder.iterdir()) if _is_image(p)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def split_validation(
    labels: ArrayLike, fraction: float = 0.2, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training part and of the validation part, both int64 and sorted, stratified by class.

    A class of at least 3 images gives the rounded fraction, at least 1 and never all; a smaller class gives none.
    """
    truth = np.asarray(labels)
    validation: list[int] = []
    for k, positions in _shuffled(truth, seed):
        if len(positions) >= MIN_FOR_VALIDATION:
            take = min(max(1, round(fraction * len(positions))), len(positions) - 1)
            validation += positions[:take].tolist()
    chosen = np.sort(np.asarray(validation, dtype=np.int64))
    return np.setdiff1d(np.arange(len(truth), dtype=np.int64), chosen), chosen


def few_shot(labels: ArrayLike, shots: int, seed: int = 0) -> NDArray[np.int64]:
    """Positions, sorted, of ``shots`` images per class (all where a class has fewer); more shots extend fewer."""
    if shots < 1:
        raise RequestError(f"--shots {shots} leaves no images.", "Give 1 or more images per class.", "bad_shots")
    chosen = [i for _, positions in _shuffled(np.asarray(labels), seed) for i in positions[:shots]]
    return np.sort(np.asarray(chosen, dtype=np.int64))


def _shuffled(labels: NDArray[np.int64], seed: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Per class, its positions in an order that depends on the seed and the class alone."""
    return [
        (int(k), np.random.default_rng([seed, int(k)]).permutation(np.flatnonzero(labels == k)))
        for k in np.unique(labels)
    ]


def content_sha256(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, hexadecimal, in the order of ``paths``."""
    with ThreadPoolExecutor(cpu_threads()) as pool:
        return list(pool.map(sha256, paths))


def manifest_sha256(split: Split, hashes: Sequence[str] | None = None) -> str:
    """SHA-256 over `class folder/file name`, size and content hash of every image, in the order of their names.

    ``hashes`` are those of ``content_sha256``, where they are known already.
    """
    known = content_sha256(split.paths) if hashes is None else hashes
    lines = [f"{p.parent.name}/{p.name}\0{p.stat().st_size}\0{h}\n" for p, h in zip(split.paths, known, strict=True)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
