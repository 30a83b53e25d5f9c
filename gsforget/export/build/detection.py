"""What an exported detector gives, and how it is compared with the model; see `kinds.ExportKind`.

Outputs, for N images, Q queries, K kinds: `kinds` [N, K], the best logit of each kind, which known answers are made of;
`logits` and `query_boxes`, the raw outputs, from which devices choose what they return; and for others to use as they
are, after the model's own post-processing, `boxes` [N, M, 4] (left, top, right, bottom as shares of the image), `scores`
and `labels` [N, M].  Nothing is masked in the file: a forgotten kind must not be found because it is forgotten.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import GateError
from gsforget.export.device.detections import Found, select
from gsforget.tasks.detect.coco import Scene

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.export.build.kinds import Comparison
    from gsforget.tasks.detect.families import Family

OUTPUT = "kinds"
MORE = ("logits", "query_boxes", "boxes", "scores", "labels")
BATCH = 8
SYNTHETIC = 16  # images
THRESHOLDS = {"max_forget_acc": 1.0, "max_retain_drop": 1.0}
# Largest difference of a probability or of a box's edge, as shares of 1.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 8e-2, "int8": 0.2, "fp8": 0.2}


@dataclass(frozen=True)
class Scenes:
    """Test scenes, and the kinds that were forgotten so far."""

    scenes: list[Scene]
    forgotten: Sequence[int]


def traced(model: nn.Module) -> nn.Module:
    """The detector with its post-processing, its parameters being the same under the same names."""
    import torch

    from gsforget.tasks.detect.families import family_named

    family = family_named(model.config.model_type)

    def forward(self: Any, images: Tensor) -> tuple[Tensor, ...]:
        with _symbolic_length(type(model).__module__):
            output = type(model).forward(self, images)
        logits, boxes = output.logits, output.pred_boxes
        width = logits.shape[-1] - (family.scoring == "softmax")
        x, y, w, h = boxes.unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        if family.scoring == "softmax":
            best, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, queries = best.topk(best.shape[1], 1)
            labels = labels.gather(1, queries)
        else:
            flat = logits.sigmoid().flatten(1)
            scores, pairs = flat.topk(min(family.most or logits.shape[1], logits.shape[1] * logits.shape[2]), 1)
            queries, labels = pairs // width, pairs % width
        chosen = corners.gather(1, queries[..., None].expand(-1, -1, 4))
        return logits[..., :width].amax(1), logits, boxes, chosen, scores, labels

    view = copy.copy(model)
    view.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return view


@contextmanager
def _symbolic_length(module: str) -> Iterator[None]:
    """`len` of a tensor, as transformers asks for the batch in RT-DETR, is a plain number, and would freeze the batch of an
    exported file; within the module of the detector it is the tensor's own, symbolic one."""
    import torch

    space = vars(sys.modules[module])
    space["len"] = lambda value: value.shape[0] if isinstance(value, torch.Tensor) else len(value)
    try:
        yield
    finally:
        space.pop("len", None)


