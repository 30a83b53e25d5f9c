"""Serving on a device: hot swaps under load, what the runtime adds to ONNX Runtime, how large and how quick to start it is.

    python benchmarks/serving.py                  # all parts, about half an hour on two CPU cores, most of it for packages
    python benchmarks/serving.py --part swaps     # swaps, overhead or install

*swaps*: `gsforget serve` in a process of its own, 1,000 requests from 8 client threads in this one; then as many, and more
until all of 20 signed patches are applied, one after every 40 answers or as soon as the one before it is done.  A request
fails when it is not answered with 200; it is stale when it was sent after a swap was reported and answered by an older
sequence.  The demo model's weights are trained;
ViT-S has random ones, with noise.  The erasures are seeded changes of rank 8 in all blocks, as in `patches.py`.

Cells are stored in `benchmarks/results/serving.json` as soon as they are measured.  Only loopback addresses are used.
"""

import argparse
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from forget_demo import ROOT, Store
from patches import make_original, make_run
from PIL import Image

from gsforget.demo.lay_out import lay_out
from gsforget.export.build import export_model, export_patch, parity
from gsforget.export.device.apply import apply
from gsforget.export.device.handover import hand_over
from gsforget.export.device.keys import new_keys
from gsforget.export.device.runtime import OnnxPredictor

RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
SWAPS, REQUESTS, CLIENTS, PRECISION = 20, 1000, 8, "fp32"
EVERY = 40  # answers between two swaps
STRENGTH = 0.03  # norm of a change, as a share of its weight's
SIDES = {"demo": 28, "vit_small": 224}
PATIENCE = 120.0  # seconds for an answer, or for a server to start
parity.SYNTHETIC = 4  # images that each export of the chain is compared on; nothing here depends on them


def make_chain(name: str, work: Path) -> tuple[Path, list[Path], Path]:
    """The original as an ONNX file, its patches, and the key to trust."""
    original = work / name / "model"
    if name == "demo":
        original, _ = lay_out(work / name)
    else:
        make_original(name, original)
    new_keys(work / name / "keys")
    out = work / name / "out"
    first = Path(export_model(original, onnx=True, precision=PRECISION, out=out / "0")["artifacts"][0]["path"])
    before, held, patches = original, first, []
    for sequence in range(1, SWAPS + 1):
        run = work / name / f"forget-{sequence:04d}"
        make_run(before, run, STRENGTH, erased=0, seed=sequence)
        made = export_patch(
            run, previous=held, precision=PRECISION, key=work / name / "keys" / "signing.key", out=out / str(sequence)
        )
        patches += [Path(a["path"]) for a in made["artifacts"] if a["kind"] == "patch"]
        held = next(Path(a["path"]) for a in made["artifacts"] if a["kind"] == "onnx")
        before = run
        print(f"{name}: patch {sequence} of {SWAPS}", flush=True)
    return first, patches, work / name / "keys" / "signing.pub.json"


class Serving:
    """`gsforget serve` of a device folder, in a process of its own."""

    def __init__(self, device: Path, python: Path = Path(sys.executable), folder: Path = ROOT):
        command = [str(python), "-m", "gsforget", "serve", str(device), "--port", "0", "--device", "cpu", "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, env=environment(python)
        )
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            if not lines[-1]:
                raise SystemExit("the server did not start")
        self.url = json.loads("".join(lines))["url"]

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)


