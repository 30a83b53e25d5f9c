"""Selective synaptic dampening: Fisher diagonals and the rule, in closed form."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import gradients
from gsforget.baselines.base import BaselineRequest
from gsforget.baselines.ssd import SSDSettings, fisher, ssd
from gsforget.baselines.training import Optimisation, Training


def by_images(model, x, y):
    """The mean of squared gradients, one image at a time by plain autograd."""
    names, weights = zip(*model.named_parameters())
    losses = [cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(y))]
    squares = [[g**2 for g in torch.autograd.grad(loss, weights)] for loss in losses]
    return {n: torch.stack(s).mean(0) for n, s in zip(names, zip(*squares))}


def training(case):
    return Training(case.model, case.images, case.forget, case.request, Optimisation())


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_the_fisher_diagonal_is_of_single_images_whatever_the_chunk(by_hand, monkeypatch, chunk):
    t = training(by_hand)
    monkeypatch.setattr(gradients, "GRADIENT_NUMBERS", chunk * sum(p.numel() for p in t.model.parameters()))
    found = fisher(t, torch.arange(6))
    for name, value in by_images(by_hand.model, by_hand.images.pixels, by_hand.images.labels).items():
        torch.testing.assert_close(found[name], value)


def test_the_bias_of_the_classifier_in_closed_form(by_hand):
    """The gradient of CE with respect to a logit is p - 1[true]; image 4 has logits (-1, -1, 2)."""
    p = torch.softmax(torch.tensor([-1.0, -1.0, 2.0]), 0)
    found = fisher(training(by_hand), torch.tensor([4]))["2.bias"]
    torch.testing.assert_close(found, (p - torch.tensor([0.0, 0.0, 1.0])) ** 2)


def test_attention_has_single_images_gradients(tiny):
    model = tiny.load()
    t = Training(model, tiny.train, tiny.bees, BaselineRequest((1,), 4), Optimisation())
    rows = torch.arange(3)
    found, expected = fisher(t, rows), by_images(t.model, tiny.train.batch(rows), tiny.train.labels[rows])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)


def test_weights_are_dampened_by_the_rule(by_hand):
    alpha, dampening = 1.2, 0.9
    result = ssd(
        by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SSDSettings(alpha, dampening)
    ).state_dict
    x, y = by_hand.images.pixels, by_hand.images.labels
    whole, lost = by_images(by_hand.model, x, y), by_images(by_hand.model, x[4:], y[4:])
    changed = 0
    for name, weight in by_hand.model.named_parameters():
        chosen = lost[name] > alpha * whole[name]
        expected = torch.where(chosen, weight * (dampening * whole[name] / lost[name]).clamp(max=1), weight)
        torch.testing.assert_close(result[name], expected)
        assert torch.equal(result[name][~chosen], weight[~chosen])
        changed += int((result[name] != weight).sum())
    assert changed


def test_no_weight_matters_more_than_the_inverse_share_of_the_forgotten_images(by_hand):
    """A third is to be forgotten, so nothing is chosen from alpha = 3 on."""
    result = ssd(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SSDSettings(alpha=3.0)).state_dict
    assert all(torch.equal(result[n], p) for n, p in by_hand.model.state_dict().items())


def test_dampening_never_enlarges_and_the_head_stays_where_asked(by_hand):
    settings = SSDSettings(alpha=0.5, dampening=100.0, head=False)
    result = ssd(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings).state_dict
    for name, weight in by_hand.model.state_dict().items():
        assert (result[name].abs() <= weight.abs()).all()
    assert torch.equal(result["2.weight"], by_hand.model[2].weight)
