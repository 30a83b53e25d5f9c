"""L2 on a case small enough to reckon by hand: two steps of descent on its loss, written out."""

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.l2 import l2
from gsforget.baselines.relabelling import Anchored


def test_it_learns_wrong_labels_rehearses_and_is_drawn_back(one_retained):
    def loss(features, logits, features_before, logits_before, model):
        ce = cross_entropy(logits[[0, 1, 4, 5]], torch.zeros(4, dtype=torch.int64))
        layer = model[1]  # the identity and zeros at the start
        return ce + 0.7 * ((layer.weight - torch.eye(2)).square().sum() + layer.bias.square().sum())

    one_retained.check(l2, Anchored, loss, strength=0.7)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    method = find_method("l2")
    settings = method.settings()
    assert (settings.lr, settings.strength, settings.batch_size, settings.epochs) == (1e-4, 0.05, 48, 100)
    assert not settings.head
    assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
