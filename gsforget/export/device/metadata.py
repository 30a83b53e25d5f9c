"""What an artifact says about itself: class names, what is forgotten, how to feed it.

An ONNX file carries this as JSON in its own metadata, so that a lone file suffices; the sidecar beside any artifact
(`model.onnx.json` for `model.onnx`) repeats it under ``model``, next to the artifact's ``sha256``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import is_plain_name, sha256
from gsforget.export.device.onnx_file import outside_files
from gsforget.export.device.preprocess import Preprocess

METADATA_KEY = "gsforget"  # in the metadata_props of an ONNX file
FORMAT = 1


@dataclass(frozen=True)
class ArtifactInfo:
    """What a device must know to use a model.

    Attributes:
        class_names: in index order; an erased class is already named ``forgotten-<index>``.
        forgotten: indices of the erased classes, which inference never returns.
        sequence: number of erasures so far, 0 for an original model.
        preprocess: how an image becomes the input.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        model_id: which chain of erasures the artifact belongs to.
        input_name, output_name: of the images [N, C, H, W] and the logits [N, K].
        features_name: of a second output, what the classifier reads, [N, d]; None where the artifact has none.
        task: what its outputs are: of ``classify`` logits [N, K], of ``face`` an embedding [N, d], …
        more_names: of further outputs of the task, each [N, …].
    """

    class_names: list[str]
    forgotten: tuple[int, ...]
    sequence: int
    preprocess: Preprocess
    precision: str
    model_id: str
    input_name: str = "images"
    output_name: str = "logits"
    features_name: str | None = None
    task: str = "classify"
    more_names: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "class_names": list(self.class_names),
            "forgotten": list(self.forgotten),
            "sequence": self.sequence,
            "preprocess": self.preprocess.to_dict(),
            "precision": self.precision,
            "model_id": self.model_id,
            "input_name": self.input_name,
            "output_name": self.output_name,
            **({"features_name": self.features_name} if self.features_name else {}),
            **({"task": self.task} if self.task != "classify" else {}),
            **({"more_names": list(self.more_names)} if self.more_names else {}),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str = "The artifact") -> ArtifactInfo:
        """Raises RequestError (kind ``bad_metadata``) when fields are absent, of a newer format or contradictory."""
        try:
            if int(raw.get("format", FORMAT)) > FORMAT:
                raise RequestError(
                    f"{where} has metadata of format {raw['format']}, newer than this gsforget reads ({FORMAT}).",
                    "Update gsforget: pip install --upgrade gsforget.",
                    "bad_metadata",
                )
            info = cls(
                class_names=[str(name) for name in raw["class_names"]],
                forgotten=tuple(sorted(int(i) for i in raw["forgotten"])),
                sequence=int(raw["sequence"]),
                preprocess=Preprocess.from_dict(raw["preprocess"]),
                precision=str(raw["precision"]),
                model_id=str(raw["model_id"]),
                input_name=str(raw.get("input_name", "images")),
                output_name=str(raw.get("output_name", "logits")),
                features_name=str(raw["features_name"]) if raw.get("features_name") else None,
                task=str(raw.get("task", "classify")),
                more_names=tuple(str(name) for name in raw.get("more_names", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{where} has incomplete metadata ({error!r}).",
                "Export it again: gsforget export --onnx.",
                "bad_metadata",
            ) from error
        if any(not 0 <= i < len(info.class_names) for i in info.forgotten):
            raise RequestError(
                f"{where} names forgotten classes {list(info.forgotten)} but has {len(info.class_names)} classes.",
                "Export it again: gsforget export --onnx.",
                "bad_metadata",
            )
        return info


def sidecar_path(artifact: str | Path) -> Path:
    """Where the sidecar of an artifact lies: `<file>.json` beside it."""
    artifact = Path(artifact)
    return artifact.with_name(artifact.name + ".json")


def read_sidecar(artifact: str | Path) -> dict[str, Any] | None:
    """The sidecar's content, or None where there is none.  Raises SafetyError when it is damaged."""
    path = sidecar_path(artifact)
    if not path.is_file():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _refused(f"{path} is not valid JSON ({error}).", "bad_sidecar") from error
    if not isinstance(sidecar, dict):
        raise _refused(f"{path} does not hold a JSON object.", "bad_sidecar")
    return sidecar


def check_hash(artifact: str | Path) -> dict[str, Any] | None:
    """Compare an artifact, and data that it keeps beside it, with its sidecar; returns that (None where there is none).

    Raises SafetyError, kind ``hash_mismatch`` when the bytes are others, ``bad_sidecar`` when no hash is stated.
    """
    sidecar = read_sidecar(artifact)
    if sidecar is None:
        return None
    stated = sidecar.get("sha256")
    if not isinstance(stated, str):
        raise _refused(f"{sidecar_path(artifact)} states no sha256.", "bad_sidecar")
    data = sidecar.get("data_files", {})
    if not isinstance(data, dict) or not all(isinstance(name, str) and is_plain_name(name) for name in data):
        raise _refused(f"{sidecar_path(artifact)} names data files outside its own folder.", "bad_sidecar")
    for path, expected in ((Path(artifact), stated), *((Path(artifact).with_name(n), h) for n, h in data.items())):
        if not path.is_file():
            raise _refused(f"{path}, which holds weights of {artifact}, is absent.", "hash_mismatch")
        found = sha256(path)
        if found != str(expected).lower():
            raise _refused(
                f"{path} is not the file that its sidecar describes (SHA-256 {found[:12]}…).", "hash_mismatch"
            )
    return sidecar


def check_outside(artifact: Path, sidecar: Mapping[str, Any] | None) -> None:
    """Refuse an ONNX file that keeps weights anywhere but in plain files beside it, which its sidecar, if any, names.

    Raises SafetyError, kind ``bad_location``.
    """
    for name in sorted(outside_files(artifact)):
        beside = artifact.with_name(name) if is_plain_name(name) else None
        if beside is None or beside.is_symlink() or (beside.exists() and not beside.is_file()):
            raise _refused(f"{artifact} keeps weights in {name!r}, which is no plain file beside it.", "bad_location")
        if sidecar is not None and name not in sidecar.get("data_files", {}):
            raise _refused(f"{artifact} keeps weights in {name}, which its sidecar does not name.", "bad_location")


def find_info(artifact: str | Path, embedded: Mapping[str, str], sidecar: Mapping[str, Any] | None) -> ArtifactInfo:
    """The info of an artifact: from its own metadata, else from its sidecar.

    Args:
        embedded: the artifact's metadata; empty for a kind of artifact that carries none.
        sidecar: what ``check_hash`` returned.

    Raises RequestError (kind ``not_ours``) when neither has it.
    """
    if METADATA_KEY in embedded:
        try:
            raw = json.loads(embedded[METADATA_KEY])
        except json.JSONDecodeError as error:
            raise RequestError(
                f"The metadata of {artifact} is not valid JSON ({error}).",
                "Export it again: gsforget export --onnx.",
                "bad_metadata",
            ) from error
        return ArtifactInfo.from_json(raw, str(artifact))
    if sidecar is not None and "model" in sidecar:
        return ArtifactInfo.from_json(sidecar["model"], str(sidecar_path(artifact)))
    raise RequestError(
        f"{artifact} was not exported by gsforget: it carries no metadata and has no sidecar {sidecar_path(artifact).name}.",
        "Export the model with gsforget export --onnx, or copy the sidecar along with the artifact.",
        "not_ours",
    )


def _refused(message: str, kind: str) -> SafetyError:
    return SafetyError(message, "Copy the artifact and its sidecar again from where they were exported.", kind)
