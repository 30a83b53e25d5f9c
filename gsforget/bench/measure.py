"""What is measured of a model after a request: the same images, attacks and limits for every method.

Answers are those of all test images, unmasked; attackers hold up to `PER_CLASS` training images of each class that earlier
requests have not forgotten.  What is judged is what `gsforget audit` judges, by the same functions (`audit.checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.audit import checks, membership, probes
from gsforget.audit.attacked import Attacked, both_starts, step_size
from gsforget.audit.images import PER_CLASS
from gsforget.audit.relearn import Curve, Starts
from gsforget.data import few_shot
from gsforget.features import features_and_logits, find_classifier
from gsforget.metrics import Z_ONE_SIDED, accuracy, h_mean, of_classes, predict, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from gsforget.images import ImageSet

EVAL_BATCH = 256
LIMITS = checks.Limits()


@dataclass(frozen=True)
class Stage:
    """Class indices at one request: to forget now, forgotten earlier, never forgotten, and of these without images."""

    wanted: tuple[int, ...]
    erased: tuple[int, ...]
    retained: tuple[int, ...]
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Look:
    """What a model makes of the images.

    Attributes:
        test_logits, test_features: [N, K], [N, d], all test images.
        rows: which training images were looked at; train_logits, train_features: of these.
        head: weight [K, d] and bias [K] or None of the classifier.
    """

    test_logits: NDArray[np.float32]
    test_features: NDArray[np.float32]
    rows: NDArray[np.int64]
    train_logits: NDArray[np.float32]
    train_features: NDArray[np.float32]
    head: tuple[Any, Any]
    module: nn.Module
    classifier: str


@dataclass(frozen=True)
class Leak:
    """What one model gives away of a request's classes, see `audit.probes` and `audit.membership`; percent, and AUC 0 to 1."""

    linear_probe: float
    prototype_attack: float
    five_shot: float
    mia: membership.MembershipResult
    starts: Starts | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Leak:
        curves = {k: Curve(tuple(v["steps"]), tuple(v["accuracies"])) for k, v in (raw["starts"] or {}).items()}
        return cls(
            raw["linear_probe"],
            raw["prototype_attack"],
            raw["five_shot"],
            membership.MembershipResult(**raw["mia"]),
            Starts(**curves) if curves else None,
        )


@dataclass(frozen=True)
class Relearning:
    """Full relearning: the accuracy in percent at which the classes are back, and the step size."""

    goal: float
    lr: float


