"""What a request comes down to: the classes to forget, or single images."""

from __future__ import annotations

from collections.abc import Collection
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
        rows: positions of single training images to forget while their classes are retained, int64; None: whole classes.
        notes: how a list of images was understood, as sentences.
    """

    classes: list[int]
    rows: NDArray[np.int64] | None = None
    notes: list[str] = field(default_factory=list)

    def sha256(self, data: ImageFolder) -> frozenset[str]:
        """SHA-256 of the single images; none for whole classes."""
        return frozenset() if self.rows is None else frozenset(data.train_sha256[i] for i in self.rows)


def resolve_target(
    request: Request,
    names: list[str],
    erased: dict[int, str],
    data: ImageFolder,
    erased_images: Collection[str] = (),
) -> Target:
    """What a request means: the classes it names, or the classes or single images that it lists.

    Args:
        names: class names of the data in index order, `erased` those of earlier requests by index.
        erased_images: SHA-256 of the images that earlier requests forgot singly.

    Raises:
        RequestError: as `resolve_classes` and `find_rows`; ``two_targets``, ``already_forgotten``; ``part_of_a_class``
            and ``whole_class`` where the list does not fit the mode; ``no_images_listed``.
    """
    if request.images is None:
        if request.sample_mode:
            raise RequestError(
                "--sample-mode forgets single images, but none are listed.",
                "Add --images FILE with one path or SHA-256 per line, or leave out --sample-mode.",
                "no_images_listed",
            )
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
    if request.sample_mode:
        if found.whole:
            raise _whole(found, names, request.images)
        gone = [i for i in rows if data.train_sha256[i] in set(erased_images)]
        if gone:
            raise RequestError(
                f"{request.images.where} lists {len(gone)} image(s) that an earlier request forgot, such as "
                f"{data.train.paths[gone[0]].parent.name}/{data.train.paths[gone[0]].name}.",
                "Remove them from the list.",
                "already_forgotten",
            )
        described = found.describe(found.partly, names)
        return Target([], rows, [f"Single images are forgotten while their classes are retained: {described}."])
    if found.partly:
        raise _only_in_part(found, names, request.images)
    check_remaining(found.whole, names, erased)
    where = request.images.where
    classes = "class" if len(found.whole) == 1 else "classes"
    return Target(
        found.whole,
        notes=[
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
        f"{_typed(list(found.listed), names)}; for these images alone add --sample-mode (in a request file sample_mode: true).",
        "part_of_a_class",
    )


def _whole(found: Coverage, names: list[str], images: ImageList) -> RequestError:
    return RequestError(
        f"{images.where} lists all training images of {_quoted(found.whole, names)}; without any of them left there is "
        "nothing to keep the class by.",
        f"For the whole class type --classes {_typed(found.whole, names)} instead of --sample-mode; take its images off the "
        "list where others are to be forgotten singly.",
        "whole_class",
    )


def _typed(classes: list[int], names: list[str]) -> str:
    """Classes as `--classes` takes them."""
    return ",".join(names[k] if "," not in names[k] else str(k) for k in classes)


def _quoted(classes: list[int], names: list[str]) -> str:
    return ", ".join(f"'{names[k]}'" for k in classes)
