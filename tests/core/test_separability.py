"""The closed-form opponent: its value is what the best probe explains, its gradient is that value's gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.separability import Separability

torch.set_num_threads(1)


def groups(count: int, d: int, classes: int, apart: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = apart * torch.randn(classes, d, generator=generator)
    return means[labels] + torch.randn(count, d, generator=generator), labels


def test_classes_without_noise_are_worth_one_each():
    labels = torch.arange(3000) % 10
    features = torch.eye(10)[labels]
    assert Separability(features, labels, torch.arange(3000), [2, 5, 7]).value() == pytest.approx(3, rel=0.05)


def test_features_that_know_nothing_are_worth_nothing():
    features, labels = groups(4000, 8, 5, apart=0.0)
    assert Separability(features, labels, torch.arange(4000), [0, 1]).value() < 0.02


def test_one_class_against_the_rest_is_the_squared_correlation():
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(5000, generator=generator) < 0.3).long()
    features = labels[:, None] + torch.randn(5000, 1, generator=generator)
    squared = torch.corrcoef(torch.stack([features[:, 0], labels.float()]))[0, 1] ** 2
    assert Separability(features, labels, torch.arange(5000), [1]).value() == pytest.approx(squared.item(), rel=0.03)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_the_gradient_is_that_of_the_value(classes, d, seed):
    """By the envelope theorem; differentiated here through the solution of the probe, in float64."""
    features, labels = groups(40, d, classes, 1.0, seed)
    features = features.double()
    rows, forget = torch.arange(40), labels == 0
    opponent = Separability(features, labels, rows, [0])
    opponent.targets = opponent.targets.double()
    mean, deviation, _ = opponent.probe()
    moved = features.clone().requires_grad_()
    z = (moved - mean) / deviation  # the scale of the probe's input is not part of the game
    gram = z.T @ z / 40 + opponent.ridge * torch.eye(d).double()
    w = torch.linalg.solve(gram, z.T @ opponent.targets / 40)
    # the probe's own loss, with its penalty: what the envelope theorem is about
    rest = ((opponent.targets - z @ w) ** 2).sum(1).mean() + opponent.ridge * (w**2).sum()
    (truth,) = torch.autograd.grad(-rest, moved)
    batch = features.clone().requires_grad_()
    (got,) = torch.autograd.grad(opponent.loss(batch, rows, forget), batch)
    a, b = truth[forget].flatten(), got[forget].flatten()
    assert not got[~forget].any()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999 or a.norm() < 1e-6


def test_following_the_gradient_hides_the_class():
    features, labels = groups(300, 6, 3, apart=2.0)
    rows, forget = torch.arange(300), labels == 0
    opponent = Separability(features, labels, rows, [0])
    before, now = opponent.value(), features.clone().requires_grad_()
    optimiser = torch.optim.Adam([now], 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        opponent.loss(now, rows, forget).backward()
        optimiser.step()
    opponent.loss(now, rows, forget)
    assert before > 0.5
    assert opponent.value() < 0.05
    assert torch.equal(now[~forget].detach(), features[~forget])


def test_a_class_without_images_does_not_count():
    features, labels = groups(60, 4, 3, 1.0)
    assert Separability(features, labels, torch.arange(60), [0, 2]).classes == 2
    assert Separability(features, labels, torch.nonzero(labels != 2).flatten(), [0, 2]).classes == 1


def test_a_batch_without_forgotten_images_changes_nothing_but_the_memory():
    features, labels = groups(30, 4, 3, 1.0)
    opponent = Separability(features, labels, torch.arange(30), [0])
    now = (features + 1).requires_grad_()
    loss = opponent.loss(now[:5], torch.arange(5), torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not now.grad.any()
    assert torch.equal(opponent.bank[:5], now[:5].detach())