class Judge:
    """Measures models on one data set.

    Args:
        train, test: all images; those that methods never get (classes without images) are an attacker's all the same.
        device: where the models are.
    """

    def __init__(self, train: ImageSet, test: ImageSet, device: torch.device, seed: int = 0):
        self.train, self.test, self.device, self.seed = train, test, device, seed
        self.truth, self.train_truth = test.labels.numpy(), train.labels.numpy()

    def look(self, model: nn.Module) -> Look:
        rows = few_shot(self.train_truth, PER_CLASS, self.seed)
        model.eval()
        classifier = find_classifier(model, self.train.batch(torch.arange(2)).to(self.device))

        def answers(images: ImageSet, chosen: NDArray[np.int64]) -> tuple[Any, Any]:
            pieces = torch.from_numpy(chosen).split(EVAL_BATCH)
            found = [features_and_logits(model, classifier, images.batch(p).to(self.device)) for p in pieces]
            return tuple(torch.cat(part).cpu().numpy() for part in zip(*found))  # type: ignore[return-value]

        test_features, test_logits = answers(self.test, np.arange(len(self.truth)))
        train_features, train_logits = answers(self.train, rows)
        layer = model.get_submodule(classifier)
        weight = getattr(layer, "rows", layer.weight)  # a face model's head answers by its normalised rows
        head = weight.detach().cpu().numpy(), None if layer.bias is None else layer.bias.detach().cpu().numpy()
        return Look(test_logits, test_features, rows, train_logits, train_features, head, model, classifier)

    def step_size(self, look: Look, stage: Stage) -> float:
        """At which all weights of the original are relearned, and then those of every model."""
        return step_size(self._attacked(look, stage), self.seed)

    def leak(self, look: Look, stage: Stage, relearn: Relearning | None = None) -> Leak:
        """What a model gives away.

        Args:
            relearn: how it is relearned; None: it is not.
        """
        labels = self.train_truth[look.rows]
        known, here = (~of_classes(truth, stage.erased) for truth in (labels, self.truth))
        x, y = look.train_features[known], labels[known]
        a, b = look.test_features[here], self.truth[here]
        mine, tested = of_classes(y, stage.wanted), list(stage.wanted)
        inside, outside = of_classes(labels, stage.wanted), of_classes(self.truth, stage.wanted)
        scores = membership.confidences(look.train_logits[inside], labels[inside])
        others = membership.confidences(look.test_logits[outside], self.truth[outside])
        return Leak(
            probes.linear_probe(x, y, a, b, tested, self.seed),
            probes.prototype_attack(
                *look.head, x[mine], y[mine], a, b, tested, retained_features=x[~mine], in_use=list(stage.retained)
            ),
            probes.five_shot(x, y, a, b, tested),
            membership.membership(scores, others, labels[inside], self.truth[outside]),
            None if relearn is None else both_starts(self._attacked(look, stage), self.seed, relearn.goal, relearn.lr),
        )

    def accuracies(self, before: Look, after: Look, stage: Stage) -> dict[str, float | None]:
        """Percent before and after: to forget, forgotten earlier, retained, and of these without images; H and its ideal.

        H = 2 A D / (A + D), A retained accuracy, D what the classes to forget lost (arXiv 2403.11530, eq. 10); its ideal
        is that of perfect forgetting at unchanged retention.
        """
        parts = {"forget": stage.wanted, "old": stage.erased, "retain": stage.retained, "missing": stage.missing}
        found: dict[str, float | None] = {}
        for when, look in (("before", before), ("after", after)):
            right = predict(look.test_logits) == self.truth
            for part, classes in parts.items():
                found[f"{part}_acc_{when}"] = accuracy(right, of_classes(self.truth, classes)).percent
        first, last, kept, had = (
            found[k] or 0.0 for k in ("forget_acc_before", "forget_acc_after", "retain_acc_after", "retain_acc_before")
        )
        return {**found, "h_mean": h_mean(first - last, kept), "h_ideal": h_mean(first, had)}

    def failures(
        self, found: dict[str, Any], leak: Leak, never: Leak | None, original: Leak, stage: Stage
    ) -> tuple[list[str], float | None]:
        """Names of the audit's checks that fail, and the probe excess; without a never-seen model fewer are made."""
        count = int(of_classes(self.truth, stage.wanted).sum())
        made = []
        reference = (never.prototype_attack, never.five_shot, never.linear_probe) if never else (None, None, None)
        for name, classes in (("forget_acc", stage.wanted), ("old_acc", stage.erased)):
            images = int(of_classes(self.truth, classes).sum())
            if images and self._above(found[f"{name}_after"], images):
                made.append(name)
        made += [
            check.name
            for check in (
                checks.attack(
                    "prototype_attack",
                    "",
                    leak.prototype_attack,
                    None,
                    reference[0],
                    (count, count),
                ),
                checks.attack("five_shot", "", leak.five_shot, None, reference[1], (count, count)),
                checks.probe(leak.linear_probe, original.linear_probe, reference[2], LIMITS),
                checks.membership(leak.mia, original.mia, never.mia if never else None),
            )
            if check.verdict == "fail"
        ]
        if leak.starts and never and never.starts:
            known = found["forget_acc_before"] or 0.0
            check = checks.relearning(leak.starts, original.starts, never.starts, known, LIMITS)
            made += [check.name] if check.verdict == "fail" else []
        excess = probes.probe_excess(leak.linear_probe, never.linear_probe, original.linear_probe) if never else None
        return made, excess

    def _above(self, percent: float | None, count: int) -> bool:
        right = round((percent or 0.0) * count / 100)
        return wilson(right, count, Z_ONE_SIDED)[0] > LIMITS.max_forget_acc

    def _attacked(self, look: Look, stage: Stage) -> Attacked:
        rows = {
            name: np.flatnonzero(of_classes(self.train_truth, c))
            for name, c in (("wanted", stage.wanted), ("kept", stage.retained))
        }
        tested = np.flatnonzero(of_classes(self.truth, stage.wanted))
        return Attacked(
            look.module,
            look.classifier,
            list(stage.wanted),
            self.train,
            self.test,
            rows["wanted"],
            rows["kept"],
            tested,
        )


def stages(requests: Sequence[Sequence[int]], num_classes: int, missing: Sequence[int] = ()) -> list[Stage]:
    """Each request as the methods meet it."""
    made, erased = [], tuple[int, ...]()
    for wanted in requests:
        gone = {*erased, *wanted}
        made.append(Stage(tuple(wanted), erased, tuple(k for k in range(num_classes) if k not in gone), tuple(missing)))
        erased += tuple(wanted)
    return made
