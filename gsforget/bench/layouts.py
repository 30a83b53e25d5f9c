"""The papers' data sets in the folders in which they are downloaded, as the two splits that gsforget reads; nothing is copied.

Class indices follow sorted folder names (CUB: its own numbers), as torchvision gives them and as the release of GS-LoRA
(arXiv 2403.11530, 2501.09705) has them; its order of requests, `random.Random(1337)` over these indices, comes on top.
The papers measure 100 classes of each set.  Where it is not published which, the rule here is our own and said below; names
that are given instead choose any classes, in any order.

- ``casia-webface``, ``ms-celeb``: identity folders.  The 100 with the most images, ties by name; a fifth of each
  identity's images, drawn by its name and seed 1337, are the test split.  CASIA-100 as GS-LoRA's authors offer it, with
  `train/` and `test/`, is read as it is.  InsightFace's packed train.rec is not read.
- ``imagenet100``: `train/` and `val/` (or `test/`), or Kaggle's `train.X1` … and `val.X` with Labels.json, whose first
  synonym names a class.  Of more than 100 classes the first ones.
- ``cub-200``: the published split of images.txt and train_test_split.txt; classes 1 to 100.
- ``omnibenchmark``: list files of `path label` lines per realm, in any of the places where the project and its download tool
  put them; test lists where they have labels, else val.  The 100 classes with the most training images.  Listed images that
  are not there are left out, as links expire.  Also `train/` and `test/` with class folders.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gsforget.data import SUFFIXES, ImageFolder, Split, listed
from gsforget.errors import RequestError

CLASSES = 100
SEED, TEST_SHARE = 1337, 0.2
Paths = dict[str, list[Path]]


@dataclass
class _Found:
    """What a layout holds: images per class and split, the classes to take by default, other spellings of classes."""

    train: Paths
    test: Paths
    default: list[str]
    test_name: str = "test"
    spellings: dict[str, str] = field(default_factory=dict)


def open_layout(name: str, root: Path | str, class_names: Sequence[str] | None = None) -> ImageFolder:
    """A downloaded data set as two splits.

    Args:
        name: a key of `LAYOUTS`.
        root: the folder that its archive unpacks to.
        class_names: the classes to read, in index order; None takes those of the papers as far as they are known.

    Raises:
        RequestError: ``unknown_layout``; ``bad_layout`` where the folder is not what the layout says, or lacks a class.
    """
    if name not in LAYOUTS:
        raise RequestError(f"There is no layout called {name}.", f"There are {', '.join(LAYOUTS)}.", "unknown_layout")
    root, (read, expected) = Path(root), LAYOUTS[name]
    if not root.is_dir():
        raise RequestError(f"There is no data folder {root}.", expected, "bad_layout")
    try:
        found = read(root, class_names)
        names = list(found.default if class_names is None else class_names)
        keys = [found.spellings.get(n, n) for n in names]
        missing = [n for n, key in zip(names, keys) if key not in found.train]
        if missing:
            raise _Wrong(f"holds no class called {listed(missing)}")
        readable = {key: spelling for spelling, key in reversed(found.spellings.items())}
        shown = names if class_names is not None else [readable.get(key, key) for key in keys]
        for split, images in (("training", found.train), ("test", found.test)):
            bare = [n for n, key in zip(shown, keys) if not images.get(key)]
            if bare:
                raise _Wrong(f"holds no {split} images of {listed(bare)}")
    except _Wrong as wrong:
        message = f"{root} is not {name} as it is usually laid out: it {wrong}."
        raise RequestError(message, expected, "bad_layout") from None
    if len(set(keys)) < 2 or len(set(keys)) < len(keys):
        raise RequestError(f"{root} needs two classes or more, each once.", expected, "bad_layout")
    return ImageFolder(root, shown, _split(found.train, keys), _split(found.test, keys), found.test_name)


class _Wrong(Exception):
    """What a folder lacks, as the end of a sentence that begins with "it"."""


def _split(images: Paths, keys: list[str]) -> Split:
    paths = [p for key in keys for p in images[key]]
    return Split(paths, np.repeat(np.arange(len(keys), dtype=np.int64), [len(images[key]) for key in keys]))


def _identities(pattern: str) -> Callable[[Path, Sequence[str] | None], _Found]:
    """Reader of identity folders whose names fit a pattern."""

    def read(root: Path, class_names: Sequence[str] | None) -> _Found:
        if (root / "train").is_dir():
            return _two_folders(root, [root / "train"], _test_folder(root))
        folders = [p for p in _folders(root) if re.fullmatch(pattern, p.name)]
        if not folders and any(root.glob("*.rec")):
            raise _Wrong("is packed in a .rec file, which is not read; unpack it to one folder per identity")
        if not folders:
            raise _Wrong("has no identity folders")
        images = {p.name: _images(p) for p in folders if class_names is None or p.name in class_names}
        most = sorted(images, key=lambda name: (-len(images[name]), name))[:CLASSES]
        parts = {name: _seeded(name, images[name]) for name in (most if class_names is None else images)}
        return _Found({n: a for n, (a, _) in parts.items()}, {n: b for n, (_, b) in parts.items()}, sorted(most))

    return read


def _seeded(name: str, images: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and test images of a class, the same ones whichever classes are read beside it."""
    order = np.random.default_rng([SEED, zlib.crc32(name.encode())]).permutation(len(images))
    take = {*order[: max(1, round(TEST_SHARE * len(images)))].tolist()}
    return [p for i, p in enumerate(images) if i not in take], [p for i, p in enumerate(images) if i in take]


