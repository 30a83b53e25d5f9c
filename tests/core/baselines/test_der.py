"""DER and DER++: two steps of their losses written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.der import DERPlusSettings, DERSettings, der

ZEROS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("of", ["features", "logits"])
def test_der_learns_wrong_labels_and_matches_on_retained_images(one_retained, of):
    """Each image's squared distance is summed over what is matched and averaged over images."""

    def loss(features, logits, features_before, logits_before, model):
        now, then = (features, features_before) if of == "features" else (logits, logits_before)
        moved = (now - then)[:2]
        return cross_entropy(logits[4:], ZEROS) + 0.6 * (moved[0] @ moved[0] + moved[1] @ moved[1]) / 2

    one_retained.check(der, DERSettings, loss, match=0.6, of=of)


def test_der_plus_rehearses_labels_too(one_retained):
    def loss(features, logits, features_before, logits_before, model):
        moved = (features - features_before)[:2].square().sum() / 2
        return cross_entropy(logits[4:], ZEROS) + 0.6 * moved + 0.2 * cross_entropy(logits[:2], ZEROS)

    one_retained.check(der, DERPlusSettings, loss, match=0.6, rehearse=0.2)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    plain, plus = find_method("der"), find_method("der++")
    assert plain.settings().match == plus.settings().match == pytest.approx(48 * 0.01)  # a sum over its batch of 48
    assert (plain.settings().rehearse, plus.settings().rehearse) == (0, 0.5)
    for method in (plain, plus):
        assert method.settings().lr == 1e-4
        assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
