"""Is a patched artifact the rebuilt one, how small is a patch, how long does it take: real sizes, no training.

    python benchmarks/patches.py                                  # all cells, about half an hour on two CPU cores
    python benchmarks/patches.py --models vit_base --precisions fp16
    python benchmarks/patches.py --table                          # prints what is stored

Weights are timm's random initialisation with seeded noise on every parameter, so that no two tensors are equal; the erasure
is a seeded change of rank 8 of both feed-forward matrices in all blocks, or in the last half of them, put on the integer
grid.  Sizes, times and `patched == rebuilt` carry over to trained weights; accuracies do not, and none are given.

Seconds of export and build alone are those of `export_engine.py`.  Every cell runs in a process of its own, so that its
peak memory is its own, and is stored in `benchmarks/results/patches.json` as soon as it is measured; a second call measures
what is missing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from forget_demo import ROOT, Store
from safetensors.torch import save

from gsforget.checkpoint import read_weights
from gsforget.export.build import artifacts, calibrate, export_model, export_patch, parity
from gsforget.export.build.edits import changes_between, engine_edits
from gsforget.export.build.locate import NotLocated, OnnxBytes
from gsforget.export.device.apply import apply
from gsforget.export.device.keys import new_keys
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, build_model, is_model_folder, read_config, save_model, sha256, write_file
from gsforget.lora.grid import merge, read_delta, to_grid

RESULTS = ROOT / "benchmarks" / "results" / "patches.json"
MODELS = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit3_small": "deit3_small_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
BLOCKS = ("all", "half")
RANK = 8
REPEATS = 3
IMAGES = 4  # on which parity is checked here: no figure of it is reported
# Norm of a change, as a share of its weight's: so large that the answers of an untrained model change as those of a trained one
# do by an erasure, more than rounding changes them.
STRENGTH = {"fp32": 0.1, "fp16": 0.1, "bf16": 0.3, "int8": 0.5}
TARGETS = ("sm80", "sm86", "sm89", "sm120")


class Clock:
    """Seconds by stage, from the reports of progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stage, self.since = "start", time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + now - self.since, 2)
        self.stage, self.since = text, now

    def stop(self) -> dict[str, float]:
        self("end")
        return {stage: seconds for stage, seconds in self.seconds.items() if seconds >= 0.05}


