"""What can be audited: anything with ``predict(batch)``, and with ``features(batch)`` where its features are to be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import nn

    from gsforget.images import ImageSet

    Array = NDArray[np.float32]

BATCH = 64
LEAST = 1e-37  # what a probability of 0 counts as: its logarithm stays finite
LINEAR = 1e-3  # largest misfit, as a share of the largest logit, of logits that are linear in the features


class Subject(Protocol):
    """A model under audit.

    Attributes:
        module, classifier: the network and the dotted name of its last linear layer; None where only answers are to be had.
        why_no_features: a clause that says why `features` gives None; empty where there are features.
    """

    module: nn.Module | None
    classifier: str | None
    why_no_features: str

    def predict(self, batch: Array) -> Array:
        """float32 images [N, C, H, W] to float32 logits [N, K]."""
        ...

    def features(self, batch: Array) -> Array | None:
        """float32 images [N, C, H, W] to what the classifier reads, float32 [N, d]."""
        ...

    def both(self, batch: Array) -> tuple[Array | None, Array]:
        """Features and logits in one pass."""
        ...


class TorchSubject:
    """A torch model: weights, features and answers.

    Args:
        module: any module that maps images to logits; it is moved to the device and put into eval mode.
        device: where to compute.
    """

    def __init__(self, module: nn.Module, device: Any = "cpu"):
        import torch

        self.device = torch.device(device)
        self.module: nn.Module | None = module.to(self.device).eval()
        self.classifier: str | None = None
        self.why_no_features = ""
        self._searched = False

    def predict(self, batch: Array) -> Array:
        return self.both(batch)[1]

    def features(self, batch: Array) -> Array | None:
        return self.both(batch)[0]

    def both(self, batch: Array) -> tuple[Array | None, Array]:
        import torch

        from gsforget.features import features_and_logits
        from gsforget.lora.blocks import as_logits

        assert self.module is not None
        # As in `predict.TorchPredictor`: the same batch always gives the same answer.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        images = torch.from_numpy(np.ascontiguousarray(batch, np.float32)).to(self.device)
        with exact, torch.no_grad():
            self._find_classifier(images)
            if self.classifier is None:
                return None, as_logits(self.module(images)).float().cpu().numpy()
            features, logits = features_and_logits(self.module, self.classifier, images)
            return features.cpu().numpy(), logits.cpu().numpy()

    def _find_classifier(self, images: Any) -> None:
        from gsforget.features import find_classifier

        if self._searched:
            return
        assert self.module is not None
        self._searched = True
        try:
            self.classifier = find_classifier(self.module, images[:2])
        except RequestError as error:
            if error.kind != "no_classifier":
                raise
            self.why_no_features = "its logits are not the output of a linear layer"


class ArtifactSubject:
    """An exported file: answers, and features where it has an output for them.

    Args:
        predictor: with ``predict(batch)``, and optionally ``features_and_logits(batch)``.
    """

    def __init__(self, predictor: Any):
        self.module: nn.Module | None = None
        self.classifier: str | None = None
        self.why_no_features = "the file has no features output"
        self._predictor = predictor

    def predict(self, batch: Array) -> Array:
        return self._predictor.predict(batch)

    def features(self, batch: Array) -> Array | None:
        return self.both(batch)[0]

    def both(self, batch: Array) -> tuple[Array | None, Array]:
        if not hasattr(self._predictor, "features_and_logits"):
            return None, self.predict(batch)
        features, logits = self._predictor.features_and_logits(batch)
        if features is not None:
            self.why_no_features = ""
        return features, logits


@dataclass(frozen=True)
class Answers:
    """What a model says about some images.

    Attributes:
        labels: int64 [N], the truth.
        logits: float32 [N, K], unmasked; logarithms where the model gives probabilities.
        features: float32 [N, d], or None.
    """

    labels: NDArray[np.int64]
    logits: Array
    features: Array | None

    @property
    def said(self) -> NDArray[np.int64]:
        """Predicted classes, int64 [N]; RequestError ``nan_logits`` for NaN."""
        from gsforget.metrics import predict

        return predict(self.logits)

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.said == self.labels

    def select(self, where: Any) -> Answers:
        """The answers at some rows (indices or a mask)."""
        return Answers(self.labels[where], self.logits[where], None if self.features is None else self.features[where])


def ask(
    subject: Subject,
    images: ImageSet,
    rows: ArrayLike,
    classes: int,
    where: str,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = BATCH,
) -> Answers:
    """Show a model images of a set.

    Args:
        rows: int64 [N], which images.
        classes: K that the logits must have.
        where: the model's name in an error.
        progress: called with (images done, images in all).

    Raises RequestError ``wrong_classes`` for another number of logits, ``nan_logits`` for NaN.
    """
    import torch

    features: list[Array | None] = []
    logits: list[Array] = []
    wanted = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    for part in wanted.split(batch_size) if len(wanted) else ():
        found, answers = subject.both(images.batch(part).numpy())
        if answers.ndim != 2 or answers.shape[1] != classes:
            raise RequestError(
                f"{where} gives logits {list(answers.shape)} for {len(part)} images, but {classes} class names are known.",
                "Give one name per class, in the model's index order: --class-names FILE.",
                "wrong_classes",
            )
        if np.isnan(answers).any():
            raise RequestError(
                f"{where} returns NaN for some images.",
                "Check the weights and the precision they run at.",
                "nan_logits",
            )
        features.append(found)
        logits.append(answers)
        if progress:
            progress(sum(map(len, logits)), len(wanted))
    labels = images.labels[wanted].numpy().astype(np.int64)
    if not logits:
        return Answers(labels, np.zeros((0, classes), np.float32), None)
    known = [f for f in features if f is not None]
    return Answers(labels, np.concatenate(logits), np.concatenate(known) if len(known) == len(features) else None)


def are_probabilities(outputs: Array) -> bool:
    """Whether rows [N, K] are distributions: nothing negative, each row sums to 1 within 0.1 %."""
    if not len(outputs) or outputs.shape[1] < 2:
        return False
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1, dtype=np.float64), 1.0, atol=1e-3))


def as_log(answers: Answers) -> Answers:
    """Probabilities as logits: their logarithm, which has the same order, and the same softmax."""
    return Answers(answers.labels, np.log(np.maximum(answers.logits, LEAST)).astype(np.float32), answers.features)


def head_of(subject: Subject, answers: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Weight [K, d] and bias [K] of the classifier: its own, or for a file fitted to its features and logits.

    The fit is exact where logits are linear in the features (it is the least of all that fit, where images are few);
    None where they are not, or where there are no features.
    """
    if subject.module is not None and subject.classifier is not None:
        layer = subject.module.get_submodule(subject.classifier)
        weight = layer.weight.detach().double().cpu().numpy()
        bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().cpu().numpy()
        return weight, bias
    if answers.features is None or not len(answers.features):
        return None
    inputs = np.c_[answers.features, np.ones(len(answers.features))].astype(np.float64)
    found = np.linalg.lstsq(inputs, answers.logits.astype(np.float64), rcond=1e-9)[0]
    misfit = np.abs(inputs @ found - answers.logits).max()
    if misfit > LINEAR * max(1.0, float(np.abs(answers.logits).max())):
        return None
    return found[:-1].T, found[-1]
