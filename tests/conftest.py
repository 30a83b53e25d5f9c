"""A tiny world that every room may use: an image folder of four classes and a ViT that has learned it in seconds."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# The networks here are so small that more threads only wait for each other; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a machine with a GPU the tests are those of a machine without: `benchmarks/gpu.py --part tests` is for the other.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Triton settles at its first import whether it interprets, and torch may import it on any test's behalf: so it is done
# here, before all of them.  What is compiled is compiled in processes of its own, which do not inherit the variable.
os.environ["TRITON_INTERPRET"] = "1"
import triton

triton.knobs.runtime.interpret = True  # for kernels that are imported later, when the variable is gone
del os.environ["TRITON_INTERPRET"]

NAMES = ["ant", "bee", "cat", "dog"]
ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@dataclass(frozen=True)
class World:
    """Session-wide and read-only: tests that change something copy it first.

    Attributes:
        data: image folder, 24 training and 20 test images per class, PNG of 16 x 16.
        model: model folder of a ViT that is right on more than 95 % of the test images.
        checkpoint: the same weights as safetensors; `pt`: as a torch file.
    """

    data: Path
    model: Path
    checkpoint: Path
    pt: Path
    names: tuple[str, ...] = tuple(NAMES)
    architecture: str = ARCHITECTURE
    model_kwargs: str = ",".join(f"{k}={v}" for k, v in KWARGS.items())


def draw_images(folder: Path, count: int, seed: int, names=NAMES, size: int = 16) -> None:
    """Write `count` images per class under folder/<class>: stripes of the class's colour and direction, and noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    directions = (rows, columns, rows + columns, rows // 4 + columns // 4)
    colours = ((220, 60, 60), (60, 200, 60), (60, 60, 220), (200, 200, 60))
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            stripes = ((directions[k % 4] + rng.integers(4)) // 2) % 2
            picture = stripes[..., None] * np.array(colours[k % 4]) + rng.normal(40, 25, (size, size, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:03d}.png")


def read_split(data: Path, split: str, names=NAMES, size: int = 16):
    """Images, float32 [N, 3, size, size] scaled to -1..1, and labels of one split."""
    import numpy as np
    import torch
    from PIL import Image

    images, labels = [], []
    for k, name in enumerate(names):
        for path in sorted((data / split / name).iterdir()):
            images.append(np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
            labels.append(k)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1, torch.tensor(labels)


def train(model, data: Path, size: int = 16, steps: int = 60, lr: float = 2e-3, names=NAMES) -> float:
    """Train a model on the data folder, full batch; returns its test accuracy in percent."""
    import torch

    from gsforget.lora.blocks import as_logits

    images, labels = read_split(data, "train", names, size)
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(as_logits(model(images)), labels).backward()
        optimiser.step()
    model.eval()
    images, labels = read_split(data, "test", names, size)
    with torch.no_grad():
        return 100 * (as_logits(model(images)).argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    import timm
    import torch
    from safetensors.torch import save_file

    from gsforget.folder import ModelConfig, save_model

    root = tmp_path_factory.mktemp("world")
    draw_images(root / "data" / "train", 24, seed=1)
    draw_images(root / "data" / "test", 20, seed=2)
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=len(NAMES), **KWARGS)
    accuracy = train(model, root / "data")
    assert accuracy > 95, f"the fixture's model learned only to {accuracy:.1f} %"
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    config = ModelConfig(ARCHITECTURE, dict(KWARGS), list(NAMES), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    (root / "model").mkdir()
    save_model(state, config, root / "model")
    save_file(state, root / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, root / "weights.pt")
    return World(root / "data", root / "model", root / "weights.safetensors", root / "weights.pt")


@dataclass(frozen=True)
class Result:
    """What a command line led to: exit status, the JSON document on stdout (None without --json), the text on stderr."""

    status: int
    document: dict
    err: str


def run_in(cwd: Path, *args) -> Result:
    """Run `gsforget ARGS --json` in process, in a folder; stdout must hold exactly one JSON document."""
    import contextlib
    import io
    import json

    from gsforget.__main__ import main

    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*map(str, args), "--json"])
    finally:
        os.chdir(before)
    return Result(status, json.loads(out.getvalue()), err.getvalue())


@pytest.fixture(scope="session")
def cli():
    """cli(cwd, *args): see `run_in`."""
    return run_in


@pytest.fixture(scope="session")
def draw():
    """draw(folder, count, seed, names): see `draw_images`."""
    return draw_images


@pytest.fixture(scope="session")
def teach():
    """teach(model, data, size, steps, lr): see `train`."""
    return train


@pytest.fixture(scope="session")
def first_run(world, tmp_path_factory):
    """(folder in which it was typed, result) of `forget --classes bee` with the defaults; read-only."""
    cwd = tmp_path_factory.mktemp("first")
    return cwd, run_in(cwd, "forget", "--model", world.model, "--data", world.data, "--classes", "bee")


@pytest.fixture(scope="session")
def face_world(tmp_path_factory):
    """Five people and two that the model never saw, see `tests/face_world.py`; read-only."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("face_world", Path(__file__).with_name("face_world.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.make_face_world(tmp_path_factory.mktemp("faces"))
