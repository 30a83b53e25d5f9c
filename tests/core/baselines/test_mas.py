"""MAS: importances of a linear model in closed form, and opposite images that do not cancel."""

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.base import BaselineRequest
from gsforget.baselines.mas import MASSettings, mas, sensitivity
from gsforget.baselines.training import Training
from gsforget.views import Given


def test_importances_of_a_linear_layer_are_two_z_x_over_k(by_hand):
    settings = MASSettings(head=True)
    found = sensitivity(Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings))
    x = by_hand.images.pixels[:4].flatten(1)
    z = x @ by_hand.model[2].weight.T
    want = (2 * z[:, :, None] * x[:, None] / 3).abs().mean(0)
    torch.testing.assert_close(found["2.weight"], want)


def test_images_that_pull_in_opposite_directions_do_not_cancel(by_hand):
    """f(x) and f(-x): gradients for the bias are opposite, and their mean, which the release takes, is 0."""
    pixels = torch.tensor([[1.0, 0], [-1, 0], [0, 1]]).view(3, 1, 1, 2)
    labels = torch.tensor([0, 1, 2])
    request = BaselineRequest((2,), 3)
    t = Training(by_hand.model, Given(pixels, labels), labels == 2, request, MASSettings(head=True))
    torch.testing.assert_close(sensitivity(t)["2.bias"], torch.tensor([2 / 3, 0, 2 / 3]))


def test_the_penalty_draws_back_by_the_sensitivity(one_retained):
    case = one_retained
    importance = sensitivity(Training(case.model, case.images, case.forget, case.request, MASSettings()))

    def loss(features, logits, features_before, logits_before, model):
        ce = cross_entropy(logits[[0, 1, 4, 5]], torch.zeros(4, dtype=torch.int64))
        moved = {"1.weight": model[1].weight - torch.eye(2), "1.bias": model[1].bias}
        return ce + 0.3 * sum((importance[n] * m.square()).sum() for n, m in moved.items())

    case.check(mas, MASSettings, loss, strength=0.3)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    method = find_method("mas")
    settings = method.settings()
    assert (settings.lr, settings.strength, settings.head) == (1e-4, 0.002, False)
    assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
