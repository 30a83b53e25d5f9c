"""Part `forget` of `gpu.py`: a training step and a whole request, with the kernels and without, kernels warm."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import ffn_ways
import numpy as np
import timm
import torch
from gpu_kernels import proximal_adam
from gpu_timing import Setting
from PIL import Image
from torch import Tensor, nn

import gsforget
from gsforget import Settings, training
from gsforget.folder import ModelConfig, save_model
from gsforget.graphs import Graphs
from gsforget.kernels import backend
from gsforget.kernels.group_prox import proximal_adam_step
from gsforget.lora.blocks import find_feed_forward
from gsforget.lora.forms import find_forms
from gsforget.lora.groups import LoRAGroups

MODEL = "vit_base_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
RANK, RATE, STRENGTH = 16, 1e-3, 1e-3
AGREES, AGREES_AUTOCAST = 1e-3, 0.1  # relative, of the first gradient from that of the unfused step


def architecture(setting: Setting) -> tuple[dict, int, int]:
    """Keyword arguments of the model, its image side, and its classes."""
    return (TINY, 32, 6) if setting.tiny else ({}, 224, 100)


def forget(setting: Setting) -> Iterator[tuple[str, Callable[..., dict], tuple]]:
    for autocast in (False, True):
        for batch in (1, 2) if setting.tiny else (1, 50):
            yield f"step/{'autocast' if autocast else 'float32'}/{batch}", measure_step, (batch, autocast)
    for way, fused, autocast in (("ours", True, False), ("ours_bfloat16", True, True), ("unfused", False, False)):
        yield f"erase/{way}", measure_erase, (fused, autocast)


def make_model(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    kwargs, _, classes = architecture(setting)
    return timm.create_model(MODEL, num_classes=classes, **kwargs).eval().requires_grad_(False)


def measure_step(setting: Setting, batch: int, autocast: bool) -> dict:
    """Forward, backward and proximal step of all groups; without the kernels: LoRA by hooks, and the step in eager torch.

    "ours" replays CUDA graphs as `gsforget forget` does at such batches; `graphs_off` says why where it does not.
    """
    _, side, classes = architecture(setting)
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=rng).to(setting.device)
    labels = torch.randint(classes, (batch,), generator=rng).to(setting.device)
    ways = {
        "ours": TrainingStep(setting, images, labels, autocast, captured=True),
        "ours_eager": TrainingStep(setting, images, labels, autocast),
        "unfused": TrainingStep(setting, images, labels, autocast, fused=False),
    }
    wanted = ways["unfused"].gradient()
    apart = {w: ((step.gradient() - wanted).norm() / wanted.norm()).item() for w, step in ways.items()}
    times = ffn_ways.interleaved(ways, setting.rounds, setting.clock, setting.warm)
    rows = {
        w: {
            **ffn_ways.summary(times[w]),
            "agrees": apart[w] <= (AGREES_AUTOCAST if autocast else AGREES),
            "gradient_apart": float(f"{apart[w]:.1e}"),
            "peak_bytes": setting.peak_bytes(step),
            "launches": setting.launches(step),
        }
        for w, step in ways.items()
    }
    return {"ways": rows, "graphs_off": ways["ours"].graphs.off}


class TrainingStep:
    """A step on images [B, 3, H, W] and labels [B]; without `fused`, on plain torch.

    Attributes:
        graphs: what is captured; nothing where it was not asked for or cannot be.
    """

    def __init__(
        self,
        setting: Setting,
        images: Tensor,
        labels: Tensor,
        autocast: bool,
        fused: bool = True,
        captured: bool = False,
    ):
        self.images, self.labels, self.fused = images, labels, fused
        self.model = make_model(setting).to(setting.device)
        networks = find_feed_forward(self.model, images[:1])
        forms = find_forms(self.model, networks, images[:1]) if fused else ()
        assert all(forms), "a network of the model has no known form"
        self.groups = g = LoRAGroups(self.model, networks, RANK, 0, forms)
        rng = torch.Generator().manual_seed(1)
        for pair in g.pairs:  # no factor is zero, so that every gradient counts
            pair.b.data.copy_(0.01 * torch.randn(pair.b.shape, generator=rng))
        self.lengths, self.moments = g.lengths.to(setting.device), (torch.zeros_like(g.flat), torch.zeros_like(g.flat))
        self.optimiser = proximal_adam(self.lengths, g.weights)
        self.graphs = Graphs.on(torch.device(setting.device), captured, self.optimiser.on_device)
        self.rate, self.strength = (
            torch.tensor(v, dtype=torch.float64, device=setting.device) for v in (RATE, STRENGTH)
        )
        self.precision = functools.partial(
            torch.autocast, setting.device, torch.bfloat16, enabled=autocast, cache_enabled=False
        )  # a graph holds no casts made before it
        self.leaves = [factor for pair in g.pairs for factor in (pair.a, pair.b)]
        self.done = 0

    def read(self, images: Tensor) -> list[Tensor]:
        with self.precision():
            return [self.model(images)]

    def advance(self) -> None:
        g, self.done = self.groups, self.done + 1
        if self.fused:
            self.optimiser.step(g.flat, g.grad, g.active, self.rate, self.strength)
        else:
            proximal_adam_step(
                g.flat, g.grad, *self.moments, self.lengths, g.weights, g.active, self.done, RATE, STRENGTH
            )

    def gradient(self) -> Tensor:
        """Of all factors, in the buffer that the next call overwrites."""
        self.groups.grad.zero_()
        (outputs,) = self.graphs.network("step", self.read, self.images, self.leaves)
        nn.functional.cross_entropy(outputs.float(), self.labels).backward()
        return self.groups.grad

    def __call__(self) -> None:
        self.gradient()
        self.graphs.work("step", self.advance, [self.groups.flat, *self.optimiser.state])


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Whole runs without the kernels: LoRA by hooks, one layer at a time, the step in eager torch, no CUDA graphs."""
    with (
        mock.patch.dict(os.environ, {backend.VARIABLE: "torch"}),
        mock.patch.object(training, "find_forms", return_value=()),
    ):
        yield


