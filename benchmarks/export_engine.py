"""Export and TensorRT for RTX build of ViT-B at fp16 on two cores: seconds and peak memory, as typed.

    python benchmarks/export_engine.py               # about two minutes

Two commands, three times each: from a model folder (`export --trt`, ONNX and parity included), and from its ONNX file as a
device does it (`export --trt MODEL.onnx`, without torch).  Weights are random and noisy, which changes no time.  The result
is `benchmarks/results/export_engine.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from forget_demo import ROOT, machine

from gsforget.folder import ModelConfig, save_model

RESULT = ROOT / "benchmarks" / "results" / "export_engine.json"
MODEL, CLASSES, CORES, TIMES = "vit_base_patch16_224", 1000, 2, 3
# The child reports its own peak, so that the memory of another run is not counted.
CHILD = """
import resource, sys
from gsforget.__main__ import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print("used", used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr)
sys.exit(status)
"""


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES)
    state = {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}
    names = [f"class {i}" for i in range(CLASSES)]
    folder.mkdir()
    save_model(state, ModelConfig(MODEL, {}, names, (3, 224, 224), (0.5,) * 3, (0.5,) * 3), folder)
    return folder


def run(*args: str) -> tuple[dict, dict]:
    """Seconds by the clock and of the processor, peak memory in MB, load beforehand; and the document of one command."""
    load = os.getloadavg()[0]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *args, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(CORES)},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    kilobytes, processor = done.stderr.rsplit("used ", 1)[1].split()
    figures = {"seconds": round(seconds, 2), "processor_seconds": round(float(processor), 2)}
    return figures | {"peak_mb": round(int(kilobytes) / 1e3), "load_average": round(load, 1)}, json.loads(done.stdout)


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    result: dict = {
        "machine": {**machine(), "cores": CORES},
        "model": MODEL,
        "weights": "random, with noise",
        "precision": "fp16",
        "targets": ["sm80", "sm86", "sm89", "sm120"],
        "runs": {"from_run": [], "from_file": []},
    }
    with tempfile.TemporaryDirectory() as work:
        folder = make_model(Path(work) / "model")
        rtx = ["--backend", "rtx", "--targets", ",".join(result["targets"])]
        for number in range(TIMES):
            out = Path(work) / f"out-{number}"
            both = ["export", str(folder), "--onnx", "--trt", "--precision", "fp16", "--out", str(out), *rtx]
            figures, document = run(*both)
            onnx_file, engine = document["artifacts"]
            result["runs"]["from_run"].append(figures)
            result["onnx_bytes"], result["engine_bytes"] = onnx_file["bytes"], engine["bytes"]
            result["parity"] = onnx_file["parity"]
            figures, again = run("export", "--trt", onnx_file["path"], "--out", str(out / "device"), *rtx)
            result["runs"]["from_file"].append(figures)
            result["same_engine_from_file"] = again["artifacts"][0]["sha256"] == engine["sha256"]
            print(number, result["runs"], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, rows in result["runs"].items():
        seconds, peak = sorted(r["seconds"] for r in rows), max(r["peak_mb"] for r in rows)
        busy = sorted(r["processor_seconds"] for r in rows)
        print(
            f"{name}: {seconds[len(seconds) // 2]} s ({seconds[0]} to {seconds[-1]}), of the processor "
            f"{busy[len(busy) // 2]} s, peak {peak} MB"
        )


if __name__ == "__main__":
    main()
