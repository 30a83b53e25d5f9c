"""FDR: two steps of its loss written out; its distance has no gradient where nothing has moved yet."""

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.fdr import FDRSettings, fdr


def test_it_learns_wrong_labels_and_holds_logits_by_their_distance(one_retained):
    """Not by its square: the pull on an image's logits is a unit vector, however far they are."""

    def loss(features, logits, features_before, logits_before, model):
        ce = cross_entropy(logits[4:], torch.zeros(2, dtype=torch.int64))
        moved = (logits - logits_before)[:2].square().sum(1)
        return ce + (0.9 * moved.sqrt().mean() if moved.detach().all() else 0)

    one_retained.check(fdr, FDRSettings, loss, lr=0.05, match=0.9)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    method = find_method("fdr")
    settings = method.settings()
    assert (settings.lr, settings.match, settings.head) == (1e-3, 40, False)
    assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
