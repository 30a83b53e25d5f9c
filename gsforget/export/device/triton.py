"""A model repository for NVIDIA's Triton Inference Server, in which an un-erased version cannot be served again.

The version of a model is its number of erasures.  A new version appears whole, by a rename; the server takes the highest
one; older versions are removed last, so that it always has one to serve.  Triton counts versions from 1 and ignores
folders that begin with 0 (docs/user_guide/model_repository.md of its server), so an original model has no place in it.
Fields of `config.pbtxt` are those of `ModelConfig` in its `model_config.proto`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import check_folder, flush_folder, read_json, write_file
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.sidecar import write_sidecar

CONFIG, LABELS = "config.pbtxt", "labels.txt"
RECORD = "triton.json"  # beside artifacts: where they were published
TYPES = {"FLOAT": "TYPE_FP32", "HALF": "TYPE_FP16", "BF16": "TYPE_BF16"}  # TensorRT's names, Triton's names


@dataclass(frozen=True)
class Served:
    """An artifact on its way into a repository.

    Attributes:
        kind: ``engine`` or ``onnx``.
        info: what the artifact says of itself.
        batch: smallest, usual and largest batch.
        backend: the engine's builder, ``trt`` or ``rtx``; empty for ONNX.
        input_type: TensorRT's name of the type of input and logits.
    """

    kind: str
    info: ArtifactInfo
    batch: tuple[int, int, int]
    backend: str = ""
    input_type: str = "FLOAT"

    @property
    def name(self) -> str:
        """The model's name in the repository: the same for every erasure, so that clients keep theirs."""
        return f"model-{self.info.precision}-{'trt' if self.kind == 'engine' else 'onnx'}"

    @property
    def file(self) -> str:
        return "model.plan" if self.kind == "engine" else "model.onnx"


def check(repository: Path, served: Served) -> None:
    """Refuse, before anything is built, what cannot be put into a repository.

    Raises:
        RequestError: an original model, an engine for RTX, a smallest batch above 1, or a folder of another model.
        SafetyError: kind ``rollback``: the repository holds a later erasure.
    """
    info, folder = served.info, repository / served.name
    check_folder(repository, "--triton-repo")
    if info.sequence < 1:
        raise RequestError(
            "Triton counts versions from 1, and the version of a model here is its number of erasures: an original has none.",
            "Forget first, and name the run: gsforget export RUN --triton-repo DIR.",
            "no_version",
        )
    if served.backend == "rtx":
        raise RequestError(
            "Triton loads standard TensorRT engines, and TensorRT for RTX makes others.",
            "Build on the server: gsforget export --trt MODEL.onnx --triton-repo DIR; or serve the ONNX file: --onnx.",
            "no_triton",
        )
    if served.batch[0] != 1:
        raise RequestError(
            f"Triton sends batches of any size from 1 on, and --batch begins at {served.batch[0]}.",
            f"Type --batch 1,{served.batch[1]},{served.batch[2]}.",
            "bad_batch",
        )
    if info.features_name:
        raise RequestError(
            "A features output serves audits and has no place on a server.",
            "Export without --with-features.",
            "features_in_engine",
        )
    if folder.exists() and model_of(folder) != info.model_id:
        raise RequestError(f"{folder} holds another model.", "Name another folder: --triton-repo DIR.", "other_model")
    newest = max(versions(folder), default=0)
    if newest > info.sequence:
        raise SafetyError(
            f"{folder} holds erasure {newest} of this model, and this is erasure {info.sequence}: what was erased since would "
            "be back.",
            "Export the newest run.",
            "rollback",
        )


