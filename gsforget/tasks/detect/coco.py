"""Annotations in the format of COCO: found, read and checked, with one sentence for whatever does not fit.

Each split has one JSON file and one folder of images.  The file is named by `--annotations`, a folder or two files, and
is DIR/annotations, or DIR itself, unless told otherwise; `train.json` goes with DIR/train, and `instances_train2017.json` with
DIR/train2017 (or DIR/images/train2017).  What is measured is `test`, or else `val`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsforget.errors import RequestError

OUTSIDE = 1.0  # pixels by which a box may stick out of its image: annotations of COCO are rounded
LAYOUT = (
    "Lay out DIR/train/*.png and DIR/test/*.png with DIR/annotations/train.json and test.json, or as COCO: DIR/train2017, "
    "DIR/val2017 and DIR/annotations/instances_train2017.json, instances_val2017.json."
)


@dataclass(frozen=True)
class Scene:
    """What is on one image.

    Attributes:
        path: of the image; size: its width and height as annotated.
        boxes: float32 [n, 4], left, top, width and height in pixels; kinds: int64 [n], class indices; crowd: bool [n].
        frame: width and height in pixels of what a model's boxes are shares of: the image, or the image with padding.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    kinds: np.ndarray
    crowd: np.ndarray
    frame: tuple[float, float]


@dataclass(frozen=True)
class AnnotatedSplit:
    """The scenes of a split, in the order of its file.

    Attributes:
        categories: class indices in the order of the category ids.
        dropped: annotations without an area, which COCO has a few of.
    """

    annotations: Path
    scenes: list[Scene]
    sha256: str
    categories: tuple[int, ...]
    dropped: int = 0


@dataclass(frozen=True)
class SceneFolder:
    """Annotated scenes to learn from and to measure on; `class_names` are the model's in index order."""

    root: Path
    class_names: list[str]
    train: AnnotatedSplit
    test: AnnotatedSplit


def open_scenes(root: Path, annotations: str | None, names: Sequence[str]) -> SceneFolder:
    """Read both splits.

    Args:
        root: data folder; annotations: what `--annotations` says: a folder, or two JSON files separated by a comma
            (training first), relative to `root` or not; None: DIR/annotations.
        names: class names of the model in index order; categories are matched by name.

    Raises:
        RequestError: a file or an image is absent, or an annotation does not fit; says which and what to do.
    """
    if not root.is_dir():
        raise RequestError(f"There is no data folder {root}.", "Give --data a folder.", "no_data")
    train, test = _find_files(root, annotations)
    return SceneFolder(root, list(names), *(_read_split(root, path, names) for path in (train, test)))


def category_names(root: Path, annotations: str | None) -> list[str]:
    """Names of the categories of the training annotations, in the order of their ids."""
    content = _read_json(_find_files(root, annotations)[0])
    return [str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])]


def _find_files(root: Path, annotations: str | None) -> tuple[Path, Path]:
    usual = "annotations" if (root / "annotations").is_dir() else "."
    given = [part.strip() for part in (annotations or usual).split(",") if part.strip()]
    paths = [root / part if (root / part).exists() else Path(part) for part in given]
    if len(paths) == 2:
        for path in paths:
            if not path.is_file():
                raise RequestError(f"There is no annotation file {path}.", LAYOUT, "no_annotations")
        return paths[0], paths[1]
    if len(paths) != 1 or not paths[0].is_dir():
        what = paths[0] if len(paths) == 1 else annotations
        raise RequestError(
            f"--annotations {what} is neither a folder of annotation files nor two files.",
            "Give --annotations FOLDER, or --annotations train.json,test.json.",
            "no_annotations",
        )
    return _file_of(paths[0], ("train",)), _file_of(paths[0], ("test", "val"))


def _file_of(folder: Path, splits: tuple[str, ...]) -> Path:
    for split in splits:
        plain = folder / f"{split}.json"
        if plain.is_file():
            return plain
        named = sorted(folder.glob(f"instances_{split}*.json"))
        if len(named) == 1:
            return named[0]
        if named:
            raise RequestError(
                f"{folder} holds {len(named)} annotation files of the {split} split ({named[0].name}, {named[1].name}).",
                "Name the two files to use: --annotations TRAIN.json,TEST.json.",
                "two_annotations",
            )
    raise RequestError(f"{folder} holds no annotations of a {splits[0]} split.", LAYOUT, "no_annotations")


def _images_of(root: Path, file: Path) -> Path:
    """The folder of images that belongs to an annotation file."""
    split = file.stem.removeprefix("instances_")
    places = [root / split, root / "images" / split, *([root / "val"] if split == "test" else [])]
    for place in places:
        if place.is_dir():
            return place
    raise RequestError(f"There is no folder {places[0]} with the images of {file}.", LAYOUT, "no_images")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} is not a readable JSON file ({error}).", "Restore it.", "bad_annotations"
        ) from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise RequestError(
            f"{path} is not in the format of COCO: it needs the lists images, annotations and categories.",
            "Convert the annotations to COCO's instances format.",
            "bad_annotations",
        )
    return content


