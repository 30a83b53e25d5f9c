"""The LoRA feed-forward step on a CPU against PEFT, LoRA layer by layer, and the network without LoRA.

    python benchmarks/kernels.py              # tests first, then about six minutes on two cores
    python benchmarks/kernels.py --draw       # the picture and the table from the stored figures; what is counted anew

ViT-S, float32, two threads, forward and backward with the gradient to the input; ways are measured in turn.  What one step
costs on a GPU is counted beside it (see `counted.py`), not measured.  Writes `benchmarks/results/kernels.json` and
`docs/images/kernels.png`; no speed-up is printed or drawn where a test fails or a way computes something else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import counted
import ffn_ways
import torch
from ffn_ways import DEPTHS, TOKENS, WIDTHS, Problem, Step
from forget_demo import ROOT, Store, machine

RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "kernels.json", ROOT / "docs" / "images" / "kernels.png"
RANKS, BATCHES, THREADS, ROUNDS = (8, 16), (1, 8, 50), 2, {1: 200, 8: 60, 50: 21}
AGREES = 1e-5  # relative, of y and every gradient, from float64
LABELS = {"peft": "PEFT", "hooks": "layer by layer", "ours": "ours", "frozen": "without LoRA"}
WAYS = {"frozen": ffn_ways.frozen, "peft": ffn_ways.peft, "hooks": ffn_ways.hooks, "ours": ffn_ways.ours}


def tests_pass() -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "kernels")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip())
    return done.returncode == 0


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def errors(ways: dict[str, Step], p: Problem) -> dict[str, float]:
    """How far each way is from float64, in y and every gradient."""
    exact, exact_frozen = ffn_ways.truth(p), ffn_ways.truth_frozen(p)
    return {name: ffn_ways.off(step(), exact_frozen if name == "frozen" else exact) for name, step in ways.items()}


def measure(k: int, n: int, batch: int, tokens: int, rank: int, rounds: int) -> dict:
    p = ffn_ways.make_problem(k, n, batch, tokens, rank, torch.float32, "cpu")
    ways = {name: make(p) for name, make in WAYS.items()}
    far = errors(ways, p)
    wrong = [name for name, error in far.items() if not error <= AGREES]
    if wrong:
        raise SystemExit(f"not the same result as in float64: {', '.join(wrong)} ({far})")
    times = ffn_ways.interleaved(ways, rounds, seconds_of)
    return {
        "rounds": rounds,
        "load_average": [round(v, 1) for v in os.getloadavg()],
        "ways": {
            name: {
                **ffn_ways.summary(times[name]),
                "saved_bytes": ffn_ways.saved_bytes(ways[name], p),
                "error": float(f"{far[name]:.1e}"),
            }
            for name in ways
        },
    }


def counted_for(name: str, batch: int = 50, rank: int = 16) -> dict:
    k, n = WIDTHS[name]
    size = (batch * TOKENS, k, n, rank)
    return {
        way: {**counted.count(way, *size), "kept_mb": round(counted.kept_bytes(way, *size) / 1e6, 1)}
        for way in counted.WAYS
    }


def report(content: dict) -> None:
    print(
        f"{'batch':>5} {'rank':>4} {'way':15} {'ms':>9} {'times PEFT':>10} {'by least':>8} {'of frozen':>9} {'kept MB':>8}"
    )
    for key, cell in content["cells"].items():
        _, batch, rank = key.split("/")
        ways = cell["ways"]
        for name, row in ways.items():
            least = ways["peft"]["least"] / row["least"]
            speed, share = ways["peft"]["ms"] / row["ms"], row["ms"] / ways["frozen"]["ms"]
            kept = row["saved_bytes"] / 1e6
            print(
                f"{batch:>5} {rank:>4} {LABELS[name]:15} {row['ms']:9.2f} {speed:10.2f} {least:8.2f} {share:9.2f} {kept:8.1f}"
            )
    print("on an H200, counted, not measured; 50 x 197 tokens, rank 16:")
    for name, ways in content["counted"].items():
        for way, row in ways.items():
            speed = ways["peft"]["microseconds"] / row["microseconds"]
            print(
                f"{name:10} {way:7} {row['microseconds']:7.0f} us {speed:5.2f} times PEFT {row['kept_mb']:6.0f} MB kept"
            )

    print("one proximal step of all groups, rank 16, counted:")
    for name, ways in content["counted_prox"].items():
        for way, row in ways.items():
            print(
                f"{name:10} {way:7} {row['launches']:4} launches {row['megabytes']:8.1f} MB"
                f" and {row['megabytes_from_cache']:6.1f} MB from the L2 cache"
            )


def draw(content: dict, path: Path = PICTURE) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_speed(left, content)
    draw_roofline(right, content["counted"])
    figure.savefig(path, dpi=130)


BLUE, RED, GREY, DARK = "#2b6ca3", "#c23b22", "#9aa0a6", "#3c4043"
COLOURS = {"ours": BLUE, "peft": RED, "hooks": GREY, "frozen": DARK, "addmm": GREY}


def draw_speed(axes, content: dict) -> None:
    """Speed relative to PEFT over the batch; solid: rank 16, dashed: rank 8."""
    for name in ("frozen", "ours", "hooks", "peft"):
        for rank, style in ((16, "-"), (8, "--")):
            rows = [content["cells"].get(f"cpu/{b}/{rank}") for b in BATCHES]
            pairs = [(b, c["ways"]["peft"]["ms"] / c["ways"][name]["ms"]) for b, c in zip(BATCHES, rows) if c]
            if name == "peft" and rank == 8:
                continue
            label = LABELS[name] if rank == 16 else None
            axes.plot(
                *zip(*pairs), style, color=COLOURS[name], marker="o", ms=4, lw=2 if name == "ours" else 1.3, label=label
            )
    axes.set_xscale("log")
    axes.set_xticks(BATCHES, [str(b) for b in BATCHES])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a batch (197 tokens each)")
    axes.set_ylabel("speed, PEFT = 1")
    axes.set_title("Measured on two CPU cores: ViT-S, float32\n(solid: rank 16, dashed: rank 8)", fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_roofline(axes, figures: dict) -> None:
    """Roof of an H200, and where the operations of each way, one after another, stay below it."""
    peak, slope = counted.PEAK / 1e12, counted.BANDWIDTH / 1e12
    low, high = 40, 1000
    axes.plot([low, peak / slope, high], [low * slope, peak, peak], color="black", lw=1.3)
    axes.annotate("memory", (62, 62 * slope), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=9)
    axes.annotate("arithmetic", (high, peak), xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9)
    labels = {"peft": "PEFT", "addmm": "vendor's products, addmm_", "ours": "ours", "frozen": "without LoRA"}
    marks = {"vit_small": "o", "vit_base": "s", "vit_large": "^"}
    for way, label in labels.items():
        for name, ways in figures.items():
            row = ways[way]
            fill = "none" if way == "addmm" else COLOURS[way]
            where, shown = (row["flop_per_byte"], row["tflop_per_second"]), label if name == "vit_base" else None
            axes.plot(*where, marks[name], color=COLOURS[way], mfc=fill, ms=7, label=shown)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    ticks_x, ticks_y = (50, 100, 200, 500, 1000), (200, 300, 500, 800)
    axes.set_xticks(ticks_x, [str(t) for t in ticks_x])
    axes.set_yticks(ticks_y, [str(t) for t in ticks_y])
    axes.set_ylim(160, 1000)
    axes.minorticks_off()
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        "H200, bfloat16, rank 16, 50 images: counted, not measured\n(circle ViT-S, square -B, triangle -L)", fontsize=10
    )
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure all cells, not only those that are missing")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.draw:
        if not tests_pass():
            raise SystemExit("the kernels' tests fail: no speed-up is printed")
        torch.set_num_threads(THREADS)
        store = Store(RESULTS, args.again)
        store.content["machine"] = {**machine(), "seed": 0}
        for batch in BATCHES:
            for rank in RANKS:
                store.measure(f"cpu/{batch}/{rank}", measure, *WIDTHS["vit_small"], batch, TOKENS, rank, ROUNDS[batch])
        store.save()
    content = json.loads(RESULTS.read_text())
    content["counted"] = {name: counted_for(name) for name in WIDTHS}
    content["counted_prox"] = {name: counted.prox(DEPTHS[name], 2 * 16 * sum(WIDTHS[name])) for name in WIDTHS}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    report(content)
    draw(content)


if __name__ == "__main__":
    main()
