"""The published loop against closed forms, and the head mask, which must change answers only."""

import math

import pytest
import torch
from torch import nn

from gsforget.baselines.base import BaselineRequest, frozen
from gsforget.baselines.head_mask import BIAS, head_mask
from gsforget.baselines.published import (
    PublishedSettings,
    class_means,
    cosine_lr,
    penalty_gradient,
    prototype_distance,
    published_gs_lora,
    published_losses,
)
from gsforget.errors import RequestError
from gsforget.features import features_and_logits, find_classifier
from gsforget.views import Given

BEE = 1


def request(epochs=0, task=0, seed=0, **more):
    return BaselineRequest((BEE,), 4, task=task, epochs=epochs, seed=seed, **more)


def accuracies(model, test):
    with torch.no_grad():
        right = model(test.pixels).argmax(1) == test.labels
    bees = test.labels == BEE
    return [100 * right[m].float().mean().item() for m in (bees, ~bees)]


def test_losses_of_a_model_that_guesses():
    """Equal logits over four classes: CE is ln 4; a feature that is its prototype has distance 0."""
    s = PublishedSettings(pull=0.5)
    features = torch.tensor([[1.0, 2, 3], [0, 1, 0], [4, 4, 4]])
    labels, forget = torch.tensor([0, 1, 2]), torch.tensor([False, True, False])
    losses = published_losses(torch.zeros(3, 4), features, labels, forget, torch.cat([features, features[:1]]), s, 0)
    assert losses.retain.item() == pytest.approx(math.log(4))
    assert losses.ascent.item() == pytest.approx(105 - math.log(4))
    assert losses.push.item() == pytest.approx(18)
    assert losses.pull.item() == pytest.approx(0, abs=1e-6)
    assert losses.total.item() == pytest.approx(math.log(4) + 0.2 * (105 - math.log(4)) + 0.05 * 18, rel=1e-6)


def test_bounds_stop_both_pushes_and_the_mean_is_bounded_not_the_image():
    s = PublishedSettings(bnd=2.0, bnd_pro=0.1)
    logits = torch.tensor(
        [[0.0, 8.0], [0.0, 0.0]], requires_grad=True
    )  # CE of class 0: 8.0003 and ln 2; their mean is > 2
    labels, forget = torch.tensor([0, 0, 1]), torch.tensor([True, True, False])
    retained = torch.zeros(1, 2)
    features = torch.tensor([[0.0, 4.0], [0, 4], [1, 1]])
    losses = published_losses(torch.cat([logits, retained]), features, labels, forget, torch.eye(2), s, 0)
    assert losses.ascent.item() == 0
    assert losses.push.item() == 0
    losses.total.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(("task", "beta"), [(0, 0.2), (1, 0.25), (3, 0.25), (9, 0.25)])
def test_the_weight_of_the_ascent_follows_the_request(task, beta):
    labels, forget = torch.tensor([0, 1]), torch.tensor([False, True])
    s = PublishedSettings(prototypes=False)
    losses = published_losses(torch.zeros(2, 2), torch.zeros(2, 3), labels, forget, torch.empty(0), s, task)
    assert losses.total.item() == pytest.approx(math.log(2) + beta * (105 - math.log(2)))
    assert losses.push.item() == losses.pull.item() == 0


def test_prototype_distance_of_two_features():
    """softmax(ln 3, 0) = (3/4, 1/4) against (1/2, 1/2), in the stated direction, averaged over images only."""
    prototypes, features = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    want = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert prototype_distance(features, prototypes).item() == pytest.approx(want)
    assert prototype_distance(features.expand(5, 2), prototypes.expand(5, 2)).item() == pytest.approx(want)


def test_penalty_gradient_is_autograds_and_zero_at_zero():
    flat = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 2.0], requires_grad=True)
    lengths = [2, 3, 1]
    sum(piece.square().sum().sqrt() for piece in (flat[:2], flat[5:])).backward()
    gradient = penalty_gradient(flat.detach(), lengths)
    torch.testing.assert_close(gradient, flat.grad)
    assert gradient.tolist() == pytest.approx([0.6, 0.8, 0, 0, 0, 1])


def test_class_means_and_a_class_without_images():
    features = torch.tensor([[1.0, 0], [3, 2], [5, 5]])
    assert class_means(features, torch.tensor([0, 0, 2]), 4).tolist() == [[2, 1], [0, 0], [5, 5], [0, 0]]


def test_the_cosine_starts_at_lr_and_ends_at_min_lr():
    s = PublishedSettings()
    assert cosine_lr(0, 20, s) == pytest.approx(1e-2)
    assert cosine_lr(10, 20, s) == pytest.approx((1e-2 + 1e-5) / 2)
    assert cosine_lr(20, 20, s) == pytest.approx(1e-5)
    assert all(cosine_lr(e, 20, s) > cosine_lr(e + 1, 20, s) for e in range(20))


def run(tiny, settings=None, **of_request):
    model = tiny.load()
    result = published_gs_lora(model, tiny.train, tiny.bees, request(**of_request), settings)
    return model, result


def test_without_epochs_nothing_changes(tiny):
    model, result = run(tiny)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in result.state_dict.items())
    assert result.group_names == [f"blocks.{i}.mlp" for i in range(4)]


