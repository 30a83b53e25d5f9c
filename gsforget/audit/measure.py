"""What the models of an audit answer: one pass over the images each, and the views of their features that attacks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.audit.case import Case, Load, Side
from gsforget.audit.images import PER_CLASS
from gsforget.audit.subjects import Answers, are_probabilities, as_log, ask, head_of
from gsforget.data import Split, few_shot
from gsforget.errors import RequestError
from gsforget.images import ImageSet
from gsforget.metrics import Z_ONE_SIDED, check_plausible, confusion_matrix, of_classes, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

Say = Callable[[str], None]
NOTICEABLE = 10.0  # percent of the forgotten test images; what is rarer may go unnoticed without a further word


@dataclass(frozen=True)
class Measured:
    """One model's answers to the training images (at most 50 per class) and to the test images it was shown."""

    side: Side
    train: Answers
    test: Answers


@dataclass(frozen=True)
class View:
    """Features of one model, as an attacker on some classes sees them.

    Attributes:
        train: of the retained and of the attacked classes; test: of the attacked classes, at most 50 each.
        tested: the attacked classes' labels.
        head: weight [K, d] and bias [K], with a row for each attacked class; None where it is not known.
    """

    train: Answers
    test: Answers
    tested: list[int]
    head: tuple[NDArray[np.float64], NDArray[np.float64]] | None


@dataclass
class Evidence:
    """All answers of an audit.

    Attributes:
        subject, original, reference: None where there is no such model.
        never_seen: answers of the base model to the never-seen classes' training and test images, labelled K and up.
        base: the model that never-seen classes were shown to: the original where it is at hand, else the audited model.
        attackable: the audited classes that have both training and test images.
        notes: sentences on what could not be concluded.
    """

    case: Case
    subject: Measured
    original: Measured | None
    reference: Measured | None
    never_seen: tuple[Answers, Answers] | None
    base: Measured
    attackable: list[int]
    sets: Sets
    notes: list[str] = field(default_factory=list)

    def views(self) -> dict[str, View | None]:
        """The views for ``subject``, ``original`` and ``reference``; None where there is none, or no features."""
        found: dict[str, View | None] = {"subject": None, "original": None, "reference": None}
        if not self.attackable:
            return found
        for name, measured in (("subject", self.subject), ("original", self.original), ("reference", self.reference)):
            if measured is not None:
                found[name] = self._view(measured, measured.train, measured.test, self.attackable)
        if self.never_seen is not None:
            train = join(
                self.base.train.select(of_classes(self.base.train.labels, self.case.retained)), self.never_seen[0]
            )
            tested = np.unique(self.never_seen[1].labels).tolist()
            found["reference"] = self._view(self.base, train, self.never_seen[1], tested)
        return found

    def _view(self, measured: Measured, train: Answers, test: Answers, tested: list[int]) -> View | None:
        if train.features is None or test.features is None:
            return None
        test = test.select(of_classes(test.labels, tested))
        head = head_of(measured.side.subject, measured.train)
        new = max(tested) + 1 - len(self.case.names)
        if head is not None and new > 0:  # never-seen classes have no rows: empty ones, which the attack fills
            head = np.pad(head[0], ((0, new), (0, 0))), np.pad(head[1], (0, new), constant_values=head[1].mean())
        seen = of_classes(train.labels, [*self.case.retained, *tested])
        return View(train.select(seen), test.select(few_shot(test.labels, PER_CLASS, self.case.ask.seed)), tested, head)


