"""Forgetting in models of many makes, each taught the tiny world first: found by structure, not by names of layers."""

import pytest

SIZE = 16


def timm_model(name, **kwargs):
    import timm

    return timm.create_model(name, num_classes=4, **kwargs)


def vit():
    return timm_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2), 16, 3


def deit3():
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm_model("deit3_small_patch16_224", init_values=0.5, **kwargs), 16, 3


def eva02():
    """SwiGLU with two input layers and a norm inside."""
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 4}
    return timm_model("eva02_base_patch14_224", **kwargs), 16, 2


def swin():
    """Four widths, shifted windows."""
    kwargs = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    return timm_model("swin_tiny_patch4_window7_224", **kwargs), 32, 5


def torchvision_vit():
    import torch
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
    )
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model, 16, 3


def huggingface_vit():
    """Its output carries `.logits`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), 16, 3


def own_blocks():
    """A block that somebody wrote: its own names, post-norm, a gate packed in one layer, no attention module of torch's."""
    import torch
    from torch import nn

    class Mixer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, tokens):
            scores = self.q(tokens) @ self.k(tokens).mT / tokens.shape[-1] ** 0.5
            tokens = self.one(tokens + scores.softmax(-1) @ self.v(tokens))
            value, gate = self.widen(tokens).chunk(2, -1)
            return self.two(tokens + self.narrow(value * torch.sigmoid(gate)))

    class Own(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.cut = nn.Conv2d(3, width, 4, 4)
            self.place = nn.Parameter(0.02 * torch.randn(16, width))
            self.stack = nn.ModuleList(Mixer(width) for _ in range(3))
            self.answer = nn.Linear(width, 4)

        def forward(self, images):
            tokens = self.cut(images).flatten(2).mT + self.place
            for block in self.stack:
                tokens = block(tokens)
            return self.answer(tokens.mean(1))

    return Own(), 16, 3


@pytest.mark.parametrize("make", [vit, deit3, eva02, swin, torchvision_vit, huggingface_vit, own_blocks])
def test_any_transformer_forgets(world, teach, make):
    import torch

    from gsforget import forget
    from gsforget.lora.blocks import find_feed_forward

    torch.manual_seed(0)
    model, size, blocks = make()
    accuracy = teach(model, world.data, size)
    assert accuracy > 90, f"{make.__name__} learned only to {accuracy:.1f} %"
    groups = find_feed_forward(model, torch.zeros(2, 3, size, size))
    assert len(groups) == blocks
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    preprocessing = {"input_size": (3, size, size), "mean": (0.5,), "std": (0.5,)}
    outcome = forget(model, world.data, ["bee"], preprocessing=preprocessing, runs=None, device="cpu")
    metrics = outcome.document["metrics"]
    assert outcome.folder is None
    assert outcome.document["artifacts"] == {}
    assert metrics["forget_acc_after"] <= 5, metrics
    assert metrics["retain_acc_after"] >= metrics["retain_acc_before"] - 5, metrics
    assert outcome.passed, outcome.document["gates"]
    active = outcome.document["groups"]["active"]
    allowed = {f"{name}.weight" for g in active for name in groups[g].linears}
    changed = {k for k in before if not torch.equal(before[k], outcome.state[k])}
    assert changed
    assert changed <= allowed
    assert changed == set(outcome.document["changed_tensors"])
    now = model.state_dict()
    assert all(torch.equal(now[k], outcome.state[k]) for k in before), "the module carries the erased weights"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def taught(world):
    from gsforget.folder import load_model

    return load_model(world.model)[0]


PREPROCESSING = {"input_size": (3, 16, 16), "mean": 0.5, "std": [0.5]}


def test_a_module_keeps_its_weights_where_a_gate_is_breached(world, taught):
    import torch

    from gsforget import Settings, Thresholds, forget

    before = {k: v.clone() for k, v in taught.state_dict().items()}
    outcome = forget(
        taught, world.data, 1, preprocessing=PREPROCESSING, settings=Settings(epochs=1, prox=0.001),
        thresholds=Thresholds(max_retain_drop=-100), runs=None, device="cpu",
    )  # fmt: skip
    assert outcome.document["verdict"] == "fail"
    assert outcome.document["classes"] == ["bee"]
    assert all(torch.equal(v, before[k]) for k, v in taught.state_dict().items())


def test_a_module_is_left_as_it_was_when_training_stops(world, taught):
    import torch

    from gsforget import forget

    def stop(event):
        if event["stage"] == "select" and event["step"] == 3:
            raise KeyboardInterrupt

    before = {k: v.clone() for k, v in taught.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        forget(taught, world.data, "bee", preprocessing=PREPROCESSING, runs=None, device="cpu", progress=stop)
    assert all(torch.equal(v, before[k]) for k, v in taught.state_dict().items())
    assert all(p.requires_grad for p in taught.parameters())
    assert not any(m._forward_hooks for m in taught.modules())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"preprocessing": {"mean": (0.5,), "std": (0.5,)}}, "no_preprocessing"),
        ({"preprocessing": {**PREPROCESSING, "img_size": 16}}, "no_preprocessing"),
        ({"preprocessing": {**PREPROCESSING, "mean": (0.5, 0.5)}}, "bad_config"),
        ({"preprocessing": {**PREPROCESSING, "input_size": (3, 32, 32)}}, "model_does_not_run"),
        ({"class_names": ["ant", "bee"]}, "class_names_differ"),
        ({"classes": "beee"}, "unknown_class"),
        ({"shots": 0}, "bad_number"),
        ({"device": "tpu"}, "unknown_device"),
    ],
)
def test_the_python_function_refuses(world, taught, change, kind):
    from gsforget import RequestError, forget

    arguments = {"classes": "bee", "preprocessing": PREPROCESSING, "runs": None, "device": "cpu"} | change
    with pytest.raises(RequestError) as caught:
        forget(taught, world.data, **arguments)
    assert caught.value.kind == kind


def test_a_head_of_another_size_is_refused(world, draw, taught, tmp_path):
    """Three folders for a module of four classes: nothing but the logits can tell."""
    from gsforget import RequestError, forget

    draw(tmp_path / "train", 4, 1, ["ant", "bee", "cat"])
    draw(tmp_path / "test", 4, 2, ["ant", "bee", "cat"])
    with pytest.raises(RequestError) as caught:
        forget(taught, tmp_path, "bee", preprocessing=PREPROCESSING, runs=None, device="cpu")
    assert caught.value.kind == "class_count"
