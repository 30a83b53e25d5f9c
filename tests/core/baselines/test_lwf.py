"""LwF: distillation by its numbers, and two steps of its loss written out."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.lwf import LwFSettings, lwf
from gsforget.baselines.training import softened


def test_distillation_of_two_answers():
    """Logits before 2 ln 3 and 0 soften at T = 2 to 3/4 and 1/4; now they are equal."""
    before = torch.tensor([[2 * math.log(3), 0.0]])
    want = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert softened(torch.zeros(1, 2), before, 2.0).item() == pytest.approx(want)
    assert softened(torch.zeros(5, 2), before.expand(5, 2), 2.0).item() == pytest.approx(want)
    assert softened(before + 7, before, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_distillation_pulls_where_the_released_term_does_nothing():
    """The gradient of softened cross entropy is (p - p before) / T."""
    logits = torch.tensor([[3.0, -1, 0.5]], requires_grad=True)
    before = torch.tensor([[0.0, 2, 1]])
    softened(logits, before, 2.0).backward()
    want = ((logits / 2).softmax(1) - (before / 2).softmax(1)).detach() / 2
    torch.testing.assert_close(logits.grad, want)


def test_it_learns_wrong_labels_distils_and_rehearses(one_retained):
    def loss(features, logits, features_before, logits_before, model):
        zeros = torch.zeros(2, dtype=torch.int64)
        p, q = (logits_before[:2] / 3).softmax(1), (logits[:2] / 3).softmax(1)
        kl = (p * (p.log() - q.log())).sum(1).mean()
        return cross_entropy(logits[4:], zeros) + 4 * kl + 0.5 * cross_entropy(logits[:2], zeros)

    one_retained.check(lwf, LwFSettings, loss, distil=4.0, rehearse=0.5, temperature=3.0)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    method = find_method("lwf")
    settings = method.settings()
    assert (settings.lr, settings.distil, settings.rehearse, settings.temperature) == (1e-4, 0.5, 10, 2)
    assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
