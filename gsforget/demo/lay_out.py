"""Lay the embedded images and model out as an ordinary image folder and model folder.

The images are a seeded draw from Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747, MIT licence beside them); the
model is a timm ViT trained on its 60,000 training images.  `benchmarks/make_demo_assets.py` made both.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import numpy as np

from gsforget.errors import RequestError
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, read_config

LICENCE = "LICENSE-fashion-mnist.txt"


def lay_out(root: Path) -> tuple[Path, Path]:
    """Write `root/model` and `root/data`; what stands there already and is complete is kept.

    Returns the model folder and the data folder.  Raises RequestError where `root` is a file.
    """
    if root.exists() and not root.is_dir():
        raise RequestError(f"{root} is a file.", "Name a folder: gsforget demo --dir DIR.", "not_a_folder")
    assets = resources.files("gsforget.demo") / "assets"
    model, data = root / "model", root / "data"
    model.mkdir(parents=True, exist_ok=True)
    with resources.as_file(assets) as source:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, model / name)
        if not (data / LICENCE).is_file():
            _write_images(source / "fashion_mnist_subset.npz", read_config(model), data)
            shutil.copyfile(source / LICENCE, data / LICENCE)  # last: it marks the folder as complete
    return model, data


def _write_images(archive: Path, config: ModelConfig, data: Path) -> None:
    from PIL import Image

    with np.load(archive) as arrays:
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            for name in config.class_names:
                (data / split / name).mkdir(parents=True, exist_ok=True)
            for number, (pixels, label) in enumerate(zip(images, labels)):
                Image.fromarray(pixels).save(data / split / config.class_names[label] / f"{number:04d}.png")
