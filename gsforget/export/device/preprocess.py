"""The one preprocessing, in numpy and Pillow: the same numbers, bit for bit, as timm's evaluation transform.

Gates, parity checks and devices all read images through this file, so none of them can differ by a resize.
Steps and roundings follow `timm.data.transforms_factory.transforms_imagenet_eval` and torchvision; a test proves it.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gsforget.errors import RequestError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border", "fit")
# Raster formats only: others that Pillow knows (EPS) would start an interpreter on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
# What Pillow's decoders raise on damaged files; it has no common base for them.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Preprocess:
    """Image to network input: resize, crop, scale to 0..1, normalise.

    Attributes:
        input_size: channels (1 or 3; 4 for ``fit``), height, width in pixels.
        mean, std: one value per channel, for pixels scaled to 0..1.
        interpolation: a key of ``INTERPOLATIONS``.
        crop_pct: the image is resized to the input size divided by this, then the centre is cut out.
        crop_mode: ``center`` keeps the aspect ratio and loses the margins, ``squash`` gives up the ratio,
            ``border`` keeps everything and fills up with the mean colour, ``fit`` keeps everything as large as `fit` says,
            in the top left corner, and fills up with zeros; with four channels the last one is 1 where the image is.
        fit: of ``fit``: shortest edge, longest edge, and what both edges are a multiple of.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    fit: tuple[int, int, int] | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Preprocess:
        """From the fields of a `config.json` (other fields are ignored).

        A single mean or std serves all channels.  Raises RequestError (kind ``bad_config``) for values that
        cannot be used.
        """
        try:
            channels, height, width = (int(v) for v in raw["input_size"])
            mean, std = (_per_channel(raw[name], min(channels, 3)) for name in ("mean", "std"))
            fit = raw.get("fit")
            made = cls(
                (channels, height, width),
                mean,
                std,
                str(raw.get("interpolation", "bicubic")),
                float(raw.get("crop_pct", 1.0)),
                str(raw.get("crop_mode") or "center"),
                (int(fit[0]), int(fit[1]), int(fit[2])) if fit else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(f"they are incomplete or not numbers ({error})") from error
        made._check()
        return made

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in a `config.json`."""
        return {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            **({"fit": list(self.fit)} if self.fit else {}),
        }

    def _check(self) -> None:
        channels = (3, 4) if self.crop_mode == "fit" else (1, 3)
        if self.input_size[0] not in channels or min(self.input_size) < 1:
            raise _unusable(f"input_size {list(self.input_size)} is not [1 or 3, height, width]")
        if not all(map(math.isfinite, self.mean)) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise _unusable("mean must be finite and std greater than 0")
        if self.interpolation not in INTERPOLATIONS:
            raise _unusable(f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        if self.crop_mode not in CROP_MODES:
            raise _unusable(f"crop_mode {self.crop_mode!r} is none of {', '.join(CROP_MODES)}")
        if (self.crop_mode == "fit") != (self.fit is not None) or (self.fit and min(self.fit) < 1):
            raise _unusable(
                "crop_mode fit needs fit: shortest edge, longest edge and a multiple, and no other mode does"
            )
        if self.fit and self.fit[1] > min(self.input_size[1:]):
            raise _unusable(f"images of up to {self.fit[1]} pixels do not fit into {list(self.input_size[1:])}")
        if not (math.isfinite(self.crop_pct) and self.crop_pct > 0):
            raise _unusable(f"crop_pct {self.crop_pct} is not greater than 0")

    @property
    def image_mode(self) -> str:
        """Pillow's mode of the images fed to the network: ``L`` for one channel, ``RGB`` for three."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def load(self, path: str | Path) -> np.ndarray:
        """Read one image file: float32 [C, H, W].

        As in timm's loader, the EXIF orientation is not applied.  Raises RequestError of kind ``no_image`` for an
        absent file and ``corrupt_image`` for an empty, truncated, damaged or unknown one.
        """
        try:
            pixels = self._read(path)
        except FileNotFoundError as error:
            raise RequestError(f"There is no image {path}.", "Check the path.", "no_image") from error
        except PermissionError as error:
            raise RequestError(
                f"{path} may not be read by this user.", "Change its permissions.", "no_image"
            ) from error
        except DAMAGED as error:
            empty = Path(path).is_file() and Path(path).stat().st_size == 0
            why = "it is a folder" if Path(path).is_dir() else _reason(empty, error)
            raise _corrupt(str(path), why) from error
        return self(pixels)

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """The bytes of one image file: float32 [C, H, W].

        Raises RequestError ``corrupt_image``, which calls the image by ``name``, as ``load`` does.
        """
        try:
            pixels = self._read(io.BytesIO(data))
        except DAMAGED as error:
            raise _corrupt(name, _reason(not data, error)) from error
        return self(pixels)

    def _read(self, source: str | Path | io.BytesIO) -> Image.Image:
        with Image.open(source, formats=FORMATS) as image:
            return image.convert(self.image_mode)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 [C, H, W] of a Pillow image of any mode and size."""
        image = image.convert(self.image_mode)
        if self.fit:
            return self._fitted(image)
        image = self._crop(self._resize(image))
        pixels = np.asarray(image, dtype=np.uint8).reshape(*self.input_size[1:], self.input_size[0])
        return self._scaled(pixels)

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] -> float32 [C, H, W], normalised."""
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return np.ascontiguousarray((scaled - mean) / std)

    def _fitted(self, image: Image.Image) -> np.ndarray:
        width, height = self.content(image.size)
        small = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        whole = np.zeros(self.input_size, np.float32)
        whole[:3, :height, :width] = self._scaled(np.asarray(small, np.uint8))
        whole[3:, :height, :width] = 1
        return whole

    def frame(self, size: tuple[int, int]) -> tuple[float, float]:
        """Width and height of the whole input in pixels of an image of this width and height, padding included."""
        if not self.fit:
            return size
        width, height = self.content(size)
        return size[0] * self.input_size[2] / width, size[1] * self.input_size[1] / height

    def content(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that an image of this width and height takes up in the input; of ``fit``, else all of it."""
        return fitted(size, *self.fit) if self.fit else (self.input_size[2], self.input_size[1])

    def _resize(self, image: Image.Image) -> Image.Image:
        target_h, target_w = (math.floor(edge / self.crop_pct) for edge in self.input_size[1:])
        width, height = image.size
        if self.crop_mode == "squash":
            size = (target_w, target_h)
        elif self.crop_mode == "center" and target_h == target_w:
            # torchvision's Resize with one number: the long edge is truncated, not rounded.
            longer = int(target_w * max(width, height) / min(width, height))
            size = (target_w, longer) if width <= height else (longer, target_h)
        else:
            ratios = (height / target_h, width / target_w)
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            size = (round(width / ratio), round(height / ratio))
        # A hair-thin image keeps one pixel, where timm fails.
        return image.resize((max(size[0], 1), max(size[1], 1)), INTERPOLATIONS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        _, height, width = self.input_size
        lack_w, lack_h = max(width - image.width, 0), max(height - image.height, 0)
        if lack_w or lack_h:
            border = (lack_w // 2, lack_h // 2, (lack_w + 1) // 2, (lack_h + 1) // 2)
            image = ImageOps.expand(image, border, self._fill())
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _fill(self) -> int | tuple[int, ...]:
        values = tuple(round(255 * v) if self.crop_mode == "border" else 0 for v in self.mean)
        return values if len(values) > 1 else values[0]


def size_of(image: bytes | str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image file that can be read, or of the bytes of one."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
        return opened.size


def fitted(size: tuple[int, int], shortest: int, longest: int, multiple: int) -> tuple[int, int]:
    """Width and height after the shorter edge became `shortest`, or the longer one `longest` where it would be larger.

    As in the image processors of DETR and, with a multiple of 16, YOLOS in transformers.
    """
    width, height = size
    small, large = min(size), max(size)
    edge, exact = shortest, float(shortest)
    if large / small * shortest > longest:
        exact = longest * small / large
        edge = round(exact)
    if small == edge and multiple == 1:
        return size
    other = int(exact * large / small)
    edge, other = (max(multiple, v - v % multiple) for v in (edge, other))
    return (edge, other) if width < height else (other, edge)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise ValueError(f"{len(numbers)} values of mean or std for {channels} channels")
    return numbers


def _unusable(reason: str) -> RequestError:
    return RequestError(
        f"The preprocessing values cannot be used: {reason}.",
        "Correct --mean, --std, --crop-pct or --interpolation, or the model's config.json.",
        "bad_config",
    )


def _corrupt(name: str, why: str) -> RequestError:
    return RequestError(f"{name} is not a readable image ({why}).", "Replace or remove the file.", "corrupt_image")


def _reason(empty: bool, error: BaseException) -> str:
    if empty:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is unknown"
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
