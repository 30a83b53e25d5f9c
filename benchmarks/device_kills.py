"""`gsforget apply` killed (SIGKILL) at 200 random moments, as a process of its own; then the device starts up again.

    python benchmarks/device_kills.py                # a few minutes

Half of the moments are spread over the whole call, half over the part of it that writes.  After each kill the device is
opened: it must give the old model where no intent record was written, else the new one, and no other bytes may have been
loaded on the way.  Every third kill is followed by a kill of the start-up.  The result is
`benchmarks/results/device_kills.json`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from forget_demo import ROOT, machine

from gsforget.export.device import opening
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.files import sha256
from gsforget.export.device.store import DeviceFolder

sys.path.insert(0, str(ROOT / "tests" / "export" / "device"))
from world import World

RESULT = ROOT / "benchmarks" / "results" / "device_kills.json"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OPEN = "import sys; from gsforget.export.device.apply import open_device; open_device(sys.argv[1])"


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(process: subprocess.Popen, after: float, watched: Path | None = None) -> bool:
    """Kill a process some seconds after its start, or after a file appears; whether it was still alive."""
    while watched is not None and not watched.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def phase(root: Path) -> str:
    """Where a kill came: what the folder says of it."""
    folder = DeviceFolder(root)
    state = folder.state()
    if folder.intent() is None:
        return "before the intent record" if state.sequence == 0 else "after the last step"
    return "writing" if state.sequence == 0 else "cleaning"


def timed(patch: Path, base: Path, root: Path) -> tuple[float, float]:
    """Seconds of an undisturbed call, and of its part from `pending.gsf` to the end."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    begin = time.perf_counter()
    process = start("-m", "gsforget", "apply", str(patch), "--device-dir", str(root), "--device", "cpu")
    appeared = None
    while process.poll() is None:
        if appeared is None and (root / "pending.gsf").exists():
            appeared = time.perf_counter()
        time.sleep(0.001)
    end = time.perf_counter()
    if process.returncode or appeared is None:
        raise SystemExit("an undisturbed call failed")
    return end - begin, end - appeared


def run(kills: int, seed: int) -> dict:
    rng = random.Random(seed)
    loads: list[str] = []
    real = opening.open_model

    def recorded(path, device, cache):
        loads.append(sha256(path))
        return real(path, device, cache=cache)

    opening.open_model = recorded
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch, "world"), engine=True, width=20_000)
        world.erase()
        patch, base, root = world.patch(1), Path(scratch, "base"), Path(scratch, "device")
        apply(world.artifacts(0), base, trust=world.public)
        hashes, size = {sha256(p): i for i in range(2) for p in world.artifacts(i)}, world.artifact(0).stat().st_size
        times = [timed(patch, base, root) for _ in range(3)]
        whole, part = (statistics.median(t[i] for t in times) for i in range(2))
        phases: Counter = Counter()
        counts = Counter(second_kills=0, torn_loaded=0, old_loaded_after_intent=0, not_finished=0, left_behind=0)
        seconds = []
        while sum(phases.values()) < kills:
            shutil.rmtree(root)
            shutil.copytree(base, root)
            process = start("-m", "gsforget", "apply", str(patch), "--device-dir", str(root), "--device", "cpu")
            late = rng.random() < 0.5
            if not kill(process, rng.uniform(0, part if late else whole), root / "pending.gsf" if late else None):
                continue
            where = phase(root)
            phases[where] += 1
            begun = where != "before the intent record"
            if sum(phases.values()) % 3 == 0:
                counts["second_kills"] += kill(start("-c", OPEN, str(root)), rng.uniform(0.1, 0.5))
            loads.clear()
            begin = time.perf_counter()
            found = open_device(root, "cpu").info.sequence
            seconds.append(time.perf_counter() - begin)
            counts["torn_loaded"] += any(digest not in hashes for digest in loads)
            counts["old_loaded_after_intent"] += begun and any(hashes.get(digest) == 0 for digest in loads)
            counts["not_finished"] += found != (1 if begun else 0)
            names = {p.name for p in (root / "models").iterdir()}
            expected = {n for p in world.artifacts(found) for n in (p.name, f"{p.name}.json")}
            leftovers = [n for n in ("intent.json", "pending.gsf") if (root / n).exists()]
            counts["left_behind"] += names != expected or bool(leftovers)
            print(f"{sum(phases.values())}/{kills} {where}: opened sequence {found}", file=sys.stderr)
    return {
        "machine": machine(),
        "seed": seed,
        "artifact_bytes": size,
        "seconds": {"call": round(whole, 3), "of_which_writing": round(part, 3), "start_up": _spread(seconds)},
        "kills": kills,
        "phases": dict(phases),
        **counts,
    }


def _spread(seconds: list[float]) -> dict:
    return {"median": round(statistics.median(seconds), 4), "largest": round(max(seconds), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = run(options.kills, options.seed)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if any(result[k] for k in ("torn_loaded", "old_loaded_after_intent", "not_finished", "left_behind")):
        raise SystemExit("a kill left something wrong")


if __name__ == "__main__":
    main()
