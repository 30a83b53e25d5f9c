"""AP and AP50 per kind by a COCO evaluator: faster-coco-eval, or else pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.detections import Found
from gsforget.tasks.detect.coco import Scene


def coco_ap(found: Found, scenes: Sequence[Scene], kinds: Sequence[int]) -> dict[int, tuple[float, float]]:
    """AP (over overlaps of 0.5 to 0.95) and AP50 of each kind in percent; NaN where the scenes hold none of it.

    Args:
        found: detections of all scenes, nothing masked.
    """
    coco, evaluator = _evaluator()
    truth, said = coco(), coco()
    categories = [{"id": k + 1, "name": str(k)} for k in kinds]
    images = [{"id": n, "width": s.size[0], "height": s.size[1]} for n, s in enumerate(scenes)]
    with contextlib.redirect_stdout(io.StringIO()):  # both talk
        truth.dataset = {"info": {}, "images": images, "categories": categories, "annotations": _objects(scenes)}
        truth.createIndex()
        said = truth.loadRes(_detections(found, scenes)) if len(found.scores) else said
        judge = evaluator(truth, said, "bbox")
        judge.params.catIds = [k + 1 for k in kinds]
        judge.params.imgIds = list(range(len(scenes)))
        judge.evaluate()
        judge.accumulate()
    precision = np.asarray(judge.eval["precision"])[..., 0, -1]  # [overlaps, recalls, kinds], all sizes, 100 detections
    per_kind = {}
    for i, k in enumerate(kinds):
        values = precision[:, :, i]
        none = (values < 0).all()
        per_kind[k] = (np.nan, np.nan) if none else (100 * float(values.mean()), 100 * float(values[0].mean()))
    return per_kind


def _evaluator() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        raise RequestError(
            "No COCO evaluator is installed.", "pip install 'gsforget[detect]'.", "not_installed"
        ) from error


def _objects(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = []
    for n, scene in enumerate(scenes):
        for box, kind, crowd in zip(scene.boxes.tolist(), scene.kinds.tolist(), scene.crowd.tolist()):
            area = box[2] * box[3]
            entry = {"id": len(listed) + 1, "image_id": n, "category_id": kind + 1, "bbox": box, "area": area}
            listed.append({**entry, "iscrowd": int(crowd)})
    return listed


def _detections(found: Found, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    listed = []
    for n, scene in enumerate(scenes):
        edges = found.boxes[n].astype(np.float64) * np.array([*scene.frame, *scene.frame])
        boxes = np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], 1)
        for box, kind, score in zip(boxes.tolist(), found.kinds[n].tolist(), found.scores[n].tolist()):
            listed.append({"image_id": n, "category_id": kind + 1, "bbox": box, "score": score})
    return listed
