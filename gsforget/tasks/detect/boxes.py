"""Boxes as detectors of transformers have them: centre, width and height, as shares of the frame."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def centred(boxes: np.ndarray, frame: tuple[float, float]) -> np.ndarray:
    """Left, top, width, height in pixels -> centre, width, height as shares of the frame, float32 [n, 4]."""
    shares = boxes / np.array([*frame, *frame], np.float32)
    shares[:, :2] += shares[:, 2:] / 2
    return shares.astype(np.float32)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes, pair by pair, [..., 4] -> [...]."""
    shared, union = _shared_and_union(_corners(boxes), _corners(others))
    return shared / union.clamp_min(1e-9)


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised intersection over union of boxes (arXiv 1902.09630), pair by pair, [..., 4] -> [...]."""
    (a1, a2), (b1, b2) = corners = _corners(boxes), _corners(others)
    shared, union = _shared_and_union(*corners)
    around = (torch.maximum(a2, b2) - torch.minimum(a1, b1)).clamp_min(0).prod(-1)
    return shared / union.clamp_min(1e-9) - (around - union) / around.clamp_min(1e-9)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2


def _shared_and_union(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (a1, a2), (b1, b2) = first, second
    shared = (torch.minimum(a2, b2) - torch.maximum(a1, b1)).clamp_min(0).prod(-1)
    return shared, (a2 - a1).prod(-1) + (b2 - b1).prod(-1) - shared
