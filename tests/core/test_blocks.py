"""Feed-forward networks are found by structure: exactly these layers, in every family, and never attention or heads."""

import pytest
import timm
import torch
from torch import nn

from gsforget.errors import RequestError
from gsforget.lora.blocks import as_logits, find_feed_forward


def test_exact_names_in_every_family(zoo, family):
    model = zoo.build(family)
    found = find_feed_forward(model, zoo.images(2))
    assert [block.linears for block in found] == zoo.networks(family, model)
    assert all(name.startswith(block.name) for block in found for name in block.linears)
    assert len({block.name for block in found}) == len(found)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size(zoo, batch):
    model = zoo.build("vit")
    assert [b.linears for b in find_feed_forward(model, zoo.images(batch))] == zoo.networks("vit", model)


def test_model_is_left_as_it_was(zoo):
    model = zoo.build("vit")
    model.train()
    model.blocks[1].eval()
    model.patch_embed.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_feed_forward(model, zoo.images(2))
    with pytest.raises(RequestError):
        find_feed_forward(model, zoo.images(2, size=40))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "layers"), [(48, "images of shape"), (8, "images of shape")], ids=["too large", "too small"]
)
def test_wrong_image_size_is_named(zoo, size, layers):
    with pytest.raises(RequestError, match=layers) as caught:
        find_feed_forward(zoo.build("vit"), zoo.images(2, size))
    assert "--img-size" in caught.value.hint


def test_convolutional_network_is_refused():
    with pytest.raises(RequestError, match="No feed-forward network"):
        find_feed_forward(timm.create_model("resnet10t", num_classes=5), torch.randn(2, 3, 64, 64))


def test_a_head_of_two_layers_is_no_feed_forward_network_of_a_block(zoo):
    model = zoo.build("vit")
    expected = zoo.networks("vit", model)
    model.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))  # as wide as what it reads
    assert [b.linears for b in find_feed_forward(model, zoo.images(2))] == expected


def test_two_linear_layers_without_activation_are_none():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.down, self.up, self.top = (
                nn.Linear(48, 16),
                nn.Linear(16, 4),
                nn.Linear(4, 16),
                nn.Linear(16, 5),
            )

        def forward(self, x):
            x = self.embed(x.flatten(1))
            return self.top(x + self.up(self.down(x)))

    with pytest.raises(RequestError, match="No feed-forward network"):
        find_feed_forward(Low(), torch.randn(2, 3, 4, 4))


def test_as_logits():
    logits = torch.ones(2, 3)

    class Output:
        def __init__(self):
            self.logits = logits

    for output in (logits, {"logits": logits}, Output(), (logits, None), [logits]):
        assert as_logits(output) is logits
    for output in (None, {}, (), ("no",)):
        with pytest.raises(RequestError, match="no logits"):
            as_logits(output)