def _imagenet100(root: Path, _: Sequence[str] | None) -> _Found:
    parts = sorted(p for p in root.glob("train.X*") if p.is_dir())
    if parts and not (root / "val.X").is_dir():
        raise _Wrong("has train.X1 but no val.X")
    found = (
        _two_folders(root, parts, root / "val.X") if parts else _two_folders(root, [root / "train"], _test_folder(root))
    )
    found.default = found.default[:CLASSES]
    if (root / "Labels.json").is_file():
        labels = {wnid: text for wnid, text in _json(root / "Labels.json").items() if wnid in found.train}
        first = Counter(text.split(",")[0] for text in labels.values())
        names = {wnid: text.split(",")[0] for wnid, text in labels.items()}
        found.spellings = {n if first[n] == 1 else f"{n} ({wnid})": wnid for wnid, n in names.items()}
    return found


def _cub(root: Path, _: Sequence[str] | None) -> _Found:
    tables = {name: dict(_lines(root / f"{name}.txt")) for name in ("images", "image_class_labels", "train_test_split")}
    if not (root / "images").is_dir():
        raise _Wrong("has no images/ folder")
    splits: tuple[Paths, Paths] = (defaultdict(list), defaultdict(list))
    number = {}
    for key, path in sorted(tables["images"].items(), key=lambda item: item[1]):
        try:
            label, trains = int(tables["image_class_labels"][key]), tables["train_test_split"][key] == "1"
        except (KeyError, ValueError):
            raise _Wrong(f"has no label or split for image {key} of images.txt") from None
        image = root / "images" / path
        if not image.is_file():
            raise _Wrong(f"lacks images/{path}, which images.txt lists")
        name = Path(path).parent.name
        number[name] = label
        splits[0 if trains else 1][name].append(image)
    default = sorted(number, key=lambda name: number[name])[:CLASSES]
    spellings = {name.split(".", 1)[-1]: name for name in number}
    train, test = splits
    return _Found(train, test, default, spellings={**{n: n for n in number}, **spellings})