def publish(
    repository: Path, served: Served, artifact: Path, sidecar: Mapping[str, Any], data: Sequence[Path] = ()
) -> dict[str, Any]:
    """Put an artifact into a repository and remove the versions before it.

    Args:
        artifact: the published file; sidecar: its sidecar's content; data: files that hold weights of it.

    Returns:
        ``{"model", "version", "path", "older"}``; ``older`` lists other models of the repository that come from the
        same original and have fewer erasures: they go on serving what was erased until they are exported or removed.

    Raises:
        RequestError, SafetyError: as ``check``.
    """
    check(repository, served)
    folder, version = repository / served.name, served.info.sequence
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():  # so that what a kill leaves is known as this model's
        write_file(folder / CONFIG, config(served))
    partial, replaced, final = folder / f".{version}-partial", folder / f".{version}-old", folder / str(version)
    for _, path in left_over(folder):
        shutil.rmtree(path)
    # Triton wants a model of several files in a folder of the model's name.
    inside = partial / served.file if data else partial
    inside.mkdir(parents=True)
    for source, name in ((artifact, served.file), *((path, path.name) for path in data)):
        _copy(source, inside / name)
    write_sidecar(inside / served.file, {**sidecar, "file": served.file})
    flush_folder(inside)
    write_file(folder / LABELS, "".join(f"{' '.join(name.split())}\n" for name in served.info.class_names))
    write_file(folder / CONFIG, config(served))
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    flush_folder(folder)
    for old in (folder / str(number) for number in versions(folder) if number != version):
        shutil.rmtree(old)
    if replaced.exists():
        shutil.rmtree(replaced)
    flush_folder(folder)
    return {
        "model": served.name,
        "version": version,
        "path": str(final),
        "older": _older(repository, served),
    }


def note(place: Path, repository: Path, served: Served) -> None:
    """Note in the folder of an artifact where it goes, so that a purge finds it; each place once, and before ``publish``.

    Raises RequestError as ``read_record``.
    """
    entry = {"repository": str(repository.resolve()), "model": served.name}
    known = [e for e in read_record(place) if {k: e.get(k) for k in entry} != entry]
    content = {"format": 1, "published": [*known, {**entry, "version": served.info.sequence}]}
    write_file(place / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(place: Path) -> list[dict[str, Any]]:
    """What was noted in a folder: ``repository``, ``model``, ``version``.  Raises RequestError ``bad_file``."""
    path = place / RECORD
    if not path.is_file():
        return []
    entries = read_json(path).get("published")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("repository"), str) for e in entries
    ):
        raise RequestError(f"{path} does not say where artifacts were published.", "Restore it.", "bad_file")
    return entries


def config(served: Served) -> str:
    """The text of `config.pbtxt`."""
    info, data_type = served.info, TYPES[served.input_type]
    runs_in = 'platform: "tensorrt_plan"' if served.kind == "engine" else 'backend: "onnxruntime"'
    return f"""name: {_text(served.name)}
{runs_in}
max_batch_size: {served.batch[2]}
input [
  {{
    name: {_text(info.input_name)}
    data_type: {data_type}
    dims: {list(info.preprocess.input_size)}
  }}
]
output [
  {{
    name: {_text(info.output_name)}
    data_type: {data_type}
    dims: [{len(info.class_names)}]
    label_filename: {_text(LABELS)}
  }}
]
dynamic_batching {{
  preferred_batch_size: [{served.batch[1]}]
}}
version_policy: {{ latest {{ num_versions: 1 }} }}
parameters {{
  key: "gsforget_model_id"
  value: {{ string_value: {_text(info.model_id)} }}
}}
"""


def _text(value: str) -> str:
    """A string of protobuf's text format, whose escapes are a superset of JSON's for such names."""
    return json.dumps(value, ensure_ascii=False)


def model_of(folder: Path) -> str | None:
    """The chain that a model of a repository belongs to; None where gsforget did not write it."""
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r'key: "gsforget_model_id"\s+value: \{ string_value: (".*") \}', text)
    return str(json.loads(found[1])) if found else None


def versions(folder: Path) -> list[int]:
    """The versions that Triton would see."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if re.fullmatch("[1-9][0-9]*", p.name) and p.is_dir())


def left_over(folder: Path) -> list[tuple[int, Path]]:
    """What an export left that was killed while it published: folders with weights, and their version."""
    named = ((re.fullmatch(r"\.([1-9][0-9]*)-(partial|old)", p.name), p) for p in sorted(folder.iterdir()))
    return [(int(found[1]), p) for found, p in named if found and p.is_dir()]


def _older(repository: Path, served: Served) -> list[str]:
    others = (p for p in sorted(repository.iterdir()) if p.is_dir() and p.name != served.name)
    same = (p for p in others if model_of(p) == served.info.model_id)
    return [str(p) for p in same if max(versions(p), default=served.info.sequence) < served.info.sequence]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb+") as handle:
        os.fsync(handle.fileno())
