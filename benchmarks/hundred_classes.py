"""The same defaults on 100 classes: four requests of 20 classes in a row, with full audits; few images; classes without any.

    python benchmarks/characters.py --dir characters          # the set and its models, once
    python benchmarks/hundred_classes.py --dir characters     # all parts; --part and --seeds for less
    python benchmarks/hundred_classes.py --print              # the stored figures

Parts: `sequence` (GS-LoRA++, the default, with `gsforget audit --tier full` of each run), `gs-lora` (the method without
prototypes), `shots` (4 images per class), `missing` (5 retained classes without training images) and `floors` (what
probes find in models that never saw the classes).  Cells are stored in `benchmarks/results/hundred_classes.json` as they
are measured; a run folder that is gone is made again.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from baseline_cell import opened, probes
from characters import REQUESTS, class_requests, references
from forget_demo import ROOT, Store, cell, judged, spread

import gsforget
from gsforget.folder import is_model_folder

SEEDS = (0, 1, 2)
RESULTS = ROOT / "benchmarks" / "results" / "hundred_classes.json"
SHOTS, MISSING = 4, 5
JUDGED = ("linear_probe_excess", "prototype_attack", "five_shot", "mia_auc", "relearn_full", "relearn_retain")


def chain(store: Store, root: Path, part: str, seed: int, data: Path, tier: str | None = None, **options) -> None:
    """Requests in a row; run folders lie in DIR/runs-PART-SEED."""
    folder, runs = root / "model", root / f"runs-{part}-{seed}"
    for n, classes in enumerate(class_requests(), 1):
        key, out = f"{part}/{seed}/{n}", runs / f"forget-{n:04d}"
        if not is_model_folder(out):
            store.content["cells"].pop(key, None)
        elif not store.has(key):
            shutil.rmtree(out)  # of a call that was stopped between the run and its audit
        reference = root / f"never-seen-{n}"
        store.measure(key, request, folder, data, classes, runs, seed, reference, tier, **options)
        folder = out
        if not is_model_folder(out):
            break  # a gate was breached


def request(
    model: Path,
    data: Path,
    classes: tuple[str, ...],
    runs: Path,
    seed: int,
    reference: Path,
    tier: str | None,
    **options,
) -> dict:
    """One request with what its own attacks found, and what audits say next to a model that never saw the classes.

    `checks` are about the classes of this request, next to the model before it; `all_so_far` about those of earlier requests
    as well, next to the first model, as `gsforget audit` looks at a run by itself.
    """
    figures = cell(model, data, classes, runs, seed=seed, reference=reference, **options)
    if tier is None or figures["verdict"] != "pass":
        return figures
    ask = {"reference": reference, "device": "cpu", "seed": seed}
    everything = gsforget.audit_model(figures["folder"], data, tier="standard", **ask)
    document = gsforget.audit_model(figures["folder"], data, tier=tier, original=model, **ask)
    return {
        **figures,
        **judged(document),
        "audit_seconds": document["seconds"],
        "all_so_far": judged(everything),
    }


def missing_data(root: Path) -> tuple[Path, list[str]]:
    """The images without the training images of five classes that are retained to the end, as links; and these classes."""
    gone = sorted({p.name for p in (root / "data" / "train").iterdir()} - set(sum(class_requests(), ())))[:MISSING]
    place = root / "data-missing"
    for split in ("train", "test"):
        (place / split).mkdir(parents=True, exist_ok=True)
        for folder in (root / "data" / split).iterdir():
            link = place / split / folder.name
            if not link.is_symlink() and not (split == "train" and folder.name in gone):
                os.symlink(folder.resolve(), link)
    return place, gone


def missing(store: Store, root: Path, seed: int) -> None:
    """Accuracy of retained classes without training images, over all four requests."""
    data, gone = missing_data(root)
    chain(store, root, "missing", seed, data)
    metrics = [root / f"runs-missing-{seed}" / f"forget-{n:04d}" / "metrics.json" for n in range(1, REQUESTS + 1)]
    found = [json.loads(path.read_text())["classes"] for path in metrics if path.is_file()]
    for n, classes in enumerate(found, 1):
        row = store.content["cells"][f"missing/{seed}/{n}"]
        first = {c["name"]: c["before"] for c in found[0]}
        mine = [c["name"] for c in classes if c["name"] in gone]
        now = {c["name"]: c["after"] for c in classes}
        row["missing_acc_first"] = 100 * sum(first[k]["right"] for k in mine) / sum(first[k]["count"] for k in mine)
        row["missing_acc_after"] = 100 * sum(now[k]["right"] for k in mine) / sum(now[k]["count"] for k in mine)
    store.save()


def floors(store: Store, root: Path) -> None:
    """Probes of the classes of each request in models that never saw them, of both kinds."""
    requests = class_requests()
    for folder in references(root):
        if is_model_folder(folder):
            store.measure(f"floors/{folder.name}", floor, folder, root / "data", requests, int(folder.name[-1]))


def floor(folder: Path, data: Path, requests: list[tuple[str, ...]], n: int) -> dict:
    source, wanted, train, test = opened(folder, data, requests[n - 1])
    earlier = [source.names.index(name) for part in requests[: n - 1] for name in part]
    return probes(source.model, train, test, wanted, earlier)


def report(store: Store) -> None:
    keys = ("forget_acc_after", "old_acc_after", "retain_drop", "h_mean", "h_ideal", "active", "linear_probe")
    keys += (
        "linear_probe_excess",
        "prototype_attack",
        "mia_auc",
        "missing_acc_first",
        "missing_acc_after",
        "train_seconds",
    )
    for part in ("sequence", "gs-lora", "shots", "missing"):
        for n in range(1, REQUESTS + 1):
            rows = [row for key, row in store.cells(part).items() if key.endswith(f"/{n}")]
            figures = {k: [r[k] for r in rows if r.get(k) is not None] for k in keys}
            if rows:
                print(f"{part}, request {n} (n={len(rows)}):", {k: spread(v) for k, v in figures.items() if v})
            for name in JUDGED if rows and "checks" in rows[0] else ():
                judged = [r["checks"][name] for r in rows if name in r.get("checks", {})]
                values = [(c["value"], c["reference"], c["verdict"]) for c in judged]
                print(f"    {name}: ", values)
            so_far = [r["all_so_far"]["checks"]["linear_probe_excess"]["value"] for r in rows if "all_so_far" in r]
            if so_far:
                print(f"    linear_probe_excess of all classes so far: {spread(so_far)} (n={len(so_far)})")
    for key, row in store.cells("floors").items():
        print(key, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("characters"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["sequence", "gs-lora", "shots", "missing", "floors", "all"], default="all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated")
    parser.add_argument("--tier", choices=["none", "quick", "standard", "full"], default="full", help="of audits")
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    store, data = Store(args.results, False), args.dir / "data"
    for seed in () if args.print else map(int, args.seeds.split(",")):
        if args.part in ("sequence", "all"):
            chain(store, args.dir, "sequence", seed, data, None if args.tier == "none" else args.tier)
        if args.part in ("gs-lora", "all"):
            chain(store, args.dir, "gs-lora", seed, data, method="gs-lora")
        if args.part in ("shots", "all"):
            chain(store, args.dir, "shots", seed, data, shots=SHOTS)
        if args.part in ("missing", "all"):
            missing(store, args.dir, seed)
    if args.part in ("floors", "all") and not args.print:
        floors(store, args.dir)
    report(store)


if __name__ == "__main__":
    main()
