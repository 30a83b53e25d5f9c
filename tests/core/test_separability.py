"""The closed-form opponent: it is linear discriminant analysis, and following its gradient hides a class from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from gsforget.separability import Discriminant, Separability

torch.set_num_threads(1)


def groups(count: int, d: int, classes: int, apart: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = apart * torch.randn(classes, d, generator=generator)
    return means[labels] + torch.randn(count, d, generator=generator), labels


def opponents(features, labels, forgotten=(0,), rows=None):
    rows = torch.arange(len(labels)) if rows is None else rows
    return Separability(features, labels, rows, torch.isin(labels, torch.tensor(forgotten)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_the_probe_is_that_of_scikit_learn(classes, d, seed):
    features, labels = groups(60 * classes, d, classes, 1.5, seed)
    features = features.double()
    discriminant = Discriminant(labels, torch.arange(len(labels)), d)
    discriminant.shrink = 0.0
    weight, bias = discriminant.probe(features)
    truth = LinearDiscriminantAnalysis("lsqr", priors=[1 / classes] * classes).fit(features.numpy(), labels.numpy())
    mine, theirs = (features @ weight + bias).softmax(1), torch.from_numpy(truth.predict_proba(features.numpy()))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-2)


def test_only_the_rows_in_play_teach_the_probe():
    features, labels = groups(200, 4, 4, 3.0)
    rows = torch.nonzero(labels != 2).flatten()
    found = opponents(features, labels, rows=rows)
    assert found.among_all.probe(features)[0].shape == (4, 3)
    assert found.named(features[rows], labels[rows]).float().mean() > 0.95
    assert not found.named(features[labels == 2], labels[labels == 2]).any()  # a class unknown to it is never named


def test_the_loss_is_minus_log_of_not_being_named():
    features, labels = groups(90, 3, 3, 1.0)
    discriminant, rows = Discriminant(labels, torch.arange(90), 3), torch.arange(1, 90, 3)
    weight, bias = discriminant.probe(features)
    own = (features[rows] @ weight + bias).softmax(1)[:, 1]
    want = -(1 - own).log().mean()
    assert discriminant.loss(features, features[rows], labels[rows]).item() == pytest.approx(want.item(), rel=1e-4)


def test_one_opponent_knows_all_classes_and_one_the_forgotten_alone():
    features, labels = groups(120, 3, 4, 2.0)
    rows, forget = torch.arange(120), labels < 2
    found = opponents(features, labels, (0, 1))
    mine = torch.nonzero(forget).flatten()
    alone = Discriminant(labels, mine, 3)
    want = [o.loss(features, features[mine], labels[mine]) for o in (found.among_all, alone)]
    assert found.loss(features, rows, forget).item() == pytest.approx(sum(want).item(), rel=1e-5)
    single = opponents(features, labels, (0,))
    assert [o.classes for o in single.opponents] == [4]  # one class alone cannot be told from itself


def test_the_gradient_reaches_forgotten_images_only_and_stays_finite():
    features, labels = groups(60, 3, 3, 50.0)  # so far apart that every probability is 0 or 1
    now = features.clone().requires_grad_()
    forget = labels == 0
    opponents(features, labels).loss(now, torch.arange(60), forget).backward()
    assert torch.isfinite(now.grad).all()
    assert now.grad[forget].any()
    assert not now.grad[~forget].any()


def test_following_the_gradient_hides_classes_from_others_and_from_each_other():
    features, labels = groups(400, 6, 4, apart=2.0)
    rows, forget = torch.arange(400), labels < 2
    found, now = opponents(features, labels, (0, 1)), features.clone().requires_grad_()

    def score(values, chosen):
        fresh = LinearDiscriminantAnalysis("lsqr").fit(values[chosen].numpy(), labels[chosen].numpy())
        return fresh.score(values[forget].numpy(), labels[forget].numpy())

    everyone = torch.ones(400, dtype=torch.bool)
    before = [score(features, chosen) for chosen in (everyone, forget)]
    optimiser = torch.optim.Adam([now], 0.02)
    for _ in range(400):
        optimiser.zero_grad()
        found.loss(now, rows, forget).backward()
        optimiser.step()
    after = [score(now.detach(), chosen) for chosen in (everyone, forget)]
    assert min(before) > 0.9
    assert after[0] < 0.65
    assert after[1] < 0.75  # half would be guessing
    assert torch.equal(now[~forget].detach(), features[~forget])


def test_a_class_among_others_is_found_although_it_does_not_correlate():
    """Its mean lies at the others' mean: regression onto its indicator finds nothing, this probe does."""
    corners = torch.tensor([[3.0, 3], [3, -3], [-3, 3], [-3, -3], [0, 0]])
    labels = torch.arange(1000) % 5
    features = corners[labels] + 0.5 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    among = labels == 4
    correlation = torch.corrcoef(torch.cat([features, among[:, None]], 1).T)[2, :2]
    assert correlation.abs().max() < 0.1
    assert opponents(features, labels, (4,)).named(features[among], labels[among]).float().mean() > 0.95


def test_few_images_of_many_features_do_not_break_it():
    features, labels = groups(18, 40, 3, 1.0)  # 15 deviations within classes for 40 features
    found, now = opponents(features, labels, (0, 1)), features.clone().requires_grad_()
    assert found.opponents == [found.among_all]
    loss = found.loss(now, torch.arange(18), labels < 2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(now.grad).all()


def test_an_opponent_that_would_know_nothing_is_left_out():
    features, labels = groups(12, 40, 3, 1.0)
    found, now = opponents(features, labels, (0, 1)), features.clone().requires_grad_()
    assert found.opponents == []
    loss = found.loss(now, torch.arange(12), labels < 2)
    loss.backward()
    assert loss.item() == 0
    one_each = opponents(features[:3], labels[:3])
    assert torch.isfinite(torch.cat([part.flatten() for part in one_each.among_all.probe(one_each.bank)])).all()


def test_a_batch_without_forgotten_images_changes_nothing_but_the_memory():
    features, labels = groups(30, 4, 3, 1.0)
    found = opponents(features, labels)
    now = (features + 1).requires_grad_()
    loss = found.loss(now[:5], torch.arange(5), torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not now.grad.any()
    assert torch.equal(found.bank[:5], now[:5].detach())
