"""Scenes for object detection: photographs of clothing on canvases, several per image, overlapping, in changing sizes.

    apt-get install dataset-fashion-mnist
    python benchmarks/scenes.py --dir scenes          # 4,000 training and 1,000 test scenes, half a minute

DIR/train and DIR/test hold the images, DIR/annotations/train.json and test.json what is on them, in the format of COCO.
The items are the photographs of Fashion-MNIST: those of its training files on training scenes, those of its test files
on test scenes.  Without the package the subset that `gsforget demo` ships is used, which is a poorer set to learn from.
A composed stand-in for real scenes, named as one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from make_demo_assets import read_idx
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SUBSET = Path(__file__).resolve().parents[1] / "gsforget" / "demo" / "assets" / "fashion_mnist_subset.npz"
KINDS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
FIRST_ID = 1  # COCO's category ids start at 1
SIZE = 96
ITEMS = (2, 5)  # per scene
SIDES = (22, 46)  # pixels of an item's longer side
COVERED = 0.35  # of an item's box at most, by one later item
TRAIN, TEST = 4000, 1000
SEEDS = {"train": 1, "test": 2}


def load_items(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Photographs uint8 [N, 28, 28] and kinds int64 [N] of the training or of the test files."""
    prefix = "train" if split == "train" else "t10k"
    path = SOURCE / f"{prefix}-images-idx3-ubyte.gz"
    if path.is_file():
        return read_idx(path), read_idx(SOURCE / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
    with np.load(SUBSET) as subset:
        return subset[f"{split}_images"], subset[f"{split}_labels"].astype(np.int64)


def canvas(rng: np.random.Generator) -> np.ndarray:
    """A soft, coloured, noisy ground, float32 [SIZE, SIZE, 3] in 0 to 255."""
    coarse = rng.uniform(20, 150, (int(rng.integers(2, 7)), int(rng.integers(2, 7)), 1))
    coarse = coarse + rng.uniform(-30, 30, (1, 1, 3)) + rng.uniform(-12, 12, (*coarse.shape[:2], 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) + rng.normal(0, 5, (SIZE, SIZE, 1)).astype(np.float32)


def cut_out(photograph: np.ndarray) -> Image.Image:
    """The part of a photograph, uint8 [28, 28], that is not black."""
    there = photograph > 12
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return Image.fromarray(photograph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def place(rng: np.random.Generator, taken: list[tuple[int, int, int, int]], w: int, h: int) -> tuple[int, int] | None:
    """A corner at which an item of this size covers little of those before it; None after ten tries."""
    for _ in range(10):
        x, y = int(rng.integers(0, SIZE - w + 1)), int(rng.integers(0, SIZE - h + 1))
        if all(
            max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b)) <= COVERED * min(w * h, c * d)
            for a, b, c, d in taken
        ):
            return x, y
    return None


def compose(
    rng: np.random.Generator, photographs: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One scene: uint8 [SIZE, SIZE, 3], and for each item its kind and its box (left, top, width, height)."""
    image = canvas(rng)
    boxes: list[tuple[int, int, int, int]] = []
    found = []
    for _ in range(int(rng.integers(ITEMS[0], ITEMS[1] + 1))):
        item = int(rng.integers(len(photographs)))
        picture = cut_out(photographs[item])
        scale = rng.uniform(*SIDES) / max(picture.size)
        w, h = (max(4, round(side * scale)) for side in picture.size)
        corner = place(rng, boxes, w, h)
        if corner is None:
            continue
        grey = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC), np.float32)[
            :, :: -1 if rng.random() < 0.5 else 1
        ]
        opacity = (grey / 40).clip(0, 1)[..., None]
        tint = rng.uniform(0.75, 1.0, 3).astype(np.float32)
        x, y = corner
        part = image[y : y + h, x : x + w]
        part[:] = opacity * (grey[..., None] * tint) + (1 - opacity) * part
        boxes.append((x, y, w, h))
        found.append((int(kinds[item]), (x, y, w, h)))
    return image.clip(0, 255).astype(np.uint8), found


def write_split(root: Path, split: str, count: int) -> None:
    """Images and annotations of one split; the same ones each time."""
    photographs, kinds = load_items(split)
    rng = np.random.default_rng(SEEDS[split])
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        image, found = compose(rng, photographs, kinds)
        name = f"{number:06d}.png"
        Image.fromarray(image).save(root / split / name)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        for kind, box in found:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + FIRST_ID,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "composed of Fashion-MNIST (MIT licence)"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + FIRST_ID, "name": name} for i, name in enumerate(KINDS)],
    }
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("scenes"))
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--test", type=int, default=TEST)
    args = parser.parse_args()
    write_split(args.dir, "train", args.train)
    write_split(args.dir, "test", args.test)


if __name__ == "__main__":
    main()
