"""LIRF's cut, its attention maps and its step, against plain PyTorch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gsforget.baselines.base import BaselineRequest
from gsforget.baselines.inside import BlockTap, find_blocks
from gsforget.baselines.lirf import LIRFSettings, attention, lirf
from gsforget.views import Given

PLAIN = {"lr": 0.1, "batch_size": 6, "epochs": 1, "optimiser": "momentum", "momentum": 0.0, "weight_decay": 0.0}


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 3)

    def forward(self, x):
        return self.embed(x.flatten(2).transpose(1, 2))  # [B, C, H, W] -> [B, positions, C]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x):
        return x + self.mlp(x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.fixture
def small():
    """Four blocks over four positions of three channels; class 2 of three is to be forgotten."""
    torch.manual_seed(0)
    model = nn.Sequential(Patches(), nn.Sequential(*[Block() for _ in range(4)]), Mean(), nn.Linear(3, 3))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    images = Given(torch.randn(6, 3, 2, 2), labels)
    return SimpleNamespace(model=model, images=images, forget=labels == 2, request=BaselineRequest((2,), 3, epochs=1))


def test_blocks_are_the_numbered_modules_around_feed_forward_networks(small, tiny):
    assert find_blocks(small.model, small.images.pixels) == ["1.0", "1.1", "1.2", "1.3"]
    assert find_blocks(tiny.load(), tiny.train.pixels[:2]) == [f"blocks.{i}" for i in range(4)]


def test_attention_in_closed_form():
    tokens = torch.tensor([[[3.0, 0, 0], [0, 2, 0]]])
    torch.testing.assert_close(attention(tokens), torch.tensor([[9.0, 4.0]]) / 97**0.5)
    torch.testing.assert_close(attention(5 * tokens), attention(tokens))


def test_only_the_lower_half_trains(small):
    before = copy.deepcopy(small.model.state_dict())
    result = lirf(small.model, small.images, small.forget, small.request, LIRFSettings(weight_decay=0.5))
    changed = {n.rsplit(".", 1)[0] for n, v in result.state_dict.items() if not torch.equal(v, before[n])}
    assert changed == {"0.embed", *(f"1.{b}.mlp.{i}" for b in (0, 1) for i in (0, 2))}
    assert all(torch.equal(v, before[n]) for n, v in small.model.state_dict().items())
    assert not any(m._forward_hooks for m in small.model.modules())


def test_two_steps_follow_the_published_loss(small):
    """At the original model neither AT nor the KL has a gradient; the second step tells whether they are there."""
    settings = LIRFSettings(**{**PLAIN, "epochs": 2, "cosine": False}, cut="1.0")
    request = BaselineRequest((2,), 3, epochs=2)
    result = lirf(small.model, small.images, small.forget, request, settings)
    x, y = small.images.pixels, small.images.labels
    with torch.no_grad(), BlockTap(small.model, ["1.0"]) as tap:
        taught = torch.softmax(small.model(x[4:])[:, :2] / 10, 1)
    theirs = attention(tap.outputs["1.0"])

    def loss(m, drawn):
        inside = m[1][0](m[0](x[4:]))
        logits = m(x[4:])
        kl = (taught * (taught / torch.softmax(logits[:, :2] / 10, 1)).log()).sum(1).mean()
        away = (attention(inside) - theirs).square().mean()
        wrong = cross_entropy(logits, torch.tensor(drawn))
        return 0.9 * wrong - 300 * away + 10 * 0.1 * 100 * kl + 5 * cross_entropy(m(x[:4]), y[:4])

    def run(first, second):
        m = copy.deepcopy(small.model)
        lower = [*m[0].parameters(), *m[1][0].parameters()]
        for drawn in (first, second):
            for p, g in zip(lower, torch.autograd.grad(loss(m, drawn), lower)):
                p.data -= 0.1 * g
        return m.state_dict()

    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    possible = [run(a, b) for a in pairs for b in pairs]
    fits = [all(torch.allclose(v, p[n], atol=1e-5) for n, v in result.state_dict.items()) for p in possible]
    assert any(fits)
