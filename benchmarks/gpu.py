"""The kernels on a GPU: right on it, and how fast, in parts that can be stopped and called again.

    python benchmarks/gpu.py --part tests              # first: no speed-up is printed before these are right
    python benchmarks/gpu.py --part ffn                # then ffn, prox, forget, memory
    python benchmarks/gpu.py --part ffn --write-table  # also the dispatcher's table for this GPU
    python benchmarks/gpu.py --device cpu --tiny --part ffn   # every part in seconds, no figures worth having

It takes torch, triton, timm, peft and what `forget` itself needs (scikit-learn, matplotlib, safetensors, Pillow).

Cells are stored in `benchmarks/results/<gpu>/<part>.json` as soon as they are measured; a call measures what is missing
and begins no cell after `--minutes`.  `--again` measures all.  Times are medians of CUDA events after a warm-up, the L2
cache flushed before each call, and the ways of a cell measured in turn.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import gpu_forget
import gpu_kernels
import torch
from forget_demo import ROOT, Store, machine
from gpu_timing import Setting

from gsforget.kernels.lora_ffn import dispatch

TABLES = Path(dispatch.__file__).parent / "tables"
RESULTS, TRIED = ROOT / "benchmarks" / "results", Path(tempfile.gettempdir()) / "gsforget-gpu"
PARTS = {
    "tests": gpu_kernels.tests,
    "ffn": gpu_kernels.ffn,
    "prox": gpu_kernels.prox,
    "forget": gpu_forget.forget,
    "memory": gpu_kernels.memory,
}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def description(device: str) -> dict:
    """Machine, versions and commit of a result."""
    import triton

    found = {**machine(), "device": device_name(device), "triton": triton.__version__, "seed": 0}
    if device == "cuda":
        found["cuda"], found["capability"] = torch.version.cuda, list(torch.cuda.get_device_capability())
    return found


def run_part(part: str, setting: Setting, store: Store, minutes: float) -> bool:
    """Measure the cells that are missing; False where time ran out before the last one."""
    end, longest = time.monotonic() + 60 * minutes, 0.0
    for key, measure, arguments in PARTS[part](setting):
        if store.has(key):
            continue
        if time.monotonic() + longest > end:
            return False
        begun = time.monotonic()
        store.measure(key, measure, setting, *arguments)
        longest = max(longest, time.monotonic() - begun)
    return True


def right(folder: Path) -> bool:
    """Whether the kernels were tested on this device, and nothing was wrong."""
    file = folder / "tests.json"
    cells = json.loads(file.read_text())["cells"].values() if file.is_file() else []
    return bool(cells) and all(cell["passed"] for cell in cells)


def report(part: str, store: Store, tested: bool) -> None:
    """Milliseconds of each way; how many times the others' speed ours has, where everything is right."""
    for key, cell in store.content["cells"].items():
        ways = cell.get("ways")
        if not ways:
            print(key, json.dumps(cell))
            continue
        print(key)
        agree = tested and all(row.get("agrees", True) for row in ways.values())
        for name, row in ways.items():
            other = f"  ours is {row['ms'] / ways['ours']['ms']:5.2f} times as fast" if agree and "ours" in ways else ""
            extra = {k: v for k, v in row.items() if k in ("peak_bytes", "saved_bytes", "launches", "agrees")}
            print(f"  {name:22} {row['ms']:9.4f} ms{other}  {json.dumps(extra)}")
    if not tested and part != "tests":
        print("no speed-up is printed: run --part tests first, and see that all of its cells passed")


def table_rows(cells: dict[str, dict]) -> list[dict]:
    """One row per stage and shape, as `dispatch` reads them: the way with the smaller sum of times over all ranks."""
    sums: dict[tuple, dict[str, float]] = {}
    for cell in cells.values():
        if not all(row.get("agrees", True) for row in cell["ways"].values()):
            continue
        for row in cell["stages"]:
            place = sums.setdefault(
                (row["stage"], row["dtype"], row["m"], row["n"], row["k"]), dict.fromkeys(dispatch.WAYS, 0.0)
            )
            for way in dispatch.WAYS:
                place[way] += row[way]
    names = ("stage", "dtype", "m", "n", "k")
    return [
        {**dict(zip(names, where)), "way": min(ms, key=lambda w: ms[w]), "ms": {w: round(t, 4) for w, t in ms.items()}}
        for where, ms in sorted(sums.items())
    ]


def write_table(store: Store, device: str, folder: Path) -> Path:
    file = folder / f"{dispatch.slug(device)}.json"
    rows = table_rows(store.content["cells"])
    if not rows:
        raise SystemExit("no cell to make a table from: run --part ffn first")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": store.content["machine"], "rows": rows}, indent=1) + "\n")
    return file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no cell that may end later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes and few rounds: tries the script")
    parser.add_argument(
        "--out", type=Path, help="folder of the result folders; default: benchmarks/results, when tiny a temporary one"
    )
    parser.add_argument("--write-table", action="store_true", help="write the dispatcher's table after --part ffn")
    parser.add_argument(
        "--tables", type=Path, help="folder of the tables; default: the package's, beside --out when tiny"
    )
    args = parser.parse_args(argv)
    if args.write_table and args.part != "ffn":
        parser.error("--write-table belongs to --part ffn")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA GPU here. Try the script with --device cpu --tiny.")
    out = args.out or (TRIED if args.tiny else RESULTS)
    name = device_name(args.device)
    setting = Setting(args.device, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"), args.tiny)
    folder = out / (dispatch.slug(name) + ("-tiny" if args.tiny else ""))
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / f"{args.part}.json", args.again)
    store.content["machine"] = description(args.device)
    done = run_part(args.part, setting, store, args.minutes)
    report(args.part, store, right(folder))
    if not done:
        print("not done: call again for the rest")
    elif args.write_table:
        print(write_table(store, name, args.tables or (out / "tables" if args.tiny else TABLES)))


if __name__ == "__main__":
    main()
