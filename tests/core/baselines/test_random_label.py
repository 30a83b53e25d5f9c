"""Random relabelling on a case small enough to reckon by hand."""

from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.random_label import RandomLabelSettings, random_label
from gsforget.baselines.training import Training
from gsforget.views import Given

PLAIN = {"lr": 0.1, "batch_size": 6, "optimiser": "momentum", "momentum": 0.0}


def test_it_descends_on_true_labels_of_retained_images_and_drawn_ones_of_forgotten(by_hand, stepped):
    settings = RandomLabelSettings(**PLAIN)
    result = random_label(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)
    x, y = by_hand.images.pixels, by_hand.images.labels

    def loss(drawn):
        return lambda m: cross_entropy(m(x[:4]), y[:4]) + cross_entropy(m(x[4:]), torch.tensor(drawn))

    possible = [stepped(loss((a, b))) for a in (0, 1) for b in (0, 1)]
    fits = [all(torch.allclose(v, p[n]) for n, v in result.state_dict.items()) for p in possible]
    assert fits.count(True) == 1
    assert torch.equal(by_hand.images.labels, y)


def test_each_image_keeps_its_label_from_pass_to_pass(by_hand, stepped):
    settings = RandomLabelSettings(epochs=2, **PLAIN)
    request = replace(by_hand.request, epochs=2)
    result = random_label(by_hand.model, by_hand.images, by_hand.forget, request, settings)
    x, y = by_hand.images.pixels, by_hand.images.labels
    losses = [
        lambda m, d=d: cross_entropy(m(x[:4]), y[:4]) + cross_entropy(m(x[4:]), torch.tensor(d))
        for d in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    possible = [stepped(loss, loss) for loss in losses]
    assert any(all(torch.allclose(v, p[n]) for n, v in result.state_dict.items()) for p in possible)


def test_labels_are_drawn_evenly_from_retained_classes(by_hand):
    """Class 1 is erased, 2 is to be forgotten, class 4 has three times the images of the others and no more labels."""
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    images = Given(torch.zeros(7, 1, 1, 2), labels)
    request = replace(by_hand.request, erased=(1,), num_classes=5)
    t = Training(by_hand.model, images, labels == 2, request, RandomLabelSettings())
    counts = torch.bincount(t.wrong_labels(6000), minlength=5)
    assert counts[1] == counts[2] == 0
    assert all(abs(counts[k] - 2000) < 200 for k in (0, 3, 4))
