"""FG-OrIU's subspaces and projections in closed form, and its step on a small transformer."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from gsforget.baselines.base import BaselineRequest
from gsforget.baselines.fg_oriu import FGOrIUSettings, LowRank, fg_oriu, projected, subspace
from gsforget.baselines.inside import BlockTap
from gsforget.views import Given

E = torch.eye(4)


def test_a_subspace_holds_the_directions_with_most_energy():
    """Squared eigenvalues of the Gram matrix are 81^2, 4^2 and 1: the first holds 99.7 %, two of them 99.98 %."""
    features = torch.stack([9 * E[0], 2 * E[1], E[2]])
    torch.testing.assert_close(subspace(features, 0.99).abs(), E[:, :1])
    torch.testing.assert_close(subspace(features, 0.9995).abs(), E[:, :2])
    torch.testing.assert_close(subspace(features, 0.99999).abs(), E[:, :3])


def test_subspaces_are_those_of_the_singular_value_decomposition():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    _, values, right = torch.linalg.svd(features, full_matrices=False)
    held = (values**4).cumsum(0) / (values**4).sum()
    count = int((held < 0.9).sum()) + 1
    found = subspace(features, 0.9)
    torch.testing.assert_close(found @ found.T, right[:count].T @ right[:count])
    torch.testing.assert_close(found.T @ found, torch.eye(count))


def test_projection_in_closed_form():
    """Direction 0 is forgotten alone, 1 shared, 2 retained alone, 3 neither's."""
    forget, retain = E[:, :2], E[:, 1:3]
    rows = torch.ones(2, 4)
    torch.testing.assert_close(projected(rows, forget, retain), torch.tensor([[2.0, 1.0, 0.0, 1.0]] * 2))


def test_low_rank_starts_at_the_weight_and_is_scaled():
    weight = torch.randn(5, 3)
    pair = LowRank(weight, FGOrIUSettings(rank=2, lora_alpha=3.0), torch.Generator().manual_seed(0))
    assert torch.equal(pair(weight), weight)
    with torch.no_grad():
        pair.b.fill_(1)
    torch.testing.assert_close(pair(weight), weight + 1.5 * pair.a.sum(0))


@pytest.fixture(scope="module")
def case(tiny):
    """12 images of the world and its model of four blocks."""
    rows = torch.cat([torch.nonzero(tiny.train.labels == k).flatten()[:3] for k in range(4)])
    images = Given(tiny.train.pixels[rows], tiny.train.labels[rows])
    return tiny.load(), images, images.labels == 1


def run(case, epochs=1, **changes):
    model, images, forget = case
    settings = FGOrIUSettings(epochs=epochs, batch_size=9, **changes)
    return fg_oriu(model, images, forget, BaselineRequest((1,), 4, epochs=epochs), settings)


def test_feed_forward_weights_alone_change_by_a_low_rank_and_the_model_is_left_alone(case):
    model, before = case[0], copy.deepcopy(case[0].state_dict())
    result = run(case, epochs=3, rank=2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert set(result.state_dict) == set(before)
    changed = {n for n, v in result.state_dict.items() if not torch.equal(v, before[n])}
    assert changed == {f"blocks.{i}.mlp.{fc}.weight" for i in range(4) for fc in ("fc1", "fc2")}
    for name in changed:
        values = torch.linalg.svdvals((result.state_dict[name] - before[name]).double())
        assert values[2] < 1e-4 * values[0]


def test_a_step_against_plain_autograd(case):
    """Plain descent from B = 0: only B of the last layer moves by its projected gradient, and B of the first by its own."""
    model, images, forget = case
    lr = 0.5
    plain = {"optimiser": "momentum", "momentum": 0.0, "weight_decay": 0.0, "cosine": False, "lr": lr, "clip": 1e9}
    result = run(case, last_only=False, push=0.3, keep=0.2, replay=0.7, **plain).state_dict
    names = [f"blocks.{i}" for i in range(4)]
    weights = {n: p for n, p in model.named_parameters() if ".mlp.fc" in n and n.endswith("weight")}
    with BlockTap(model, names) as tap:
        logits = model(images.pixels)
        tokens = {n: o[:, 0] for n, o in tap.outputs.items()}
    sides = [{n: subspace(f.detach()[m], 0.99) for n, f in tokens.items()} for m in (forget, ~forget)]
    loss = 0.7 * cross_entropy(logits[~forget], images.labels[~forget])
    for n, f in tokens.items():
        f = normalize(f, dim=1)
        loss = loss + 0.3 * torch.linalg.svdvals(f[forget] @ sides[0][n]).sum()
        inside = f[~forget]
        loss = loss + 0.2 * (inside - inside @ sides[1][n] @ sides[1][n].T).square().sum().sqrt()
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    rng = torch.Generator().manual_seed(0)
    for n, weight in weights.items():  # in the order in which factors are drawn
        a = LowRank(weight, FGOrIUSettings(), rng).a.detach()
        step = gradients[n] @ a.T / 8
        if "fc2" in n:
            block = n.split(".mlp")[0]
            step = projected(step.T, sides[0][block], sides[1][block]).T
        expected = weight - lr * step @ a / 8
        torch.testing.assert_close(result[n], expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(result[n], weight)


def test_the_push_empties_the_subspace_of_forgotten_features(case):
    model, images, forget = case
    after = copy.deepcopy(model)
    after.load_state_dict(run(case, epochs=40, push=1.0, replay=1.0).state_dict)

    def tokens(m):
        with torch.no_grad(), BlockTap(m, ["blocks.3"]) as tap:
            m(images.pixels)
        return tap.outputs["blocks.3"][:, 0]

    space = subspace(tokens(model)[forget], 0.99)
    before, now = (torch.linalg.svdvals(normalize(tokens(m)[forget], dim=1) @ space).sum() for m in (model, after))
    assert now < 0.7 * before
