"""Example images, only where the user asked for images: each with the old and the new answer, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsforget.errors import RequestError
from gsforget.report.markup import Html, number, tag

SIZE, LARGE = 160, 256  # longest side in pixels; larger where there are boxes to read
ROLES = {"forget": "Forgotten in this request", "old": "Forgotten earlier", "retain": "Retained"}


@dataclass(frozen=True)
class Example:
    """One test image and what was said about it.

    Attributes:
        image: a file, or the bytes of one, that Pillow can read.
        role: ``forget``, ``old`` or ``retain``.
        before, after: the class that was answered.
        before_score, after_score: its probability, 0 to 1.
        after_image: a second picture, where the first shows what was found before, and this one what is found now.
    """

    image: Path | bytes
    role: str
    before: str
    before_score: float | None
    after: str
    after_score: float | None
    after_image: bytes | None = None


def section(examples: Sequence[Example]) -> Html:
    """Figures by role.  Raises RequestError ``bad_image`` for what Pillow cannot read."""
    parts = []
    for role, title in ROLES.items():
        chosen = [e for e in examples if e.role == role]
        if chosen:
            parts += [tag("h3", title), tag("div", *map(_figure, chosen), class_="gallery")]
    return tag("div", *parts)


def _figure(example: Example) -> Html:
    def line(word: str, answer: str, score: float | None) -> Html:
        share = tag("span", f"({number(100 * score, '%', 0)})", class_="whole") if score is not None else None
        return tag("div", f"{word}: ", tag("b", answer), " ", share)

    shown = [example.image, *([example.after_image] if example.after_image else [])]
    side = SIZE if len(shown) == 1 else LARGE
    alt = f"test image, {ROLES[example.role].lower()}"
    pictures = [tag("img", src=_data_uri(image, side), alt=alt, loading="eager") for image in shown]
    caption = tag(
        "figcaption",
        line("before", example.before, example.before_score),
        line("after", example.after, example.after_score),
    )
    return tag("figure", *pictures, caption)


def _data_uri(image: Path | bytes, side: int = SIZE) -> str:
    """The picture, made small and written anew as PNG: what a camera noted in the file (place, time) is not carried over."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            small = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError) as error:
        name = "An example image" if isinstance(image, bytes) else str(image)
        raise RequestError(f"{name} cannot be read ({error}).", "Leave it out.", "bad_image") from error
    small.thumbnail((side, side))
    target = io.BytesIO()
    small.save(target, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
