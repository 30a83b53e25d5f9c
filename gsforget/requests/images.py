"""Lists of images to forget: paths or SHA-256 hashes, and which training images they mean.

An image is known by its content: every byte-identical copy among the training images is meant as well, since one copy
that stays would be learned again.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsforget.data import ImageFolder, listed
from gsforget.errors import RequestError
from gsforget.folder import sha256

# A hash alone, or a line of sha256sum: hash, blanks, file name.
HASH = re.compile(r"(?P<hash>[0-9a-fA-F]{64})(\s.*)?")
HINT = "Write one image path (from the list's folder, the data folder, or absolute) or SHA-256 per line."


@dataclass(frozen=True)
class ImageList:
    """What a person listed.

    Attributes:
        lines: paths or SHA-256, in order, without empty ones.
        where: the list as messages name it.
        folder: from which relative paths are tried first.
    """

    lines: list[str]
    where: str
    folder: Path


def read_image_list(path: Path) -> ImageList:
    """Read ``--images FILE``.  Raises RequestError ``bad_image_list`` when it is absent, unreadable or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise RequestError(f"The list of images {path} {reason}.", HINT, "bad_image_list") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"The list of images {path} is empty.", HINT, "bad_image_list")
    return ImageList(lines, str(path), path.absolute().parent)


def find_rows(images: ImageList, data: ImageFolder) -> NDArray[np.int64]:
    """Positions, sorted, of all training images whose content is that of a listed one.

    Raises RequestError ``unknown_image`` for a path that does not exist and an image that is not among them.
    """
    train = {str(path.absolute()): digest for path, digest in zip(data.train.paths, data.train_sha256)}
    wanted: dict[str, str] = {}
    for line in images.lines:
        match = HASH.fullmatch(line)
        wanted.setdefault(match["hash"].lower() if match else _hash_of(line, images, data, train), line)
    unknown = sorted(wanted.keys() - set(data.train_sha256), key=lambda h: images.lines.index(wanted[h]))
    if unknown:
        first = wanted[unknown[0]]
        more = f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""
        tested = unknown[0] in data.test_sha256
        raise RequestError(
            f"{images.where}: {first!r} is not one of the {len(data.train)} training images in {data.root / 'train'}{more}.",
            "It is a test image; list the images that the model was trained on."
            if tested
            else "List images of the train folder; they are compared by content.",
            "unknown_image",
        )
    return np.flatnonzero(np.fromiter((h in wanted for h in data.train_sha256), bool, len(data.train)))


def _hash_of(line: str, images: ImageList, data: ImageFolder, train: dict[str, str]) -> str:
    given = Path(line)
    tried = [given] if given.is_absolute() else [images.folder / given, data.root.absolute() / given]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        place = "" if given.is_absolute() else f" in {listed([str(folder) for folder in (images.folder, data.root)])}"
        raise RequestError(f"{images.where}: there is no image {line!r}{place}.", HINT, "unknown_image")
    return train.get(str(found)) or sha256(found)


@dataclass(frozen=True)
class Coverage:
    """How much of each class a list of images holds: ``whole`` and ``partly`` are class indices."""

    listed: dict[int, int]
    total: dict[int, int]

    @property
    def whole(self) -> list[int]:
        return [k for k, n in self.listed.items() if n == self.total[k]]

    @property
    def partly(self) -> list[int]:
        return [k for k, n in self.listed.items() if n < self.total[k]]

    def describe(self, classes: Collection[int], names: list[str]) -> str:
        """``3 of 24 of 'bee', 1 of 24 of 'cat'``"""
        parts = [f"{self.listed[k]} of {self.total[k]} of '{names[k]}'" for k in classes]
        return ", ".join(parts[:5]) + (f", … ({len(parts)} classes in all)" if len(parts) > 5 else "")


def coverage(rows: NDArray[np.int64], labels: NDArray[np.int64]) -> Coverage:
    """Counts per class of the images at ``rows``, int64, and of all, by class index."""
    classes, counts = np.unique(labels[rows], return_counts=True)
    found = {int(k): int(n) for k, n in zip(classes, counts)}
    return Coverage(found, {k: int((labels == k).sum()) for k in found})
