"""Images in, boxes with kinds and scores out; a forgotten kind is never among them.  Boxes can be drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from gsforget.errors import RequestError
from gsforget.export.device.detections import describe, select
from gsforget.export.device.infer import batches
from gsforget.export.device.preprocess import FORMATS, Preprocess, size_of

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
MIN_SCORE = 0.3


class Detects(Protocol):
    """Anything that turns images [N, C, H, W] into the outputs of an exported detector, by name."""

    def outputs(self, batch: np.ndarray) -> dict[str, np.ndarray]: ...


def detect(
    predictor: Detects,
    preprocess: Preprocess,
    forgotten: Collection[int],
    class_names: Sequence[str],
    paths: Sequence[Path],
    min_score: float = MIN_SCORE,
    batch_size: int = 8,
    skip_corrupt: bool = False,
    on_skip: Callable[[RequestError], None] | None = None,
    draw: Path | None = None,
) -> dict[str, Any]:
    """Find objects on each image.

    Args:
        forgotten: kinds that are left out before the best are chosen, so that they are never returned.
        paths: image files; skip_corrupt, on_skip: as for `classify`.
        min_score: lowest score, 0 to 1.
        draw: folder for copies of the images with the boxes on them.

    Returns:
        ``{"images": [{"path", "detections": [{"class", "score", "box"}]}]}``, best first; a box is left, top, right and
        bottom in pixels of the image file.  With `draw` each image has ``drawn``, the copy's path.

    Raises RequestError for an unreadable image, outputs that do not fit ``class_names``, and when no image is left.
    """
    if not 0 <= min_score <= 1:
        raise RequestError(f"--min-score is {min_score}; it must be 0 to 1.", "Type --min-score 0.3.", "bad_score")
    if draw is not None:
        draw.mkdir(parents=True, exist_ok=True)
    names, images = list(class_names), []
    for files, batch in batches(preprocess, paths, batch_size, skip_corrupt, on_skip):
        sizes = [size_of(file) for file in files]
        listed = find_objects(predictor.outputs(batch), sizes, preprocess, forgotten, names, min_score)
        for file, objects in zip(files, listed, strict=True):
            entry: dict[str, Any] = {"path": str(file), "detections": objects}
            if draw is not None:
                place = _free(draw, file.stem)
                draw_boxes(file, entry["detections"], names).save(place)
                entry["drawn"] = str(place)
            images.append(entry)
    if not images:
        raise RequestError("No image could be read.", "Name other images.", "no_images")
    return {"images": images}


def find_objects(
    given: dict[str, np.ndarray],
    sizes: Sequence[tuple[int, int]],
    preprocess: Preprocess,
    forgotten: Collection[int],
    class_names: Sequence[str],
    min_score: float,
) -> list[list[dict[str, Any]]]:
    """The objects on each image of a batch, best first, as `detect` returns them.

    Args:
        given: outputs of an exported detector, by name; sizes: width and height of each image file in pixels.

    Raises RequestError for outputs that do not fit ``class_names`` or are not finite.
    """
    names = list(class_names)
    scoring = scoring_of(given["logits"], len(names))
    found = select(given["logits"], given["query_boxes"], scoring, given["scores"].shape[1], forgotten)
    listed = []
    for n, size in enumerate(sizes):
        boxes = found.boxes[n] * padding(preprocess, size)
        one = type(found)(found.scores[n : n + 1], found.kinds[n : n + 1], boxes[None])
        listed.append(describe(one, 0, size, names, min_score, forgotten))
    return listed


def scoring_of(logits: np.ndarray, classes: int) -> str:
    """How a detector's logits [N, Q, …] are read: softmax has a column for "no object".  RequestError ``wrong_classes``."""
    if logits.shape[-1] not in (classes, classes + 1):
        raise RequestError(
            f"The detector gives {logits.shape[-1]} numbers per query, but {classes} class names are known.",
            "Check class_names in config.json, or export the model again.",
            "wrong_classes",
        )
    return "sigmoid" if logits.shape[-1] == classes else "softmax"


def padding(preprocess: Preprocess, size: tuple[int, int]) -> np.ndarray:
    """What boxes are multiplied with to be shares of the image: 1 but where a model counts the padding as well, [4]."""
    frame = size if preprocess.input_size[0] == 4 else preprocess.frame(size)
    return np.array([frame[0] / size[0], frame[1] / size[1]] * 2, np.float32)


def draw_boxes(path: Path, detections: Sequence[dict[str, Any]], names: Sequence[str], scale: int = 1) -> Image.Image:
    """A copy of an image with boxes, kinds and scores; small images are enlarged so that they can be read."""
    with Image.open(path, formats=FORMATS) as image:
        copy = image.convert("RGB")
    scale = max(scale, -(-256 // max(copy.size)))
    copy = copy.resize((copy.width * scale, copy.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(copy)
    for entry in reversed(detections):  # the best on top
        colour = COLOURS[list(names).index(entry["class"]) % len(COLOURS)]
        left, top, right, bottom = (scale * edge for edge in entry["box"])
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = f"{entry['class']} {100 * entry['score']:.0f}"
        place = pen.textbbox((left + 2, max(0, top - 12)), text)
        pen.rectangle(place, fill=colour)
        pen.text((left + 2, max(0, top - 12)), text, fill="white")
    return copy


def _free(folder: Path, stem: str) -> Path:
    """A name that no drawing has yet."""
    place, n = folder / f"{stem}.png", 1
    while place.exists():
        n += 1
        place = folder / f"{stem}-{n}.png"
    return place
