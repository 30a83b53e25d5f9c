"""Run folders as `forget` writes them, with weights that are only bytes: for tests of purging.  Loaded by `conftest.py`."""

import json
from pathlib import Path

from gsforget import ledger
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, read_config, sha256, write_file

DELTA = "delta.safetensors"
CONFIG_0 = ModelConfig("vit_tiny", {}, ["cat", "dog", "cow", "ant"], (3, 8, 8), (0.5,), (0.5,))


def write_original(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"original weights")
    (folder / CONFIG).write_text(json.dumps(CONFIG_0.to_json()))
    return folder


def write_run(folder: Path, parent: Path, index: int) -> Path:
    """A run folder as `forget` writes it, with weights that are only bytes."""
    (folder / "audit").mkdir(parents=True)
    (folder / "artifacts").mkdir()
    config = read_config(parent).erase([index])
    (folder / WEIGHTS).write_bytes(f"weights of {folder.name}".encode())
    (folder / CONFIG).write_text(json.dumps(config.to_json()))
    (folder / DELTA).write_bytes(f"factors of {folder.name}".encode())
    (folder / "metrics.json").write_text("{}")
    (folder / "audit" / "groups.png").write_bytes(b"png")
    base = sha256(parent / WEIGHTS)
    request = {"sequence": config.sequence, "parent": str(parent), "parent_sha256": base}
    (folder / "request.json").write_text(json.dumps(request))
    fields = (("model", WEIGHTS), ("config", CONFIG), ("delta", DELTA), ("request", "request.json"))
    entry = {
        "sequence": config.sequence,
        "classes": [{"index": index, "name": CONFIG_0.class_names[index]}],
        "method": "gs-lora",
        "base": base,
        "verdict": "pass",
        "metrics": {},
        **{k: sha256(folder / n) for k, n in fields},
    }
    lines = ledger.append(ledger.parent_lines(parent), entry)
    write_file(folder / "ledger.jsonl", "".join(f"{line}\n" for line in lines))
    return folder
