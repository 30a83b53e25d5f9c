"""Losses and targets of classification, against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.tasks.classify import ASCENT_WEIGHT, Classification, default_bound

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
    return task.losses(outputs, task.targets(outputs.detach()) if targets is None else targets, labels, forget)


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
    task = Classification(3, (0,), (), 3.0)
    targets = task.targets(outputs.float())
    got = task.losses(outputs, targets, torch.tensor([0]), torch.tensor([True]))
    assert got.total.dtype == torch.float32
    assert torch.isfinite(got.total)


def test_loss_is_least_at_the_targets():
    task = Classification(4, (1,), (), 0.0)  # no ascent
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    targets = task.targets(outputs)
    labels, forget = torch.zeros(6, dtype=torch.int64), torch.arange(6) < 2
    at_targets = task.losses(targets.clamp_min(1e-30).log(), targets, labels, forget).total
    assert at_targets < task.losses(outputs, targets, labels, forget).total


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_default_bound(classes):
    assert math.exp(-default_bound(classes)) == pytest.approx(1 / (math.e * classes))


def test_correct_is_by_unmasked_logits():
    task = Classification(3, (0,))
    outputs = torch.tensor([[9.0, 1, 0], [0, 1, 9.0]])
    assert task.correct(outputs, torch.tensor([0, 1])).tolist() == [True, False]
