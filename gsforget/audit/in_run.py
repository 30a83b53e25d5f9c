"""The audit's cheap attacks inside `forget`, in the same process: what the merged model's features still know.

The original is asked before the training, the merged model after it, with the functions of `gsforget audit` on at most
`PER_CLASS` images of a class.  Features are dropped as soon as they are measured, and are never written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.audit import outputs
from gsforget.audit.case import PREPROCESSING, Ask, Case, Load, Side, open_reference
from gsforget.audit.images import PER_CLASS, AuditImages, list_never_seen
from gsforget.audit.measure import Evidence, Measured, Sets, check_reference, uneven
from gsforget.audit.probes import NO_ROOM, SMALL_EXCESS, SMALL_ROOM, Verdict, excess_verdict, probe_excess
from gsforget.audit.subjects import Answers, TorchSubject, ask
from gsforget.data import Split, few_shot
from gsforget.errors import RequestError
from gsforget.gates import Gate
from gsforget.images import ImageSet
from gsforget.metrics import of_classes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from gsforget.audit.measure import View
    from gsforget.data import ImageFolder
    from gsforget.request import Request
    from gsforget.source import Source

NO_REFERENCE = "linear_probe_excess: needs --reference or --never-seen"


@dataclass(frozen=True)
class Figures:
    """What one model gives away: percent of the test images named by a fresh probe, and by five images per class put
    into the head; AUC (0 to 1) of same-class membership inference.  None where it could not be measured."""

    linear_probe: float | None = None
    prototype_attack: float | None = None
    mia_auc: float | None = None


@dataclass(frozen=True)
class Probed:
    """The attacks on one erasure.

    Attributes:
        after, original, reference: of the merged model, of the one before, and of what never saw the classes.
        compared: what the reference is: ``{"kind": "model", …}`` or ``{"kind": "classes", …}``; None: there is none.
        limit: --max-probe-excess.
        notes: sentences on what could not be measured or concluded.
    """

    after: Figures
    original: Figures
    reference: Figures | None
    compared: dict[str, Any] | None
    limit: float | None
    notes: list[str]
    seconds: float

    @property
    def excess(self) -> float | None:
        """See `probes.probe_excess`; None without a reference, or where the original is no better than it."""
        known = self._three()
        return probe_excess(*known) if known else None

    @property
    def verdict(self) -> Verdict | None:
        """See `probes.excess_verdict`; None where nothing is compared, or no limit was asked for."""
        known = self._three()
        return excess_verdict(*known, self.limit) if known and self.limit is not None else None

    def _three(self) -> tuple[float, float, float] | None:
        never = self.reference.linear_probe if self.reference else None
        if self.after.linear_probe is None or never is None or self.original.linear_probe is None:
            return None
        return self.after.linear_probe, never, self.original.linear_probe

    def gates(self) -> list[Gate]:
        """``probe_excess``, where it was asked for and there is a figure; breached where `excess_verdict` says fail.

        Its threshold is what that verdict allows, which with little room is not the limit.
        """
        known = self._three()
        if self.limit is None or self.excess is None or known is None:
            return []
        room = known[2] - known[1]
        allowed = SMALL_EXCESS / room if NO_ROOM <= room < SMALL_ROOM else self.limit
        return [Gate("probe_excess", self.excess, self.excess, allowed, self.verdict != "fail")]

    def document(self) -> dict[str, float | None]:
        """``audit`` of the document of `forget`."""
        a = self.after
        return {
            "linear_probe": a.linear_probe,
            "linear_probe_excess": self.excess,
            "prototype_attack": a.prototype_attack,
            "mia_auc": a.mia_auc,
        }

    def to_json(self) -> dict[str, Any]:
        """``audit`` of metrics.json: the raw values of all models."""
        return {
            **{k: asdict(f) if f else None for k, f in self._models().items()},
            "linear_probe_excess": self.excess,
            "probe_verdict": self.verdict,
            "compared_with": self.compared,
            "per_class": PER_CLASS,
        }

    def _models(self) -> dict[str, Figures | None]:
        return {"after": self.after, "original": self.original, "reference": self.reference}

    def not_tested(self) -> list[str]:
        """What the figures leave open, as sentences."""
        said = list(self.notes)
        if self.reference is None:
            said.append(NO_REFERENCE)
        if self.verdict == "inconclusive":
            known = self._three()
            assert known is not None
            said.append(
                f"the gate probe_excess is inconclusive: a fresh probe names {known[2]:.1f} % on the original's features and "
                f"{known[1]:.1f} % on never-seen ones, less than {NO_ROOM:g} points apart, too little to judge by"
            )
        said.append(
            "what other attacks find in the features, relearning among them: gsforget audit --tier full measures more"
        )
        return said


class Prober:
    """Measures the attacks on one model as it is before and as it is after its erasure.

    Args:
        source, data, request: of the erasure; forget, retained: class indices.
        train, test: images that are decoded already.
        load: reads an image file for the model.

    Raises:
        RequestError: the reference or the never-seen classes cannot be used.
    """

    def __init__(
        self,
        source: Source,
        data: ImageFolder,
        request: Request,
        forget: Sequence[int],
        retained: Sequence[int],
        train: ImageSet,
        test: ImageSet,
        load: Load,
        device: Any,
    ):
        self.model: nn.Module = source.model
        self.request, self.names, self.device, self.seed = request, source.names, device, request.settings.seed
        self.train, self.test, self.load = train, test, load
        self.notes: list[str] = []
        self.seconds = 0.0
        reference = self._open_reference(source)
        unseen = self._never_seen(source, data)
        splits = [Split(list(s.paths), s.labels.numpy().astype(np.int64)) for s in (train, test)]
        there = [set(s.labels.tolist()) for s in splits]
        self.attackable = [k for k in forget if k in there[0] and k in there[1]]
        self.rows = {
            "train": self._rows(splits[0], [*forget, *retained]),
            "test": self._rows(splits[1], self.attackable),
        }
        asked = Ask(None, data.root, "standard", request.reference, request.never_seen, seed=self.seed)
        images = AuditImages(data.root, splits[0], splits[1], splits[0], *unseen, [])
        side = Side(TorchSubject(self.model, device), load, Path(), "")
        old = sorted(set(range(len(self.names))) - {*forget, *retained})
        self.case = Case(
            asked, "run", None, side, None, reference, self.names, list(forget), old, self.attackable, 0, images, device
        )

    def before(self) -> None:
        """Ask the original, and what never saw the classes.

        Raises:
            RequestError: ``bad_reference``; ``no_classifier`` where a probe was asked for and there are no features.
        """
        start = time.perf_counter()
        first = self._ask(self.case.side, "The model")
        why = first.side.subject.why_no_features
        if why and self.request.thresholds.max_probe_excess is not None:
            raise RequestError(
                f"--max-probe-excess needs the model's features, but {why}.",
                "Leave it out; the answers are judged all the same.",
                "no_classifier",
            )
        self.original = self._figures(first)
        self.reference = self._never_seen_figures(first)
        if why:
            self.notes.append(f"linear_probe, linear_probe_excess and prototype_attack: {why}")
        self.seconds += time.perf_counter() - start

    def after(self) -> Probed:
        """Ask the merged model, which the same module holds by now."""
        start = time.perf_counter()
        subject = TorchSubject(self.model, self.device)
        after = self._figures(self._ask(Side(subject, self.load, Path(), ""), "The merged model"))
        self.seconds += time.perf_counter() - start
        limit = self.request.thresholds.max_probe_excess
        return Probed(after, self.original, self.reference, self._compared(), limit, self.notes, self.seconds)

    def _rows(self, split: Split, classes: Sequence[int]) -> NDArray[np.int64]:
        rows = np.flatnonzero(of_classes(split.labels, classes))
        return rows[few_shot(split.labels[rows], PER_CLASS, self.seed)] if len(rows) else rows

    def _ask(self, side: Side, where: str) -> Measured:
        count = len(self.names)
        found = [
            ask(side.subject, images, self.rows[name], count, where)
            for name, images in (("train", self.train), ("test", self.test))
        ]
        return Measured(side, found[0], found[1])

    def _figures(self, measured: Measured) -> Figures:
        e = self._evidence(measured)
        if not self.attackable:
            return Figures()
        details = outputs.membership_check(e)[1]
        assert details is not None
        return self._attack(e.views()["subject"], e, details["after"]["auc"])

    def _attack(self, view: View | None, e: Evidence, auc: float | None) -> Figures:
        if view is None:
            return Figures(mia_auc=auc)
        return Figures(outputs.linear_probe(view, e), outputs.rows_replaced(view, e), auc)

    def _evidence(self, measured: Measured, never_seen: tuple[Answers, Answers] | None = None) -> Evidence:
        return Evidence(
            self.case, measured, None, None, never_seen, measured, self.attackable, Sets(self.case), self.notes
        )

    def _never_seen_figures(self, original: Measured) -> Figures | None:
        if self.case.reference is not None:
            measured = self._ask(self.case.reference, f"The reference {self.case.reference.path}")
            check_reference(self.case, measured, original)
            if measured.side.subject.why_no_features:
                self.notes.append(f"the features of the reference: {measured.side.subject.why_no_features}")
            return self._figures(measured)
        if not self.request.never_seen:
            return None
        splits = self.case.images.never_seen_train, self.case.images.never_seen_test
        shown = []
        for split in splits:
            images = ImageSet(split, self.load, self.request.skip_corrupt)
            images.check()
            rows = np.arange(len(images))
            shown.append(ask(original.side.subject, images, rows, len(self.names), "The model"))
        self.notes += uneven(len(self.request.never_seen), len(self.attackable))
        e = self._evidence(original, (shown[0], shown[1]))
        return self._attack(e.views()["reference"], e, None)

    def _open_reference(self, source: Source) -> Side | None:
        folder = self.request.reference
        if folder is None:
            return None
        opened = open_reference(folder, len(source.names), self.request.trust_code)
        ours, theirs = source.config.to_json(), opened.config.to_json()
        differ = [k for k in PREPROCESSING if ours.get(k) != theirs.get(k)]
        if differ:
            raise RequestError(
                f"The reference {folder} reads images in another way than the model ({', '.join(differ)}).",
                "Leave out --reference, and compare afterwards: gsforget audit --reference.",
                "bad_reference",
            )
        return Side(TorchSubject(opened.model, self.device), self.load, folder, "")

    def _never_seen(self, source: Source, data: ImageFolder) -> tuple[Split, Split]:
        places = data.root / "train", data.root / data.test_name
        return list_never_seen(*places, source.names, source.erased, self.request.never_seen, self.seed)

    def _compared(self) -> dict[str, Any] | None:
        if self.request.reference:
            return {"kind": "model", "path": str(self.request.reference)}
        if self.request.never_seen:
            return {"kind": "classes", "classes": list(self.request.never_seen)}
        return None