def environment(python: Path) -> dict[str, str]:
    """Without PYTHONPATH where the package is installed."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return kept | ({"PYTHONPATH": str(ROOT)} if python == Path(sys.executable) else {})


class Load:
    """Requests from several threads, each with a connection of its own that it keeps.

    At least ``requests`` of them; with ``until_released``, as many more as it takes until ``release``.
    """

    def __init__(self, url: str, image: bytes, requests: int, until_released: bool = False):
        self.url, self.image, self.left, self.held = url, image, requests, until_released
        self.reported = 0
        self.seconds: list[float] = []
        self.failed, self.stale, self.late, self.answered = 0, 0, 0, 0
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]

    def run(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def release(self) -> None:
        with self.changed:
            self.held = False

    def join(self) -> dict:
        for thread in self.threads:
            thread.join()
        return {
            "requests": self.answered + self.failed,
            "failed": self.failed,
            "stale": self.stale,
            "arrived_after_a_report_from_before": self.late,
            "milliseconds": {
                "median": round(1e3 * statistics.median(self.seconds), 2),
                "p99": round(1e3 * float(np.percentile(self.seconds, 99)), 2),
                "most": round(1e3 * max(self.seconds), 2),
            },
        }

    def _client(self) -> None:
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=PATIENCE)
        while True:
            with self.changed:
                if self.left <= 0 and not self.held:
                    return
                self.left -= 1
                least = self.reported
            start = time.perf_counter()
            try:
                connection.request("POST", "/infer", self.image)
                answer = connection.getresponse()
                document = json.loads(answer.read())
                good = answer.status == 200
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                good = False
            took = time.perf_counter() - start
            with self.changed:
                if good:
                    self.answered += 1
                    self.seconds.append(took)
                    self.stale += document["sequence"] < least
                    self.late += least <= document["sequence"] < self.reported
                else:
                    self.failed += 1
                self.changed.notify_all()


def swaps(store: Store, work: Path) -> None:
    for name in SIDES:
        keys = [f"swaps/{name}/{kind}" for kind in ("quiet", "swapping")]
        if not all(store.has(key) for key in keys):
            first, patches, trust = make_chain(name, work)
            store.measure(keys[0], under_load, name, first, [], trust, work)
            store.measure(keys[1], under_load, name, first, patches, trust, work)


def under_load(name: str, first: Path, patches: list[Path], trust: Path, work: Path) -> dict:
    device = Path(tempfile.mkdtemp(dir=work)) / "device"
    apply(first, device, trust=trust)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDES[name], SIDES[name], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    seconds: list[float] = []
    with Serving(device) as server:
        Load(server.url, stream.getvalue(), 50).run().join()  # the first answers of a session are slow
        load = Load(server.url, stream.getvalue(), REQUESTS, bool(patches)).run()
        begun = time.perf_counter()
        for number, patch in enumerate(patches, 1):
            with load.changed:
                load.changed.wait_for(lambda due=number * EVERY: load.answered + load.failed >= due, PATIENCE)
            start = time.perf_counter()
            done = hand_over([patch], device)
            if done is None or done["serving"]["sequence"] != number:
                raise SystemExit(f"patch {number} did not reach the server")
            with load.changed:
                load.reported = number
            seconds.append(time.perf_counter() - start)
        load.release()
        figures = load.join()
        total = time.perf_counter() - begun
    figures |= {"seconds": round(total, 2), "load_average": [round(n, 1) for n in os.getloadavg()]}
    if patches:
        figures |= {
            "swaps": len(patches),
            "swap_seconds": {"median": round(statistics.median(seconds), 3), "most": round(max(seconds), 3)},
        }
    return figures


def overhead(store: Store, work: Path) -> None:
    if store.has("overhead/vit_small/8"):
        return
    make_original("vit_small", work / "overhead")
    made = export_model(work / "overhead", onnx=True, out=work / "overhead-out")
    store.measure("overhead/vit_small/8", runtime_overhead, Path(made["artifacts"][0]["path"]))


def runtime_overhead(onnx_file: Path, batch: int = 8, times: int = 25) -> dict:
    """OnnxPredictor against the bare call of its own session, in turn."""
    predictor = OnnxPredictor(onnx_file, "cpu")
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    bare_call = predictor._session.run
    names, feed = [predictor.info.output_name], {predictor.info.input_name: images}
    seconds: dict[str, list[float]] = {"bare": [], "predictor": []}
    for number in range(2 * times + 4):
        kind = ("bare", "predictor")[number % 2]
        start = time.perf_counter()
        _ = bare_call(names, feed) if kind == "bare" else predictor.predict(images)
        if number >= 4:
            seconds[kind].append(time.perf_counter() - start)
    bare, ours = (statistics.median(seconds[kind]) for kind in ("bare", "predictor"))
    return {
        "batch": batch,
        "bare_ms": round(1e3 * bare, 2),
        "predictor_ms": round(1e3 * ours, 2),
        "overhead_percent": round(100 * (ours / bare - 1), 2),
        "least_percent": round(100 * (min(seconds["predictor"]) / min(seconds["bare"]) - 1), 2),
        "load_average": [round(n, 1) for n in os.getloadavg()],
    }


def install(store: Store, work: Path) -> None:
    store.measure("install/onnxruntime", device_install, work)


def device_install(work: Path) -> dict:
    """A virtual environment as a device gets it: its size, and seconds until the first answer."""
    folder = work / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    requirements = ROOT / "gsforget" / "export" / "device" / "requirements.txt"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    empty = size_of(folder)
    subprocess.run([*pip, "-r", str(requirements)], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    original, data = lay_out(work / "first")
    made = export_model(original, onnx=True, out=work / "first-out")
    model, device = Path(made["artifacts"][0]["path"]), work / "first-device"
    apply(model, device)
    image = next((data / "test").rglob("*.png"))
    command = [str(python), "-m", "gsforget", "infer", str(device), str(image), "--json"]
    typed, served = [], []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=work, env=environment(python))
        typed.append(time.perf_counter() - start)
        start = time.perf_counter()
        with Serving(device, python, work) as server:
            if Load(server.url, image.read_bytes(), 1).run().join()["failed"]:
                raise SystemExit("the first request failed")
            served.append(time.perf_counter() - start)
    packages = subprocess.run([*pip[:3], "list", "--format=json"], capture_output=True, text=True, check=True)
    return {
        "bytes": size_of(folder),
        "bytes_of_pip_alone": empty,
        "packages": sorted(p["name"] for p in json.loads(packages.stdout)),
        "seconds_to_first_answer": {
            "infer": round(statistics.median(typed), 2),
            "serve": round(statistics.median(served), 2),
        },
        "load_average": [round(n, 1) for n in os.getloadavg()],
    }


def size_of(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


PARTS = {"overhead": overhead, "install": install, "swaps": swaps}


def report(store: Store) -> None:
    for key, figures in store.content["cells"].items():
        print(key, json.dumps(figures))
    for name in SIDES:
        cells = store.cells(f"swaps/{name}")
        if len(cells) == 2:
            quiet, swapping = (cells[f"swaps/{name}/{kind}"]["milliseconds"]["p99"] for kind in ("quiet", "swapping"))
            print(f"{name}: p99 {quiet} ms quiet, {swapping} ms during swaps, {swapping / quiet:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    store = Store(RESULTS, args.again)
    with tempfile.TemporaryDirectory() as work:
        for name, part in PARTS.items():
            if args.part in (name, "all"):
                part(store, Path(work))
    report(store)


if __name__ == "__main__":
    main()
