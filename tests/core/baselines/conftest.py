"""Small cases for baselines: the world's images in memory, and a network that is small enough to reckon by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gsforget.baselines.base import BaselineRequest
from gsforget.folder import load_model
from gsforget.views import Given

BEE = 1


@pytest.fixture(scope="module")
def tiny(world):
    """Images of both splits as the model of the world reads them, and the mask of the bees among the training images."""
    from gsforget.export.device.preprocess import Preprocess

    config = load_model(world.model)[1]
    prepare = Preprocess.from_dict(config.to_json())

    def read(split):
        files = [(p, k) for k, n in enumerate(world.names) for p in sorted((world.data / split / n).iterdir())]
        labels = torch.tensor([k for _, k in files])
        return Given(torch.stack([torch.from_numpy(prepare.load(p)) for p, _ in files]), labels)

    train = read("train")
    return SimpleNamespace(
        config=config, train=train, test=read("test"), bees=train.labels == BEE, load=lambda: load_model(world.model)[0]
    )


@pytest.fixture
def one_retained(by_hand):
    """`by_hand` with class 1 forgotten earlier: rows 0 and 1 are retained, and the wrong label of rows 4 and 5 is 0.

    `check(run, settings class, loss, …)` compares a baseline with two steps of plain gradient descent, the classifier held,
    on loss(features, logits, features before, logits before, model); before the second step something has moved.
    """

    def parts(model):
        features = model[:-1](by_hand.images.pixels)
        return features, model[-1](features)

    def descend(loss, lr, steps=2):
        model = copy.deepcopy(by_hand.model)
        before = [piece.detach() for piece in parts(model)]
        trained = list(model[1].parameters())
        for _ in range(steps):
            gradients = torch.autograd.grad(loss(*parts(model), *before, model), trained)
            with torch.no_grad():
                for weight, gradient in zip(trained, gradients):
                    weight -= lr * gradient
        return model.state_dict()

    def check(run, settings, loss, lr=0.1, **numbers):
        plain = {"batch_size": 6, "optimiser": "momentum", "momentum": 0.0, "weight_decay": 0.0, "cosine": False}
        result = run(by_hand.model, by_hand.images, by_hand.forget, request, settings(lr=lr, **plain, **numbers))
        for name, value in descend(loss, lr).items():
            torch.testing.assert_close(result.state_dict[name], value)
        assert len(result.history) == 2

    request = replace(by_hand.request, erased=(1,), epochs=2)
    return SimpleNamespace(**{**vars(by_hand), "request": request}, check=check)


@pytest.fixture
def by_hand():
    """Six images of one pixel row, three classes, a linear classifier over two features with known weights.

    Class 2 is to be forgotten.  `images`, `forget`, `request`, `model`.
    """
    pixels = torch.tensor([[2.0, 0], [1, 0], [0, 2], [0, 1], [-1, -1], [-2, -2]]).view(6, 1, 1, 2)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        model[2].bias.zero_()
    request = BaselineRequest((2,), 3, epochs=1)
    return SimpleNamespace(images=Given(pixels, labels), forget=labels == 2, request=request, model=model)


@pytest.fixture
def stepped(by_hand):
    """The case's weights after plain gradient descent along some losses, each a function of a model."""

    def descend(*losses, lr=0.1, model=None):
        model = copy.deepcopy(model or by_hand.model)
        weights = list(model.parameters())
        for loss in losses:
            gradients = torch.autograd.grad(loss(model), weights)
            with torch.no_grad():
                for w, g in zip(weights, gradients):
                    w -= lr * g
        return model.state_dict()

    return descend