def _omnibenchmark(root: Path, _: Sequence[str] | None) -> _Found:
    if (root / "train").is_dir() and _folders(root / "train"):
        found = _two_folders(root, [root / "train"], _test_folder(root))
        found.default = _most(found.train, found.default)
        return found
    train, test = _lists(root, "train"), _lists(root, "test")
    test_name = "test" if test else "val"
    test = test or _lists(root, "val")
    if not train or not test:
        raise _Wrong(f"has no {'val or test' if train else 'train'} lists of labelled images that are there")
    order = sorted({*train} & {*test}, key=lambda key: (key.rpartition("/")[0], int(key.rpartition("/")[2])))
    found = _Found(train, test, _most(train, order), test_name)
    for folder in (root, root / "meta_v2"):
        for path in sorted(folder.glob("trainid2name*.json")):
            names = {f"{realm}/{i}": n for realm, ids in _json(path).items() for i, n in ids.items()}
            shared = Counter(names.values())
            found.spellings = {n if shared[n] == 1 else f"{n} ({key})": key for key, n in names.items() if key in train}
    return found


def _most(images: Paths, order: list[str]) -> list[str]:
    """The classes with the most images, in their order; among equals the earlier ones."""
    chosen = {*sorted(order, key=lambda key: -len(images[key]))[:CLASSES]}
    return [key for key in order if key in chosen]


def _lists(root: Path, split: str) -> Paths:
    """Images that list files of a split name and that are there, by `realm/label`; nothing from lists without labels."""
    places = [f"{split}.txt", f"*/{split}.txt", f"meta_v2/*/{split}.txt", f"*/{split}/record*.txt"]
    found: Paths = defaultdict(list)
    for path in sorted({p for place in [*places, f"*/*.{split}/record*.txt"] for p in root.glob(place)}):
        inside = [part for part in path.relative_to(root).parts[:-1] if part != "meta_v2"]
        realm = inside[0] if inside else "all"
        bases = (path.parent, root / realm, root)
        for image, label in _lines(path):
            there = next((base / image for base in bases if (base / image).is_file()), None)
            if label.isdigit() and there is not None:
                found[f"{realm}/{label}"].append(there)
    return dict(found)


def _two_folders(root: Path, train: list[Path], test: Path) -> _Found:
    """Class folders of two splits, the first perhaps in several parts."""
    if not train[0].is_dir():
        raise _Wrong(f"has no {train[0].name}/ folder")
    names = sorted({p.name for part in train for p in _folders(part)})
    images = {n: [p for part in train if (part / n).is_dir() for p in _images(part / n)] for n in names}
    held_out = {n: _images(test / n) for n in names if (test / n).is_dir()}
    if not names:
        raise _Wrong(f"has no class folders in {train[0].name}/")
    if len(held_out) < len(names):
        raise _Wrong(f"has no folder in {test.name}/ for {listed([n for n in names if n not in held_out])}")
    return _Found(images, held_out, names, "test" if test.name == "test" else "val")


def _test_folder(root: Path) -> Path:
    found = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if found is None:
        raise _Wrong("has neither a test/ nor a val/ folder")
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.is_dir())


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _lines(path: Path) -> list[tuple[str, str]]:
    """First word and rest of each line; nothing is said of empty ones."""
    try:
        text = path.read_text(encoding="utf8")
    except OSError:
        raise _Wrong(f"has no {path.name}") from None
    pairs = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(first, rest.strip()) for first, _, rest in pairs]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        raise _Wrong(f"has a {path.name} that is no JSON") from None


LAYOUTS: dict[str, tuple[Callable[[Path, Sequence[str] | None], _Found], str]] = {
    "casia-webface": (
        _identities(r"\d+"),
        "Expected ROOT/<identity number>/*.jpg, or train/ and test/ with such folders.",
    ),
    "ms-celeb": (_identities(r"m\.\w+"), "Expected ROOT/m.<identity>/*.jpg, or train/ and test/ with such folders."),
    "imagenet100": (
        _imagenet100,
        "Expected train/<wnid>/* and val/<wnid>/*, or Kaggle's train.X1 to train.X4 and val.X with such folders.",
    ),
    "cub-200": (
        _cub,
        "Expected images/<number>.<name>/*.jpg beside images.txt, image_class_labels.txt and train_test_split.txt.",
    ),
    "omnibenchmark": (
        _omnibenchmark,
        "Expected <realm>/train.txt and <realm>/val.txt with `path label` lines (also in meta_v2/, or as record.txt beside "
        "images/), or train/ and test/ with class folders.",
    ),
}
