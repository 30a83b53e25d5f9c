"""A tiny world of people: coarse patterns with noise, a small ViT with a CosFace head that has learned some of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PEOPLE, NEW = ("ann", "bob", "cleo", "dan", "eve"), ("new-1", "new-2")
SIZE = 16
KWARGS = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "in_chans": 1,
    "embedding_dim": 12,
    "scale": 16.0,
}


@dataclass(frozen=True)
class FaceWorld:
    model: Path
    data: Path


def image(person: int, rng: np.random.Generator) -> Image.Image:
    pattern = np.random.default_rng(100 + person).integers(0, 2, (4, 4)) * 110 + 50
    pixels = np.kron(pattern, np.ones((4, 4))) + rng.normal(0, 30, (SIZE, SIZE))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_face_world(root: Path) -> FaceWorld:
    from gsforget.data import scan
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.folder import ModelConfig, save_model
    from gsforget.tasks.face.model import build

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for n, person in enumerate((*PEOPLE, *NEW)):
        for split, count in (("train", 24), ("test", 10)):
            if split == "test" or person in PEOPLE:
                folder = root / "data" / split / person
                folder.mkdir(parents=True)
                for k in range(count):
                    image(n, rng).save(folder / f"{k}.png")
    config = ModelConfig(
        "vit_tiny_patch16_224", KWARGS, list(PEOPLE), (1, SIZE, SIZE), (0.4,), (0.25,), "bilinear", task="face"
    )
    prepare = Preprocess.from_dict(config.to_json())
    train = scan(root / "data", list(PEOPLE), never_seen=NEW).train
    x, y = torch.from_numpy(np.stack([prepare.load(p) for p in train.paths])), torch.from_numpy(train.labels)
    torch.manual_seed(0)
    model = build(config.architecture, config.model_kwargs, len(PEOPLE))
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(24):
            adam.zero_grad()
            logits = model.loss.margin_logits(model.features(x[rows]), y[rows], 0.1)
            torch.nn.functional.cross_entropy(logits, y[rows]).backward()
            adam.step()
    (root / "model").mkdir()
    save_model(model.eval().state_dict(), config, root / "model")
    return FaceWorld(root / "model", root / "data")
