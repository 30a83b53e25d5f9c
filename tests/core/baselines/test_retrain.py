"""The positive control: nothing of the model before the request reaches the result."""

import copy
from dataclasses import replace

import torch
from torch import nn

from gsforget.baselines import find_method
from gsforget.baselines.retrain import RetrainSettings, retrain
from gsforget.views import Given

SHORT = RetrainSettings(lr=0.05, epochs=40, batch_size=4, steps=0, views=0.0, smoothing=0.0)


def test_the_result_does_not_depend_on_the_weights_that_it_was_given(by_hand):
    first = retrain(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, SHORT)
    other = copy.deepcopy(by_hand.model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3).add_(1)
    again = retrain(other, by_hand.images, by_hand.forget, by_hand.request, SHORT)
    for name, value in first.state_dict.items():
        assert torch.equal(value, again.state_dict[name])


def test_it_learns_the_retained_classes_from_nothing_in_its_own_number_of_passes(by_hand):
    result = retrain(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=1), SHORT)
    assert len(result.history) == 40
    model = copy.deepcopy(by_hand.model)
    model.load_state_dict(result.state_dict)
    with torch.no_grad():
        answers = model(by_hand.images.pixels).argmax(1)
    assert answers[:4].tolist() == [0, 0, 1, 1]
    assert not (answers[4:] == 2).any()


def test_few_images_are_passed_over_more_often(by_hand):
    """Four retained images in batches of two are two steps per pass."""
    settings = replace(SHORT, epochs=1, batch_size=2, steps=7)
    assert len(retrain(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings).history) == 4


def test_forgotten_and_erased_images_are_never_looked_at(by_hand):
    poisoned = Given(by_hand.images.pixels.clone(), by_hand.images.labels)
    poisoned.pixels[2:] = torch.nan
    request = replace(by_hand.request, erased=(1,))
    result = retrain(by_hand.model, poisoned, by_hand.forget, request, SHORT)
    assert all(torch.isfinite(v).all() for v in result.state_dict.values())


def test_views_differ_from_step_to_step_and_the_control_is_marked(by_hand):
    grey = Given(torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), by_hand.images.labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    still, moving = (
        retrain(model, grey, by_hand.forget, by_hand.request, replace(SHORT, epochs=2, views=v)) for v in (0.0, 1.0)
    )
    assert not torch.equal(still.state_dict["1.weight"], moving.state_dict["1.weight"])
    assert find_method("retrain").control == "positive"
