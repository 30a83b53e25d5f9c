"""The packages of an export: a patch where it can be proven, whole files where not, signed and published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build.artifacts import Export, Made, open_at
from gsforget.export.build.edits import (
    DTYPES,
    Packer,
    changes_between,
    data_edits,
    data_pairs,
    describe_artifact,
    engine_edits,
    onnx_edits,
    prove,
)
from gsforget.export.build.locate import NotLocated, OnnxBytes
from gsforget.export.build.previous import Previous
from gsforget.export.device.changes import GiveEdit, PatchedArtifact, TensorEdit
from gsforget.export.device.keys import SigningKey
from gsforget.export.device.manifest import KnownAnswers, Manifest, Payload
from gsforget.export.device.package import SUFFIX, plain_payload, write_package
from gsforget.folder import WEIGHTS, sha256

if TYPE_CHECKING:
    from gsforget.export.device.infer import Predicts
    from gsforget.export.device.keys import PublicKey
    from gsforget.lora.grid import GridFactors

EXPIRES = 365  # days


@dataclass(frozen=True)
class Signing:
    """Who signs a package, how long it counts, and for whom its payload is encrypted (None: for everyone)."""

    key: SigningKey
    expires: int | None = EXPIRES
    recipient: PublicKey | None = None


class Packages:
    """The packages of one export, in the making beside the artifacts that they lead to."""

    def __init__(self, export: Export, signing: Signing, scratch: Path, trust_code: bool):
        self.export, self.signing, self.scratch, self.trust_code = export, signing, scratch, trust_code
        self.created = datetime.now(UTC).replace(microsecond=0)
        self.packages: list[tuple[Path, dict[str, Any], list[str]]] = []  # file, fields for its entry, GPUs

    def make_patch(self, before: Previous, delta: dict[str, GridFactors]) -> None:
        """A patch for every artifact for which it can be proven, whole files for the others."""
        export = self.export
        old_onnx = self._old_onnx(before)
        for path, sidecar in before.engines:
            self._rebuild(path, sidecar)
        pairs = [(old_onnx, export.made[0])]
        by_name = {path.name: path for path, _ in before.engines}
        pairs += [(by_name[str(m.extra["replaces"])], m) for m in export.made[1:]]
        packer = Packer(DTYPES[export.precision])
        proven: list[tuple[PatchedArtifact, Made]] = []
        failed: list[tuple[Made, str]] = []
        try:
            old, new = OnnxBytes.read(old_onnx), OnnxBytes.read(export.made[0].path)
            changes, where = changes_between(old, new, delta, export.precision)
            for change in changes:
                packer.add(change)
        except NotLocated as error:
            failed = [(made, str(error)) for _, made in pairs]
            pairs = []
        for old_path, made in pairs:
            export.progress(f"patching {old_path.name} and comparing it with the fresh {made.path.name}")
            try:
                if made.kind == "onnx":
                    edits: Sequence[TensorEdit | GiveEdit] = onnx_edits(old, new, changes, where, packer)
                    files = [(made, old_path, edits)]
                    for was, now in data_pairs(old, new).items():
                        beside = Made(made.path.with_name(now), "data", [], {})
                        files.append((beside, old_path.with_name(was), data_edits(where, was)))
                else:
                    files = [(made, old_path, engine_edits(old_path.read_bytes(), changes))]
                described = [(describe_artifact(one, base, edits), one, base) for one, base, edits in files]
                manifest = self._manifest("patch", packer, [artifact for artifact, _, _ in described])
                for artifact, _, base in described:
                    prove(manifest, bytes(packer.payload), artifact, base)
                proven += [(artifact, one) for artifact, one, _ in described]
            except (NotLocated, SafetyError) as error:
                failed.append((made, str(error).rstrip(".")))
        if proven:
            self._write_patch(packer, proven, old_onnx)
        for made, reason in failed:
            export.not_tested.append(f"a patch of {made.path.name}: {reason}; the whole file is packed instead")
        self.pack_whole([made for made, _ in failed])

    def _write_patch(self, packer: Packer, proven: list[tuple[PatchedArtifact, Made]], old_onnx: Path) -> None:
        from gsforget.export.build.answers import find_answers

        export = self.export
        export.progress("looking for seeds on which old and new answers differ")
        # The fresh file is, byte for byte, the patched one.
        new, _ = open_at(export.made[0].path, export.precision, self.scratch)
        was, _ = open_at(old_onnx, export.precision, self.scratch)
        shape, exact = export.info.preprocess.input_size, self._exact()
        answers = find_answers(was, new, exact, shape, export.precision)
        name = f"patch-{export.config.sequence:04d}-{export.precision}{SUFFIX}"
        artifacts = [artifact for artifact, _ in proven]
        self._write(name, self._manifest("patch", packer, artifacts, answers), bytes(packer.payload))

    def pack_whole(self, made: Sequence[Made]) -> None:
        """A package for each file that holds the file itself."""
        from gsforget.export.build.answers import only_new

        if not made:
            return
        export = self.export
        export.progress("asking the new model for known answers")
        new, _ = open_at(export.made[0].path, export.precision, self.scratch)
        shape, exact = export.info.preprocess.input_size, self._exact()
        answers = only_new(new, exact, shape, export.precision)
        for one in made:
            beside = [Made(one.path.with_name(n), "data", [], {}) for n in one.extra.get("data_files", ())]
            packer = Packer(DTYPES[export.precision])
            for part in (one, *beside):
                packer.payload += part.path.read_bytes()
            artifacts = [describe_artifact(part, None, ()) for part in (one, *beside)]
            self._write(
                f"{one.path.stem}{SUFFIX}", self._manifest("full", packer, artifacts, answers), bytes(packer.payload)
            )

    def _exact(self) -> Predicts:
        """The new weights in float32 arithmetic: how far others lie from it is what rounding changes."""
        from gsforget.export.device.runtime import OnnxPredictor
        from gsforget.predict import TorchPredictor

        if self.export.precision == "int8":  # the same integers, no operators of int8 put together
            return OnnxPredictor(self.export.made[0].path, "cpu", optimised=False)
        return TorchPredictor(self.export.kind.traced(self.export.model))

    def _old_onnx(self, before: Previous) -> Path:
        """The ONNX file that devices hold: the one that is there, else the same made again."""
        export = self.export
        export.not_tested.extend(before.ignored)
        if before.onnx is not None:
            return before.onnx
        if before.folder is None:
            raise RequestError(
                "The ONNX file of the model before the erasure is gone, and so are its weights.",
                "Send the whole model: gsforget export --patch --full.",
                "no_base",
            )
        export.progress("exporting the model before the erasure again")
        place = self.scratch / "before"
        place.mkdir()
        again = Export(before.folder, export.precision, self.trust_code, lambda _text: None)
        again.write_onnx(place)
        path = again.made[0].path
        if before.onnx_sha256 is None:
            export.not_tested.append(
                f"that devices hold the very file {path.name} that the patch starts from: no sidecar of it is left, and "
                f"it was made again (SHA-256 {sha256(path)[:16]}…); devices with another file refuse the patch"
            )
        elif before.onnx_sha256 != sha256(path):
            raise RequestError(
                f"{path.name} is gone, and made again it is another file than its sidecar describes (other versions of "
                "the exporter, or factors that were purged since).",
                "Restore it from a backup, or send the whole model: gsforget export --patch --full.",
                "not_reproducible",
            )
        return path

    def _rebuild(self, path: Path, sidecar: dict[str, Any]) -> None:
        """Build the engine anew that an old one is to become; those of standard TensorRT are made on the device."""
        from gsforget.export.device.targets import choose

        export = self.export
        if sidecar.get("builder") != "tensorrt_rtx":
            export.not_tested.append(
                f"{path.name} is an engine of standard TensorRT, which no patch of bytes fits: the device that holds it "
                "refits it, or builds it again, from the patched ONNX file"
            )
            return
        count = len(export.made)
        export.write_engine(self.scratch, choose("rtx", tuple(sidecar["targets"])), tuple(sidecar["batch"]))
        for made in export.made[count:]:
            made.extra["replaces"] = path.name

    def _manifest(
        self,
        kind: str,
        packer: Packer,
        artifacts: Sequence[PatchedArtifact],
        answers: KnownAnswers | None = None,
    ) -> Manifest:
        export, days = self.export, self.signing.expires
        sequence = export.config.sequence
        plain = plain_payload(bytes(packer.payload))
        return Manifest(
            kind=kind,
            model_id=export.info.model_id,
            sequence=sequence,
            requires=sequence - 1 if kind == "patch" else None,
            precision=export.precision,
            created=self.created,
            expires=None if days is None else self.created + timedelta(days=days),
            key_id=self.signing.key.key_id,
            info=export.info,
            payload=Payload(**plain),
            tensors=tuple(packer.tensors) if kind == "patch" else (),
            artifacts=tuple(artifacts),
            known_answers=answers or KnownAnswers(1.0, ()),
        )

    def _write(self, name: str, manifest: Manifest, payload: bytes) -> None:
        self.export.progress(f"signing {name}")
        key, recipient = self.signing.key, self.signing.recipient
        path = self.scratch / name
        write_package(path, manifest.to_json(), payload, key.sign, recipient)
        size = path.stat().st_size
        replaces = [
            {
                "kind": a.kind,
                "name": a.name,
                "targets": list(a.targets),
                "bytes": a.after.bytes,
                "ratio": round(a.after.bytes / size, 1),
                "patched_equals_rebuilt": True if manifest.kind == "patch" else None,
            }
            for a in manifest.artifacts
        ]
        fields = {
            "sequence": manifest.sequence,
            "requires": manifest.requires,
            "expires": manifest.to_json()["expires"],
            "key_id": manifest.key_id,
            "encrypted_for": recipient.key_id if recipient else None,
            "tensors": [t.name for t in manifest.tensors],
            "replaces": replaces,
        }
        targets = list(dict.fromkeys(t for a in manifest.artifacts for t in a.targets))
        self.packages.append((path, {"kind": manifest.kind, **fields}, targets))

    def publish(self, place: Path) -> dict[str, Any]:
        """Publish the new artifacts, the base of the next patch, and then the packages."""
        from gsforget.export.device.sidecar import describe, write_sidecar

        export = self.export
        for made in export.made:
            made.extra.pop("replaces", None)
        document = export.publish(place, True)
        source, entries = sha256(export.folder / WEIGHTS), []
        for path, fields, targets in self.packages:
            kind = fields["kind"]
            parity = {**export.parity, "measured_on": f"the patched ONNX file: {export.measured_on}"}
            chain = export.chain.to_json()
            content = describe(path, kind, export.info, chain, source, targets, parity, fields)
            final = place / path.name
            path.replace(final)
            write_sidecar(final, content)
            shown = ("kind", "bytes", "sha256", "precision", "targets", "parity", *fields)
            entries.append({"path": str(final), **{k: content[k] for k in shown}})
        return {**document, "artifacts": entries + document["artifacts"]}