def _read_split(root: Path, path: Path, names: Sequence[str]) -> AnnotatedSplit:
    content, folder = _read_json(path), _images_of(root, path)
    try:
        kinds = _class_of(content["categories"], names, path)
        images = {int(image["id"]): image for image in content["images"]}
        for what, key, entries in (
            ("image", "id", "images"),
            ("image", "file_name", "images"),
            ("category", "id", "categories"),
        ):
            _check_unique([entry[key] for entry in content[entries]], f"{what} {key}", path)
        found: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in content["annotations"]:
            _check(annotation, images, kinds, path)
            found[int(annotation["image_id"])].append(annotation)
        scenes = [_scene(folder, image, found[number], kinds) for number, image in images.items()]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RequestError(
            f"{path} holds an entry that is not as COCO has it ({type(error).__name__}: {error}).",
            "Images need id, file_name, width and height; annotations id, image_id, category_id and bbox.",
            "bad_annotations",
        ) from error
    absent = [scene.path for scene in scenes if not scene.path.is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise RequestError(
            f"{path} annotates {absent[0].name}{more}, which {'are' if more else 'is'} not in {folder}.",
            "Copy the images there, or remove them and their annotations from the file.",
            "missing_image",
        )
    if not scenes:
        raise RequestError(f"{path} lists no images.", LAYOUT, "no_images")
    kept = sum(len(scene.kinds) for scene in scenes)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    categories = tuple(kinds[number] for number in sorted(kinds))
    return AnnotatedSplit(path, scenes, digest, categories, len(content["annotations"]) - kept)


def _class_of(categories: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> dict[int, int]:
    """Class index by category id, matched by name; numbered names such as LABEL_3 are matched by their number."""
    index = {name: i for i, name in reversed(list(enumerate(names)))}
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    found: dict[int, int] = {}
    for category in categories:
        number, name = int(category["id"]), str(category["name"])
        if unnamed and 0 <= number < len(names):
            found[number] = number
        elif name in index:
            found[number] = index[name]
        else:
            shown = ", ".join(f"'{n}'" for n in names[:5])
            raise RequestError(
                f"{path} has the category '{name}', which is none of the model's {len(names)} classes ({shown}, …).",
                "Name the categories as the model's config.json does, or give --class-names FILE.",
                "unknown_category",
            )
    return found


def _check_unique(values: Sequence[Any], what: str, path: Path) -> None:
    """RequestError ``listed_twice``: annotations of the one would be taken for those of the other, or count twice."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise RequestError(f"{path} lists the {what} {value} twice.", "Remove one of them.", "listed_twice")
        seen.add(value)


def _check(annotation: dict[str, Any], images: dict[int, Any], kinds: dict[int, int], path: Path) -> None:
    what = f"Annotation {annotation.get('id', '?')} of {path}"
    if int(annotation["image_id"]) not in images:
        raise RequestError(
            f"{what} belongs to image {annotation['image_id']}, which the file does not list.",
            "List the image, or remove the annotation.",
            "missing_image",
        )
    if int(annotation["category_id"]) not in kinds:
        raise RequestError(
            f"{what} has the category id {annotation['category_id']}, which the file's categories do not list.",
            "Add it under categories, or correct the annotation.",
            "unknown_category",
        )
    image = images[int(annotation["image_id"])]
    width, height = int(image["width"]), int(image["height"])
    left, top, w, h = (float(v) for v in annotation["bbox"])
    inside = left >= -OUTSIDE and top >= -OUTSIDE and left + w <= width + OUTSIDE and top + h <= height + OUTSIDE
    if not (inside and w >= 0 and h >= 0):
        raise RequestError(
            f"{what} has the box [{left:g}, {top:g}, {w:g}, {h:g}] (left, top, width, height), which lies outside its "
            f"image {image['file_name']} of {width} x {height} pixels.",
            "Correct the box; COCO counts in pixels from the top left corner.",
            "bad_box",
        )


def _scene(folder: Path, image: dict[str, Any], annotations: list[dict[str, Any]], kinds: dict[int, int]) -> Scene:
    width, height = int(image["width"]), int(image["height"])
    corners = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.array([width, height, width, height], np.float32))
    sides = corners[:, 2:] - corners[:, :2]
    keep = (sides > 0).all(1)
    return Scene(
        folder / str(image["file_name"]),
        (width, height),
        np.concatenate([corners[:, :2], sides], 1)[keep],
        np.array([kinds[int(a["category_id"])] for a in annotations], np.int64)[keep],
        np.array([bool(int(a.get("iscrowd", 0))) for a in annotations], bool)[keep],
        (width, height),
    )
