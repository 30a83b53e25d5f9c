"""A set of 100 classes and the models that belong to it: characters in real fonts.  A stand-in, named as one.

    apt-get install fonts-noto-core fonts-cmu fonts-lato fonts-roboto-unhinted fonts-open-sans fonts-freefont-ttf \\
        fonts-liberation fonts-linuxlibertine fonts-sil-gentium fonts-ebgaramond fonts-dejavu-extra fonts-firacode
    pip install fonttools
    python benchmarks/characters.py --dir characters     # the set in 10 s, seven models in half an hour on two cores

Each class is a character, each image one font's drawing of it; fonts of the test images do not occur among the training
images.  DIR/data holds the images, DIR/model the model that has learned all classes.  What never saw some of them is
trained in the same way, with the same network and number of epochs:

- DIR/never-seen-N: without all classes of the first N requests, as if trained anew on what is retained after them;
- DIR/never-saw-request-N: without the classes of the Nth request alone.

With fewer classes left to learn from, the first kind has poorer features altogether: it is the harder measure.
"""

import argparse
import random
from collections.abc import Collection
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, is_model_folder, save_model

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω&@#%?!$+*=<>"
TRAIN_FONTS, TEST_FONTS = 60, 20
SIZE = 28
KWARGS = {"img_size": SIZE, "patch_size": 7, "embed_dim": 96, "depth": 8, "num_heads": 4, "in_chans": 1}
ORDER_SEED = 1337  # the class order of the GS-LoRA release; classes are taken from the end
REQUESTS = 4


def class_name(character: str) -> str:
    return f"u{ord(character):04x}"


def class_requests(count: int = REQUESTS) -> list[tuple[str, ...]]:
    """The classes of the first requests, 20 each, in the order of the published protocol."""
    order = sorted(class_name(c) for c in CHARACTERS)
    random.Random(ORDER_SEED).shuffle(order)
    return [tuple(order[80 - 20 * n : 100 - 20 * n]) for n in range(count)]


def fonts_that_draw(characters: str) -> list[Path]:
    """Installed fonts that have all of some characters, by path."""
    from fontTools.ttLib import TTFont, TTLibError

    found = []
    for path in sorted(Path("/usr/share/fonts").rglob("*.[to]tf")):
        try:
            covered = TTFont(path, lazy=True).getBestCmap() or {}
        except TTLibError:
            continue
        if all(ord(c) in covered for c in characters):
            found.append(path)
    return found


def usable_fonts() -> list[Path]:
    """Fonts that draw all 100 characters, no two of one name, in a seeded order."""
    found: dict[str, Path] = {}
    for path in fonts_that_draw(CHARACTERS):
        found.setdefault(path.stem, path)
    fonts = [found[name] for name in sorted(found)]
    random.Random(0).shuffle(fonts)
    return fonts


def draw(character: str, font: FreeTypeFont, rng: np.random.Generator) -> Image.Image:
    """Light on dark, turned by up to 15 degrees, in 65 to 100 % of the size, off the centre, with noise.

    Without this the set is too easy to show anything: a network that never saw a class names it as well as one that did.
    """
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (96, 96))
    ImageDraw.Draw(canvas).text((48 - (left + right) / 2, 48 - (top + bottom) / 2), character, font=font, fill=255)
    angle, scale, (dx, dy) = np.radians(rng.uniform(-15, 15)), 1 / rng.uniform(0.65, 1.0), rng.uniform(-7, 7, 2)
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    matrix = (a, b, 48 - a * (48 + dx) - b * (48 + dy), -b, a, 48 + b * (48 + dx) - a * (48 + dy))
    turned = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    pixels = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    noisy = rng.uniform(0.6, 1) * pixels + rng.normal(30, 25, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_images(root: Path) -> None:
    fonts = usable_fonts()
    if len(fonts) < TRAIN_FONTS + TEST_FONTS:
        raise SystemExit(
            f"{len(fonts)} fonts draw all characters, {TRAIN_FONTS + TEST_FONTS} are needed: install those above"
        )
    for number, path in enumerate(fonts[: TRAIN_FONTS + TEST_FONTS]):
        font = ImageFont.truetype(str(path), 64)
        for character in CHARACTERS:
            folder = root / ("train" if number < TRAIN_FONTS else "test") / class_name(character)
            folder.mkdir(parents=True, exist_ok=True)
            draw(character, font, np.random.default_rng([number, ord(character)])).save(folder / f"{path.stem}.png")


def load_split(root: Path, names: list[str], prepare: Preprocess) -> tuple[torch.Tensor, torch.Tensor]:
    files = [(p, i) for i, name in enumerate(names) for p in sorted((root / name).glob("*.png"))]
    images = torch.from_numpy(np.stack([prepare.load(p) for p, _ in files]))
    return images, torch.tensor([i for _, i in files])


def train_model(data: Path, folder: Path, epochs: int = 60, without: Collection[str] = ()) -> None:
    """Train from random weights on all classes but those in `without`, whose rows of the head learn nothing."""
    torch.manual_seed(0)
    names = sorted(class_name(c) for c in CHARACTERS)
    config = ModelConfig("vit_tiny_patch16_224", KWARGS, names, (1, SIZE, SIZE), (0.2,), (0.35,), "bilinear")
    prepare = Preprocess.from_dict(config.to_json())
    x, y = load_split(data / "train", names, prepare)
    seen = torch.tensor([names[i] not in without for i in y.tolist()])
    x, y = x[seen], y[seen]
    model = timm.create_model(config.architecture, num_classes=len(names), **KWARGS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 100 * 100].split(100):
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            logits = model(torch.roll(x[rows], (dy, dx), (2, 3)))
            loss = torch.nn.functional.cross_entropy(logits, y[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch} loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True)
    save_model(model.state_dict(), config, folder)


def references(root: Path) -> dict[Path, tuple[str, ...]]:
    """Folders of the models that never saw some classes, and which."""
    requests = class_requests()
    found = {root / f"never-seen-{n}": sum(requests[:n], ()) for n in range(1, REQUESTS + 1)}
    return {**found, **{root / f"never-saw-request-{n}": requests[n - 1] for n in range(2, REQUESTS + 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("characters"))
    parser.add_argument("--only", help="make just this model, to train several side by side")
    args = parser.parse_args()
    if not (args.dir / "data" / "test").is_dir():
        make_images(args.dir / "data")
    for folder, without in {args.dir / "model": (), **references(args.dir)}.items():
        if args.only in (None, folder.name) and not is_model_folder(folder):
            train_model(args.dir / "data", folder, without=without)


if __name__ == "__main__":
    main()
