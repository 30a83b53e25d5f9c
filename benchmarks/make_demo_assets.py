"""Make what `gsforget demo` ships: a Fashion-MNIST subset and a small ViT trained on the full training set.

    apt-get install dataset-fashion-mnist
    python benchmarks/make_demo_assets.py            # about 40 minutes on two CPU cores
    python benchmarks/make_demo_assets.py --subset   # only the images and the licence, seconds

The subset is a seeded draw (300 training images per class from the training files, 100 test images per class
from the test files).  The model sees all 60,000 training images and is measured once on all 10,000 test images;
the figure goes to `benchmarks/results/demo_model.json`.
"""

import argparse
import gzip
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

SOURCE = Path("/usr/share/datasets/fashion-mnist")
LICENCE = Path("/usr/share/doc/dataset-fashion-mnist/copyright")
ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "gsforget" / "demo" / "assets"
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
MODEL = "vit_tiny_patch16_224"
MODEL_KWARGS = {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 8, "num_heads": 4, "in_chans": 1}
MEAN, STD = 0.286, 0.353  # of the training images, scaled to 0..1


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes (format of the MNIST distribution)."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_split(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    return read_idx(SOURCE / f"{prefix}-images-idx3-ubyte.gz"), read_idx(SOURCE / f"{prefix}-labels-idx1-ubyte.gz")


def write_subset(seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    out = {}
    for split, prefix, per_class in (("train", "train", 300), ("test", "t10k", 100)):
        images, labels = load_split(prefix)
        picked = [np.sort(rng.permutation(np.flatnonzero(labels == c))[:per_class]) for c in range(10)]
        out[f"{split}_images"] = images[np.concatenate(picked)]
        out[f"{split}_labels"] = labels[np.concatenate(picked)]
    ASSETS.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(ASSETS / "fashion_mnist_subset.npz", **out)
    (ASSETS / "LICENSE-fashion-mnist.txt").write_text(LICENCE.read_text())


def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random shift by up to two pixels and random horizontal flip; [B, 1, 28, 28]."""
    n = batch.shape[0]
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows, cols = dy + torch.arange(28), dx + torch.arange(28)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    cols = torch.where(flip, cols.flip(1), cols)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], cols[:, None, :]].unsqueeze(1)


def normalise(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images.astype(np.float32) / 255)[:, None] - MEAN) / STD


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500)))
    return 100 * hits / len(labels)


def train(epochs: int, batch: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_split("train")
    x, y = normalise(images), torch.from_numpy(labels.astype(np.int64))
    tx, ty = load_split("t10k")
    tx, ty = normalise(tx), torch.from_numpy(ty.astype(np.int64))
    model = timm.create_model(MODEL, num_classes=10, **MODEL_KWARGS)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    steps, warm = epochs * (len(x) // batch), 400
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / warm) * (0.01 + 0.99 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    start = time.time()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for i in torch.randperm(len(x), generator=generator).split(batch):
            if len(i) < batch:
                continue
            loss = torch.nn.functional.cross_entropy(model(augment(x[i], generator)), y[i], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        # Training accuracy only: the test images are read once, at the end.
        seen = accuracy(model, x[:5000], y[:5000])
        print(
            f"epoch {epoch} loss {total / (len(x) // batch):.4f} train acc {seen:.2f} {time.time() - start:.0f} s",
            flush=True,
        )
    acc = accuracy(model, tx, ty)
    per_class = [accuracy(model, tx[ty == c], ty[ty == c]) for c in range(10)]
    ASSETS.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, ASSETS / "model.safetensors")
    config = {
        "architecture": MODEL,
        "model_kwargs": MODEL_KWARGS,
        "class_names": CLASSES,
        "input_size": [1, 28, 28],
        "mean": [MEAN],
        "std": [STD],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    (ASSETS / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    result = {
        "test_accuracy": acc,
        "test_images": len(ty),
        "per_class": dict(zip(CLASSES, per_class)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    path = ROOT / "benchmarks" / "results" / "demo_model.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", action="store_true", help="write the images and the licence only")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_subset(args.seed)
    if not args.subset:
        train(args.epochs, args.batch, args.lr, args.seed)