class TorchDetector:
    """A detector in memory behind the outputs of an exported one."""

    def __init__(self, model: nn.Module, device: Any):
        self.network, self.device = traced(model.to(device).eval()), device

    def outputs(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            given = self.network(torch.from_numpy(batch).to(self.device))
        return {name: t.cpu().numpy() for name, t in zip((OUTPUT, *MORE), given, strict=True)}


def find_samples(
    data: Path, names: list[str], erased: list[str], forgotten: Sequence[int], annotations: str | None = None
) -> Scenes:
    """The test scenes of a data folder; see `tasks.detect.coco` for where annotations lie."""
    from gsforget.tasks.detect.coco import open_scenes

    del erased
    return Scenes(open_scenes(data, annotations, names).test.scenes, forgotten)


def check(c: Comparison) -> dict[str, Any]:
    """Probabilities and boxes of artifact and model on the same images, and AP of what was forgotten and retained."""
    import torch

    from gsforget.tasks.detect.families import family_named

    family = family_named(c.model.config.model_type)
    network = traced(c.model)
    largest = edges = 0.0
    founds: list[tuple[Found, Found]] = []
    agree = count = 0
    for batch in _batches(c):
        with torch.inference_mode():
            wanted = [t.numpy() for t in network(torch.from_numpy(batch))]
        given = c.artifact.outputs(batch)  # type: ignore[attr-defined]
        logits, boxes = given["logits"], given["query_boxes"]
        if not (np.isfinite(logits).all() and np.isfinite(boxes).all()):
            raise _differs(c.where, "its outputs are not finite", c.info.precision)
        both = [_probabilities(x, family) for x in (wanted[1], logits)]
        order = _order(wanted[2], boxes, both)
        both[1], boxes = (np.take_along_axis(x, order[..., None], 1) for x in (both[1], boxes))
        largest = max(largest, float(np.abs(both[0] - both[1]).max()))
        sure = both[0].max(-1) > 0.3
        if sure.any():
            edges = max(edges, float(np.abs(wanted[2] - boxes)[sure].max()))
            agree += int((both[0].argmax(-1) == both[1].argmax(-1))[sure].sum())
            count += int(sure.sum())
        founds.append((_select(wanted[1], wanted[2], family), _select(logits, given["query_boxes"], family)))
    allowed = TOLERANCES[c.info.precision]
    parity: dict[str, Any] = {
        "max_abs_diff": largest,
        "max_box_diff": edges,
        "top1_agreement": 100.0 * agree / count if count else 100.0,
        "images": sum(len(f.scores) for f, _ in founds),
        "inputs": "test images" if c.samples else "seeded noise",
        "forget_acc": None,
        "retain_acc": None,
    }
    if not (largest <= allowed and edges <= allowed):
        what = f"probabilities differ by up to {largest:.2g} and boxes by up to {edges:.2g} (allowed: {allowed:g})"
        raise _differs(c.where, what, c.info.precision)
    if c.samples is not None:
        parity |= _check_forgotten(c, family, founds)
    return parity


def _select(logits: np.ndarray, boxes: np.ndarray, family: Family) -> Found:
    return select(logits, boxes, family.scoring, family.most or logits.shape[1])


def _check_forgotten(c: Comparison, family: Family, founds: list[tuple[Found, Found]]) -> dict[str, float | None]:
    """AP50 of forgotten and AP of retained kinds on the artifact; GateError where the run's gates are breached."""
    from gsforget.tasks.detect.evaluate import coco_ap

    assert c.samples is not None
    scenes = framed(c.samples.scenes, c.info.preprocess, family)
    kinds = sorted({int(k) for s in scenes for k in s.kinds[~s.crowd]})
    both = [
        Found(*(np.concatenate(p) for p in zip(*((f.scores, f.kinds, f.boxes) for f in side)))) for side in zip(*founds)
    ]
    model, artifact = (coco_ap(found, scenes, kinds) for found in both)
    gone = [k for k in kinds if k in c.samples.forgotten]
    kept = [k for k in kinds if k not in c.samples.forgotten]
    forget = float(np.mean([artifact[k][1] for k in gone])) if gone else None
    retain, was = ((float(np.mean([ap[k][0] for k in kept])) if kept else None) for ap in (artifact, model))
    limits = {**THRESHOLDS, **(c.thresholds or {})}
    if c.thresholds is not None and forget is not None and forget > limits["max_forget_acc"]:
        raise _breached(c.where, "AP50 of forgotten kinds", forget, limits["max_forget_acc"])
    if c.thresholds is not None and retain is not None and was is not None and was - retain > limits["max_retain_drop"]:
        raise _breached(c.where, "loss of AP of retained kinds", was - retain, limits["max_retain_drop"])
    return {"forget_acc": forget, "retain_acc": retain}


def framed(scenes: Sequence[Scene], preprocess: Any, family: Family) -> list[Scene]:
    """Scenes whose frame is what the model's boxes are shares of."""
    from dataclasses import replace

    return list(scenes) if family.masked else [replace(s, frame=preprocess.frame(s.size)) for s in scenes]


def _batches(c: Comparison) -> Iterator[np.ndarray]:
    """Batches of different sizes on purpose: a batch dimension frozen at export would show."""
    prepare = c.info.preprocess
    if c.samples is None:
        noise = np.random.default_rng(0).random((SYNTHETIC, *prepare.input_size)).astype(np.float32)
        if prepare.input_size[0] == 4:
            noise[:, 3] = 1
        yield from (noise[:1], noise[1:4], noise[4:])
        return
    paths = [s.path for s in c.samples.scenes]
    for start in range(0, len(paths), BATCH):
        yield np.stack([prepare.load(p) for p in paths[start : start + BATCH]])


def _probabilities(logits: np.ndarray, family: Family) -> np.ndarray:
    if family.scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _order(wanted: np.ndarray, given: np.ndarray, probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """For each query of the model that of the artifact: where a model chooses its queries, rounding may swap some, [N, Q]."""
    same = np.broadcast_to(np.arange(wanted.shape[1]), wanted.shape[:2])
    if np.abs(wanted - given).max() < 1e-2:
        return same
    from scipy.optimize import linear_sum_assignment

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a[:, None] - b[None]).sum(-1)

    pairs = zip(wanted, given, *probabilities)
    return np.stack([linear_sum_assignment(apart(w, g) + apart(p, q))[1] for w, g, p, q in pairs])


def _differs(where: str, what: str, precision: str) -> GateError:
    return GateError(
        f"{where} does not answer as the model does: {what}. Nothing was published.",
        "Type --precision fp32." if precision != "fp32" else "Please report this, with the model's type.",
        "parity",
    )


def _breached(where: str, what: str, value: float, limit: float) -> GateError:
    return GateError(
        f"{where}: the {what} is {value:.2f}, at most {limit:g} is allowed. Nothing was published.",
        "Export at --precision fp32, or forget again with a stricter --max-forget-acc.",
        "forgetting",
    )