def measure_erase(setting: Setting, fused: bool, autocast: bool) -> dict:
    """A fifth of the classes from a model with random weights, evidence and files included; the second of two such runs.

    Every class is a pattern of its own with noise, and the classifier is fitted to the random features by least squares,
    so that there is something to forget.
    """
    classes = architecture(setting)[2]
    wanted = list(range(0, classes, 5))
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        pictures = make_images(setting, data)
        model = Path(work) / "model"
        make_folder(setting, model, pictures)
        found = {}
        for name in ("cold", "warm"):
            with contextlib.nullcontext() if fused else plain_torch():
                outcome = gsforget.forget(
                    model,
                    data,
                    wanted,
                    settings=settings_of(setting, autocast),
                    device=setting.device,
                    runs=Path(work) / name,
                )
            document = outcome.document
            found[name] = {
                "seconds": document["seconds"],
                "verdict": document["verdict"],
                "steps": outcome.metrics["chosen"]["steps"],
                "active": len(document["groups"]["active"]),
                **document["metrics"],
            }
    return {"classes": classes, "forgotten": len(wanted), "images": sum(map(len, pictures.values())), **found}


def settings_of(setting: Setting, autocast: bool) -> Settings:
    """Those of a user; when tiny, a single pass over the images."""
    return Settings(rank=4, epochs=1.0, autocast=autocast) if setting.tiny else Settings(rank=RANK, autocast=autocast)


def make_images(setting: Setting, data: Path) -> dict[int, list[np.ndarray]]:
    """1,000 PNG files, eight of ten for training; the training images by class, uint8 [H, W, 3]."""
    _, side, classes = architecture(setting)
    rng = np.random.default_rng(0)
    kept: dict[int, list[np.ndarray]] = {}
    for k in range(classes):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pattern = np.asarray(coarse.resize((side, side), Image.Resampling.NEAREST)).astype(np.float32)
        for i in range(10):
            pixels = np.clip(pattern + 16 * rng.standard_normal(pattern.shape), 0, 255).astype(np.uint8)
            folder = data / ("train" if i < 8 else "test") / f"class-{k:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            kept.setdefault(k, []).append(pixels)
    return kept


@torch.no_grad()
def make_folder(setting: Setting, folder: Path, pictures: dict[int, list[np.ndarray]]) -> None:
    """The model with a classifier that is right on its training images."""
    kwargs, side, classes = architecture(setting)
    model = make_model(setting).to(setting.device)
    rows = [(k, pixels) for k, mine in pictures.items() for pixels in mine[:8]]
    pixels = torch.from_numpy(np.stack([p for _, p in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
    features = torch.cat([model.forward_head(model.forward_features(x.to(setting.device)), pre_logits=True).cpu().double()
                          for x in pixels.split(100)])  # fmt: skip
    targets = nn.functional.one_hot(torch.tensor([k for k, _ in rows]), classes).double() - 1 / classes
    mean = features.mean(0)
    centred = features - mean
    gram = centred.T @ centred
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = 10 * torch.linalg.solve(gram, centred.T @ targets).T
    model.head.weight.copy_(weight)
    model.head.bias.copy_(-(weight @ mean))
    names = [f"class-{k:03d}" for k in range(classes)]
    config = ModelConfig(MODEL, kwargs, names, (3, side, side), (0.5,) * 3, (0.5,) * 3)
    folder.mkdir()
    save_model({k: v.cpu() for k, v in model.state_dict().items()}, config, folder)
