"""Each thing that an audit judges: its figures, what it is held against, the verdict, and one sentence for people.

A check without what it needs is ``inconclusive``, never passed.  Pure functions of figures; no model is run here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from gsforget.audit.probes import NO_ROOM, SMALL_EXCESS, SMALL_ROOM, excess_verdict, probe_excess
from gsforget.metrics import Z_ONE_SIDED

if TYPE_CHECKING:
    from gsforget.audit.membership import MembershipResult
    from gsforget.audit.relearn import Starts
    from gsforget.gates import Gate

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Limits:
    """What an audit holds a model to; the same for every model, whatever gates its run was given."""

    max_forget_acc: float = 1.0  # percent; the gate of `forget`: below what guessing among 100 classes gives
    max_retain_drop: float = 1.0  # points per erasure since the original; the gate of `forget`
    max_class_drop: float = 10.0  # points; the gate of `forget`: a mean hides one class that collapsed
    max_probe_excess: float = 0.25  # a quarter of what forgetting could remove; 0 = never seen, 1 = untouched
    min_relearn_ratio: float = 0.5  # steps next to a never-seen model; AIN (ERASURE) has 1 as ideal, below it is memory
    recover_share: float = 0.95  # of the original's accuracy: what counts as learned again (relearn time, 2.5)


@dataclass(frozen=True)
class Check:
    """One judged figure; units are ``%``, ``points``, ``ratio``, ``steps`` or ``auc``.

    Attributes:
        value, original, reference: of the audited model, the model before forgetting, and what never saw the classes.
        threshold: what ``value`` is held against; None where that is not known.
        says: one plain sentence.
    """

    name: str
    value: float | None
    original: float | None
    reference: float | None
    threshold: float | None
    verdict: Verdict
    unit: str
    says: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


UNCOMPARED = "what a model that never saw these classes shows is not known (--reference or --never-seen)"
TOO_FEW = "so few images cannot show a difference from chance"


def overall(checks: Sequence[Check]) -> Verdict:
    """``fail`` where any check failed, else ``inconclusive`` where any is, else ``pass``."""
    verdicts = {c.verdict for c in checks}
    return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts or not checks else "pass"


def unknown(name: str, unit: str, why: str, threshold: float | None = None) -> Check:
    """A check that could not be made; ``why`` completes 'Not judged: …'."""
    return Check(name, None, None, None, threshold, "inconclusive", unit, f"Not judged: {why}.")


def of_gate(gate: Gate, unit: str, says: str, original: float | None = None, reference: float | None = None) -> Check:
    """A gate of `forget` as a check: breached when its one-sided 95 % bound lies beyond the threshold."""
    verdict: Verdict = "pass" if gate.passed else "fail"
    return Check(gate.name, gate.value, original, reference, gate.threshold, verdict, unit, says)


def attack(
    name: str, says: str, value: float, original: float | None, reference: float | None, counts: tuple[int, int]
) -> Check:
    """Percent of forgotten test images that an attack names, at most that of never-seen classes.

    Args:
        counts: test images behind ``value`` and behind ``reference``.
    """
    if reference is None:
        return Check(name, value, original, None, None, "inconclusive", "%", f"{says}; {UNCOMPARED}.")
    if rate_difference(100.0, 0.0, *counts) <= 0:
        says = f"{says}; of never-seen classes {reference:.1f} %; {TOO_FEW}."
        return Check(name, value, original, reference, reference, "inconclusive", "%", says)
    beyond = rate_difference(value, reference, *counts) > 0
    verdict: Verdict = "fail" if beyond else "pass"
    excused = ", no more than chance would explain" if value > reference and not beyond else ""
    says = f"{says}; of never-seen classes {reference:.1f} %{excused}."
    return Check(name, value, original, reference, reference, verdict, "%", says)


def rate_difference(first: float, second: float, first_count: int, second_count: int) -> float:
    """Lower one-sided 95 % bound, in points, of first - second (percent of independent images).

    Wald's with one success and one failure added to each rate (Agresti and Caffo, The American Statistician 54, 2000).
    """
    rates = [(count * p / 100 + 1) / (count + 2) for p, count in ((first, first_count), (second, second_count))]
    variance = sum(p * (1 - p) / (count + 2) for p, count in zip(rates, (first_count, second_count)))
    return 100 * (rates[0] - rates[1] - Z_ONE_SIDED * math.sqrt(variance))


def probe(value: float, original: float | None, reference: float | None, limits: Limits) -> Check:
    """The linear probe, judged by its excess over a never-seen model; value and threshold are ratios.

    The raw percentages stand in the sentence, and in ``details``.
    """
    name, limit = "linear_probe_excess", limits.max_probe_excess
    raw = f"a fresh linear probe on the features names {value:.1f} % of the forgotten images"
    if reference is None or original is None:
        lacking = UNCOMPARED if reference is None else "the original model is not at hand (--original)"
        before = None if original is None else 1.0
        return Check(name, None, before, None, limit, "inconclusive", "ratio", f"{_cap(raw)}; {lacking}.")
    excess = probe_excess(value, reference, original)
    verdict: Verdict = excess_verdict(value, reference, original, limit)
    room = original - reference
    says = f"{_cap(raw)}, never seen {reference:.1f} %, original {original:.1f} %"
    if room < NO_ROOM:
        says += f"; these differ by less than {NO_ROOM:g} points, too little to judge"
    elif room < SMALL_ROOM:
        says += f"; with less than {SMALL_ROOM:g} points between them, at most {SMALL_EXCESS:g} above never seen are allowed"
    return Check(name, excess, 1.0, 0.0, limit, verdict, "ratio", f"{says}.")


def membership(value: MembershipResult, original: MembershipResult | None, reference: MembershipResult | None) -> Check:
    """Same-class membership inference.

    Passed where the 95 % interval of the AUC reaches one half, or the leak |AUC - 1/2| of a model that never trained on
    the images: the splits of a data set may differ by themselves, and no forgetting can remove that.
    """
    nearest = max(value.low - 0.5, 0.5 - value.high, 0.0)
    allowed = reference.leak if reference else 0.0
    verdict: Verdict = "inconclusive" if not value.decisive else "pass" if nearest <= allowed else "fail"
    judged = (
        TOO_FEW
        if not value.decisive
        else "guessing lies within that range"
        if nearest == 0
        else "a model that never trained on them shows as much"
        if nearest <= allowed
        else "more than chance would explain"
    )
    says = (
        f"Training images of forgotten classes are told from new ones with AUC {value.auc:.2f} "
        f"({value.low:.2f} to {value.high:.2f}; 0.5 is guessing): {judged}; {100 * value.tpr:.0f} % of them at a false alarm "
        f"rate of {100 * value.fpr:.0f} %."
    )
    return Check(
        "mia_auc",
        value.auc,
        original.auc if original else None,
        reference.auc if reference else None,
        0.5 + allowed,
        verdict,
        "auc",
        says,
    )


def relearning(
    subject: Starts, original: Starts | None, reference: Starts | None, known: float, limits: Limits
) -> Check:
    """Full relearning: steps until the classes are back, next to a never-seen model's; the faster start of each counts.

    Args:
        known: the original's accuracy on these images, percent; see `relearning_goal`.
    """
    from gsforget.audit.relearn import steps_to

    name, limit = "relearn_full", limits.min_relearn_ratio
    goal = relearning_goal(reference, known, limits)

    def steps(starts: Starts | None) -> int | None:
        return steps_to(starts.faster(goal), goal) if starts else None

    def took(starts: Starts) -> str:
        return "no step at all" if steps(starts) == 0 else _after(steps(starts), starts.imprinted.steps[-1])

    def took_own(starts: Starts) -> str:
        return _after(steps_to(starts.own, goal), starts.own.steps[-1])

    value, before, needed = (steps(s) for s in (subject, original, reference))
    says = f"Fine-tuning brings the forgotten classes back to {goal:.0f} % after {took(subject)}"
    if reference is None:
        says += f" (from its own head after {took_own(subject)}); {UNCOMPARED}."
        return Check(name, value, before, None, None, "inconclusive", "steps", says)
    assert needed is not None
    own = f"from its own head after {took_own(subject)}, in that model after {took_own(reference)}"
    says += f", in a model that never saw them after {took(reference)}, each from its better start ({own})"
    if needed == 0:
        says += (
            f"; not judged: with class means put into its head, the model that never saw them names as many ({goal:.0f} %) "
            "before any step, so steps tell nothing"
        )
        return Check(name, value, before, needed, None, "inconclusive", "steps", f"{says}.")
    verdict: Verdict = "pass" if value is None or value >= limit * needed else "fail"
    return Check(name, value, before, needed, limit * needed, verdict, "steps", f"{says}.")


def relearning_goal(reference: Starts | None, known: float, limits: Limits) -> float:
    """When classes count as back, percent: at a share of the original's accuracy ``known``, or at the best that the
    never-seen model reaches within the steps measured, whichever is less."""
    goal = limits.recover_share * known
    return min(goal, reference.best) if reference else goal


def _after(steps: int | None, measured: int) -> str:
    return f"more than {measured} steps" if steps is None else f"{steps} step{'' if steps == 1 else 's'}"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
