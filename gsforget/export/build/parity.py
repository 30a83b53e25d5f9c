"""Does the artifact answer as the model does, and has it forgotten?  Measured on the artifact itself, unmasked logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import GateError, RequestError

if TYPE_CHECKING:
    from torch import nn

    from gsforget.data import ImageFolder
    from gsforget.export.build.kinds import Comparison
    from gsforget.export.device.infer import Predicts
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.export.device.runtime import Predictor

OUTPUT = "logits"  # of an exported classifier, see `kinds`
MORE: tuple[str, ...] = ()
BATCH = 64
SYNTHETIC = 32  # images
# Gates of `forget`, in the order that ``evaluate_gates`` takes them, where a run states none.
THRESHOLDS = {"max_forget_acc": 1.0, "max_retain_drop": 1.0, "max_class_drop": 10.0}


@dataclass(frozen=True)
class Tolerance:
    """What an artifact may differ by.

    Attributes:
        absolute: largest difference of a logit.
        relative: the same as a share of the reference's largest logit; the larger of both holds.
        tie: reference logits this close to the best (times max(1, largest logit)) count as equally good.
        agreement: percent of images whose best class must be the reference's.
    """

    absolute: float
    relative: float
    tie: float
    agreement: float


# At fp16 an activation carries 11 bits; a faithful ViT differs by 0.1 to 1 % of its largest logit, a broken one by more
# than that logit itself.
# At bf16 it carries 8 bits, and differs by about eight times as much.
# At int8 it carries 8 bits of a range that is shared by all of a tensor, and the reference are the weights at fp32; at fp8
# 4 bits, of the number's own size.
TOLERANCES = {
    "fp32": Tolerance(1e-3, 0.0, 1e-5, 100.0),
    "fp16": Tolerance(1e-3, 0.05, 0.02, 99.0),
    "bf16": Tolerance(1e-2, 0.1, 0.05, 97.0),
    "int8": Tolerance(1e-2, 0.25, 0.05, 95.0),
    "fp8": Tolerance(1e-2, 0.25, 0.05, 95.0),
}


@dataclass(frozen=True)
class Samples:
    """Test images by path, their labels (int64 [N]), and the classes to tell apart."""

    paths: Sequence[Path]
    labels: np.ndarray
    forgotten: Sequence[int]


def compare(reference_logits: np.ndarray, artifact_logits: np.ndarray, tie: float = 0.0) -> dict[str, float]:
    """Compare logits [N, K] of the same images.

    Args:
        tie: the artifact's best class also agrees where its reference logit is at most this below the reference's best.

    Returns:
        ``max_abs_diff`` and ``mean_abs_diff`` in logits, ``top1_agreement`` in percent; infinite differences and
        agreement 0 where the artifact's logits are not finite.
    """
    if reference_logits.shape != artifact_logits.shape or not len(reference_logits):
        raise ValueError(f"logits {reference_logits.shape} and {artifact_logits.shape} cannot be compared")
    if not np.isfinite(artifact_logits).all():
        return {"max_abs_diff": float("inf"), "mean_abs_diff": float("inf"), "top1_agreement": 0.0}
    reference, artifact = reference_logits.astype(np.float64), artifact_logits.astype(np.float64)
    difference = np.abs(reference - artifact)
    chosen = np.take_along_axis(reference, artifact.argmax(1)[:, None], axis=1)[:, 0]
    return {
        "max_abs_diff": float(difference.max()),
        "mean_abs_diff": float(difference.mean()),
        "top1_agreement": float(100.0 * (chosen >= reference.max(1) - tie).mean()),
    }


def traced(model: nn.Module) -> nn.Module:
    """The classifier itself."""
    return model


def check(c: Comparison) -> dict[str, Any]:
    """Parity of an artifact with the model, and the run's gates on the file itself; see `kinds.ExportKind`."""
    from gsforget.predict import TorchPredictor

    info = c.info
    measured = evaluate(TorchPredictor(c.model), c.artifact, info.preprocess, info.precision, c.samples)
    parity, peak, right = measured
    check_parity(parity, peak, info.precision, c.where)
    if info.features_name:
        parity |= check_features(c.model, c.artifact, info.preprocess, info.precision, c.samples, c.where)
    if right is not None and c.samples is not None and c.thresholds is not None:
        check_forgotten(right, c.samples, c.thresholds, c.where)
    return parity


def check_parity(parity: dict[str, Any], peak: float, precision: str, where: str) -> None:
    """Raise GateError (kind ``parity``) where an artifact differs from the model by more than ``TOLERANCES`` allow."""
    allowed = TOLERANCES[precision]
    limit = max(allowed.absolute, allowed.relative * peak)
    if not (parity["max_abs_diff"] < limit and parity["top1_agreement"] >= allowed.agreement):
        raise GateError(
            f"{where} does not answer as the model does: logits differ by up to {parity['max_abs_diff']:.2g} "
            f"(allowed: {limit:.2g}), and the best class agrees on {parity['top1_agreement']:.2f} % of the images "
            f"(needed: {allowed.agreement:g} %). Nothing was published.",
            "Type --precision fp32." if precision != "fp32" else "Please report this, with the model's name.",
            "parity",
        )


