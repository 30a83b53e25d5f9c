"""What a served model says of images, by its task: ranked classes, or the objects that it finds; never a forgotten one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.detect import MIN_SCORE, find_objects
from gsforget.export.device.infer import rank
from gsforget.export.device.runtime import Predictor

SERVED = ("classify", "detect")  # tasks that can be answered image by image


@dataclass(frozen=True)
class Wish:
    """How much is asked for: classes per image, at most; or objects from this score on, 0 to 1."""

    top: int = 5
    min_score: float = MIN_SCORE

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise RequestError(
                f"The lowest score is {self.min_score}; it must be 0 to 1.", "For example 0.3.", "bad_score"
            )


def answer(
    predictor: Predictor, pixels: np.ndarray, names: Sequence[str], sizes: Sequence[tuple[int, int]], wish: Wish
) -> list[dict[str, Any]]:
    """Of images [N, C, H, W], per image ``{"top": [{"class", "score"}]}`` or ``{"detections": [{"class", "score", "box"}]}``.

    Args:
        names: what to call each image in an error; sizes: width and height of each image file.

    Raises RequestError as `rank` and `find_objects`.
    """
    info = predictor.info
    if info.task == "detect":
        given = predictor.outputs(pixels)  # type: ignore[attr-defined]
        found = find_objects(given, sizes, info.preprocess, info.forgotten, info.class_names, wish.min_score)
        return [{"detections": objects} for objects in found]
    ranked = rank(predictor.predict(pixels), names, info.forgotten, info.class_names, wish.top)
    return [{"top": best} for best in ranked]


def narrowed(said: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """An answer cut down to what one of several senders asked for."""
    if "top" in said:
        return {"top": said["top"][: wish.top]}
    return {"detections": [entry for entry in said["detections"] if entry["score"] >= wish.min_score]}
