"""Verdicts: what passes, what fails, and what cannot be judged; bounds by hand."""

import math

import pytest

from gsforget.audit import checks
from gsforget.audit.checks import Limits
from gsforget.audit.membership import MembershipResult
from gsforget.audit.relearn import Curve, Starts
from gsforget.gates import Gate
from gsforget.metrics import Z_ONE_SIDED

LIMITS = Limits()


def verdicts(*given):
    return checks.overall([checks.Check("x", 1, None, None, None, v, "%", "") for v in given])


def test_one_failure_decides_and_a_gap_is_no_pass():
    assert verdicts("pass", "inconclusive", "fail") == "fail"
    assert verdicts("pass", "inconclusive") == "inconclusive"
    assert verdicts("pass", "pass") == "pass"
    assert verdicts() == "inconclusive"


def test_what_was_not_measured_is_inconclusive():
    check = checks.unknown("mia_auc", "auc", "there are no test images", 0.5)
    assert (check.value, check.verdict, check.threshold) == (None, "inconclusive", 0.5)
    assert check.says == "Not judged: there are no test images."


def test_a_gate_keeps_its_verdict():
    gate = Gate("forget_acc", 3.0, 1.5, 1.0, False)
    check = checks.of_gate(gate, "%", "It names 3.", 97.0)
    assert (check.name, check.value, check.original, check.threshold, check.verdict) == ("forget_acc", 3, 97, 1, "fail")


def test_rate_difference_closed_form():
    # 9 of 18 against 0 of 18: (9 + 1) / 20 - 1 / 20, variance (0.5 * 0.5 + 0.05 * 0.95) / 20.
    expected = 0.45 - Z_ONE_SIDED * math.sqrt((0.25 + 0.05 * 0.95) / 20)
    assert checks.rate_difference(50.0, 0.0, 18, 18) == pytest.approx(100 * expected)
    assert checks.rate_difference(60.0, 60.0, 50, 50) < 0


@pytest.mark.parametrize(
    ("value", "reference", "verdict"),
    [(55.0, 50.0, "pass"), (90.0, 50.0, "fail"), (10.0, 50.0, "pass"), (90.0, None, "inconclusive")],
)
def test_attacks_are_held_against_classes_never_seen(value, reference, verdict):
    check = checks.attack("five_shot", "It names some", value, 95.0, reference, (40, 40))
    assert check.verdict == verdict
    assert check.threshold == check.reference == reference


def test_an_attack_on_so_few_images_that_none_could_fail_is_not_judged():
    assert checks.attack("five_shot", "It names some", 100.0, 100.0, 0.0, (2, 2)).verdict == "inconclusive"
    assert checks.attack("five_shot", "It names some", 100.0, 100.0, 0.0, (3, 3)).verdict == "fail"


@pytest.mark.parametrize(
    ("value", "original", "reference", "verdict", "excess"),
    [
        (62, 90, 60, "pass", 2 / 30),
        (75, 90, 60, "fail", 0.5),
        (50, 90, 60, "pass", -1 / 3),
        (61, 63, 60, "inconclusive", 1 / 3),  # 3 points of room
        (61.9, 66, 60, "pass", 1.9 / 6),  # 6 points of room: 2 above never seen are allowed, whatever the ratio
        (62.1, 66, 60, "fail", 2.1 / 6),
        (70, 90, None, "inconclusive", None),
        (70, None, 60, "inconclusive", None),
    ],
)
def test_probe_excess(value, original, reference, verdict, excess):
    check = checks.probe(value, original, reference, LIMITS)
    assert check.verdict == verdict
    assert check.value == (None if excess is None else pytest.approx(excess))
    assert f"{value:.1f} %" in check.says


def result(auc, low, high):
    return MembershipResult(auc, low, high, 0.02, 100, 100)


@pytest.mark.parametrize(
    ("subject", "reference", "verdict"),
    [
        (result(0.55, 0.49, 0.61), None, "pass"),  # one half is possible
        (result(0.60, 0.54, 0.66), None, "fail"),
        (result(0.40, 0.34, 0.46), None, "fail"),  # suspiciously high losses give images away as well
        (result(0.60, 0.54, 0.66), result(0.56, 0.5, 0.62), "pass"),  # the splits differ by themselves as much
        (result(0.80, 0.74, 0.86), result(0.56, 0.5, 0.62), "fail"),
    ],
)
def test_membership(subject, reference, verdict):
    check = checks.membership(subject, None, reference)
    assert check.verdict == verdict
    assert check.value == subject.auc


