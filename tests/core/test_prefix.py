"""Reuse of the frozen prefix: the same logits, the same gradients, few kept tensors, and a clean model afterwards."""

import pytest
import torch
from torch import nn

from gsforget.lora.blocks import as_logits, find_feed_forward
from gsforget.lora.groups import LoRAGroups
from gsforget.prefix import PrefixReuse

PLENTY = 1e9


def prepared(zoo, name: str, group: int):
    """A model whose groups before `group` are retired, the others filled; and the first layer that trains."""
    model = zoo.build(name).requires_grad_(False)
    groups = LoRAGroups(model, find_feed_forward(model, zoo.images(2)), 3, 0)
    groups.flat.copy_(0.2 * torch.randn(len(groups.flat), generator=torch.Generator().manual_seed(3)))
    group %= len(groups)
    groups.retire(range(group))
    return model, groups, groups.blocks[group].linears[0]


def gradients(model, groups, images, output):
    groups.grad.zero_()
    torch.nn.functional.cross_entropy(output, torch.arange(len(images)) % 5).backward()
    return groups.grad.clone()


def own_forwards(model) -> list[str]:
    return [n for n, m in model.named_modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("group", [0, 1, -1])
def test_same_logits_and_gradients(zoo, family, group):
    model, groups, first = prepared(zoo, family, group)
    images = zoo.images(11, seed=5)
    reuse = PrefixReuse.plan(model, first, zoo.images(6), len(images), PLENTY)
    assert reuse is not None
    assert 0 < len(reuse.needed) <= 3
    reuse.fill(len(images), lambda i: images[i], 4)
    for rows in (torch.tensor([7, 0, 10, 3]), torch.tensor([5]), torch.tensor([2, 2, 9])):
        truth = as_logits(model(images[rows]))
        want = gradients(model, groups, rows, truth)
        with reuse.images(rows):
            output = as_logits(model(reuse.blank_input(images, len(rows))))
            got = gradients(model, groups, rows, output)
        torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
        assert want.any()
    assert not own_forwards(model)


def test_frozen_part_does_not_run(zoo):
    model, _, first = prepared(zoo, "vit", -1)
    images = zoo.images(6)
    reuse = PrefixReuse.plan(model, first, images, 6, PLENTY)
    reuse.fill(6, lambda i: images[i], 3)
    ran = []
    watched = [model.patch_embed.proj, model.blocks[0].mlp.fc1, model.blocks[1].attn.qkv, model.blocks[2].attn.qkv]
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in watched]
    with reuse.images(torch.arange(2)):
        model(reuse.blank_input(images, 2))
    assert not ran
    model(images)
    assert ran == watched
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_budget(zoo, name):
    model, _, first = prepared(zoo, name, -1)
    probe = zoo.images(6)
    assert PrefixReuse.plan(model, first, probe, 100, 0) is None

    def kept(plan):
        plan.fill(6, lambda i: probe[i], 6)
        return sum(t.nbytes for t in plan.store.values()) / 6 * 100

    full = PrefixReuse.plan(model, first, probe, 100, PLENTY)
    size = kept(full)
    assert PrefixReuse.plan(model, first, probe, 100, size).needed == full.needed
    less = PrefixReuse.plan(model, first, probe, 100, 0.6 * size)
    assert less is not None
    assert len(less.needed) < len(full.needed)
    assert kept(less) <= 0.6 * size
    with torch.no_grad(), less.images(torch.tensor([4, 1])):
        torch.testing.assert_close(model(less.blank_input(probe, 2)), model_of(model, less, probe[[4, 1]]))
    assert not own_forwards(model)


def model_of(model, reuse, images):
    """What the model says by itself, asked in the middle of an answering context."""
    answering = {f.module: f.module.__dict__.pop("forward") for f in reuse.frozen}
    try:
        return model(images)
    finally:
        for module, forward in answering.items():
            module.forward = forward


def test_model_is_clean_after_an_exception(zoo):
    model, _, first = prepared(zoo, "vit", 1)
    images = zoo.images(6)
    with torch.no_grad():
        truth = model(images)
    reuse = PrefixReuse.plan(model, first, images, 6, PLENTY)
    reuse.fill(6, lambda i: images[i], 3)
    with pytest.raises(IndexError), reuse.images(torch.tensor([99])):
        model(reuse.blank_input(images, 1))
    assert not own_forwards(model)

    def fails(_):
        raise OSError("the image is gone")

    with pytest.raises(OSError, match="gone"):
        reuse.fill(6, fails, 3)
    assert {n for n, m in model.named_modules() if m._forward_pre_hooks} == set()
    assert sum(len(m._forward_hooks) for m in model.modules()) == 4  # the pairs of the two active groups
    with torch.no_grad():
        assert torch.equal(model(images), truth)


def test_forward_of_somebody_else_is_put_back(zoo):
    model, _, first = prepared(zoo, "vit", 1)
    norm, calls = model.blocks[1].norm1, []
    plain = norm.forward

    def theirs(x):
        calls.append(1)
        return plain(x)

    norm.forward = theirs
    images = zoo.images(6)
    reuse = PrefixReuse.plan(model, first, images, 6, PLENTY)
    with reuse.images(torch.arange(2)):
        pass
    assert norm.forward is theirs
    calls.clear()
    model(images)
    assert calls


class Odd(nn.Module):
    """A tower of two blocks whose pieces can be made awkward."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(3 * 64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=kind != "sequence first")
        self.blocks = nn.ModuleList([layer, nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True)])
        self.act = nn.GELU()
        self.up, self.down, self.top = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        image = x
        x = self.embed(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))
        if self.kind == "sequence first":
            x = self.blocks[0](x.transpose(0, 1)).transpose(0, 1)
        else:
            x = self.blocks[0](x)
        if self.kind == "shared activation":
            x = x + self.act(x)
        if self.kind == "in place":
            x += 1.0
            x.mul_(2.0)
        x = x + self.down(self.act(self.up(x)))
        if self.kind == "reads the image":
            x = x * (1 + image.mean((1, 2, 3), keepdim=True)[..., 0])
        return self.top(x.mean(1))


@pytest.mark.parametrize("kind", ["plain", "sequence first", "shared activation", "in place", "reads the image"])
@pytest.mark.parametrize("tokens", [32, 24, 48])
def test_awkward_models_fall_back_or_are_right(kind, tokens):
    torch.manual_seed(0)
    model = Odd(kind).eval().requires_grad_(False)
    images = torch.randn(12, 3, 8 * tokens // 8, 64, generator=torch.Generator().manual_seed(1))
    groups = LoRAGroups(model, find_feed_forward(model, images[:2]), 2, 0)
    assert groups.blocks[-1].linears == ("up", "down")
    groups.flat.copy_(torch.randn(len(groups.flat), generator=torch.Generator().manual_seed(3)))
    groups.retire(range(len(groups) - 1))
    with torch.no_grad():
        truth = model(images)
        reuse = PrefixReuse.plan(model, "up", images[:6], 12, PLENTY)
        assert kind == "sequence first" or (reuse is None) == (kind == "reads the image")
        if reuse:
            reuse.fill(12, lambda i: images[i].clone(), 5)
            rows = torch.tensor([9, 3, 0])
            for _ in range(2):  # what is kept must not be written to
                with reuse.images(rows):
                    torch.testing.assert_close(model(reuse.blank_input(images, 3)), truth[rows], rtol=1e-4, atol=1e-4)
        assert not own_forwards(model)
        torch.testing.assert_close(model(images), truth)
