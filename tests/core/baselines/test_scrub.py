"""SCRUB's turns on a case small enough to reckon by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.scrub import ScrubSettings, scrub
from gsforget.baselines.training import distillation

PLAIN = {"lr": 0.1, "batch_size": 6, "momentum": 0.0, "weight_decay": 0.0}


@pytest.fixture
def turns(by_hand):
    """The losses of a max step and of a min step with alpha 0.3, gamma 0.7, T 2."""
    x, y, before = by_hand.images.pixels, by_hand.images.labels, by_hand.model(by_hand.images.pixels).detach()

    def kl(logits, target):
        p, q = torch.softmax(target / 2, 1), torch.softmax(logits / 2, 1)
        return 4 * (p * (p / q).log()).sum(1).mean()

    # At the original model the KL has no gradient; only later steps tell whether it is there.
    return (
        lambda m: -kl(m(x[4:]), before[4:]),
        lambda m: 0.7 * cross_entropy(m(x[:4]), y[:4]) + 0.3 * kl(m(x[:4]), before[:4]),
    )


def test_max_passes_come_first_and_min_passes_follow_each(by_hand, stepped, turns):
    settings = ScrubSettings(epochs=3, round=3, max_passes=2, alpha=0.3, gamma=0.7, temperature=2.0, **PLAIN)
    result = scrub(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=3), settings)
    up, down = turns
    for name, value in stepped(up, down, up, down, down).items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_a_round_that_does_not_fit_is_shortened(by_hand, stepped, turns):
    """Of a round of 10 with 5 max passes 2 passes are left: one begins with a max pass."""
    settings = ScrubSettings(epochs=10, round=10, max_passes=5, alpha=0.3, gamma=0.7, temperature=2.0, **PLAIN)
    result = scrub(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=2), settings)
    up, down = turns
    for name, value in stepped(up, down, down).items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_the_smoothed_variant_is_pulled_towards_the_average(by_hand, stepped, turns):
    settings = ScrubSettings(
        epochs=2, round=1, max_passes=0, alpha=0.3, gamma=0.7, temperature=2.0, smoothing=0.5, **PLAIN
    )
    result = scrub(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=2), settings)
    _, down = turns
    before = [p.detach().clone() for p in by_hand.model.parameters()]

    def pulled(m):
        apart = [p - b for p, b in zip(m.parameters(), before)]
        return down(m) + 0.5 * sum(d.norm() for d in apart if d.any())

    # The first round starts at the average, whose pull has no direction; after it the average is the student itself.
    for name, value in stepped(pulled, down).items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_the_pull_is_felt_within_a_round(by_hand, stepped, turns):
    settings = ScrubSettings(
        epochs=2, round=2, max_passes=0, alpha=0.3, gamma=0.7, temperature=2.0, smoothing=0.5, **PLAIN
    )
    result = scrub(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=2), settings)
    _, down = turns
    before = [p.detach().clone() for p in by_hand.model.parameters()]

    def pulled(m):
        return down(m) + 0.5 * sum((p - b).norm() for p, b in zip(m.parameters(), before))

    for name, value in stepped(down, pulled).items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_distillation_is_zero_at_the_target_and_a_mean_over_images():
    z = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert distillation(z, z, 3.0) == 0
    one_hot = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    torch.testing.assert_close(distillation(torch.zeros(2, 2), one_hot), torch.tensor(2.0).log())


def test_both_variants_are_there_with_their_numbers():
    plain, smoothed = find_method("scrub").settings(), find_method("scrub-s").settings()
    assert (plain.lr, plain.alpha, plain.gamma, plain.temperature, plain.smoothing) == (5e-4, 0.001, 0.99, 4.0, 0.0)
    assert (smoothed.lr, smoothed.alpha, smoothed.gamma, smoothed.smoothing) == (1e-4, 0.001, 10.0, 0.05)