def test_membership_of_so_few_images_that_none_could_fail_is_not_judged():
    check = checks.membership(MembershipResult(1.0, 0.2, 1.0, 1.0, 1, 1, decisive=False), None, None)
    assert (check.verdict, check.value) == ("inconclusive", 1.0)
    assert "so few images" in check.says


STEPS = (0, 1, 2, 5, 10, 20)


def curve(*accuracies):
    return Curve(STEPS, accuracies)


def one(found):
    """Both starts alike."""
    return Starts(found, found)


NEVER = curve(0, 10, 30, 60, 80, 95)


@pytest.mark.parametrize(
    ("subject", "verdict", "steps"),
    [
        (curve(0, 5, 20, 50, 70, 95), "pass", 20),
        (curve(0, 50, 96, 96, 96, 96), "fail", 2),
        (curve(0, 0, 0, 0, 0, 10), "pass", None),
        (curve(0, 10, 50, 80, 95, 95), "pass", 10),  # exactly half
    ],
)
def test_relearning_needs_half_the_steps_of_a_model_that_never_saw_them(subject, verdict, steps):
    check = checks.relearning(one(subject), one(curve(*[100] * 6)), one(NEVER), 100.0, LIMITS)
    assert (check.verdict, check.value, check.original, check.reference) == (verdict, steps, 0, 20)
    assert check.threshold == 10


def test_relearning_aims_at_what_the_never_seen_model_reaches():
    slow = curve(0, 5, 10, 20, 30, 40)
    check = checks.relearning(one(curve(0, 5, 10, 40, 50, 60)), None, one(slow), 100.0, LIMITS)
    assert (check.value, check.reference, check.verdict) == (5, 20, "fail")
    assert checks.relearning(one(slow), None, None, 100.0, LIMITS).verdict == "inconclusive"


def test_the_faster_start_of_each_counts_and_both_are_told():
    slow, fast = curve(0, 0, 0, 0, 0, 90), curve(60, 70, 96, 96, 96, 96)
    subject, never = Starts(NEVER, curve(0, 0, 0, 0, 0, 0)), Starts(slow, fast)
    check = checks.relearning(subject, None, never, 100.0, LIMITS)
    assert (check.value, check.reference, check.verdict) == (20, 2, "pass")
    assert "from its own head after 20 steps, in that model after more than 20 steps" in check.says
    check = checks.relearning(Starts(NEVER, curve(60, 96, 96, 96, 96, 96)), None, never, 100.0, LIMITS)
    assert (check.value, check.reference, check.threshold, check.verdict) == (1, 2, 1, "pass")  # exactly half
    check = checks.relearning(Starts(NEVER, curve(60, 96, 96, 96, 96, 96)), None, one(NEVER), 100.0, LIMITS)
    assert (check.value, check.reference, check.verdict) == (1, 20, "fail")


def test_a_never_seen_model_that_is_there_at_once_tells_nothing():
    there = Starts(NEVER, curve(97, 97, 97, 97, 97, 97))
    check = checks.relearning(one(NEVER), None, there, 100.0, LIMITS)
    assert (check.value, check.reference, check.threshold, check.verdict) == (20, 0, None, "inconclusive")
    assert "before any step" in check.says


def test_which_start_is_shown():
    late, early = curve(0, 0, 0, 0, 95, 95), curve(50, 50, 95, 95, 95, 95)
    assert Starts(late, early).faster(90) is Starts(early, late).faster(90) is early
    never = curve(0, 0, 0, 0, 0, 1)
    assert Starts(never, late).faster(99) is late
    assert Starts(early, late).faster(50) is early  # no step at all
    assert Starts(late, never).best == 95


@pytest.mark.parametrize(
    ("points", "words"),
    [(0.5, "fell by 0.5 points"), (-0.5, "rose by 0.5 points"), (0.04, "stayed as it was"), (-0.0, "stayed as it was")],
)
def test_a_rise_is_no_negative_fall(points, words):
    from gsforget.audit.outputs import _fell

    assert _fell(points) == words
