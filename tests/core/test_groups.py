"""LoRA groups: nothing changes at the start, gradients land in the flat buffer, and what is retired is gone."""

import pytest
import torch

from gsforget.lora.blocks import as_logits, find_feed_forward
from gsforget.lora.forms import find_forms
from gsforget.lora.groups import LoRAGroups


@pytest.fixture(params=[False, True], ids=["layers", "whole"])
def fused(request) -> bool:
    """Whether networks of a known form are computed as a whole."""
    return request.param


def attach(zoo, name: str, rank: int = 3, seed: int = 0, fused: bool = False):
    model = zoo.build(name).requires_grad_(False)
    networks = find_feed_forward(model, zoo.images(2))
    forms = find_forms(model, networks, zoo.images(2)) if fused else ()
    return model, LoRAGroups(model, networks, rank, seed, forms)


def logits(model, images):
    return as_logits(model(images))


def fill(groups, scale=0.3):
    groups.flat.copy_(scale * torch.randn(len(groups.flat), generator=torch.Generator().manual_seed(7)))


def test_logits_are_bit_identical_at_the_start(zoo, family, fused):
    images = zoo.images()
    with torch.no_grad():
        before = logits(zoo.build(family), images)
        model, groups = attach(zoo, family, fused=fused)
        assert torch.equal(logits(model, images), before)
        fill(groups)
        assert not torch.allclose(logits(model, images), before, atol=1e-4)
        groups.detach()
        assert torch.equal(logits(model, images), before)


def test_the_table_covers_the_buffer(zoo, family):
    model, groups = attach(zoo, family)
    modules = dict(model.named_modules())
    for group, block in enumerate(groups.blocks):
        sides = [modules[n].weight.shape for n in block.linears]
        assert groups.lengths[group] == sum(min(3, o, i) * (o + i) for o, i in sides)
    assert groups.offsets.tolist() == [0, *groups.lengths.cumsum(0).tolist()[:-1]]
    assert int(groups.lengths.sum()) == len(groups.flat)
    count = len(groups)
    expected = [float(n) ** 0.5 * (count - g) / count for g, n in enumerate(groups.lengths.tolist())]
    assert groups.weights.tolist() == pytest.approx(expected)
    groups.flat.copy_(torch.arange(len(groups.flat)))
    seen = torch.cat([t.flatten() for p in groups.pairs for t in (p.a, p.b)])
    assert torch.equal(seen, groups.flat)  # the pairs are views of the buffer, in the order of the groups


@pytest.mark.parametrize("name", ["vit", "swin", "eva02", "own"])
def test_gradients_equal_autograd_of_merged_weights(zoo, name, fused):
    model, groups = attach(zoo, name, fused=fused)
    fill(groups)
    images, target = zoo.images(), torch.arange(6) % 5

    def loss():
        return torch.nn.functional.cross_entropy(logits(model, images), target)

    groups.grad.zero_()
    loss().backward()
    once = groups.grad.clone()
    loss().backward()
    torch.testing.assert_close(groups.grad, 2 * once)  # gradients add up in place
    groups.detach()
    plain = [t.detach().clone().requires_grad_() for p in groups.pairs for t in (p.a, p.b)]
    merged = {p.parameter: p.module.weight + plain[2 * k + 1] @ plain[2 * k] for k, p in enumerate(groups.pairs)}
    output = as_logits(torch.func.functional_call(model, merged, (images,)))
    torch.nn.functional.cross_entropy(output, target).backward()
    want = torch.cat([t.grad.flatten() for t in plain])
    torch.testing.assert_close(once, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())
    assert once.any()


def test_merged_weights_equal_the_adapter(zoo, family, fused):
    model, groups = attach(zoo, family, fused=fused)
    fill(groups, 0.1)
    images = zoo.images()
    with torch.no_grad():
        adapted = logits(model, images)
        groups.detach()
        for name, pair in groups.named_deltas().items():
            assert name == pair.parameter
            pair.module.weight += pair.delta()
        torch.testing.assert_close(logits(model, images), adapted, rtol=1e-4, atol=1e-4)


def test_retire_takes_a_group_out(zoo):
    model, groups = attach(zoo, "vit")
    fill(groups)
    groups.grad.fill_(1.0)
    groups.retire([0, 2])
    assert groups.active_indices() == [1]
    start, end = int(groups.offsets[1]), int(groups.offsets[1] + groups.lengths[1])
    for buffer in (groups.flat, groups.grad):
        assert buffer[start:end].all()
        assert not buffer[:start].any()
        assert not buffer[end:].any()
    hooked = {n for n, m in model.named_modules() if m._forward_hooks}
    assert hooked == set(groups.blocks[1].linears)
    assert {p.group for p in groups.named_deltas().values()} == {1}
    groups.attach()
    assert all(len(m._forward_hooks) <= 1 for m in model.modules())
    groups.grad.zero_()
    logits(model, zoo.images()).sum().backward()
    assert groups.grad[start:end].any()
    assert not groups.grad[:start].any()
    assert all(p.grad is None for p in model.parameters())
    groups.detach()
    assert not any(m._forward_hooks for m in model.modules())


def test_norms(zoo):
    _, groups = attach(zoo, "swin")
    fill(groups)
    want = [
        sum(t.detach().double().square().sum() for p in groups.pairs if p.group == g for t in (p.a, p.b)).sqrt().item()
        for g in range(len(groups))
    ]
    assert groups.norms().tolist() == pytest.approx(want, rel=1e-6)


def test_rank_is_cut_on_narrow_layers(zoo):
    model, groups = attach(zoo, "swin", rank=20)
    assert [p.a.shape[0] for p in groups.pairs[:4]] == [16, 16, 20, 20]  # the first stage is 16 wide
    with torch.no_grad():
        assert torch.isfinite(logits(model, zoo.images())).all()


def test_factors_follow_the_seed_and_the_stated_range(zoo):
    same, again, other = (attach(zoo, "vit", seed=s)[1] for s in (3, 3, 4))
    assert torch.equal(same.flat, again.flat)
    assert not torch.equal(same.flat, other.flat)
    for pair in same.pairs:
        bound = pair.module.in_features**-0.5
        assert pair.a.abs().max() <= bound
        assert pair.a.abs().max() > 0.8 * bound
        assert not pair.b.any()


def test_half_precision_models_are_adapted_in_their_own_type(zoo):
    model, groups = attach(zoo, "vit")
    model.bfloat16()
    fill(groups)
    assert logits(model, zoo.images().bfloat16()).dtype == torch.bfloat16


def test_only_active_groups_are_computed_as_a_whole(zoo):
    model, groups = attach(zoo, "vit", fused=True)
    fill(groups)
    groups.retire([0, 2])
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == [groups.blocks[1].name]
    assert not any(m._forward_hooks for m in model.modules())
    assert groups.entry(1) == groups.blocks[1].name
    groups.detach()
    assert not any("forward" in m.__dict__ for m in model.modules())
