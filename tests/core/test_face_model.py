"""Heads by their formulas, the Face Transformer by a forward pass written out, and refusals of other layouts."""

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, normalize

from gsforget.errors import RequestError
from gsforget.tasks.face.model import FaceTransformer, Head, build, describe
from gsforget.tasks.face.source import open_source

SMALL = {"depth": 2, "dim": 64, "heads": 1, "mlp_dim": 48, "image_size": 40}


def small(**options):
    torch.manual_seed(0)
    return FaceTransformer(5, **{**SMALL, **options}).eval()


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_margin_heads_by_their_formulas(kind):
    torch.manual_seed(1)
    head = Head(3, 4, kind, scale=10.0)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    angles = (normalize(x) @ normalize(head.weight).T).acos()
    got = head.margin_logits(x, y)
    for i, k in enumerate(y.tolist()):
        theta = angles[i, k].item()
        if kind == "cosface":
            wanted = math.cos(theta) - 0.35
        else:
            wanted = math.cos(theta + 0.5) if theta + 0.5 < math.pi else math.cos(theta) - 0.5 * math.sin(0.5)
        assert got[i, k].item() == pytest.approx(10 * wanted, abs=1e-3)
        other = (k + 1) % 3
        assert got[i, other].item() == pytest.approx(10 * math.cos(angles[i, other].item()), abs=1e-4)


def test_softmax_head_and_unknown_head():
    head = Head(3, 4, "softmax")
    x = torch.randn(2, 4)
    torch.testing.assert_close(head.margin_logits(x, torch.tensor([0, 1])), x @ head.weight.T + head.bias)
    with pytest.raises(RequestError, match="no head"):
        Head(3, 4, "sphereface")


def published(state, images, overlap):
    """The published forward pass from tensors alone: patches, attention scaled by the whole width, class token."""
    b = len(images)
    if overlap:
        x = torch.nn.functional.unfold(images, 8 + overlap, stride=8, padding=overlap).transpose(1, 2)
    else:
        rows = [
            images[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].permute(0, 2, 3, 1).reshape(b, -1)
            for i in range(5)
            for j in range(5)
        ]
        x = torch.stack(rows, 1)
    x = x @ state["patch_to_embedding.weight"].T + state["patch_to_embedding.bias"]
    x = torch.cat([state["cls_token"].expand(b, 1, -1), x], 1) + state["pos_embedding"]
    for n in range(2):
        part = f"transformer.layers.{n}.0.fn."
        y = layer_norm(x, (64,), state[part + "norm.weight"], state[part + "norm.bias"])
        q, k, v = (y @ state[part + "fn.to_qkv.weight"].T).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) * 64**-0.5).softmax(-1)
        x = x + weights @ v @ state[part + "fn.to_out.0.weight"].T + state[part + "fn.to_out.0.bias"]
        part = f"transformer.layers.{n}.1.fn."
        y = layer_norm(x, (64,), state[part + "norm.weight"], state[part + "norm.bias"])
        y = gelu(y @ state[part + "fn.net.0.weight"].T + state[part + "fn.net.0.bias"])
        x = x + y @ state[part + "fn.net.3.weight"].T + state[part + "fn.net.3.bias"]
    x = layer_norm(x[:, 0], (64,), state["mlp_head.0.weight"], state["mlp_head.0.bias"])
    return normalize(x)


@pytest.mark.parametrize("overlap", [0, 4])
def test_the_published_forward_pass(overlap):
    model = small(overlap=overlap)
    images = torch.rand(3, 3, 40, 40)
    with torch.no_grad():
        got = model(images)
        wanted = published(model.state_dict(), images, overlap)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(("depth", "overlap"), [(6, 0), (12, 0), (18, 4)])
def test_published_sizes_are_read_from_the_tensors(depth, overlap):
    with torch.device("meta"):
        state = FaceTransformer(100, depth=depth, overlap=overlap).state_dict()
    kwargs, people = describe(state, "x.pth")
    assert people == 100
    assert kwargs == {
        "depth": depth,
        "dim": 512,
        "heads": 8,
        "mlp_dim": 2048,
        "image_size": 112,
        "patch_size": 8,
        "overlap": overlap,
        "head": "cosface",
    }
    if (depth, overlap) == (6, 0):
        assert sum(t.numel() for t in state.values()) == 19_157_504  # as published


def test_a_published_checkpoint_opens_by_itself(tmp_path):
    model = small()
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "face.pth")
    source = open_source("face-transformer", list("abcde"), tmp_path / "face.pth", {}, {})
    images = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(source.model(images), model(images))
    assert (source.config.task, source.config.mean, source.config.std) == ("face", (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(RequestError, match="5 rows, and 4 people") as caught:
        open_source("face-transformer", list("abcd"), tmp_path / "face.pth", {}, {})
    assert caught.value.kind == "class_count"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("cls_token"), "cls_token is missing"),
        (lambda s: s.pop("loss.weight"), "loss.weight"),
        (lambda s: s.update({"transformer.layers.0.1.fn.fn.net.0.lora_A": torch.ones(1)}), "LoRA"),
    ],
)
def test_other_layouts_are_refused_in_one_sentence(tmp_path, change, said):
    state = small().state_dict()
    change(state)
    torch.save(state, tmp_path / "face.pth")
    with pytest.raises(RequestError, match=said) as caught:
        open_source("face-transformer", list("abcde"), tmp_path / "face.pth", {}, {})
    assert caught.value.kind == "not_published_layout"


def test_a_tensor_too_many_is_refused(tmp_path):
    torch.save({**small().state_dict(), "extra": torch.ones(1)}, tmp_path / "face.pth")
    with pytest.raises(RequestError, match="extra"):
        open_source("face-transformer", list("abcde"), tmp_path / "face.pth", {}, {})


def test_a_timm_backbone_with_an_embedding_layer(tmp_path):
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = build("vit_tiny_patch16_224", {**kwargs, "embedding_dim": 6, "head": "softmax"}, 3)
    torch.save(model.state_dict(), tmp_path / "face.pth")
    source = open_source("vit_tiny_patch16_224", list("abc"), tmp_path / "face.pth", kwargs, {})
    assert source.config.model_kwargs == {**kwargs, "embedding_dim": 6, "head": "softmax"}
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(source.model(images), model(images))
    assert source.model(images).shape == (2, 6)
    with pytest.raises(RequestError, match="not known"):
        open_source("vit_tiny_patch16_224", list("abc"), None, kwargs, {})
