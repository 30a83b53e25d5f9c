"""Accuracies of one request to a classifier as they go into its documents, and the gates that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gsforget import samples
from gsforget.gates import Gate, evaluate_gates, retention_gates
from gsforget.metrics import accuracy, h_mean, of_classes, per_class
from gsforget.tasks.base import Measured, Picture

if TYPE_CHECKING:
    import numpy as np

    from gsforget.audit.in_run import Probed
    from gsforget.request import Request
    from gsforget.samples import SampleResult
    from gsforget.source import Source

PROBES = ("linear_probe", "linear_probe_excess", "prototype_attack", "mia_auc")
NO_PROBE = (
    f"{', '.join(PROBES[:-1])} and {PROBES[-1]}: they are about whole classes; single images are judged by the membership "
    "attack under sample"
)


@dataclass(frozen=True)
class Figures:
    """All that was asked and measured in one erasure.

    Attributes:
        forget, retain, old: class indices of this request, never forgotten, and of earlier requests.
        labels, said_before, said_after: int64 [N] of the test images.
        sample: what became of single images that were forgotten; None where whole classes were.
        probed: what attacks on features and answers found; None for single images.
        again: names of classes forgotten earlier that came back, and so were forgotten again.
    """

    source: Source
    request: Request
    forget: Sequence[int]
    retain: Sequence[int]
    old: Sequence[int]
    labels: np.ndarray
    said_before: np.ndarray
    said_after: np.ndarray
    sample: SampleResult | None
    probed: Probed | None
    again: list[str]

    def summary(self) -> dict[str, float | None]:
        """The `metrics` of the design's JSON, percent."""
        before, after = self.said_before == self.labels, self.said_after == self.labels
        forget, retain, old = (of_classes(self.labels, c) for c in (self.forget, self.retain, self.old))
        forget_before, forget_after = (accuracy(right, forget).percent or 0.0 for right in (before, after))
        if self.sample is not None:
            forget_before, forget_after = (found.percent or 0.0 for found in self.sample.accuracies)
        retain_before, retain_after = (accuracy(right, retain).percent or 0.0 for right in (before, after))
        return {
            "forget_acc_before": forget_before,
            "forget_acc_after": forget_after,
            "retain_acc_before": retain_before,
            "retain_acc_after": retain_after,
            "old_acc_after": accuracy(after, old).percent,
            # Single images are not to be answered wrongly, so the drop of their accuracy is no aim.
            "h_mean": None if self.sample else h_mean(forget_before - forget_after, retain_after),
        }

    def gates(self) -> list[Gate]:
        right = self.said_before == self.labels, self.said_after == self.labels
        t = self.request.thresholds
        limits = t.max_forget_acc, t.max_retain_drop, t.max_class_drop
        if self.sample is None:
            found = evaluate_gates(*right, self.labels, self.forget, self.retain, self.old, *limits)
            return [*found, *(self.probed.gates() if self.probed else [])]
        return [self.sample.gate(), *retention_gates(*right, self.labels, self.retain, self.old, *limits)]

    def classes(self) -> list[dict[str, Any]]:
        """Per class with counts and 95 % Wilson intervals."""
        names, count = self.source.names, len(self.source.names)
        before, after = (
            per_class(said == self.labels, self.labels, count) for said in (self.said_before, self.said_after)
        )
        sides = ("retain", self.retain), ("forget", self.forget), ("old", self.old)
        role = {k: name for name, classes in sides for k in classes}
        return [
            {"index": i, "name": names[i], "role": role[i], "before": before[i].to_json(), "after": after[i].to_json()}
            for i in range(count)
        ]

    def not_tested(self, summary: dict[str, float | None]) -> list[str]:
        said = self.probed.not_tested() if self.probed else [NO_PROBE]
        if self.old and summary["old_acc_after"] is None:
            said.append("old_acc_after: the test folder holds no images of the classes erased before")
        untested = [self.source.names[i] for i in self.retain if not (self.labels == i).any()]
        if untested:
            said.append(f"retained classes without test images: {', '.join(untested)}")
        if self.sample is not None:
            said.append(samples.NOT_TESTED)
        if self.source.erased_images:
            said.append(samples.EARLIER)
        return said

    def warnings(self) -> list[str]:
        said = self.sample.warnings() if self.sample else []
        if not self.again:
            return said
        listed = ", ".join(self.again)
        return [f"Named again on validation images, and so forgotten again in this run: {listed}.", *said]

    def in_request(self) -> dict[str, Any]:
        gone = sorted(self.source.erased_images.union(self.sample.sha256 if self.sample else ()))
        return {
            **({"mode": "sample", "images": self.sample.sha256} if self.sample else {}),
            **({"erased_images": gone} if gone else {}),
            **({"compared_with": self.probed.compared} if self.probed and self.probed.compared else {}),
        }

    def picture(self) -> Picture:
        forgotten = of_classes(self.labels, self.forget)
        said = self.said_before[forgotten], self.said_after[forgotten]
        if self.sample is not None:
            said = self.sample.said_before, self.sample.said_after
        return Picture(*said, self.source.names, self.forget, "the forgotten images" if self.sample else None)


def measured(f: Figures) -> Measured:
    """All of it, for the documents."""
    summary = f.summary()
    sample = f.sample
    return Measured(
        summary,
        f.classes(),
        len(f.labels),
        f.gates(),
        f.picture(),
        f.probed.document() if f.probed else dict.fromkeys(PROBES),
        f.probed.to_json() if f.probed else None,
        f.probed.seconds if f.probed else 0.0,
        {"mode": "sample", "sample": sample.to_json()} if sample else {},
        f.not_tested(summary),
        f.warnings(),
        f.in_request(),
        {"mode": "sample", "images": len(sample.labels)} if sample else {},
    )
