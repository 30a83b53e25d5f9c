"""Losses and targets of classification, against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.gates import paired_drop
from gsforget.separability import Separability
from gsforget.tasks.base import Seen
from gsforget.tasks.classify import (
    ASCENT_WEIGHT,
    FIRM_PULL,
    PULL_WEIGHT,
    PUSH_BOUND,
    PUSH_WEIGHT,
    SEPARABILITY_WEIGHT,
    Classification,
    ClassificationObjective,
    default_bound,
)
from gsforget.tasks.classify.answers import correct, score

torch.set_num_threads(1)


@given(st.integers(2, 12), st.integers(0, 2**31), st.data())
@settings(max_examples=60, deadline=None)
def test_targets_are_the_renormalised_softmax(classes, seed, data):
    gone = data.draw(st.sets(st.integers(0, classes - 1), min_size=1, max_size=classes - 1))
    forget, erased = tuple(sorted(gone)[:1]), tuple(sorted(gone)[1:])
    outputs = 5 * torch.randn(7, classes, generator=torch.Generator().manual_seed(seed))
    kept = outputs.clone()
    targets = Classification(classes, forget, erased).targets(outputs)
    p = outputs.double().softmax(1)
    p[:, list(gone)] = 0
    torch.testing.assert_close(targets.double(), p / p.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert not targets[:, list(gone)].any()
    assert torch.equal(outputs, kept)  # the outputs given are not written to


def losses(outputs, labels, forget, bound=3.0, targets=None):
    task = Classification(outputs.shape[1], (0,), (), bound)
    targets = task.targets(outputs.detach()) if targets is None else targets
    rows = torch.arange(len(labels))
    return ClassificationObjective(targets, labels, forget, bound).losses(Seen(outputs, torch.empty(0)), rows)


def test_closed_form_of_one_batch():
    outputs = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.5, 2.0]])
    labels, forget = torch.tensor([0, 1, 2]), torch.tensor([True, False, False])
    got = losses(outputs, labels, forget)
    log_p = outputs.double().log_softmax(1)
    targets = torch.tensor([[0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e)], [0, 1, 0], [0, 1, 0]], dtype=torch.float64)
    targets[1] = torch.tensor([0, math.exp(2), 1]).double() / (math.exp(2) + 1)
    targets[2] = torch.tensor([0, 1, math.exp(1.5)]).double() / (math.exp(1.5) + 1)
    distance = -(targets * log_p).sum(1)
    assert got.retain.item() == pytest.approx(float(distance[1:].mean()), rel=1e-5)
    ascent = 3.0 + float(log_p[0, 0])
    assert got.forget.item() == pytest.approx(float(distance[0]) + ASCENT_WEIGHT * ascent, rel=1e-5)
    assert got.total.item() == pytest.approx(got.retain.item() + got.forget.item(), rel=1e-6)


@pytest.mark.parametrize(("probability", "ascends"), [(0.5, True), (0.051, True), (0.049, False), (1e-6, False)])
def test_ascent_is_zero_beyond_the_bound(probability, ascends):
    outputs = torch.tensor([[math.log(probability), math.log(1 - probability)]], requires_grad=True)
    labels, forget = torch.tensor([0]), torch.tensor([True])
    targets = torch.zeros(1, 2)  # leaves the ascent alone
    got = losses(outputs, labels, forget, bound=-math.log(0.05), targets=targets)
    got.forget.backward()
    want = ASCENT_WEIGHT * max(0.0, -math.log(0.05) + math.log(probability))
    assert got.forget.item() == pytest.approx(want, abs=1e-6)
    assert bool(outputs.grad.any()) == ascends
    if ascends:  # descending the loss lowers the forgotten logit
        assert outputs.grad[0, 0] > 0 > outputs.grad[0, 1]


@pytest.mark.parametrize("forgotten", [0, 4])
def test_one_sided_batches_are_finite_and_differentiable(forgotten):
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    forget = torch.arange(4) < forgotten
    got = losses(outputs, torch.zeros(4, dtype=torch.int64), forget)
    got.total.backward()
    assert torch.isfinite(got.total)
    assert torch.isfinite(outputs.grad).all()
    assert outputs.grad.any()
    assert (got.retain if forgotten else got.forget).item() == 0


def test_half_precision_logits_are_judged_in_float32():
    outputs = torch.tensor([[30000.0, -30000.0, 0.0]], dtype=torch.float16)
    got = losses(outputs, torch.tensor([0]), torch.tensor([True]))
    assert got.total.dtype == torch.float32
    assert torch.isfinite(got.total)


def test_loss_is_least_at_the_targets():
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    targets = Classification(4, (1,)).targets(outputs)
    labels, forget = torch.zeros(6, dtype=torch.int64), torch.arange(6) < 2
    at_targets = losses(targets.clamp_min(1e-30).log(), labels, forget, 0.0, targets).total  # a bound of 0: no ascent
    assert at_targets < losses(outputs, labels, forget, 0.0, targets).total


def test_the_score_says_which_class_lost_most():
    labels, forget = torch.tensor([0] * 10 + [1] * 40 + [2] * 40), torch.arange(90) < 10
    before, after = torch.ones(90, dtype=torch.bool), torch.arange(90) >= 70
    found = score(before, after, forget, torch.arange(90), labels)
    assert (found.forget, found.retain, found.retain_before) == (0, 25, 100)
    assert found.class_bound == paired_drop([True] * 40, [False] * 40)[1]
    assert found.class_bound > 80 > found.drop_bound
    assert score(before, after, forget, torch.arange(90)).class_bound is None
    nothing = score(before, after, torch.ones(90, dtype=torch.bool), torch.arange(90), labels)
    assert (nothing.retain, nothing.drop_bound, nothing.class_bound) == (None, None, None)


def test_views_make_a_score_no_surer():
    before, after = torch.ones(80, dtype=torch.bool), torch.arange(80) % 20 > 0
    forget, alone = torch.zeros(80, dtype=torch.bool), torch.arange(80)
    assert score(before, after, forget, alone % 20).drop_most > score(before, after, forget, alone).drop_most + 1


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_default_bound(classes):
    assert math.exp(-default_bound(classes)) == pytest.approx(1 / (math.e * classes))


def test_correct_is_by_unmasked_logits():
    outputs = torch.tensor([[9.0, 1, 0], [0, 1, 9.0]])
    assert correct(outputs, torch.tensor([0, 1])).tolist() == [True, False]


def gs_lora_pp(features, labels, forget, method="gs-lora++", **options):
    """The objective of a request to forget class 0, from a model whose logits are all zero."""
    count = len(labels)
    task = Classification(3, (0,), (), 3.0, method, **options)
    return task.objective(Seen(torch.zeros(count, 3), features), labels, forget, torch.arange(count))


@pytest.mark.parametrize("firm", [False, True])
def test_push_pull_and_separability_add_up(firm):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 5, generator=generator), torch.arange(30) % 3
    forget = labels == 0
    objective = gs_lora_pp(features, labels, forget, firm=firm)
    now, rows = features + 0.5 * torch.randn(30, 5, generator=generator), torch.arange(30)
    got = objective.losses(Seen(torch.zeros(30, 3), now), rows)
    plain = gs_lora_pp(features, labels, forget, "gs-lora").losses(Seen(torch.zeros(30, 3), torch.empty(0)), rows)
    scale = features[~forget].std(0, unbiased=False)
    pull = (((now - features)[~forget] / scale) ** 2).mean()
    away = (((now - features[forget].mean(0))[forget] / scale) ** 2).mean(1)
    separability = Separability(features, labels, rows, forget)
    least = SEPARABILITY_WEIGHT * separability.loss(now, rows, forget)
    push = PUSH_WEIGHT * (PUSH_BOUND - away).relu().mean()
    torch.testing.assert_close(got.retain, plain.retain + (FIRM_PULL if firm else PULL_WEIGHT) * pull)
    torch.testing.assert_close(got.forget, plain.forget + push + least)


def test_opponents_of_earlier_classes_know_all_classes_and_take_from_theirs_alone():
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 5
    task = Classification(5, (0, 1), (2,), 3.0)
    gone, old, rows = labels <= 2, labels == 2, torch.arange(60)
    objective = task.objective(Seen(torch.zeros(60, 5), features), labels, gone, rows[~old])
    now = features + torch.randn(60, 4, generator=generator)
    moved = torch.randn(60, 4, generator=generator)
    wider = objective.with_earlier(lambda: Seen(torch.zeros(60, 5), now), rows, 2.0)
    first = objective.losses(Seen(torch.zeros(60, 5), moved), rows, depth=2.0)
    then = wider.losses(Seen(torch.zeros(60, 5), moved), rows, depth=3.0)
    held = PULL_WEIGHT * (((moved - features)[~gone] / objective.features.prototypes.scale) ** 2).mean()
    torch.testing.assert_close(then.retain, first.retain + (FIRM_PULL - PULL_WEIGHT) / PULL_WEIGHT * held)
    taken = 3.0 * SEPARABILITY_WEIGHT * Separability(now, labels, rows, gone).loss(moved, rows, old)
    torch.testing.assert_close(then.forget, first.forget + taken)
    # They begin with the features as they are now, so that they know the earlier class where it is.
    fresh = objective.with_earlier(lambda: Seen(torch.zeros(60, 5), now), rows, 2.0)
    assert torch.equal(fresh.named(Seen(now, now), rows), Separability(now, labels, rows, gone).named(now, labels))
    assert (
        gs_lora_pp(features, labels % 3, labels % 3 == 0, "gs-lora").with_earlier(lambda: Seen(now, now), rows, 2.0)
        is None
    )


def test_features_that_stayed_cost_a_retained_image_nothing():
    features, labels = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    objective = gs_lora_pp(features, labels, labels == 0)
    rows = torch.nonzero(labels != 0).flatten()
    with_features = objective.losses(Seen(torch.zeros(len(rows), 3), features[rows]), rows)
    without = gs_lora_pp(features, labels, labels == 0, "gs-lora").losses(
        Seen(torch.zeros(len(rows), 3), torch.empty(0)), rows
    )
    torch.testing.assert_close(with_features.total, without.total)


def test_push_ends_at_its_bound():
    features, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)), torch.arange(40) % 4 // 2
    objective = gs_lora_pp(features, labels, labels == 0).features
    far = (features + 100).requires_grad_()
    away = objective.prototypes.distances(far, labels)[labels == 0]
    assert bool((away > PUSH_BOUND).all())
    assert (PUSH_BOUND - away).relu().sum().item() == 0
