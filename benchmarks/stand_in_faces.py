"""A stand-in for faces, named as one: a font at its own slant, width and weight is an identity, nine of its characters an image.

    apt-get install fonts-noto-core fonts-cmu fonts-lato fonts-roboto-unhinted fonts-open-sans fonts-freefont-ttf \\
        fonts-liberation fonts-linuxlibertine fonts-sil-gentium fonts-ebgaramond fonts-dejavu-extra fonts-firacode
    pip install fonttools

The protocol is that of open-set recognition: training and probe images share no character, and `NEVER_SEEN` identities
occur in no training image.  Fonts are chosen one after the other, each as unlike the earlier ones as can be, because
hundreds of files draw the same Latin letters; slant, width, height and weight are drawn once per identity.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from characters import fonts_that_draw
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import cross_entropy

from gsforget.data import scan
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, is_model_folder, save_model
from gsforget.tasks.face.model import build

IDENTITIES, NEVER_SEEN = 48, 16
TRAIN_IMAGES, TEST_IMAGES = 80, 30  # per identity
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
GRID, SIZE = 3, 48
KWARGS = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 4,
    "in_chans": 1,
    "global_pool": "avg",
    "class_token": False,
    "embedding_dim": 64,
    "head": "cosface",
    "scale": 16.0,
}
ARCHITECTURE = "vit_tiny_patch16_224"
EPOCHS, BATCH, LR = 40, 64, 3e-3
MARGIN = 0.2  # it grows to this between 0.4 and 0.7 of the steps: at once it is more than so small a network learns


def pools() -> tuple[list[str], list[str]]:
    """Characters of training images and of probes; none is in both."""
    shuffled = sorted(CHARACTERS)
    random.Random(0).shuffle(shuffled)
    return shuffled[:36], shuffled[36:]


def choose_fonts(count: int) -> list[Path]:
    """Fonts that draw all characters, each as unlike those before it as can be."""
    found, shapes = fonts_that_draw(CHARACTERS), []
    for path in found:
        font = ImageFont.truetype(str(path), 26)
        shapes.append(np.concatenate([np.asarray(glyph(c, font), np.float32).ravel() for c in "aegQRt5"]))
    if len(found) < count:
        raise SystemExit(f"{len(found)} fonts draw all characters, {count} are needed: install those above")
    pixels = np.stack(shapes)
    chosen = [int(np.abs(pixels - pixels.mean(0)).sum(1).argmin())]
    nearest = np.abs(pixels - pixels[chosen[0]]).sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.abs(pixels - pixels[chosen[-1]]).sum(1))
    fonts = [found[i] for i in chosen]
    random.Random(0).shuffle(fonts)
    return fonts


@dataclass(frozen=True)
class Style:
    """What an identity adds to its font: slant, width and height as factors, and pixels of stroke."""

    slant: float
    width: float
    height: float
    stroke: int

    @classmethod
    def of(cls, n: int) -> "Style":
        rng = np.random.default_rng([7, n])
        slant, width, stroke = rng.uniform(-0.4, 0.4), rng.uniform(0.7, 1.25), int(rng.integers(0, 2))
        return cls(slant, width, rng.uniform(0.75, 1.1), stroke)


PLAIN = Style(0, 1, 1, 0)


def glyph(character: str, font: ImageFont.FreeTypeFont, style: Style = PLAIN) -> Image.Image:
    """One character on the base line, light on dark, 32 x 32."""
    canvas = Image.new("L", (64, 64))
    left, _, right, _ = font.getbbox(character)
    at = 32 - (left + right) / 2, 44
    ImageDraw.Draw(canvas).text(at, character, font=font, fill=255, anchor="ls", stroke_width=style.stroke)
    a, e = 1 / style.width, 1 / style.height
    shear = a * style.slant
    matrix = (a, shear, 32 - 32 * a - 36 * shear, 0, e, 36 - 36 * e)
    shaped = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return shaped.crop((19, 20, 45, 46)).resize((32, 32), Image.Resampling.LANCZOS)


def draw(font: ImageFont.FreeTypeFont, style: Style, pool: list[str], rng: np.random.Generator) -> Image.Image:
    """Different characters in rows, a little turned and moved, with noise."""
    canvas = Image.new("L", (32 * GRID, 32 * GRID))
    for n, character in enumerate(rng.choice(pool, GRID * GRID, replace=False)):
        canvas.paste(glyph(str(character), font, style), (32 * (n % GRID), 32 * (n // GRID)))
    by = tuple(int(v) for v in rng.integers(-2, 3, 2))
    moved = canvas.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC, translate=by)
    pixels = np.asarray(moved.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    noisy = rng.uniform(0.85, 1) * pixels + rng.normal(12, 8, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def identity(n: int) -> str:
    return f"id-{n:02d}" if n < IDENTITIES else f"new-{n - IDENTITIES:02d}"


NEW = [identity(IDENTITIES + n) for n in range(NEVER_SEEN)]


def make_images(root: Path) -> None:
    """DIR/train and DIR/test; the never-seen identities have a folder in test alone."""
    for n, path in enumerate(choose_fonts(IDENTITIES + NEVER_SEEN)):
        font = ImageFont.truetype(str(path), 26)
        splits = {"train": TRAIN_IMAGES if n < IDENTITIES else 0, "test": TEST_IMAGES}
        for s, ((split, images), pool) in enumerate(zip(splits.items(), pools(), strict=True)):
            folder = root / split / identity(n)
            for k in range(images):
                folder.mkdir(parents=True, exist_ok=True)
                draw(font, Style.of(n), pool, np.random.default_rng([n, s, k])).save(folder / f"{k:03d}.png")


def train_model(data: Path, folder: Path) -> None:
    """A small ViT with a CosFace head, from random weights."""
    torch.manual_seed(0)
    listed = scan(data, None, never_seen=NEW)
    names = listed.class_names
    config = ModelConfig(ARCHITECTURE, KWARGS, names, (1, SIZE, SIZE), (0.25,), (0.25,), "bilinear", task="face")
    prepare = Preprocess.from_dict(config.to_json())
    x = torch.from_numpy(np.stack([prepare.load(p) for p in listed.train.paths]))
    y = torch.from_numpy(listed.train.labels)
    model = build(config.architecture, config.model_kwargs, len(names)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=steps, pct_start=0.15)
    step = 0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            images = torch.roll(x[rows], (dy, dx), (2, 3))
            margin, step = MARGIN * min(1, max(0, (step / steps - 0.4) / 0.3)), step + 1
            loss = cross_entropy(model.loss.margin_logits(model.features(images), y[rows], margin), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch} loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True)
    save_model(model.eval().state_dict(), config, folder)


def prepare(root: Path) -> tuple[Path, Path]:
    """The model folder and the data folder under `root`, made where they are not there."""
    if not (root / "data" / "test").is_dir():
        make_images(root / "data")
    if not is_model_folder(root / "model"):
        train_model(root / "data", root / "model")
    return root / "model", root / "data"
