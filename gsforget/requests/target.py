"""What a request comes down to: the classes to forget, or single images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gsforget.classes import check_remaining, resolve_classes
from gsforget.data import ImageFolder
from gsforget.errors import RequestError
from gsforget.request import Request
from gsforget.requests.images import Coverage, ImageList, coverage, find_rows


@dataclass(frozen=True)
class Target:
    """What is to be forgotten.

    Attributes:
        classes: indices of whole classes, sorted.
        notes: how a list of images was understood, as sentences.
    """

    classes: list[int]
    notes: list[str] = field(default_factory=list)


def resolve_target(request: Request, names: list[str], erased: dict[int, str], data: ImageFolder) -> Target:
    """The classes that a request means, whether it names them or lists all their images.

    Args:
        names: class names of the data in index order, `erased` those of earlier requests by index.

    Raises:
        RequestError: as `resolve_classes` and `find_rows`; ``two_targets``; ``part_of_a_class``.
    """
    if request.images is None:
        return Target(resolve_classes(request.classes, names, erased))
    if any(name.strip() for name in request.classes):
        raise RequestError(
            "Both classes and a list of images were given.",
            "Give one of them; forget the others in a second request.",
            "two_targets",
        )
    rows = find_rows(request.images, data)
    _refuse_erased(rows, data, names, erased, request.images)
    found = coverage(rows, data.train.labels)
    if found.partly:
        raise _only_in_part(found, names, request.images)
    check_remaining(found.whole, names, erased)
    where = request.images.where
    classes = "class" if len(found.whole) == 1 else "classes"
    return Target(
        found.whole,
        [
            f"{where} lists all training images of {_quoted(found.whole, names)}: taken as a request for the whole {classes}."
        ],
    )


def _refuse_erased(
    rows: NDArray[np.int64], data: ImageFolder, names: list[str], erased: dict[int, str], images: ImageList
) -> None:
    gone = sorted({int(k) for k in data.train.labels[rows]} & erased.keys())
    if gone:
        raise RequestError(
            f"{images.where} lists images of {_quoted(gone, names)}, which was already forgotten as a class.",
            "Remove these images from the list.",
            "already_forgotten",
        )


def _only_in_part(found: Coverage, names: list[str], images: ImageList) -> RequestError:
    return RequestError(
        f"{images.where} covers classes only in part: {found.describe(found.partly, names)}. Forgetting some images while "
        "their class is kept is another kind of request, and its evidence is weaker.",
        f"For the whole class{'es' if len(found.listed) > 1 else ''} type --classes "
        f"{','.join(names[k] if ',' not in names[k] else str(k) for k in found.listed)}.",
        "part_of_a_class",
    )


def _quoted(classes: list[int], names: list[str]) -> str:
    return ", ".join(f"'{names[k]}'" for k in classes)