def evaluate(
    reference: Predicts,
    artifact: Predicts,
    preprocess: Preprocess,
    precision: str,
    samples: Samples | None,
) -> tuple[dict[str, Any], float, tuple[np.ndarray, np.ndarray] | None]:
    """Run both on the same images: the samples, or seeded noise where there are none.

    Args:
        reference, artifact: float32 images [N, C, H, W] to logits [N, K].

    Returns:
        The parity entry (``forget_acc`` and ``retain_acc`` in percent, over all classes forgotten so far and all
        others; None where there are no images), the reference's largest absolute logit, and whether the reference and
        the artifact are right, bool [N] each (None without samples).
    """
    pairs = [(reference.predict(b), artifact.predict(b)) for b in batches(preprocess, samples)]
    wanted, found = (np.concatenate(part) for part in zip(*pairs, strict=True))
    peak = max(1.0, float(np.abs(wanted).max()))
    parity: dict[str, Any] = compare(wanted, found, TOLERANCES[precision].tie * peak)
    parity |= {"images": len(wanted), "inputs": "test images" if samples else "seeded noise"}
    if samples is None:
        return parity | {"forget_acc": None, "retain_acc": None}, peak, None
    right = wanted.argmax(1) == samples.labels, found.argmax(1) == samples.labels
    return parity | measure(found, samples.labels, samples.forgotten), peak, right


def check_features(
    model: nn.Module,
    artifact: Predictor,
    preprocess: Preprocess,
    precision: str,
    samples: Samples | None,
    where: str,
) -> dict[str, float]:
    """``features_max_abs_diff``, the largest difference of a feature, over the first batches of the images.

    The limit is that of the logits with the largest feature in place of the largest logit, but at fp32 at least 1e-4 of
    it, because features have no common scale.  Raises GateError (kind ``parity``) beyond it.
    """
    import torch

    from gsforget.features import features_and_logits, find_classifier

    some = list(itertools.islice(batches(preprocess, samples), 4))
    classifier = find_classifier(model, torch.from_numpy(some[0]))
    largest = peak = 0.0
    for batch in some:
        wanted = features_and_logits(model, classifier, torch.from_numpy(batch))[0].numpy()
        found = artifact.features(batch)
        same = found is not None and found.shape == wanted.shape
        largest = max(largest, float(np.abs(found - wanted).max())) if same else float("inf")
        peak = max(peak, float(np.abs(wanted).max()))
    allowed = TOLERANCES[precision]
    limit = max(allowed.absolute, max(allowed.relative, 1e-4) * peak)
    if not largest <= limit:
        raise GateError(
            f"The features of {where} are not the model's: they differ by up to {largest:.2g} (allowed: {limit:.2g}). "
            "Nothing was published.",
            "Type --precision fp32." if precision != "fp32" else "Please report this, with the model's name.",
            "parity",
        )
    return {"features_max_abs_diff": largest}


def measure(logits: np.ndarray, labels: np.ndarray, forgotten: Sequence[int]) -> dict[str, float | None]:
    """``forget_acc`` and ``retain_acc`` in percent of logits [N, K]: over the forgotten classes and over the others."""
    from gsforget.metrics import accuracy, of_classes

    gone = of_classes(labels, forgotten)
    right = logits.argmax(1) == labels
    return {"forget_acc": accuracy(right, gone).percent, "retain_acc": accuracy(right, ~gone).percent}


def check_forgotten(
    right: tuple[np.ndarray, np.ndarray], samples: Samples, thresholds: dict[str, float], where: str
) -> None:
    """Raise GateError (kind ``forgetting``) where the artifact breaches the gates of the run.

    Args:
        right: whether the run's model and the artifact are right, bool [N] each.
        thresholds: of the run: ``max_forget_acc`` in percent, ``max_retain_drop`` and ``max_class_drop`` in points,
            the drops counted from the run's model to the artifact.
    """
    from gsforget.gates import evaluate_gates

    present = set(np.unique(samples.labels).tolist())
    forgotten = [k for k in samples.forgotten if k in present]
    retained = sorted(present - set(forgotten))
    if not forgotten or not retained:
        return
    limits = [thresholds.get(k, default) for k, default in THRESHOLDS.items()]
    for gate in evaluate_gates(*right, samples.labels, forgotten, retained, (), *limits):
        if not gate.passed:
            raise GateError(
                f"{where} breaches the gate {gate.name}: {gate.value:.2f}, at most {gate.threshold:g} is allowed. "
                "Nothing was published.",
                "Export at --precision fp32, or forget again with a stricter --max-forget-acc.",
                "forgetting",
            )


def find_samples(
    data: Path, names: list[str], erased: list[str], forgotten: Sequence[int], annotations: str | None = None
) -> Samples:
    """The test images of a data folder.

    Args:
        names: folder names in index order, erased classes under the names that their folders have.
        erased: those of them whose folders may be gone.
        annotations: of detectors; refused here.

    Raises:
        RequestError: the folder does not fit the classes, or has no test images.
    """
    from gsforget.tasks.classify.kind import open_data

    return samples_of(open_data(data, names, erased, annotations=annotations), forgotten)


def samples_of(data: ImageFolder, forgotten: Sequence[int]) -> Samples:
    """The test images of an opened folder.  Raises RequestError ``no_test_images``."""
    if not len(data.test):
        raise RequestError(f"{data.root} holds no test images.", "Give another folder with --data.", "no_test_images")
    return Samples(data.test.paths, np.asarray(data.test.labels), forgotten)


def batches(preprocess: Preprocess, samples: Samples | None):
    """Batches of different sizes on purpose: a batch dimension frozen at export would show."""
    if samples is None:
        noise = np.random.default_rng(0).standard_normal((SYNTHETIC, *preprocess.input_size)).astype(np.float32)
        yield from (noise[:1], noise[1:4], *(noise[i : i + 7] for i in range(4, SYNTHETIC, 7)))
        return
    for start in range(0, len(samples.paths), BATCH):
        yield np.stack([preprocess.load(p) for p in samples.paths[start : start + BATCH]])
