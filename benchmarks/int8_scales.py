"""What int8 scales that grow save over scales that stay, by the size of the erasure: one step of the chain, no training.

    python benchmarks/int8_scales.py            # half a minute
    python benchmarks/int8_scales.py --table    # prints what is stored

The weights are those of `patches.py`, and so are the changes: random, of rank 8, of both feed-forward matrices in all blocks
of ViT-Ti.  Given are the share of the change that is left in the dequantised weights, as an export measures it, and how far
these are from the exact ones, as a share of the change.
"""

import argparse

import numpy as np
import timm
import torch
from forget_demo import ROOT, Store

from gsforget.export.build.int8 import FROZEN, Int8Weight, next_scale, next_weight

RESULTS = ROOT / "benchmarks" / "results" / "int8_scales.json"
RATIOS = (0.03, 0.1, 0.3, 0.5, 1.0)  # norm of a change, as a share of its weight's
RANK = 8


def weights() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    noise = torch.Generator().manual_seed(1)
    found = {}
    with torch.no_grad():
        for name, parameter in timm.create_model("vit_tiny_patch16_224").named_parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
            if name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight")):
                found[name] = parameter.double().numpy().copy()
    return found


def step(found: dict[str, np.ndarray], ratio: float) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(2)
    left = {"frozen": 0.0, "grown": 0.0}
    off, whole = dict(left), 0.0
    for name, weight in found.items():
        rows, columns = weight.shape
        a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        change = (b @ a).double().numpy()
        change *= ratio * np.linalg.norm(weight) / np.linalg.norm(change)
        scale = (np.abs(weight).max(1) / 127).astype(np.float32)
        before = Int8Weight(name, f"{name}_scale", False, scale, 0)
        values = np.rint(weight / before.spread()).astype(np.int8)
        whole += float((change * change).sum())
        for kind, after in (("frozen", scale), ("grown", next_scale(values, before, change))):
            spread = after.astype(np.float64)[:, None]
            new = next_weight(values, before.spread(), spread, change) * spread
            left[kind] += float(((new - values * before.spread()) * change).sum())
            off[kind] += float(((new - weight - change) ** 2).sum())
    return {k: {"left": round(left[k] / whole, 4), "off": round((off[k] / whole) ** 0.5, 4)} for k in left}


def report(store: Store) -> None:
    print(f"{'size':>5} {'left, frozen':>13} {'grown':>7} {'off, frozen':>12} {'grown':>7}   scales")
    for key, row in sorted(store.content["cells"].items(), key=lambda item: float(item[0])):
        stay = row["frozen"]["left"] >= FROZEN * row["grown"]["left"]
        shown = [f"{100 * row[k][what]:.1f} %" for what in ("left", "off") for k in ("frozen", "grown")]
        print("{:>5} {:>13} {:>7} {:>12} {:>7}   {}".format(key, *shown, "stay" if stay else "grow"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is stored, measure nothing")
    args = parser.parse_args()
    store = Store(RESULTS, not args.table)
    found = {} if args.table else weights()
    for ratio in RATIOS if found else ():
        store.measure(str(ratio), step, found, ratio)
    report(store)


if __name__ == "__main__":
    main()
