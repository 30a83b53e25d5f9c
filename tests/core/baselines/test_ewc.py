"""EWC: the Fisher information of a linear softmax model has a closed form."""

import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.baselines.base import BaselineRequest
from gsforget.baselines.ewc import EWCSettings, ewc, fisher
from gsforget.baselines.training import Training
from gsforget.views import Given


def test_the_fisher_information_of_a_linear_softmax_is_p_times_one_minus_p_times_x_squared(by_hand):
    """Over many copies of one image; squared means of batches would be near 0 here, as E d log p = 0."""
    pixels = torch.cat([torch.tensor([[1.0, 0.5]]).expand(20000, 2), torch.zeros(1, 2)]).view(-1, 1, 1, 2)
    labels = torch.cat([torch.zeros(20000, dtype=torch.int64), torch.tensor([2])])
    t = Training(
        by_hand.model,
        Given(pixels, labels),
        labels == 2,
        BaselineRequest((2,), 3),
        EWCSettings(head=True, images=20000),
    )
    found = fisher(t)
    p = torch.softmax(torch.tensor([1.0, 0.5, -1.5]), 0)
    want = (p * (1 - p))[:, None] * torch.tensor([1.0, 0.5]).square()
    torch.testing.assert_close(found["2.weight"], want, rtol=0.1, atol=0)
    torch.testing.assert_close(found["2.bias"], p * (1 - p), rtol=0.1, atol=0)


def test_gradients_are_taken_image_by_image_in_chunks_of_any_size(by_hand, monkeypatch):
    """Against one backward pass per image with the labels that were drawn."""
    import gsforget.baselines.gradients as gradients

    def training():
        return Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, EWCSettings(head=True))

    whole = fisher(training())
    monkeypatch.setattr(gradients, "GRADIENT_NUMBERS", 1)
    chances = by_hand.model(by_hand.images.pixels)[:4].softmax(1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0)).flatten()
    want = {n: torch.zeros_like(p) for n, p in by_hand.model.named_parameters()}
    for image, label in zip(by_hand.images.pixels[:4], drawn):
        loss = cross_entropy(by_hand.model(image[None]), label[None])
        for n, g in zip(want, torch.autograd.grad(loss, list(by_hand.model.parameters()))):
            want[n] += g.square() / 4
    for found in (whole, fisher(training())):
        for n in want:
            torch.testing.assert_close(found[n], want[n])


def test_a_few_images_stand_for_many(by_hand):
    """One of four: its own squared gradient, not a quarter of it."""
    settings = EWCSettings(head=True, images=1)
    t = Training(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)
    found = fisher(t)["2.bias"]
    p = by_hand.model(by_hand.images.pixels)[:4].softmax(1).detach()
    possible = [(row - torch.eye(3)[k]).square() for row in p for k in range(3)]
    assert any(torch.allclose(found, one) for one in possible)


def test_the_penalty_draws_back_by_the_fisher_information(one_retained):
    settings = EWCSettings(batch_size=6)
    case = one_retained
    importance = fisher(Training(case.model, case.images, case.forget, case.request, settings))
    assert set(importance) == {"1.weight", "1.bias"}  # the classifier is frozen

    def loss(features, logits, features_before, logits_before, model):
        ce = cross_entropy(logits[[0, 1, 4, 5]], torch.zeros(4, dtype=torch.int64))
        moved = {"1.weight": model[1].weight - torch.eye(2), "1.bias": model[1].bias}
        return ce + 5 * sum((importance[n] * m.square()).sum() for n, m in moved.items())

    case.check(ewc, EWCSettings, loss, strength=5.0)


def test_defaults_are_those_of_the_release_and_trials_make_settings():
    method = find_method("ewc")
    settings = method.settings()
    assert (settings.lr, settings.strength, settings.head) == (1e-4, 3.0, False)
    assert 3 <= len([method.settings(**trial) for trial in method.trials]) <= 7
