"""Galleries: a template per enrolled person, bound to the model that made it; identification and comparison by cosine.

The file is an `.npz` of plain arrays (read without pickle): `names` [M], `templates` float32 [M, d] of length 1, `images`
[M], how many each was made from, `model`, the SHA-256 of the model, and `threshold`, the cosine above which a face counts as
an enrolled person's.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import write_file
from gsforget.export.device.preprocess import Preprocess

FAR = 1e-3  # share of strangers' comparisons that the threshold lets pass, of the enrolled people themselves
FORMAT = 1
BATCH = 64


class Embeds(Protocol):
    """Anything that turns images [N, C, H, W] into embeddings [N, d]."""

    def predict(self, batch: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Gallery:
    """Templates of enrolled people; see the file's own description."""

    names: list[str]
    templates: np.ndarray
    images: np.ndarray
    model: str
    threshold: float

    def save(self, path: Path) -> None:
        """Write the file whole, or not at all."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format=np.int64(FORMAT),
            names=np.array(self.names, dtype=np.str_),
            templates=self.templates.astype(np.float32),
            images=self.images.astype(np.int64),
            model=np.array(self.model, dtype=np.str_),
            threshold=np.float64(self.threshold),
        )
        write_file(path, buffer.getvalue())

    def check_model(self, hashes: Sequence[str], path: Path) -> None:
        """SafetyError ``other_gallery`` unless the gallery was made with a model of one of these hashes.

        Cosines between the embeddings of two models mean nothing, and a gallery from before an erasure still holds the
        templates of whom it forgot.
        """
        if self.model not in hashes:
            raise SafetyError(
                f"{path} was made with another model ({self.model[:12]}…).",
                f"Enrol the people again with this model: gsforget infer MODEL --enroll DIR --gallery {path}.",
                "other_gallery",
            )

    def identify(self, embeddings: np.ndarray, top: int = 5) -> list[dict[str, Any]]:
        """Per embedding [N, d]: ``top``, the nearest people with their cosines, and ``person``, None for a stranger."""
        cosines = unit(embeddings) @ self.templates.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        found = []
        for row, best in zip(cosines, order, strict=True):
            ranked = [{"id": self.names[i], "cosine": float(row[i])} for i in best]
            found.append({"top": ranked, "person": ranked[0]["id"] if row[best[0]] > self.threshold else None})
        return found

    def without(self, names: Sequence[str]) -> Gallery:
        """The gallery without the templates of some people."""
        keep = [i for i, name in enumerate(self.names) if name not in set(names)]
        kept = [self.names[i] for i in keep]
        return Gallery(kept, self.templates[keep], self.images[keep], self.model, self.threshold)


def load_gallery(path: Path) -> Gallery:
    """Read a gallery.  Raises RequestError ``no_gallery`` and ``bad_gallery``."""
    if not path.is_file():
        raise RequestError(
            f"There is no gallery {path}.",
            f"Make one: gsforget infer MODEL --enroll DIR --gallery {path}, with a folder of images per person in DIR.",
            "no_gallery",
        )
    try:
        with np.load(path, allow_pickle=False) as raw:
            newer = int(raw["format"]) > FORMAT
            gallery = Gallery(
                [str(name) for name in raw["names"]],
                raw["templates"].astype(np.float32),
                raw["images"],
                str(raw["model"]),
                float(raw["threshold"]),
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        plain = "pickle" in str(error)  # numpy then says how to run it
        raise _bad(path, "it is no .npz of plain arrays" if plain else str(error)) from error
    if newer:
        raise _bad(path, "it is of a newer format")
    if gallery.templates.ndim != 2 or len(gallery.names) != len(gallery.templates) or not gallery.names:
        raise _bad(path, "names and templates do not match")
    if not np.isfinite(gallery.templates).all():
        raise _bad(path, "a template is NaN or infinite")
    return gallery


def make_gallery(names: Sequence[str], embeddings: np.ndarray, people: np.ndarray, model: str) -> Gallery:
    """Templates as mean embeddings at length 1.

    Args:
        embeddings: [N, d]; people: int [N], an index into `names` for each, all of which occur.
        model: SHA-256 of the model that made them.
    """
    units = unit(embeddings)
    counts = np.bincount(people, minlength=len(names))
    sums = np.zeros((len(names), units.shape[1]))
    np.add.at(sums, people, units)
    templates = unit(sums)
    cosines = units @ templates.T
    strangers = np.sort(cosines[people[:, None] != np.arange(len(names))[None]])[::-1]
    at = float(strangers[min(len(strangers) - 1, max(1, int(FAR * len(strangers))))]) if len(strangers) else 0.5
    return Gallery(list(names), templates.astype(np.float32), counts, model, at)


def enroll(
    model: Embeds, preprocess: Preprocess, folder: Path, sha256: str, say: Callable[[str], None] | None = None
) -> Gallery:
    """A gallery of the people in a folder, one folder of images each.

    Raises RequestError ``no_people`` for a folder without such folders, and for an image that cannot be read.
    """
    from gsforget.export.device.infer import find_images

    people = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    if not people:
        raise RequestError(
            f"{folder} holds no folders of people.", "Give DIR/<person>/*.jpg, one folder per person.", "no_people"
        )
    listed = [(path, n) for n, person in enumerate(people) for path in find_images([person])]
    owners = np.array([n for _, n in listed])
    embeddings = embed(model, preprocess, [path for path, _ in listed])
    single = [p.name for n, p in enumerate(people) if (owners == n).sum() == 1]
    if single and say:
        say(f"Enrolled by one image alone, which makes a poor template: {', '.join(single[:5])}.")
    return make_gallery([p.name for p in people], embeddings, owners, sha256)


def embed(model: Embeds, preprocess: Preprocess, paths: Sequence[Path]) -> np.ndarray:
    """Embeddings of image files, float32 [N, d] of length 1.  Raises RequestError where one cannot be read."""
    batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
    found = np.concatenate([model.predict(np.stack([preprocess.load(p) for p in batch])) for batch in batches])
    broken = ~np.isfinite(found).all(axis=1)
    if broken.any():
        raise RequestError(
            f"The embedding of {paths[int(np.argmax(broken))]} is NaN or infinite.",
            "Export the model at a higher precision, such as --precision fp32.",
            "nan_logits",
        )
    return unit(found)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows at length 1."""
    values = np.asarray(vectors, np.float64)
    return (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _bad(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path} is not a gallery ({why}).",
        "Make it again: gsforget infer MODEL --enroll DIR --gallery FILE.",
        "bad_gallery",
    )
