"""Embedding models: the Face Transformer in its published layout, and timm backbones, each with the head it was taught by.

The forward pass takes images and nothing else, and gives embeddings of length 1.  Released code passes the true label to
the head at evaluation, whose margin then lowers the true identity's logit; here a margin exists in `margin_logits` alone,
which only training calls.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, one_hot, scaled_dot_product_attention

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

FACE_TRANSFORMER = "face-transformer"
HEADS = ("cosface", "arcface", "softmax")
SCALE, MARGINS = 64.0, {"cosface": 0.35, "arcface": 0.5, "softmax": 0.0}  # of the published heads
HEAD_DIM, STRIDE = 64, 8  # of the published Face Transformers; what their checkpoints do not tell


class Head(nn.Linear):
    """One row per training identity: weight [K, d], and a bias [K] with plain softmax."""

    def __init__(self, identities: int, width: int, kind: str = "cosface", scale: float = SCALE):
        if kind not in HEADS:
            raise RequestError(f"There is no head {kind!r}.", f"Type head={' or head='.join(HEADS)}.", "bad_head")
        self.kind, self.scale = kind, scale
        super().__init__(width, identities, bias=kind == "softmax")

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def rows(self) -> Tensor:
        """What answers are products with, [K, d]."""
        return self.weight if self.kind == "softmax" else self.scale * normalize(self.weight)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Answers [B, K] without any margin: s cos θ of embeddings [B, d] of length 1; softmax: W x + b of features."""
        return linear(embeddings, self.rows, self.bias)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Of embeddings [B, d] with each identity's row: [B, K]."""
        return linear(normalize(embeddings), normalize(self.weight))

    def margin_logits(self, features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
        """Logits [B, K] for training with cross-entropy, from features [B, d] before they are normalised.

        CosFace (arXiv 1801.09414): s (cos θ - m) for the true identity; ArcFace (arXiv 1801.07698): s cos(θ + m), and
        s (cos θ - m sin m) beyond θ = π - m; for all others s cos θ.  Softmax: W x + b.
        """
        if self.kind == "softmax":
            return linear(features, self.weight, self.bias)
        m = MARGINS[self.kind] if margin is None else margin
        cosines = self.cosines(features)
        truth = one_hot(labels, cosines.shape[1]).bool()
        if self.kind == "cosface":
            return self.scale * torch.where(truth, cosines - m, cosines)
        angle = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        lowered = torch.where(angle + m < torch.pi, (angle + m).cos(), cosines - m * torch.tensor(m).sin().item())
        return self.scale * torch.where(truth, lowered, cosines)


class FaceModel(nn.Module):
    """Images [B, C, H, W] to embeddings of length 1, [B, d]; `loss` is the head, which this pass does not use."""

    loss: Head

    def features(self, images: Tensor) -> Tensor:
        """Embeddings before they are normalised, [B, d]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.features(images))


class FaceTransformer(FaceModel):
    """The Face Transformer of Zhong and Deng (arXiv 2103.14803) under its published tensor names.

    ``overlap`` is what a patch reads beyond its stride, on all sides together (0, or 4 for P12S8).
    """

    def __init__(
        self,
        identities: int,
        depth: int = 6,
        dim: int = 512,
        heads: int = 8,
        mlp_dim: int = 2048,
        image_size: int = 112,
        patch_size: int = 8,
        channels: int = 3,
        overlap: int = 0,
        head_dim: int = HEAD_DIM,
        head: str = "cosface",
        scale: float = SCALE,
    ):
        super().__init__()
        self.patch, self.overlap = patch_size, overlap
        patches = (image_size // patch_size) ** 2
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim) * 0.02)
        self.patch_to_embedding = nn.Linear(channels * (patch_size + overlap) ** 2, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.transformer = _Transformer(dim, depth, heads, head_dim, mlp_dim)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim))
        self.loss = Head(identities, dim, head, scale)

    def features(self, images: Tensor) -> Tensor:
        x = self.patch_to_embedding(self._patches(images))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])

    def _patches(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, values of a patch]: pixel by pixel, or channel by channel where patches overlap."""
        p = self.patch
        if self.overlap:
            return nn.functional.unfold(images, p + self.overlap, stride=p, padding=self.overlap).transpose(1, 2)
        b, c, h, w = images.shape
        tiles = images.reshape(b, c, h // p, p, w // p, p)
        return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, head_dim: int, mlp_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([_Residual(dim, _Attention(dim, heads, head_dim)), _Residual(dim, _Mlp(dim, mlp_dim))])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer:  # type: ignore[attr-defined]
                x = part(x)
        return x


class _Residual(nn.Module):
    def __init__(self, dim: int, inner: nn.Module):
        super().__init__()
        self.fn = _PreNorm(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class _PreNorm(nn.Module):
    def __init__(self, dim: int, inner: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5  # by the whole width, as published
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        out = scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        # Identities stand where dropout does while the network is trained: the published names count them.
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TimmFace(FaceModel):
    """A timm backbone without its classifier, with an embedding layer or without."""

    def __init__(
        self,
        identities: int,
        name: str,
        embedding_dim: int | None = None,
        head: str = "cosface",
        scale: float = SCALE,
        **kwargs: Any,
    ):
        from gsforget.models import create_timm

        super().__init__()
        self.backbone = create_timm(name, 0, kwargs)
        width = int(self.backbone.num_features)
        self.embedding = nn.Linear(width, embedding_dim) if embedding_dim else nn.Identity()
        self.loss = Head(identities, embedding_dim or width, head, scale)

    def features(self, images: Tensor) -> Tensor:
        return self.embedding(self.backbone(images))


def build(architecture: str, model_kwargs: dict[str, Any], identities: int) -> FaceModel:
    """An untrained embedding model in eval mode.

    Args:
        architecture: ``face-transformer`` or a timm name.
        model_kwargs: of `FaceTransformer`; else of `TimmFace` (``embedding_dim``, ``head``, ``scale``) and of timm.

    Raises:
        RequestError: ``unknown_model``, ``bad_model_kwargs``, ``bad_head``.
    """
    if architecture != FACE_TRANSFORMER:
        return TimmFace(identities, architecture, **model_kwargs).eval()  # type: ignore[return-value]
    try:
        return FaceTransformer(identities, **model_kwargs).eval()  # type: ignore[return-value]
    except TypeError as error:
        raise RequestError(
            f"A Face Transformer cannot be built with {model_kwargs} ({error}).",
            "Check --model-kwargs; with --checkpoint none are needed.",
            "bad_model_kwargs",
        ) from error


def describe(state: dict[str, Tensor], where: Path | str) -> tuple[dict[str, Any], int]:
    """What a published Face Transformer checkpoint says of its model: keyword arguments, and the number of identities.

    Raises:
        RequestError: ``not_published_layout``: the file is not laid out so.
    """
    why = _unlike(state)
    if why:
        raise RequestError(
            f"{where} is not a Face Transformer in its published layout: {why}.",
            "Give a checkpoint with patch_to_embedding, transformer.layers.N, mlp_head and loss.weight, without LoRA "
            "factors; or name a timm backbone: --model NAME.",
            "not_published_layout",
        )
    dim = state["cls_token"].shape[-1]
    depth = 1 + max(int(m[1]) for name in state if (m := re.match(r"transformer\.layers\.(\d+)\.", name)))
    read = state["patch_to_embedding.weight"].shape[1]
    side = round((read / 3) ** 0.5)
    if 3 * side * side != read or side < STRIDE:
        raise RequestError(
            f"{where} reads patches of {read} values, which are not square patches of colour images.",
            "The published models read 8 x 8 or 12 x 12 pixels in three channels.",
            "not_published_layout",
        )
    patches = round((state["pos_embedding"].shape[1] - 1) ** 0.5)
    kwargs = {
        "depth": depth,
        "dim": dim,
        "heads": state["transformer.layers.0.0.fn.fn.to_qkv.weight"].shape[0] // (3 * HEAD_DIM),
        "mlp_dim": state["transformer.layers.0.1.fn.fn.net.0.weight"].shape[0],
        "image_size": STRIDE * patches,
        "patch_size": STRIDE,
        "overlap": side - STRIDE,
        "head": "softmax" if "loss.bias" in state else "cosface",
    }
    return kwargs, len(state["loss.weight"])


def _unlike(state: dict[str, Tensor]) -> str:
    """What keeps a state dict from being a published checkpoint; empty where nothing does."""
    needed = (
        "pos_embedding",
        "cls_token",
        "patch_to_embedding.weight",
        "transformer.layers.0.0.fn.fn.to_qkv.weight",
        "transformer.layers.0.1.fn.fn.net.0.weight",
        "mlp_head.0.weight",
    )
    lora = [name for name in state if "lora_" in name]
    if lora:
        return f"it holds LoRA factors, such as {lora[0]}, and does not say whether they are merged"
    missing = [name for name in needed if name not in state]
    if missing:
        return f"{missing[0]} is missing"
    if "loss.weight" not in state:
        return "loss.weight, the head with a row per identity, is missing"
    return ""
