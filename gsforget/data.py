"""Image folders: `DIR/train/<class>/*` and `DIR/test/<class>/*` (or `val`), checked before anything is computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsforget import processes
from gsforget.errors import RequestError
from gsforget.folder import sha256

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
LAYOUT = "Lay the images out as DIR/train/<class>/* and DIR/test/<class>/* (png, jpg, webp or bmp)."
MIN_FOR_VALIDATION = 3  # images of a class below which it has no validation part


@dataclass(frozen=True)
class Split:
    """Images of one split, class by class in index order: ``paths`` and ``labels``, int64 [N]."""

    paths: list[Path]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def per_class(self, k: int) -> NDArray[np.int64]:
        """Positions, int64, of the images of class ``k``."""
        return np.flatnonzero(self.labels == k)

    def count(self, k: int) -> int:
        """Number of images of class ``k``."""
        return int((self.labels == k).sum())

    def select(self, positions: ArrayLike) -> Split:
        """The images at ``positions``, in that order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Split([self.paths[i] for i in chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageFolder:
    """Both splits of the data folder ``root``; ``test_name`` says whether `test` or `val` was read."""

    root: Path
    class_names: list[str]
    train: Split
    test: Split
    test_name: str

    @cached_property
    def train_sha256(self) -> list[str]:
        """SHA-256 of each training image, read once."""
        return content_sha256(self.train.paths)

    @cached_property
    def test_sha256(self) -> list[str]:
        """SHA-256 of each test image, read once."""
        return content_sha256(self.test.paths)


def scan(
    root: Path,
    class_names: list[str] | None,
    optional: Collection[str] = (),
    missing_ok: bool = False,
    never_seen: Collection[str] = (),
) -> ImageFolder:
    """List the images of a data folder.

    Args:
        root: folder that holds `train` and `test` (or `val`).
        class_names: names in the model's index order; None takes the sorted folders of `train`.
        optional: names that may lack images or a folder, such as erased classes; the folder of the class at index 3 may
            be called `forgotten-3` then, as the model's `config.json` calls it.
        missing_ok: a class without any training images is no error (nor is it where it lacks test images, too).
        never_seen: folders that are no classes of the model, and are left out.

    Raises:
        RequestError: what is missing, empty, or does not fit the class names.
    """
    if not root.is_dir():
        raise RequestError(f"There is no data folder {root}.", "Check --data.", "no_data")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir():
        raise RequestError(f"{root} has no train/ folder.", LAYOUT, "no_train")
    if test is None:
        raise RequestError(f"{root} has neither a test/ nor a val/ folder.", LAYOUT, "no_test")
    names = list(class_names) if class_names is not None else _folders(train, never_seen)
    _check_names(names, train)
    renamed = {n: new for i, n in enumerate(names) if n in optional and (new := f"forgotten-{i}") not in {*names} - {n}}
    absent = [n for n in names if not _images(train, n, renamed)] if missing_ok and _folders(train) else []
    free = {*optional, *absent}
    for folder in (train, test):
        _check_folders(folder, names, renamed, absent, class_names is not None, never_seen)
    return ImageFolder(root, names, _list(train, names, free, renamed), _list(test, names, free, renamed), test.name)


def _folders(split: Path, without: Collection[str] = ()) -> list[str]:
    return sorted(
        p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in without
    )


def _check_names(names: list[str], train: Path) -> None:
    if not names:
        raise RequestError(f"{train} holds no class folders.", LAYOUT, "no_images")
    double = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise RequestError(
            f"The class name '{double[0]}' occurs {names.count(double[0])} times.",
            "Class names must differ; number the repeated ones.",
            "duplicate_names",
        )
    if len(names) == 1:
        raise RequestError(
            f"There is only one class, '{names[0]}'; nothing would be retained after forgetting it.",
            f"Add the other classes under {train}.",
            "one_class",
        )


def _check_folders(
    split: Path,
    names: list[str],
    renamed: dict[str, str],
    absent: Collection[str],
    given: bool,
    never_seen: Collection[str] = (),
) -> None:
    """The folders of a split must be the class names, no more and no fewer, but for classes erased or without images.

    ``renamed`` maps the names of erased classes to their new ones; ``absent`` holds those without training images.
    """
    there = _folders(split, set(never_seen) - set(names))
    extra = [n for n in there if n not in names and n not in renamed.values()]
    # Beside a folder that fits no name, a class without a folder is more likely misspelt than missing.
    free = {*renamed} if extra else {*renamed, *absent}
    missing = [n for n in names if n not in there and n not in free]
    if not missing and not extra:
        return
    hint = "Give the names in the model's index order, as the folders are named: --class-names FILE, one per line."
    if not there:
        raise RequestError(f"{split} holds no class folders.", LAYOUT, "no_images")
    if given and not any(n in names for n in there):
        raise RequestError(
            f"None of the {len(names)} class names ({listed(names)}) has a folder in {split}, "
            f"which holds {len(there)} ({listed(there)}).",
            hint,
            "class_names_differ",
        )
    parts = [f"has no folder for {listed(missing)}"] if missing else []
    if extra:
        parts.append(
            f"has {len(extra)} folder(s) that {'no class name fits' if given else 'train/ lacks'}: {listed(extra)}"
        )
        if renamed:
            hint = f"A class erased earlier may be removed, or its folder be named {listed(sorted(renamed))}."
    if not given:
        hint = "Both splits need the same class folders."
    counts = f" ({len(names)} class names, {len(there)} folders)" if len(names) != len(there) else ""
    raise RequestError(f"{split} {' and '.join(parts)}{counts}.", hint, "class_names_differ")


def listed(names: Sequence[str], most: int = 5) -> str:
    """A few names for a sentence: 'a', 'b', … (8 in all)."""
    shown = ", ".join(f"'{n}'" for n in names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"


def _list(split: Path, names: list[str], optional: Collection[str], renamed: dict[str, str]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(names):
        found = _images(split, name, renamed)
        if not found and name not in optional:
            raise RequestError(
                f"{split / name} holds no images.",
                "Add png, jpg, webp or bmp files, or remove the class.",
                "no_images",
            )
        paths += found
        labels += [index] * len(found)
    return Split(paths, np.asarray(labels, dtype=np.int64))


def _images(split: Path, name: str, renamed: dict[str, str]) -> list[Path]:
    """The images of a class, sorted by name; of an erased class also those in the folder of its new name."""
    folders = [split / folder for folder in dict.fromkeys((name, renamed.get(name, name)))]
    return [p for folder in folders if folder.is_dir() for p in sorted(folder.iterdir()) if _is_image(p)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def split_validation(
    labels: ArrayLike, fraction: float = 0.2, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training part and of the validation part, both int64 and sorted, stratified by class.

    A class of at least 3 images gives the rounded fraction, at least 1 and never all; a smaller class gives none.
    """
    truth = np.asarray(labels)
    validation: list[int] = []
    for k, positions in _shuffled(truth, seed):
        if len(positions) >= MIN_FOR_VALIDATION:
            take = min(max(1, round(fraction * len(positions))), len(positions) - 1)
            validation += positions[:take].tolist()
    chosen = np.sort(np.asarray(validation, dtype=np.int64))
    return np.setdiff1d(np.arange(len(truth), dtype=np.int64), chosen), chosen


def few_shot(labels: ArrayLike, shots: int, seed: int = 0) -> NDArray[np.int64]:
    """Positions, sorted, of ``shots`` images per class (all where a class has fewer); more shots extend fewer."""
    if shots < 1:
        raise RequestError(f"--shots {shots} leaves no images.", "Give 1 or more images per class.", "bad_shots")
    chosen = [i for _, positions in _shuffled(np.asarray(labels), seed) for i in positions[:shots]]
    return np.sort(np.asarray(chosen, dtype=np.int64))


def _shuffled(labels: NDArray[np.int64], seed: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Per class, its positions in an order that depends on the seed and the class alone."""
    return [
        (int(k), np.random.default_rng([seed, int(k)]).permutation(np.flatnonzero(labels == k)))
        for k in np.unique(labels)
    ]


def content_sha256(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, hexadecimal, in the order of ``paths``."""
    with ThreadPoolExecutor(cpu_threads()) as pool:
        return list(pool.map(sha256, paths))


def manifest_sha256(split: Split, hashes: Sequence[str] | None = None) -> str:
    """SHA-256 over `class folder/file name`, size and content hash of every image, in the order of their names.

    ``hashes`` are those of ``content_sha256``, where they are known already.
    """
    known = content_sha256(split.paths) if hashes is None else hashes
    lines = [f"{p.parent.name}/{p.name}\0{p.stat().st_size}\0{h}\n" for p, h in zip(split.paths, known, strict=True)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def cpu_threads() -> int:
    """CPU threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Free memory in bytes: what the system has, capped by the container's limit where there is one."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            free = 4 * 2**30  # neither Linux nor POSIX: assume little
    try:
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):
        pass  # no limit ("max" is not a number), or no control group
    return max(free, 0)


class ImageSet:
    """The images of a split as float32 batches, decoded by threads and kept in memory where they fit.

    Args:
        split: what to read.
        load: maps a path to a float32 array [C, H, W]; raises RequestError where an image is corrupt.
        skip_corrupt: let ``check`` drop corrupt images instead of refusing them.
        memory_fraction: share of the available memory that decoded images may take.

    ``paths``, ``labels`` (torch.int64 [N]) and ``dropped`` follow ``check``, which may drop images; call it first.
    """

    def __init__(
        self,
        split: Split,
        load: Callable[[Path], NDArray[np.float32]],
        skip_corrupt: bool = False,
        memory_fraction: float = 0.25,
    ):
        import torch

        self.paths = list(split.paths)
        self.labels: Tensor = torch.from_numpy(split.labels.copy())
        self.dropped: list[Path] = []
        self._load = load
        self._skip_corrupt = skip_corrupt
        self._memory = memory_fraction * available_memory() / processes.on_this_machine()
        self._cache: Tensor | None = None
        self._filled = np.zeros(len(self.paths), dtype=bool)
        self._planned = False

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor) -> Tensor:
        """Images at ``indices``, int64 [B], as float32 [B, C, H, W] on the CPU.

        Raises RequestError ``corrupt_image`` for the first one that cannot be decoded.
        """
        import torch

        wanted = indices.cpu()
        positions = wanted.tolist()
        self._plan()
        if self._cache is not None:
            todo = [i for i in dict.fromkeys(positions) if not self._filled[i]]
            errors = [error for error in self._each(self._fill, todo) if error]
            if errors:
                raise errors[0]
            return self._cache.index_select(0, wanted)
        images = self._each(lambda i: _attempt(self._load, self.paths[i]), positions)
        for image in images:
            if isinstance(image, RequestError):
                raise image
        return torch.from_numpy(np.stack(images)) if images else torch.empty(0)

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[Path]:
        """Read every image once; returns the paths that were dropped.

        Images that will be kept in memory are decoded, and so are all with ``skip_corrupt``; of others only the
        headers are read.  ``progress`` is called with (images done, images in all).
        Raises RequestError ``corrupt_image`` naming the first corrupt image and the number of others.
        """
        self._plan()
        if self._cache is not None:
            work: Callable[[int], RequestError | None] = self._fill
        elif self._skip_corrupt:
            work = self._try
        else:
            work = self._read_header
        errors: list[RequestError | None] = []
        for start in range(0, len(self), 256):
            part = range(start, min(start + 256, len(self)))
            errors += self._each(work, part)
            if progress:
                progress(part.stop, len(self))
        corrupt = [i for i, error in enumerate(errors) if error]
        if not corrupt:
            return []
        first = errors[corrupt[0]]
        assert first is not None
        if not self._skip_corrupt:
            raise _corrupt(first, len(corrupt) - 1)
        return self._drop(corrupt)

    def _plan(self) -> None:
        """Decide once, from the first image that decodes, whether all fit in memory."""
        import torch

        if self._planned or not self.paths:
            return
        for i in range(len(self)):
            image = _attempt(self._load, self.paths[i])
            if not isinstance(image, RequestError):
                if image.nbytes * len(self) <= self._memory:
                    self._cache = torch.empty((len(self), *image.shape), dtype=torch.float32)
                break
        self._planned = True

    def _each(self, work: Callable, positions: Sequence[int]) -> list:
        if len(positions) < 2:
            return [work(i) for i in positions]
        with ThreadPoolExecutor(min(cpu_threads(), 16)) as pool:
            return list(pool.map(work, positions))

    def _fill(self, i: int) -> RequestError | None:
        import torch

        assert self._cache is not None
        if not self._filled[i]:
            image = _attempt(self._load, self.paths[i])
            if isinstance(image, RequestError):
                return image
            self._cache[i] = torch.from_numpy(image)
            self._filled[i] = True
        return None

    def _try(self, i: int) -> RequestError | None:
        image = _attempt(self._load, self.paths[i])
        return image if isinstance(image, RequestError) else None

    def _read_header(self, i: int) -> RequestError | None:
        from PIL import Image

        try:
            with Image.open(self.paths[i]) as image:
                image.verify()
        except Exception as error:  # Pillow's decoders have no common base for what damaged files do to them
            message = f"The image {self.paths[i]} cannot be decoded ({error})."
            return RequestError(message, "Replace it, or add --skip-corrupt.", "corrupt_image")
        return None

    def _drop(self, corrupt: list[int]) -> list[Path]:
        import torch

        keep = np.setdiff1d(np.arange(len(self)), corrupt)
        emptied = set(self.labels.tolist()) - set(self.labels[torch.from_numpy(keep)].tolist())
        if emptied:
            folder = next(self.paths[i].parent for i in corrupt if int(self.labels[i]) in emptied)
            raise RequestError(f"No image in {folder} can be decoded.", "Replace the files.", "corrupt_image")
        gone = [self.paths[i] for i in corrupt]
        self.paths = [self.paths[i] for i in keep]
        self.labels = self.labels[torch.from_numpy(keep)]
        self._filled = self._filled[keep]
        if self._cache is not None:
            self._cache = self._cache[torch.from_numpy(keep)]
        self.dropped += gone
        return gone


def _attempt(work: Callable, path: Path):
    """The result of ``work(path)``, or the RequestError that says why this one image cannot be used."""
    try:
        return work(path)
    except RequestError as error:
        if error.kind not in ("corrupt_image", "no_image"):
            raise
        return error


def _corrupt(first: RequestError, others: int) -> RequestError:
    more = f" And {others} more cannot be decoded." if others else ""
    return RequestError(first.message + more, "Replace the files, or add --skip-corrupt.", "corrupt_image")