def make_original(name: str, folder: Path) -> None:
    config = ModelConfig(
        MODELS[name],
        {},
        [f"class {i}" for i in range(1000)],
        (3, 224, 224),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    torch.manual_seed(0)
    model = build_model(config)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    folder.mkdir(parents=True)
    save_model(model.state_dict(), config, folder)


def make_run(
    parent: Path,
    folder: Path,
    strength: float,
    *,
    erased: int = 7,
    seed: int = 2,
    blocks: str = "all",
) -> None:
    """A run folder whose erasure is a seeded change of rank 8 of the feed-forward matrices of all blocks, or the last half."""
    state, config = read_weights(parent / "model.safetensors", as_saved=True), read_config(parent)
    names = sorted((n for n in state if n.endswith((".mlp.fc1.weight", ".mlp.fc2.weight"))), key=position)
    names = names[len(names) // 2 :] if blocks == "half" else names
    generator, delta = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, columns = state[name].shape
        a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        b *= strength * state[name].norm() / (b @ a).norm()
        delta[name] = to_grid(a, b)
        state[name] = merge(state[name], delta[name])
    folder.mkdir(parents=True)
    after = config.erase([erased])
    save_model(state, after, folder)
    write_file(folder / "delta.safetensors", save({k: v for n, f in delta.items() for k, v in f.tensors(n).items()}))
    request = {
        "parent": str(parent),
        "parent_sha256": sha256(parent / "model.safetensors"),
        "names": config.class_names,
    }
    write_file(folder / "request.json", json.dumps({"sequence": after.sequence, **request}))


def position(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def cell(work: Path, name: str, precision: str, blocks: str) -> dict:
    """One patch: is it the rebuild, its size, and its times."""
    os.chdir(work)
    parity.SYNTHETIC = IMAGES
    if precision == "int8":  # the ranges of an untrained model are measured on noise
        artifacts.Export.calibration_data = lambda self: None
        calibrate.calibration_images = lambda _data, _names, _erased, _forgotten, preprocess: noise(preprocess)
    original, run = Path(name), Path(f"{name}-{blocks}")
    if not is_model_folder(original):
        make_original(name, original)
    if not is_model_folder(run):
        make_run(original, run, STRENGTH[precision], blocks=blocks)
    key = Path("keys/signing.key")
    if not key.exists():
        new_keys(key.parent)
    out = Path(f"{name}-{precision}")
    base = out / f"model-0000-{precision}.onnx"
    if not base.is_file():
        export_model(original, onnx=True, trt=True, backend="rtx", targets=TARGETS, precision=precision, out=out)
    clock = Clock()
    start = time.perf_counter()
    made = export_patch(
        run, previous=base, precision=precision, key=key, out=f"{name}-{precision}-{blocks}", progress=clock
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (engine,) = out.glob("*.engine")
    return {
        "load_average": [round(n, 1) for n in os.getloadavg()],
        **sizes(made),
        "seconds": {"total": round(seconds, 1), **clock.stop()},
        "peak_bytes": peak,
        "locate_seconds": locate(base, Path(made["artifacts"][-2]["path"]), engine, run, precision),
        "apply": {kind: time_apply(file, made, key.parent) for kind, file in (("onnx", base), ("engine", engine))},
        "not_tested": [n for n in made["not_tested"] if "whole file" in n],
    }


def noise(preprocess: Preprocess) -> Iterator[np.ndarray]:
    """Two batches that stand in for images."""
    rng = np.random.default_rng(3)
    for _ in range(2):
        yield rng.standard_normal((IMAGES, *preprocess.input_size)).astype(np.float32)


def sizes(made: dict) -> dict:
    patch = next((a for a in made["artifacts"] if a["kind"] == "patch"), None)
    files = {a["kind"]: a["bytes"] for a in made["artifacts"] if a["kind"] in ("onnx", "engine")}
    proven = {r["kind"]: r["patched_equals_rebuilt"] for r in patch["replaces"]} if patch else {}
    return {
        "patched_equals_rebuilt": {kind: bool(proven.get(kind)) for kind in files},
        "patch_bytes": patch["bytes"] if patch else None,
        "tensors": len(patch["tensors"]) if patch else 0,
        **{f"{kind}_bytes": size for kind, size in files.items()},
        "engine_over_patch": round(files["engine"] / patch["bytes"], 1) if patch else None,
    }


def locate(old: Path, new: Path, engine: Path, run: Path, precision: str) -> dict[str, float | None]:
    """Seconds to find the tensors in the ONNX file, by its structure, and in the engine, by value."""
    built = engine.read_bytes()
    delta = read_delta(run / "delta.safetensors")
    start = time.perf_counter()
    changes, _ = changes_between(OnnxBytes.read(old), OnnxBytes.read(new), delta, precision)
    middle = time.perf_counter()
    try:
        engine_edits(built, changes)
    except NotLocated:
        return {"onnx": round(middle - start, 3), "engine": None}
    return {"onnx": round(middle - start, 3), "engine": round(time.perf_counter() - middle, 3)}


def time_apply(file: Path, made: dict, keys: Path) -> dict | None:
    """`apply` on a device that holds one file: the fastest of three calls, and what each of its steps took.

    With the ONNX file, the last step but one is to load the new model and ask it the known answers; an engine cannot be
    loaded here.
    """
    patch = made["artifacts"][0]
    if patch["kind"] != "patch" or not any(r["kind"] == file.suffix[1:] for r in patch["replaces"]):
        return None
    wanted = next(a["sha256"] for a in made["artifacts"] if a["kind"] == file.suffix[1:])
    calls = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory(dir=".") as device:
            apply([file], device, trust=keys / "signing.pub.json", device="cpu")
            start, busy = time.perf_counter(), time.process_time()
            applied = apply(patch["path"], device, device="cpu")
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            (result,) = [p for p in Path(device, "models").iterdir() if p.suffix == file.suffix]
            steps = {step: round(taken, 3) for step, taken in applied.seconds.items()}
            same = sha256(result) == wanted
            calls.append(
                {"seconds": round(seconds, 3), "cpu_seconds": round(busy, 3), "steps": steps, "same_bytes": same}
            )
    return min(calls, key=lambda call: call["seconds"])


def in_process(work: Path, key: str) -> dict:
    """Measure a cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", key, "--dir", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{key} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one(work: Path, key: str) -> dict:
    name, precision, what = key.split("/")
    return cell(work, name, precision, what)


def report(store: Store) -> None:
    print(
        f"{'model':<12} {'prec.':<5} {'blocks':<6} {'ONNX':>5} {'RTX':>5} {'patch MB':>9} {'engine MB':>10} {'ratio':>6} "
        f"{'locate s':>9} {'apply s (engine)':>17} {'apply s (ONNX)':>15} {'peak GB':>8}"
    )
    for key, row in sorted(store.content["cells"].items(), key=lambda item: order(item[0])):
        name, precision, what = key.split("/")
        if what == "build":
            print(
                f"{name:<12} {precision:<5} export and RTX build: {row['seconds']['total']} s, {gigabytes(row)} GB at most"
            )
            continue
        same = {k: "same" if v else "FULL" for k, v in row["patched_equals_rebuilt"].items()}
        on = {k: "-" if v is None else f"{v['seconds']:.2f}" for k, v in row["apply"].items()}
        patch = "-" if row["patch_bytes"] is None else f"{row['patch_bytes'] / 1e6:.3f}"
        print(
            f"{name:<12} {precision:<5} {what:<6} {same['onnx']:>5} {same['engine']:>5} {patch:>9} "
            f"{row['engine_bytes'] / 1e6:>10.1f} {row['engine_over_patch'] or 0:>6} "
            f"{row['locate_seconds']['engine'] or 0:>9} {on['engine']:>17} {on['onnx']:>15} {gigabytes(row):>8}"
        )


def order(key: str) -> tuple[int, int, str]:
    name, precision, what = key.split("/")
    return list(MODELS).index(name), PRECISIONS.index(precision), what


def gigabytes(row: dict) -> float:
    return round(row["peak_bytes"] / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--dir", type=Path, help="where models and artifacts lie meanwhile; default: a temporary folder"
    )
    parser.add_argument("--again", action="store_true", help="measure all cells anew")
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(one(args.dir, args.cell)))
        return
    store = Store(args.results, args.again)
    for name in [] if args.table else args.models.split(","):
        for precision in args.precisions.split(","):
            keys = [f"{name}/{precision}/{what}" for what in BLOCKS]
            with tempfile.TemporaryDirectory(dir=args.dir) as work:
                for key in keys:
                    store.measure(key, in_process, Path(work), key)
    report(store)


if __name__ == "__main__":
    main()