def test_first_step_is_that_of_the_frozen_model(tiny):
    """With B = 0 and one batch per epoch the first losses are those of the model before, prototypes its class means."""
    size = len(tiny.train.labels)
    _, result = run(tiny, epochs=1, settings=PublishedSettings(batch_size=size, pull=0.3))
    model = tiny.load()
    features, logits = features_and_logits(model, find_classifier(model, tiny.train.pixels[:2]), tiny.train.pixels)
    labels, ce, kl = tiny.train.labels, nn.functional.cross_entropy, torch.softmax
    means = torch.stack([features[labels == k].mean(0) for k in range(4)])
    p, q = kl(means[labels], 1), kl(features, 1)
    distance = (p * (p.log() - q.log())).sum(1)
    first = result.history[0]
    assert first["retain"] == pytest.approx(ce(logits[~tiny.bees], labels[~tiny.bees]).item(), abs=1e-4)
    assert first["ascent"] == pytest.approx(105 - ce(logits[tiny.bees], labels[tiny.bees]).item(), rel=1e-5)
    assert first["push"] == pytest.approx(18 - distance[tiny.bees].mean().item(), rel=1e-5)
    assert first["pull"] == pytest.approx(distance[~tiny.bees].mean().item(), rel=1e-3, abs=1e-5)


def test_factors_start_in_the_published_ranges(tiny):
    """A of the first request as loralib draws it, of later ones with the release's slope; B is zero."""
    from gsforget.baselines.published import _Loop

    for task, factor in ((0, 1.0), (1, math.sqrt(6 / 51)), (2, math.sqrt(6 / 51))):
        model = tiny.load()
        with frozen(model):
            loop = _Loop(model, tiny.train, tiny.bees, request(task=task), PublishedSettings())
            loop._draw_factors()
        for pair in loop.groups.pairs:
            bound = factor / math.sqrt(pair.module.in_features)
            assert 0.9 * bound < pair.a.abs().max() <= bound
            assert not pair.b.any()
        assert loop.scale == 1 / 8
    assert not any(m._forward_hooks for m in model.modules())


def test_it_forgets_and_retains_and_the_merged_weights_are_the_adapted_model(tiny):
    adapted = {}

    def keep(event):
        if event["epoch"] == 7:
            with torch.no_grad():
                adapted["logits"] = model(tiny.test.pixels)

    model = tiny.load()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = published_gs_lora(model, tiny.train, tiny.bees, request(epochs=8), PublishedSettings(batch_size=8), keep)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # the caller's model is as it was
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    merged = tiny.load()
    merged.load_state_dict(result.state_dict)
    forget, retain = accuracies(merged, tiny.test)
    assert forget <= 5
    assert retain >= 80
    with torch.no_grad():
        torch.testing.assert_close(merged(tiny.test.pixels), adapted["logits"], rtol=1e-5, atol=1e-5)
    changed = {k for k, v in result.state_dict.items() if not torch.equal(v, before[k])}
    assert changed == {f"blocks.{i}.mlp.{fc}.weight" for i in range(4) for fc in ("fc1", "fc2")}
    assert min(result.norms) > 1e-3  # the subgradient leaves no exact zeros
    assert result.seconds > 0


def test_a_strong_penalty_shrinks_the_groups(tiny):
    weak, strong = (run(tiny, epochs=4, settings=PublishedSettings(alpha=a))[1] for a in (0.0, 10.0))
    assert sum(strong.norms) < 0.7 * sum(weak.norms)
    assert min(strong.norms) > 0


def test_same_seed_same_weights(tiny):
    first, again, other = (run(tiny, epochs=1, seed=s)[1].state_dict for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_averaged_weights_are_the_result_where_asked_for(tiny):
    """No memory (decay 0) gives the last weights, no change (decay 1) the first averaged ones."""
    last, no_memory, first, short = (
        run(tiny, epochs=3, settings=PublishedSettings(ema_epoch=e, ema_decay=d))[1].state_dict
        for e, d in ((None, 0.9), (0, 0.0), (2, 1.0), (0, 1.0))
    )
    name = "blocks.3.mlp.fc1.weight"
    torch.testing.assert_close(no_memory[name], last[name])
    torch.testing.assert_close(first[name], last[name])
    assert not torch.allclose(short[name], last[name])


def test_images_of_earlier_requests_are_not_retained(tiny):
    """Turning their pixels into NaN would poison the run if one of them were used."""
    poisoned = Given(tiny.train.pixels.clone(), tiny.train.labels)
    poisoned.pixels[tiny.train.labels == 2] = torch.nan
    result = published_gs_lora(tiny.load(), poisoned, tiny.bees, request(epochs=1, erased=(2,)))
    assert all(torch.isfinite(v).all() for v in result.state_dict.values())


def test_a_side_without_images_is_refused(tiny):
    for mask in (torch.zeros_like(tiny.bees), torch.ones_like(tiny.bees)):
        with pytest.raises(RequestError) as caught:
            published_gs_lora(tiny.load(), tiny.train, mask, request(epochs=1))
        assert caught.value.kind == "no_images"


def test_head_mask_changes_the_answers_and_nothing_else(tiny):
    model = tiny.load()
    state = head_mask(model, tiny.train, tiny.bees, request(erased=(3,))).state_dict
    masked = tiny.load()
    masked.load_state_dict(state)
    images = tiny.test.pixels
    features, before = features_and_logits(model, "head", images)
    same, after = features_and_logits(masked, "head", images)
    assert torch.equal(same, features)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, [BEE, 3]] == BIAS).all()
    assert not set(after.argmax(1).tolist()) & {BEE, 3}
    assert accuracies(masked, tiny.test)[0] == 0
    assert [k for k, v in state.items() if not torch.equal(v, model.state_dict()[k])] == ["head.weight", "head.bias"]


def test_head_mask_needs_a_bias():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
    with pytest.raises(RequestError) as caught:
        head_mask(model, Given(torch.rand(4, 3, 2, 2), torch.arange(4)), torch.arange(4) == BEE, request())
    assert caught.value.kind == "no_bias"
