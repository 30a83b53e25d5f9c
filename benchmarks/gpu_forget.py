"""Part `forget` of `gpu.py`: a whole training step with the kernels and without, and a whole request, kernels warm."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ffn_ways
import numpy as np
import timm
import torch
from gpu_kernels import proximal_adam
from gpu_timing import Setting
from PIL import Image
from torch import Tensor, nn

import gsforget
from gsforget import Settings
from gsforget.folder import ModelConfig, save_model
from gsforget.kernels.group_prox import proximal_adam_step
from gsforget.lora.blocks import find_feed_forward
from gsforget.lora.forms import find_forms
from gsforget.lora.groups import LoRAGroups

MODEL = "vit_base_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
RANK, RATE, STRENGTH = 16, 1e-3, 1e-3


def architecture(setting: Setting) -> tuple[dict, int, int]:
    """Keyword arguments of the model, its image side, and its classes."""
    return (TINY, 32, 6) if setting.tiny else ({}, 224, 100)


def forget(setting: Setting) -> Iterator[tuple[str, Callable[..., dict], tuple]]:
    for autocast in (False, True):
        for batch in (1, 2) if setting.tiny else (1, 50):
            yield f"step/{'autocast' if autocast else 'float32'}/{batch}", measure_step, (batch, autocast)
    yield "erase", measure_erase, ()


def make_model(setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    kwargs, _, classes = architecture(setting)
    return timm.create_model(MODEL, num_classes=classes, **kwargs).eval().requires_grad_(False)


def measure_step(setting: Setting, batch: int, autocast: bool) -> dict:
    """Forward, backward and proximal step of all groups; without the kernels: LoRA by hooks, and the step in eager torch."""
    _, side, classes = architecture(setting)
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=rng).to(setting.device)
    labels = torch.randint(classes, (batch,), generator=rng).to(setting.device)
    ways = {name: training_step(setting, images, labels, name == "ours", autocast) for name in ("ours", "unfused")}
    times = ffn_ways.interleaved(ways, setting.rounds, setting.clock, setting.warm)
    rows = {
        w: {**ffn_ways.summary(times[w]), "peak_bytes": setting.peak_bytes(step), "launches": setting.launches(step)}
        for w, step in ways.items()
    }
    return {"ways": rows}


def training_step(
    setting: Setting, images: Tensor, labels: Tensor, fused: bool, autocast: bool
) -> Callable[[], object]:
    model = make_model(setting).to(setting.device)
    networks = find_feed_forward(model, images[:1])
    forms = find_forms(model, networks, images[:1]) if fused else ()
    assert all(forms), "a network of the model has no known form"
    g = LoRAGroups(model, networks, RANK, 0, forms)
    lengths, moments = g.lengths.to(setting.device), (torch.zeros_like(g.flat), torch.zeros_like(g.flat))
    optimiser = proximal_adam(lengths, g.weights) if fused else None
    rate, strength = (torch.tensor(v, device=setting.device) for v in (RATE, STRENGTH))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        g.grad.zero_()
        with torch.autocast(setting.device, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if optimiser is not None:
            optimiser.step(g.flat, g.grad, g.active, rate, strength)
        else:
            proximal_adam_step(g.flat, g.grad, *moments, lengths, g.weights, g.active, done, RATE, STRENGTH)

    return step


def measure_erase(setting: Setting) -> dict:
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
            outcome = gsforget.forget(
                model, data, wanted, settings=Settings(rank=RANK), device=setting.device, runs=Path(work) / name
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
