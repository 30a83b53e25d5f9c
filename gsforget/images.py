"""Images of a split as tensors, decoded by threads, kept in memory where they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsforget import processes
from gsforget.data import Split
from gsforget.errors import RequestError
from gsforget.machine import available_memory, cpu_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


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
