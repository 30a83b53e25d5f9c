"""The published GS-LoRA++ loop and the head mask on the 100 classes of `hundred_classes.py`, on the same model and data.

    python benchmarks/hundred_classes.py --dir characters --requests 0   # makes characters/data and characters/model
    python benchmarks/published_loop.py --dir characters                 # 3 seeds x 4 requests x 20 epochs
    python benchmarks/published_loop.py --dir characters --hundred       # one request, one seed, 100 epochs
    python benchmarks/published_loop.py --dir characters --head-mask     # the negative control, seconds

On two free cores a chain takes about a quarter of an hour, the 100 epochs 20 minutes.  Cells are stored as they are measured
in `benchmarks/results/published_loop.json`; a second call measures only what is missing.  The erased models lie in
DIR/published-SEED/request-N and DIR/head-mask/request-1, to be audited.
"""

import argparse
import functools
from pathlib import Path

from baseline_cell import baseline_cell
from characters import class_requests
from forget_demo import ROOT, Store, spread
from hundred_classes import SEEDS

from gsforget.baselines.head_mask import head_mask
from gsforget.baselines.published import PublishedSettings, published_gs_lora
from gsforget.folder import is_model_folder

RESULTS = ROOT / "benchmarks" / "results" / "published_loop.json"
EPOCHS, PUBLISHED_EPOCHS = 20, 100


def show(event: dict) -> None:
    figures = " ".join(f"{k} {v:.3f}" for k, v in event.items() if k != "epoch")
    print(f"  epoch {event['epoch']}: {figures}", flush=True)


def method(name: str) -> functools.partial:
    """`gs-lora` or `gs-lora++` with its published settings."""
    return functools.partial(
        published_gs_lora, settings=PublishedSettings(prototypes=name.endswith("++")), progress=show
    )


def chain(store: Store, root: Path, name: str, epochs: int, seed: int, count: int) -> None:
    """Requests in a row, each from the folder that the one before it left; a folder that is gone is made again."""
    place = "-".join(
        ["published", *([name] if name != "gs-lora++" else []), *([str(epochs)] if epochs != EPOCHS else [])]
    )
    folder = root / "model"
    for n, classes in enumerate(class_requests(count)):
        key, out = f"{name}/{epochs}/{seed}/{n}", root / f"{place}-{seed}" / f"request-{n + 1}"
        if not is_model_folder(out):
            store.content["cells"].pop(key, None)
        store.measure(
            key, baseline_cell, method(name), folder, root / "data", classes, out, f"published {name}", seed, n, epochs
        )
        folder = out


def mask(store: Store, root: Path) -> None:
    out = root / "head-mask" / "request-1"
    if not is_model_folder(out):
        store.content["cells"].pop("head-mask/0", None)
    classes = class_requests(1)[0]
    store.measure(
        "head-mask/0", baseline_cell, head_mask, root / "model", root / "data", classes, out, "head mask", epochs=0
    )


def report(store: Store) -> None:
    groups: dict[str, list[dict]] = {}
    for key, row in store.content["cells"].items():
        parts = key.split("/")
        label = f"{parts[0]}, {parts[1]} epochs, request {int(parts[3]) + 1}" if len(parts) == 4 else parts[0]
        groups.setdefault(label, []).append(row)
    keys = ("forget_acc_after", "old_acc_after", "retain_drop", "h_mean", "h_ideal", "linear_probe", "five_shot")
    keys += ("groups_near_zero", "train_seconds")
    for label, rows in sorted(groups.items()):
        figures = {k: [r[k] for r in rows if r[k] is not None] for k in keys}
        print(f"{label} (n={len(rows)}):", {k: spread(v) for k, v in figures.items() if v})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("characters"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--method", choices=["gs-lora", "gs-lora++"], default="gs-lora++")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--hundred", action="store_true", help="one request, one seed, the published 100 epochs")
    parser.add_argument("--head-mask", action="store_true", help="the negative control instead")
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    args = parser.parse_args()
    if not (is_model_folder(args.dir / "model") and (args.dir / "data" / "test").is_dir()):
        raise SystemExit(f"{args.dir} lacks data/ or model/; make them with benchmarks/characters.py --dir {args.dir}")
    store = Store(args.results, args.again)
    if args.head_mask:
        mask(store, args.dir)
    elif args.hundred:
        chain(store, args.dir, args.method, PUBLISHED_EPOCHS, 0, 1)
    else:
        for seed in SEEDS[: args.seeds]:
            chain(store, args.dir, args.method, args.epochs, seed, args.requests)
    report(store)


if __name__ == "__main__":
    main()
