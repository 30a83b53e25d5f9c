"""How alike two models' features are: debiased linear CKA per block, and the shift of each class's mean.

After an erasure CKA should be low on images of forgotten classes and high on retained ones.  It is dominated by the
directions of largest variance, and the plain estimate rises with the number of features; this one does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def cka(x: ArrayLike, y: ArrayLike) -> float | None:
    """Debiased linear CKA of features [n, d1] and [n, d2] of the same n >= 4 images.

    The ratio HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of unbiased HSIC estimates (Song et al., JMLR 13, 2012, eq. 5;
    Nguyen et al., arXiv 2010.15327) with K = X Xᵀ, L = Y Yᵀ.  1 for rotated, scaled and shifted copies; about 0, and
    sometimes a little below, for unrelated features.  None where one side has no variance to compare.

    Raises:
        ValueError: fewer than 4 images, or different numbers of them.
    """
    first, second = _centred(x), _centred(y)
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"CKA needs features of the same images, at least 4; got {len(first)} and {len(second)}")
    of_x, of_y = _gram(first), _gram(second)
    own_x, own_y = _hsic(of_x, of_x), _hsic(of_y, of_y)
    # Rounding leaves about 1e-16 of the squared norms in place of no variance.
    if own_x <= 1e-12 * np.square(of_x).mean() or own_y <= 1e-12 * np.square(of_y).mean():
        return None
    return float(_hsic(of_x, of_y) / np.sqrt(own_x * own_y))


def prototype_shift(before: ArrayLike, after: ArrayLike) -> NDArray[np.float64]:
    """Cosine, float64 [C], between each class's mean feature before and after, [C, d] each (see `probes.class_means`).

    1 = unmoved.  A mean of length 0 gives 0.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"means {first.shape} and {second.shape} must both be [C, d]")
    length = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / np.where(length > 0, length, 1.0)


def _centred(features: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"features must be [n, d], got {values.shape}")
    return values - values.mean(axis=0)  # HSIC does not notice; sums of squares lose less


def _gram(features: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.sqrt(np.square(features).sum() / len(features))
    features = features / scale if scale > 0 else features
    gram = features @ features.T
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Unbiased HSIC of kernels [n, n] with zero diagonals."""
    n = len(a)
    both = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(((a * b).sum() + both - 2 / (n - 2) * (a.sum(axis=0) @ b.sum(axis=0))) / (n * (n - 3)))
