"""Forms of feed-forward networks: known ones are recognised whatever they are called, others are left alone."""

import pytest
import timm
import torch
from torch import nn

from gsforget.lora.blocks import FeedForward, find_feed_forward
from gsforget.lora.forms import find_forms


def forms_of(model, images):
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return find_forms(model, find_feed_forward(model, images), images)


@pytest.mark.parametrize(
    ("name", "options", "activation", "firsts"),
    [
        ("vit_tiny_patch16_224", {}, "gelu", [("fc1", None)]),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "quick_gelu", [("fc1", None)]),
        ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, "gelu_tanh", [("fc1", None)]),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "relu", [("fc1", None)]),
        ("eva02_tiny_patch14_224", {}, "silu", [("fc1", 0), ("fc1", 1)]),
        ("vit_giant_patch14_reg4_dinov2", {"embed_dim": 48, "num_heads": 2}, "silu", [("fc1", 0), ("fc1", 1)]),
    ],
)
def test_forms_of_timm(name, options, activation, firsts):
    size = 28 if "14" in name else 32
    model = timm.create_model(name, num_classes=3, img_size=size, depth=2, **options)
    forms = forms_of(model, torch.randn(2, 3, size, size))
    assert [f and f.activation for f in forms] == [activation] * 2
    for k, form in enumerate(forms):
        assert form.module == f"blocks.{k}.mlp"
        assert form.firsts == tuple((f"blocks.{k}.mlp.{name}", half) for name, half in firsts)
        assert form.last == f"blocks.{k}.mlp.fc2"


class Block(nn.Module):
    """A user's own block: what happens between and around the layers is up to `how`."""

    def __init__(self, how: str):
        super().__init__()
        self.up, self.down, self.norm, self.how = nn.Linear(6, 12), nn.Linear(12, 6), nn.LayerNorm(12), how

    def forward(self, x, scale=1.0):
        h = torch.nn.functional.gelu(self.up(x))
        if self.how == "norm":
            h = self.norm(h)
        y = scale * self.down(h)
        return y + x if self.how == "residual" else (y, h) if self.how == "tuple" else y


class Model(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.block, self.head = Block(how), nn.Linear(6, 3)

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 2)
        for _ in range(2 if self.block.how == "twice" else 1):
            out = self.block(x, scale=1.0) if self.block.how == "options" else self.block(x)
            out = out[0] if isinstance(out, tuple) else out
        return self.head(x + out)


@pytest.mark.parametrize(
    ("how", "known"),
    [("plain", True), ("norm", False), ("residual", False), ("tuple", False), ("options", False), ("twice", False)],
)
def test_forms_of_a_users_own_block(how, known):
    torch.manual_seed(0)
    blocks = [FeedForward("block", ("block.up", "block.down"))]
    form = find_forms(Model(how).eval(), blocks, torch.randn(4, 3, 8, 8))[0]
    assert (form is not None) == known


class Gated(nn.Module):
    """Two first layers; the second one is activated."""

    def __init__(self):
        super().__init__()
        self.value, self.gate, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(self.value(x) * torch.nn.functional.silu(self.gate(x)))


def test_two_first_layers_in_whatever_order():
    torch.manual_seed(0)
    model = Model("plain").eval()
    model.block = Gated()
    model.block.how = "plain"
    blocks = [FeedForward("block", ("block.value", "block.gate", "block.down"))]
    form = find_forms(model, blocks, torch.randn(4, 3, 8, 8))[0]
    assert form.activation == "silu"
    assert form.firsts == (("block.gate", None), ("block.value", None))


def test_layers_with_hooks_of_their_own_are_called_as_they_are():
    model = Model("plain").eval()
    model.block.up.register_forward_hook(lambda _m, _i, output: output + 0)
    blocks = [FeedForward("block", ("block.up", "block.down"))]
    assert find_forms(model, blocks, torch.randn(4, 3, 8, 8)) == [None]


def test_a_forward_that_somebody_has_put_on_a_module_stays():
    model = Model("plain").eval()
    model.block.forward = model.block.forward
    blocks = [FeedForward("block", ("block.up", "block.down"))]
    assert find_forms(model, blocks, torch.randn(4, 3, 8, 8)) == [None]


def test_layers_with_no_module_of_their_own_are_left_alone():
    """Hugging Face's layers lie in two modules, and the second one adds the residual."""
    model = Model("plain").eval()
    assert find_forms(model, [FeedForward("nowhere", ("block.up", "block.down"))], torch.randn(4, 3, 8, 8)) == [None]