class Sets:
    """The images as each model reads them: training images, then never-seen ones; likewise test images."""

    def __init__(self, case: Case):
        images = case.images
        self._splits = {
            "train": _joined(images.train, images.never_seen_train),
            "test": _joined(images.test, images.never_seen_test),
        }
        self._known: dict[tuple[str, int], tuple[Load, ImageSet]] = {}
        self._count = len(case.names)
        self.dropped: list[Path] = []
        if case.ask.skip_corrupt:
            for name in self._splits:
                self._drop_corrupt(name, case.side.load)

    def _drop_corrupt(self, split: str, load: Load) -> None:
        """Leave out what cannot be read, for all models alike."""
        made = ImageSet(self._splits[split], load, skip_corrupt=True)
        self.dropped += made.check()
        self._splits[split] = Split(made.paths, made.labels.numpy())
        self._known[split, id(load)] = load, made

    def images(self, split: str, load: Load) -> ImageSet:
        """The images of ``train`` or ``test``; kept per way of reading them.

        Raises RequestError ``corrupt_image`` for the first that cannot be read.
        """
        if (split, id(load)) not in self._known:
            made = ImageSet(self._splits[split], load)
            try:
                made.check()
            except RequestError as error:
                error.hint = "Replace or remove the file, or add --skip-corrupt."
                raise
            self._known[split, id(load)] = load, made
        return self._known[split, id(load)][1]

    def rows(self, split: str, classes: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Rows of the images of some classes; None: of all classes of the model."""
        labels = self._splits[split].labels
        return np.flatnonzero(labels < self._count if classes is None else of_classes(labels, classes))


def measure(case: Case, say: Say) -> Evidence:
    """Ask all models of a case.

    Raises RequestError where images, answers, or the reference do not fit.
    """
    sets, count = Sets(case), len(case.names)
    notes: list[str] = []
    if sets.dropped:
        notes.append(f"{len(sets.dropped)} image(s) that cannot be read, such as {sets.dropped[0]}")

    def answers(side: Side, title: str, test_classes: Sequence[int] | None = None) -> Measured:
        say(f"asking {title}")
        where = f"The model {side.path}"
        rows = {"train": sets.rows("train"), "test": sets.rows("test", test_classes)}
        parts = {s: ask(side.subject, sets.images(s, side.load), rows[s], count, where) for s in ("train", "test")}
        if are_probabilities(np.concatenate([parts["train"].logits, parts["test"].logits])):
            notes.append(
                f"logits of {side.path}: it gives probabilities, whose logarithms are used instead; accuracies and ranks are "
                "the same, membership is coarser where they are rounded to 0 or 1"
            )
            parts = {s: as_log(a) for s, a in parts.items()}
        return Measured(side, parts["train"], parts["test"])

    subject = answers(case.side, "the audited model")
    original = answers(case.original, "the original") if case.original else None
    check_order(case, original or subject)
    if original:
        check_original(case, original)
    reference = answers(case.reference, "the reference", case.audited) if case.reference else None
    if reference:
        check_reference(case, reference, original)
    base, never_seen = original or subject, None
    if case.ask.never_seen:
        say("asking about never-seen classes")
        new = range(count, count + len(case.ask.never_seen))
        shown = [
            ask(
                base.side.subject,
                sets.images(s, base.side.load),
                sets.rows(s, new),
                count,
                f"The model {base.side.path}",
            )
            for s in ("train", "test")
        ]
        never_seen = shown[0], shown[1]
        notes += uneven(len(new), len(case.audited))
    notes += few_tested(subject.test, case.audited)
    there = [set(np.unique(a.labels).tolist()) for a in (subject.train, subject.test)]
    attackable = [k for k in case.audited if k in there[0] and k in there[1]]
    if case.audited and not attackable:
        notes.append(
            "the features of the forgotten classes: they need training images to attack with and test images to measure on"
        )
    return Evidence(case, subject, original, reference, never_seen, base, attackable, sets, notes)


def check_order(case: Case, measured: Measured) -> None:
    """Refuse a class order or preprocessing with which no figure would mean anything, as `forget` does."""
    test = measured.test
    if of_classes(test.labels, case.retained).any():
        confusion = confusion_matrix(test.labels, test.said, len(case.names))
        known = [k for k in range(len(case.names)) if k not in measured.side.erased and k in (case.retained)]
        if len(known) > 1:  # one class alone has no order, and naming it always is no sign of anything
            check_plausible(confusion, known, case.names)


def join(first: Answers, second: Answers) -> Answers:
    """Answers of one model to two lots of images."""
    both = None
    if first.features is not None and second.features is not None:
        both = np.concatenate([first.features, second.features])
    labels = np.concatenate([first.labels, second.labels])
    return Answers(labels, np.concatenate([first.logits, second.logits]), both)


def uneven(never_seen: int, forgotten: int) -> list[str]:
    """A sentence where not as many never-seen classes stand beside the forgotten ones, else none."""
    if never_seen == forgotten:
        return []
    return [
        f"never-seen classes one for one: {never_seen} of them stand beside {forgotten} forgotten ones; fewer classes are "
        "easier to tell apart"
    ]


def few_tested(test: Answers, audited: Sequence[int]) -> list[str]:
    """A sentence where there are so few test images of the forgotten classes that much could go unnoticed, else none."""
    count = int(of_classes(test.labels, audited).sum())
    unnoticed = wilson(0, count, Z_ONE_SIDED)[1] if count else 0.0
    if unnoticed <= NOTICEABLE:
        return []
    return [
        f"rare right answers on forgotten classes: with {count} test image(s) of them, a model that names up to "
        f"{unnoticed:.0f} % may well show none"
    ]


def check_reference(case: Case, reference: Measured, original: Measured | None) -> None:
    """A reference that names the forgotten classes, or has the original's features, would let anything pass.

    Raises RequestError ``bad_reference``.
    """
    hint = "Give --reference a model that was trained without them."
    forgotten = reference.test.select(of_classes(reference.test.labels, case.audited))
    right, count = int(forgotten.correct.sum()), len(forgotten.labels)
    if count and wilson(right, count, Z_ONE_SIDED)[0] > max(1.0, 100.0 / len(case.names)):
        raise RequestError(
            f"The reference {reference.side.path} names {100 * right / count:.1f} % of the forgotten images, so it has seen "
            "these classes.",
            hint,
            "bad_reference",
        )
    if original is not None and _same_features(original, reference):
        raise RequestError(
            f"The reference {reference.side.path} is the original with another head: its features have seen the forgotten "
            "classes.",
            hint,
            "bad_reference",
        )


def _same_features(first: Measured, second: Measured) -> bool:
    """Whether two models give the same images the same features, of all that were measured on both."""
    pairs = ((first.train, second.train), (first.test, second.test))
    known = [(a.features, b.features) for a, b in pairs if a.features is not None and b.features is not None]
    alike = [(a, b) for a, b in known if len(b) and a.shape == b.shape]
    return bool(alike) and all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in alike)


def check_original(case: Case, original: Measured) -> None:
    """An original that never knew the forgotten classes has nothing to be compared with.

    Raises RequestError ``bad_original``.
    """
    known = original.test.select(of_classes(original.test.labels, case.audited))
    if not len(known.labels):
        return
    right, count = int(known.correct.sum()), len(known.labels)
    if wilson(right, count, Z_ONE_SIDED)[1] <= max(1.0, 100.0 / len(case.names)):
        raise RequestError(
            f"The original {original.side.path} names only {100 * right / count:.1f} % of the forgotten images, so it never "
            "knew these classes.",
            "Give --original the model from before the forgetting.",
            "bad_original",
        )


def _joined(first: Split, second: Split) -> Split:
    return Split([*first.paths, *second.paths], np.concatenate([first.labels, second.labels]))


def subset(rows: NDArray[Any], most: int, seed: int) -> NDArray[np.int64]:
    """At most ``most`` seeded rows, in ascending order."""
    if len(rows) <= most:
        return np.asarray(rows, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most]).astype(np.int64)
