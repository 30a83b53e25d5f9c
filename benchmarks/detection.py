"""Two requests of two kinds in a row on a small detector, three seeds: what is found of forgotten and retained kinds.

    python benchmarks/scenes.py --dir scenes             # half a minute
    python benchmarks/train_detector.py --out detector   # 16 CPU-minutes
    python benchmarks/train_detector.py --out never-seen-1 --without sandal,bag
    python benchmarks/train_detector.py --out never-seen-2 --without sandal,bag,coat,sneaker
    python benchmarks/detection.py --data scenes --detector detector --reference never-seen-1,never-seen-2
    python benchmarks/detection.py --print               # the stored figures

RT-DETR on 96 x 96 scenes composed of Fashion-MNIST, see `scenes.py`; a stand-in for COCO, named as one.  Cells are stored
in `benchmarks/results/detection.json` as they are measured; a second call measures only what is missing; five CPU-minutes
a request.  `before` is the detector as it was trained, on all test scenes.  Probes are those of `gsforget audit --tier
standard`, on the objects of all kinds forgotten so far, next to detectors of the same make that were never told of them,
one per request.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from forget_demo import ROOT, SEEDS, Store, spread
from scenes import KINDS, SIZE

import gsforget
from gsforget import Settings
from gsforget.folder import is_model_folder

RESULTS = ROOT / "benchmarks" / "results" / "detection.json"
REQUESTS = (("sandal", "bag"), ("coat", "sneaker"))
METHODS = ("gs-lora++", "gs-lora")
ATTACKS = ("prototype_attack", "five_shot", "linear_probe_excess")
AUDITED = ("value", "original", "reference", "verdict")
PUBLISHED = "3 to 7 AP of kinds forgotten earlier remain (COCO, Deformable DETR)"


def request(
    model: Path, data: Path, kinds: tuple[str, ...], out: Path, method: str, seed: int, original: Path, never_seen: Path
) -> dict:
    """One request: figures, gates, what was changed, and what an audit finds in the queries."""
    start = time.process_time()
    outcome = gsforget.forget(
        model, data, kinds, task="detect", method=method, settings=Settings(seed=seed), device="cpu", out=out
    )
    d, m = outcome.document, outcome.metrics
    return {
        "verdict": d["verdict"],
        "cpu_seconds": round(time.process_time() - start),
        "train_seconds": d["seconds"]["train"],
        "metrics": d["metrics"],
        "classes": m["classes"],
        "every_query": {e["name"]: {k: e[k] for k in ("before", "after")} for e in m["detection"]["every_query"]},
        "detections": m["detection"]["detections"],
        "gates": {g["name"]: {k: g[k] for k in ("value", "bound", "threshold", "passed")} for g in d["gates"]},
        "groups": d["groups"],
        "active": [g["name"] for g in m["groups"] if g["active"]],
        "changed_tensors": d["changed_tensors"],
        "chosen": {k: m["chosen"][k] for k in ("steps", "stages", "depth", "bnd", "levels")},
        "audit": probes(outcome.folder, data, original, never_seen, seed) if outcome.folder else None,
    }


def probes(run: Path, data: Path, original: Path, never_seen: Path, seed: int) -> dict:
    """What attacks on the queries find of all kinds forgotten so far, percent, in the run, the original and the reference."""
    with tempfile.TemporaryDirectory() as out:
        document = gsforget.audit_model(
            run, data, tier="standard", original=original, reference=never_seen, device="cpu", seed=seed, out=out
        )
    found = {c["name"]: {k: c[k] for k in AUDITED} for c in document["checks"] if c["name"] in ATTACKS}
    return {**found, "linear_probe": document["details"]["linear_probe"], "verdict": document["verdict"]}


def chain(store: Store, detector: Path, data: Path, runs: Path, references: list[Path], method: str, seed: int) -> None:
    """Requests in a row; run folders lie in RUNS/METHOD-SEED."""
    folder = detector
    for n, kinds in enumerate(REQUESTS, 1):
        key, out = f"{method}/{seed}/{n}", runs / f"{method}-{seed}" / f"forget-{n:04d}"
        if not store.has(key) and out.exists():
            shutil.rmtree(out)  # of a call that was stopped between the run and its cell
        if store.has(key) and not is_model_folder(out):
            store.content["cells"].pop(key)
        store.measure(key, request, folder, data, kinds, out, method, seed, detector, references[n - 1])
        if not is_model_folder(out):
            break  # a gate was breached
        folder = out


def report(store: Store) -> None:
    print(f"{len(KINDS)} kinds on {SIZE} x {SIZE} scenes; published: {PUBLISHED}")
    for method in METHODS:
        for n in range(1, len(REQUESTS) + 1):
            rows = [row for key, row in store.cells(method).items() if key.endswith(f"/{n}")]
            if not rows:
                continue
            found = [row["metrics"] for row in rows]
            print(f"{method}, request {n} ({', '.join(REQUESTS[n - 1])}), {len(rows)} seed(s):")
            for name in ("forget_ap50", "forget_ap", "retain_ap50", "retain_ap", "old_ap50", "old_ap"):
                if found[0][f"{name}_after"] is not None:
                    before, after = ([f[f"{name}_{when}"] for f in found] for when in ("before", "after"))
                    print(f"  {name}: {spread(before)} -> {spread(after)}")
            hidden = [v["after"] for row in rows for v in row["every_query"].values()]
            print(f"  retain drop {spread([row['gates']['retain_ap_drop']['value'] for row in rows])} AP, H", end=" ")
            print(f"{spread([f['h_mean'] for f in found])}, AP50 over every query {spread(hidden)}")
            audits = [row["audit"] for row in rows if row.get("audit")]  # a run whose gate was breached has none
            for name in (*ATTACKS[:2], "linear_probe") if audits else ():
                sides = zip(*(list(audit[name].values())[:3] for audit in audits))
                print(f"  {name} {', '.join(spread(list(side)) for side in sides)} (after, original, never seen)")
            if audits:
                print(f"  probe excess {spread([audit['linear_probe_excess']['value'] for audit in audits])}", end=", ")
                print(f"audits {[audit['verdict'] for audit in audits]}")
            print(f"  active {[row['active'] for row in rows]} of {rows[0]['groups']['total']}", end="; ")
            print(f"passed {sum(row['verdict'] == 'pass' for row in rows)} of {len(rows)}", end="; ")
            print(f"{statistics.median(row['cpu_seconds'] for row in rows)} CPU-seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("scenes"))
    parser.add_argument("--detector", type=Path, default=Path("detector"))
    parser.add_argument(
        "--reference", default="never-seen-1,never-seen-2", help="per request, never told of what is gone by then"
    )
    parser.add_argument("--runs", type=Path, default=Path("detector-runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="comma-separated")
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    store = Store(args.results, args.again)
    if not args.print:
        torch.set_num_threads(1)
        references = [Path(name) for name in args.reference.split(",")]
        for seed in map(int, args.seeds.split(",")):
            for method in args.methods.split(","):
                chain(store, args.detector, args.data, args.runs, references, method, seed)
    report(store)


if __name__ == "__main__":
    main()
