"""Exported embedding models: one output, `embedding`; the margin head stays behind.  Compared by cosine with the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import GateError
from gsforget.export.build.parity import Samples, batches, samples_of

if TYPE_CHECKING:
    from torch import nn

    from gsforget.export.build.kinds import Comparison

__all__ = ["MORE", "OUTPUT", "check", "find_samples", "traced"]

OUTPUT = "embedding"
MORE: tuple[str, ...] = ()
# The lowest cosine between an artifact's embedding of an image and the model's: rounding of a ViT's activations, with room.
LEAST_COSINE = {"fp32": 1 - 1e-5, "fp16": 0.999, "bf16": 0.98, "int8": 0.9, "fp8": 0.9}
MAX_TAR_GAIN = 1.0  # points by which an artifact may verify forgotten people better than the model does


def find_samples(
    data: Path, names: list[str], erased: list[str], forgotten: Sequence[int], annotations: str | None = None
) -> Samples:
    """The test images of the model's people; see `kinds.ExportKind`."""
    from gsforget.tasks.face.data import open_data

    return samples_of(open_data(data, names, erased, annotations=annotations), forgotten)


def traced(model: nn.Module) -> nn.Module:
    """The model itself: its forward pass leaves the head out."""
    return model


def check(c: Comparison) -> dict[str, Any]:
    """Parity by cosine, and whether forgotten people verify as little as by the model; see `kinds.ExportKind`.

    `forget_tar` and `retain_tar` are TAR in percent at a false accept rate of 1e-3, of the artifact itself, over all people
    forgotten so far and all others; None without images.
    """
    from gsforget.predict import TorchPredictor

    reference = TorchPredictor(c.model)
    both = [(reference.predict(b), c.artifact.predict(b)) for b in batches(c.info.preprocess, c.samples)]
    wanted, found = (np.concatenate(part) for part in zip(*both, strict=True))
    same = np.isfinite(found).all() and found.shape == wanted.shape
    cosine = float((_unit(wanted) * _unit(found)).sum(1).min()) if same else -1.0
    parity: dict[str, Any] = {
        "max_abs_diff": float(np.abs(wanted - found).max()) if same else float("inf"),
        "min_cosine": cosine,
        "images": len(wanted),
        "inputs": "test images" if c.samples else "seeded noise",
        "forget_tar": None,
        "retain_tar": None,
    }
    if cosine < LEAST_COSINE[c.info.precision]:
        raise GateError(
            f"{c.where} does not embed as the model does: the cosine of an image's two embeddings is as low as {cosine:.4f} "
            f"(needed: {LEAST_COSINE[c.info.precision]:g}). Nothing was published.",
            "Type --precision fp32." if c.info.precision != "fp32" else "Please report this, with the model's name.",
            "parity",
        )
    if c.samples is None:
        return parity
    before, after = (_verify(e, c.samples) for e in (wanted, found))
    if None not in (before["forget_tar"], after["forget_tar"]) and c.thresholds is not None:
        gained = after["forget_tar"] - before["forget_tar"]  # type: ignore[operator]
        if gained > MAX_TAR_GAIN:
            raise GateError(
                f"{c.where} verifies forgotten people again: TAR {after['forget_tar']:.1f} %, where the model's is "
                f"{before['forget_tar']:.1f} %. Nothing was published.",
                "Export at --precision fp32.",
                "forgetting",
            )
    return parity | after


def _verify(embeddings: np.ndarray, samples: Samples) -> dict[str, float | None]:
    from gsforget.tasks.face import verification as v
    from gsforget.tasks.face.evidence import People

    labels = np.asarray(samples.labels)
    gone = [int(k) for k in np.unique(labels) if k in samples.forgotten]
    kept = [int(k) for k in np.unique(labels) if k not in samples.forgotten]
    people = People(_unit(embeddings), labels, {"forget": gone, "retain": kept})
    genuine, owners, impostors = v.pairs(*people.of("retain"))
    if not len(impostors):
        return {"forget_tar": None, "retain_tar": None}
    at = v.threshold(impostors)
    mine, whose, _ = v.pairs(*people.of("forget")) if gone else (np.zeros(0), np.zeros(0, int), None)
    return {
        "forget_tar": v.accept_rate(mine, whose, at).percent if len(mine) else None,
        "retain_tar": v.accept_rate(genuine, owners, at).percent if len(genuine) else None,
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
