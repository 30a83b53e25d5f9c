"""The figures of the main job: five pairs of classes, a chain of four requests, and what reuse and retiring gain.

    python benchmarks/forget_demo.py                 # all parts, about 25 minutes on two CPU cores
    python benchmarks/forget_demo.py --part pairs    # pairs, chain, reuse, shots or parity

Three seeds each.  Every cell is stored in `benchmarks/results/forget_demo.json` as soon as it is measured; a second call
measures only what is missing (`--again` measures all).
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gsforget
from gsforget import Settings
from gsforget.demo.lay_out import lay_out
from gsforget.metrics import h_mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forget_demo.json"
SEEDS = (0, 1, 2)
PAIRS = (("t-shirt", "shirt"), ("trouser", "bag"), ("pullover", "coat"), ("sandal", "sneaker"), ("dress", "ankle-boot"))
CHAIN = (("t-shirt", "shirt"), ("sandal", "sneaker"), ("trouser", "bag"), ("pullover", "coat"))
SHOTS = (1, 2, 4, 16)


def cell(
    model: Path,
    data: Path,
    classes: tuple[str, ...],
    runs: Path | None,
    shots: int | None = None,
    reference: Path | None = None,
    method: str | None = None,
    **settings,
) -> dict:
    """One request: its figures, and what perfect forgetting with unchanged retention would give."""
    outcome = gsforget.forget(
        model,
        data,
        list(classes),
        settings=Settings(**settings),
        shots=shots,
        reference=reference,
        method=method,
        device="cpu",
        runs=runs,
    )
    document, metrics = outcome.document, outcome.metrics
    m, attacks = document["metrics"], metrics["audit"]
    return {
        "classes": list(classes),
        "seed": settings.get("seed", 0),
        "verdict": document["verdict"],
        **m,
        "h_ideal": h_mean(m["forget_acc_before"], m["retain_acc_before"]),
        "retain_drop": m["retain_acc_before"] - m["retain_acc_after"],
        "active": len(document["groups"]["active"]),
        "groups": document["groups"]["total"],
        **document["audit"],
        "attacks": {k: attacks[k] for k in ("original", "reference")},
        "forgotten_again": len(document["forgotten_again"]),
        "stages": metrics["chosen"]["stages"],
        "depth": metrics["chosen"]["depth"],
        "train_seconds": document["seconds"]["train"],
        "total_seconds": document["seconds"]["total"],
        "merge_difference": metrics["merge"]["max_logit_difference"],
        "sha256": document["sha256"].get("model"),
        "folder": str(outcome.folder) if outcome.folder else None,
    }


def judged(document: dict) -> dict:
    """What an audit says, as it is stored; the curves of full relearning where it was asked for."""
    kept = ("value", "original", "reference", "threshold", "verdict")
    checks = {check["name"]: {k: check[k] for k in kept} for check in document["checks"]}
    found = {"tier": document["tier"], "audit_verdict": document["verdict"], "checks": checks}
    curves = document["details"].get("relearning", {}).get("full", {})
    curves = {k: curves[k] for k in ("steps", "subject", "reference") if k in curves}
    return {**found, "relearning": curves} if curves else found


def pairs(store: "Store", model: Path, data: Path, work: Path) -> None:
    for classes in PAIRS:
        for seed in SEEDS:
            store.measure(f"pairs/{'+'.join(classes)}/{seed}", cell, model, data, classes, work, seed=seed)


def chain(store: "Store", model: Path, data: Path, work: Path) -> None:
    for seed in SEEDS:
        store.measure(f"chain/{seed}", requests_in_turn, model, data, work, seed)


def requests_in_turn(model: Path, data: Path, work: Path, seed: int) -> dict:
    steps, folder = [], model
    for classes in CHAIN:
        steps.append(cell(folder, data, classes, work, seed=seed))
        folder = Path(steps[-1]["folder"])
    return {"steps": steps}


def reuse(store: "Store", model: Path, data: Path, work: Path) -> None:
    """The same request with reuse of the frozen prefix and skipping of dead groups, and without, in turn."""
    modes = {"both": (True, True), "no_reuse": (False, True), "no_retiring": (True, False), "neither": (False, False)}
    for seed in SEEDS:
        for name, (prefix, retire) in modes.items():
            switches = {"reuse_prefix": prefix, "retire_groups": retire}
            store.measure(f"reuse/{name}/{seed}", cell, model, data, PAIRS[3], work, seed=seed, **switches)


def shots(store: "Store", model: Path, data: Path, work: Path) -> None:
    for count in SHOTS:
        for seed in SEEDS:
            store.measure(f"shots/{count}/{seed}", cell, model, data, PAIRS[3], work, shots=count, seed=seed)


def parity(store: "Store", model: Path, data: Path, work: Path) -> None:
    for seed in SEEDS:
        store.measure(f"parity/{seed}", twice_and_export, model, data, work, seed)


def twice_and_export(model: Path, data: Path, work: Path, seed: int) -> dict:
    """Same seed, same hash; and the exported ONNX file against PyTorch on the test images."""
    first, second = (cell(model, data, PAIRS[1], work, seed=seed) for _ in range(2))
    exported = gsforget.export_model(Path(first["folder"]), onnx=True)["artifacts"][0]
    return {
        "same_sha256": first["sha256"] == second["sha256"],
        "merge_difference": first["merge_difference"],
        "bytes": exported["bytes"],
        "parity": exported["parity"],
    }


PARTS = {"pairs": pairs, "chain": chain, "reuse": reuse, "shots": shots, "parity": parity}


class Store:
    """Cells by key in one JSON file, written after each."""

    def __init__(self, path: Path, again: bool):
        self.path = path
        if again:
            path.unlink(missing_ok=True)  # or the first save would bring all of its cells back
        self.content = json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "cells": {}}

    def has(self, key: str) -> bool:
        return key in self.content["cells"]

    def measure(self, key: str, run: Callable[..., dict], *args, **kwargs) -> None:
        if self.has(key):
            return
        start = time.time()
        self.content["cells"][key] = without_paths(run(*args, **kwargs))
        self.save()
        print(f"{key}: {time.time() - start:.0f} s", flush=True)

    def save(self) -> None:
        """Write the cells, beside those that another process has stored in the meantime."""
        if self.path.is_file():
            there = json.loads(self.path.read_text())["cells"]
            self.content["cells"] = {**there, **self.content["cells"]}
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def cells(self, prefix: str) -> dict[str, dict]:
        return {k: v for k, v in self.content["cells"].items() if k.startswith(f"{prefix}/")}


def without_paths(content):
    """A result as it is stored: without the run folders of this machine."""
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items() if key != "folder"}
    return content


def commit() -> str | None:
    """What is checked out here; None where there is no git, or only a copy of the files."""
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def machine() -> dict:
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gsforget": gsforget.__version__,
        "commit": commit(),
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(store: Store) -> None:
    for name in PAIRS:
        rows = list(store.cells(f"pairs/{'+'.join(name)}").values())
        if rows:
            gap = [r["h_mean"] - r["h_ideal"] for r in rows]
            print(
                f"{' + '.join(name):22} forget {spread([r['forget_acc_after'] for r in rows])} "
                f"retain drop {spread([r['retain_drop'] for r in rows])} H minus ideal {spread(gap)} "
                f"active {sorted(r['active'] for r in rows)} of {rows[0]['groups']} "
                f"train s {spread([r['train_seconds'] for r in rows])}"
            )
    for key, row in store.cells("chain").items():
        last = row["steps"][-1]
        worst = max(s["old_acc_after"] for s in row["steps"][1:])
        forgotten, retain = [s["forget_acc_after"] for s in row["steps"]], last["retain_acc_after"]
        print(f"{key}: old at most {worst:.2f} %, forget {forgotten}, retain {retain:.1f}")
    timing = {
        m: [r["train_seconds"] for r in store.cells(f"reuse/{m}").values()]
        for m in ("both", "no_reuse", "no_retiring", "neither")
    }
    if timing["both"] and timing["neither"]:
        rows = [r for m in ("both", "neither") for r in store.cells(f"reuse/{m}").values()]
        print(
            {m: spread(v) for m, v in timing.items() if v},
            "speed-up",
            round(statistics.median(timing["neither"]) / statistics.median(timing["both"]), 2),
        )
        print("H", [round(r["h_mean"], 2) for r in rows])
    for count in SHOTS:
        rows = list(store.cells(f"shots/{count}").values())
        if rows:
            forgotten, drops = ([r[k] for r in rows] for k in ("forget_acc_after", "retain_drop"))
            print(f"{count} shots: forget {spread(forgotten)} retain drop {spread(drops)}")
    for key, row in store.cells("parity").items():
        print(key, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    store = Store(RESULTS, args.again)
    with tempfile.TemporaryDirectory() as work:
        model, data = lay_out(Path(work) / "demo")
        for name, part in PARTS.items():
            if args.part in (name, "all"):
                part(store, model, data, Path(work) / "runs")
    report(store)


if __name__ == "__main__":
    main()
