"""int8 along two erasures of the demo model: followed with scales that grow, with scales frozen, and calibrated anew.

    python benchmarks/int8_chain.py            # some minutes on two CPU cores
    python benchmarks/int8_chain.py --table    # prints what is stored

Each row is one ONNX file, compared with the run's float32 weights on all test images: the largest difference of a logit,
the best class, accuracies, and which share of the erasure is left in the dequantised weights.  *grown* is what gsforget
publishes, as a patch, whose size and proof are given; *frozen* is the same step with all scales as they were, whose range
cuts values off; *anew* is a calibration of the run itself.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from forget_demo import ROOT, Store, cell

from gsforget.demo.lay_out import lay_out
from gsforget.export.build import export_model, export_patch, parity
from gsforget.export.build.artifacts import Export
from gsforget.export.build.int8 import int8_weights, next_weight, read_int8
from gsforget.export.device.keys import new_keys
from gsforget.export.device.runtime import OnnxPredictor
from gsforget.lora.grid import read_delta
from gsforget.predict import TorchPredictor

RESULTS = ROOT / "benchmarks" / "results" / "int8_chain.json"
CHAIN = (("sandal", "sneaker"), ("bag",))
SHOWN = ("max_abs_diff", "mean_abs_diff", "top1_agreement", "forget_acc", "retain_acc")


def frozen(before: Path, run: Path, path: Path) -> tuple[float, float]:
    """Write the file after a step in which no scale changes.

    Returns which share of the erasure is left, and the largest change of a tensor as a share of its norm.
    """
    model = onnx.load(before)
    stored = {i.name: i for i in model.graph.initializer}
    left = whole = largest = 0.0
    for name, factors in read_delta(run / "delta.safetensors").items():
        weight, product = int8_weights(model)[name], factors.product().numpy()
        values, step = read_int8(model, weight), weight.spread()
        after = next_weight(values, step, step, product)
        left += float(((after.astype(float) - values) * step * product).sum())
        whole += float((product * product).sum())
        largest = max(largest, float(np.linalg.norm(product) / np.linalg.norm(values * step)))
        stored[weight.initializer].raw_data = np.ascontiguousarray(after.T if weight.transposed else after).tobytes()
    onnx.save(model, path)
    return left / whole, largest


def measure(run: Path, file: Path, data: Path) -> dict:
    export = Export(run, "int8", False, lambda _text: None)
    export.find_data(data)
    reference, artifact = TorchPredictor(export.model), OnnxPredictor(file, "cpu")
    found, _, _ = parity.evaluate(reference, artifact, export.info.preprocess, "int8", export.samples)
    return {k: found[k] for k in SHOWN}


def chain(root: Path, store: Store) -> None:
    model, data = lay_out(root)
    new_keys(root / "keys")
    key, before = root / "keys" / "signing.key", model
    held = Path(export_model(model, onnx=True, precision="int8", data=data, out=root / "0")["artifacts"][0]["path"])
    store.measure("0/anew", measure, model, held, data)
    cut = held
    for sequence, classes in enumerate(CHAIN, 1):
        run = Path(cell(before, data, classes, root / "runs")["folder"])
        made = export_patch(run, previous=held, precision="int8", key=key, data=data, out=root / str(sequence))
        package = next(a for a in made["artifacts"] if a["kind"] == "patch")
        after = Path(next(a["path"] for a in made["artifacts"] if a["kind"] == "onnx"))
        proven = {
            "patch_bytes": package["bytes"],
            "file_bytes": after.stat().st_size,
            "patched_equals_rebuilt": package["replaces"][0]["patched_equals_rebuilt"],
        }
        store.measure(f"{sequence}/grown", lambda: {**measure(run, after, data), **proven, "kept": kept(after)})  # noqa: B023
        share, largest = frozen(cut, run, root / f"frozen-{sequence}.onnx")
        cut = root / f"frozen-{sequence}.onnx"
        figures = {"kept": round(share, 4), "largest_change": round(largest, 3)}
        store.measure(f"{sequence}/frozen", lambda: {**measure(run, cut, data), **figures})  # noqa: B023
        anew = export_model(run, onnx=True, precision="int8", data=data, out=root / f"anew-{sequence}")["artifacts"][0]
        store.measure(f"{sequence}/anew", measure, run, Path(anew["path"]), data)
        before, held = run, after


def kept(file: Path) -> float:
    from gsforget.export.device.metadata import read_sidecar

    return (read_sidecar(file) or {})["erasure_kept"]


def report(store: Store) -> None:
    print(
        f"{'erasures':<9} {'scales':<7} {'left':>7} {'max diff':>9} {'top-1':>7} {'forgotten':>10} {'retained':>9} {'patch':>9}"
    )
    for key, row in sorted(store.content["cells"].items()):
        sequence, scales = key.split("/")
        gone = "-" if row["forget_acc"] is None else f"{row['forget_acc']:.1f} %"
        left = f"{100 * row['kept']:.1f} %" if "kept" in row else "-"
        patch = f"{row['patch_bytes'] / 1e3:.0f} kB" if "patch_bytes" in row else "-"
        print(
            f"{sequence:<9} {scales:<7} {left:>7} {row['max_abs_diff']:>9.2f} {row['top1_agreement']:>6.1f} % {gone:>9} "
            f"{row['retain_acc']:>7.1f} % {patch:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    args = parser.parse_args()
    store = Store(RESULTS, not args.table)
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            chain(Path(folder), store)
    report(store)


if __name__ == "__main__":
    main()
