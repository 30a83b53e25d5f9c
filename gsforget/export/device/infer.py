"""Images in, ranked classes out; a forgotten class is never among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.preprocess import Preprocess

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Predicts(Protocol):
    """Anything that turns images [N, C, H, W] into logits [N, K]."""

    def predict(self, batch: np.ndarray) -> np.ndarray: ...


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files meant by files and folders, each once, in the order given.

    Folders are searched with everything in them, sorted by path, for png, jpg, jpeg, webp and bmp; hidden files are
    left out.  Raises RequestError for an absent path and for a folder without images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_file():
            found[path] = None
        elif path.is_dir():
            inside = sorted(_walk(path))
            if not inside:
                raise RequestError(
                    f"{path} holds no images ({', '.join(s[1:] for s in SUFFIXES)}).",
                    "Name another folder.",
                    "no_images",
                )
            found.update(dict.fromkeys(inside))
        else:
            raise RequestError(f"There is no image or folder {path}.", "Check the path.", "no_image")
    return list(found)


def classify(
    predictor: Predicts,
    preprocess: Preprocess,
    forgotten: Collection[int],
    class_names: Sequence[str],
    paths: Sequence[Path],
    top: int = 5,
    batch_size: int = 64,
    skip_corrupt: bool = False,
    on_skip: Callable[[RequestError], None] | None = None,
) -> dict[str, Any]:
    """Rank the classes of each image.

    Args:
        forgotten: indices that are masked out before the softmax, so that they are never returned.
        class_names: one per logit.
        paths: image files, as ``find_images`` gives them.
        top: how many classes per image, at most.
        skip_corrupt: leave out images that cannot be read instead of stopping at the first.
        on_skip: told of each image left out.

    Returns:
        ``{"images": [{"path", "top": [{"class", "score"}]}]}``, best class first; scores are 0 to 1 and sum to 1
        over all classes that are not forgotten.

    Raises RequestError for an unreadable image, logits that do not fit ``class_names`` or are not finite, and when
    no image is left.
    """
    if top < 1 or batch_size < 1:
        raise RequestError(f"top ({top}) and batch size ({batch_size}) must be at least 1.", "Use --top 5.", "bad_top")
    images: list[dict[str, Any]] = []
    for names, batch in batches(preprocess, paths, batch_size, skip_corrupt, on_skip):
        ranked = rank(predictor.predict(batch), [str(name) for name in names], forgotten, class_names, top)
        images += [{"path": str(path), "top": best} for path, best in zip(names, ranked, strict=True)]
    if not images:
        raise RequestError("No image could be read.", "Name other images.", "no_images")
    return {"images": images}


def rank(
    logits: np.ndarray, images: Sequence[str], forgotten: Collection[int], class_names: Sequence[str], top: int
) -> list[list[dict[str, Any]]]:
    """Rank the classes of each image by its logits [N, K].

    Args:
        images: what to call each image in an error.
        forgotten, class_names, top: as for ``classify``.

    Returns:
        Per image ``[{"class", "score"}]``, best first.

    Raises RequestError for logits that do not fit ``class_names`` or are not finite.
    """
    kept = np.array([i for i in range(len(class_names)) if i not in set(forgotten)], dtype=int)
    scores = _softmax(_checked(logits, images, len(class_names))[:, kept].astype(np.float64))
    orders = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [{"class": class_names[kept[i]], "score": float(row[i])} for i in order]
        for row, order in zip(scores, orders, strict=True)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(where, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))


def batches(
    preprocess: Preprocess,
    paths: Sequence[Path],
    size: int,
    skip_corrupt: bool,
    on_skip: Callable[[RequestError], None] | None,
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Files and what they become, float32 [n, C, H, W], `size` at a time; arguments as for `classify`."""
    for start in range(0, len(paths), size):
        names, images = [], []
        for path in paths[start : start + size]:
            try:
                images.append(preprocess.load(path))
                names.append(path)
            except RequestError as error:
                if not skip_corrupt:
                    error.hint = f"{error.hint} Or leave out what cannot be read: --skip-corrupt."
                    raise
                if on_skip is not None:
                    on_skip(error)
        if names:
            yield names, np.stack(images)


def _checked(logits: np.ndarray, names: Sequence[str], classes: int) -> np.ndarray:
    if logits.shape != (len(names), classes):
        raise RequestError(
            f"The model gives {list(logits.shape)} logits for {len(names)} images, but {classes} class names are known.",
            "Check class_names in config.json, or export the model again.",
            "wrong_classes",
        )
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise RequestError(
            f"The model's logits for {names[int(np.argmax(bad))]} are NaN or infinite.",
            "Export the model at a higher precision, such as --precision fp32.",
            "nan_logits",
        )
    return logits


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)
