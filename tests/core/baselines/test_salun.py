"""SalUn's mask and steps on a case small enough to reckon by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.salun import SalUnSettings, saliency_mask, salun
from gsforget.baselines.training import Training

PLAIN = {"lr": 0.1, "batch_size": 6, "momentum": 0.0, "weight_decay": 0.0, "cosine": False}


def saliency(case):
    loss = cross_entropy(case.model(case.images.pixels[4:]), case.images.labels[4:])
    return torch.cat([g.abs().flatten() for g in torch.autograd.grad(loss, list(case.model.parameters()))])


def test_the_mask_is_the_half_with_the_largest_gradients(by_hand):
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SalUnSettings())
    chosen = torch.cat([m.flatten() for m in saliency_mask(t, 0.5)])
    size = saliency(by_hand)
    assert chosen.sum() == len(size) // 2
    assert size[chosen].min() >= size[~chosen].max()
    assert torch.cat([m.flatten() for m in saliency_mask(t, 1.0)]).all()


def test_a_weight_that_takes_no_part_in_the_logits_is_never_chosen(by_hand):
    by_hand.model[1].register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SalUnSettings())
    masks = dict(zip([n for n, _ in t.model.named_parameters()], saliency_mask(t, 0.5)))
    assert not masks["1.unused"].any()


def test_gradients_are_summed_before_their_size_is_taken(by_hand):
    """Two forgotten images with opposite gradients matter to no weight, whatever the gradient of either."""
    by_hand.images.pixels[5] = -by_hand.images.pixels[4]
    with torch.no_grad():
        by_hand.model[2].weight.zero_()
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SalUnSettings())
    masks = dict(zip([n for n, _ in t.model.named_parameters()], saliency_mask(t, 3 / 15)))
    assert masks["2.bias"].all()
    assert not masks["2.weight"].any()


def test_a_step_moves_masked_in_weights_alone(by_hand, stepped):
    result = salun(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SalUnSettings(**PLAIN))
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SalUnSettings())
    masks = dict(zip([n for n, _ in t.model.named_parameters()], saliency_mask(t, 0.5)))
    x, y, before = by_hand.images.pixels, by_hand.images.labels, by_hand.model.state_dict()
    possible = [
        stepped(lambda m, d=d: cross_entropy(m(x[:4]), y[:4]) + cross_entropy(m(x[4:]), torch.tensor(d)))
        for d in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    expected = [{n: torch.where(masks[n], p[n], before[n]) for n in p} for p in possible]
    assert any(all(torch.allclose(v, e[n]) for n, v in result.state_dict.items()) for e in expected)


@pytest.mark.parametrize("optimiser", ["momentum", "adamw"])
def test_weight_decay_and_momentum_leave_masked_weights_bit_identical(by_hand, optimiser):
    settings = SalUnSettings(lr=0.1, optimiser=optimiser, weight_decay=0.5, batch_size=2, epochs=5)
    request = replace(by_hand.request, epochs=5)
    result = salun(by_hand.model, by_hand.images, by_hand.forget, request, settings).state_dict
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)
    for (name, before), mask in zip(by_hand.model.named_parameters(), saliency_mask(t, 0.5)):
        assert torch.equal(result[name][~mask], before[~mask])
        assert (result[name][mask] != before[mask]).any() or not mask.any()
