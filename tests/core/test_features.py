"""Penultimate features are what the classifier reads, whatever the model is called inside."""

import pytest
import torch
from torch import nn

from gsforget.errors import RequestError
from gsforget.features import FeatureTap, features_and_logits, find_classifier


class Odd(nn.Module):
    """The classifier is neither last in the module list nor called `head`."""

    def __init__(self):
        super().__init__()
        self.zap = nn.Linear(5, 3)
        self.body = nn.Linear(12, 5)

    def forward(self, x):
        return self.zap(self.body(x.flatten(1)).relu())


def test_features_times_weights_are_the_logits():
    torch.manual_seed(0)
    model, images = Odd().eval(), torch.randn(4, 3, 2, 2)
    assert find_classifier(model, images) == "zap"
    features, logits = features_and_logits(model, "zap", images)
    torch.testing.assert_close(features @ model.zap.weight.T + model.zap.bias, logits)


def test_the_tap_keeps_gradients_and_leaves_nothing_behind():
    model, images = Odd().eval(), torch.randn(2, 3, 2, 2)
    with FeatureTap(model, "zap") as tap:
        model(images)
    tap.features.sum().backward()
    assert model.body.weight.grad is not None
    assert not model.zap._forward_pre_hooks


def test_a_model_that_ends_in_softmax_has_no_classifier():
    with pytest.raises(RequestError) as caught:
        find_classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(1)), torch.randn(2, 3, 2, 2))
    assert caught.value.kind == "no_classifier"
