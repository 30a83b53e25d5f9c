"""Object kinds forgotten one request after the other, by a small detector on composed scenes of real photographs.

    python benchmarks/scenes.py --out scenes               # 4,000 and 1,000 scenes with COCO annotations
    python benchmarks/train_detector.py --out detector     # 16 minutes on one core
    python benchmarks/detection.py --model detector --data scenes

Two requests of two of the ten kinds.  Cells are stored in `benchmarks/results/detection.json` as they are measured; a second
call measures only what is missing.
"""

import argparse
import time
from pathlib import Path

from forget_demo import ROOT, Store, spread

import gsforget
from gsforget import Settings

RESULTS = ROOT / "benchmarks" / "results" / "detection.json"
REQUESTS = (("sandal", "bag"), ("coat", "sneaker"))


def request(model: Path, data: Path, classes: tuple[str, ...], seed: int, out: Path) -> dict:
    start = time.process_time()
    outcome = gsforget.forget(model, data, classes, task="detect", settings=Settings(seed=seed), out=out, device="cpu")
    document = outcome.document
    return {
        "classes": list(classes),
        "verdict": document["verdict"],
        "metrics": document["metrics"],
        "groups": document["groups"],
        "seconds": document["seconds"],
        "cpu_seconds": time.process_time() - start,
        "sha256": document["sha256"],
    }


def report(store: Store) -> None:
    for n in range(len(REQUESTS)):
        rows = [c for k, c in store.content["cells"].items() if k.endswith(f"/{n}")]
        keys = (
            "forget_ap50_before",
            "forget_ap50_after",
            "old_ap50_after",
            "retain_ap_before",
            "retain_ap_after",
            "h_mean",
        )
        figures = {k: [r["metrics"][k] for r in rows if r["metrics"].get(k) is not None] for k in keys}
        print(f"request {n + 1} (n={len(rows)}):", {k: spread(v) for k, v in figures.items() if v})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("detector"))
    parser.add_argument("--data", type=Path, default=Path("scenes"))
    parser.add_argument("--runs", type=Path, default=Path("runs-detection"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    args = parser.parse_args()
    store = Store(args.results, args.again)
    for seed in range(args.seeds):
        folder = args.model
        for n, classes in enumerate(REQUESTS):
            out = args.runs / f"{seed}-{n + 1}"
            key = f"forget/{seed}/{n}"
            if store.has(key) and not out.is_dir():
                store.content["cells"].pop(key)
            store.measure(key, request, folder, args.data, classes, seed, out)
            if store.content["cells"][key]["verdict"] != "pass":
                break
            folder = out
    report(store)


if __name__ == "__main__":
    main()
