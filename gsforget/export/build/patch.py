"""An erasure as a patch: the factors of one erasure, and where in each artifact the tensors lie that they change.

The new artifacts are made afresh; the patch is applied to the old ones by the device's own code, and only where the
result is the fresh file, byte for byte, is it published.  Where it is not, the whole new file is packed instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build.chain import DELTA, LEDGER
from gsforget.export.build.edits import (
    DTYPES,
    Packer,
    changes_between,
    describe_artifact,
    engine_edits,
    onnx_edits,
    prove,
)
from gsforget.export.build.exporter import PRECISIONS, Export, find_place, open_at
from gsforget.export.build.locate import NotLocated
from gsforget.export.build.previous import Previous, find_previous
from gsforget.export.device.changes import GiveEdit, PatchedArtifact, TensorEdit
from gsforget.export.device.keys import SigningKey, find_signing_key, read_public_key
from gsforget.export.device.manifest import KnownAnswers, Manifest, Payload
from gsforget.export.device.metadata import check_hash
from gsforget.export.device.package import SUFFIX, plain_payload, write_package
from gsforget.folder import WEIGHTS, sha256
from gsforget.purged import day, find_purged
from gsforget.runs import newest_run

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.export.build.exporter import Made
    from gsforget.export.device.keys import PublicKey
    from gsforget.lora.grid import GridFactors

EXPIRES = 365  # days


@dataclass(frozen=True)
class Signing:
    """Who signs a package, how long it counts, and for whom its payload is encrypted (None: for everyone)."""

    key: SigningKey
    expires: int | None = EXPIRES
    recipient: PublicKey | None = None


def export_patch(
    run: str | Path | None = None,
    *,
    previous: str | Path | None = None,
    full: bool = False,
    precision: str = "fp32",
    key: str | Path | None = None,
    expires: int = EXPIRES,
    encrypt_for: str | Path | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    trust_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export an erasure as a signed patch, and the new artifacts that it leads to.

    Args:
        run: a run folder; default: the newest run under `runs/`.  With ``full`` also a model folder.
        previous: folder of the model that the run started from, or one of its artifacts.
        full: pack whole files instead of a patch, for devices without the model before: its ONNX file, and the engines
            of the same precision that lie among its artifacts.
        precision: of the artifacts that devices hold.
        key: signing key; default: $GSFORGET_KEY, else `~/.config/gsforget/signing.key`.
        expires: days from now until which devices accept the package.
        encrypt_for: public fleet key that the payload is encrypted for.
        data, out, trust_code, progress: as for `export_model`.

    Returns:
        What `export_model` does; packages come first in ``artifacts``, of kind ``patch`` or ``full``, with their
        ``replaces``: for each file the ``bytes`` that it has, and ``ratio``, how many times smaller the package is.

    Raises:
        RequestError: arguments or installation do not fit, ``no_key``, ``not_parent``, ``purged``.
        GateError: a new artifact fails its gates, or answers as the old one does; nothing was published.
        SafetyError: factors that do not lead to the weights, an artifact that is not what its sidecar says.
    """
    if precision not in PRECISIONS:
        raise RequestError(
            f"Patches are made at {', '.join(PRECISIONS)}, and not at {precision}.",
            "Patch the file that was quantised, and quantise the result again, or send the quantised file whole.",
            "bad_precision",
        )
    if expires < 1:
        raise RequestError(f"A package cannot expire after {expires} days.", "For example --expires 90.", "bad_expires")
    if full and previous is not None:
        raise RequestError(
            "A whole model starts from nothing, and a patch from the model before.",
            "Type --from without --full, or --full without --from.",
            "two_bases",
        )
    recipient = read_public_key(Path(encrypt_for), "fleet") if encrypt_for else None
    signing = Signing(find_signing_key(Path(key) if key else None), expires, recipient)
    folder = Path(run) if run is not None else newest_run()
    place = find_place(folder, Path(out) if out else None)
    tell = progress or (lambda _text: None)
    delta = {} if full else _read_delta(folder)
    export = Export(folder, precision, trust_code, tell)
    before = None if full else _check_previous(export, previous)
    if before is not None:
        _check_ledger(folder)
        _check_delta(folder, before, delta)
    export.find_data(Path(data) if data else None)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place, ignore_cleanup_errors=True) as scratch:
        export.write_onnx(Path(scratch))
        export.check()
        making = _Making(export, signing, Path(scratch), trust_code)
        if before is None:
            making.pack_whole([*export.made, *_own_engines(export, place)])
        else:
            making.make_patch(before, delta)
        return making.publish(place)


class _Making:
    """Packages in the making, beside the export whose artifacts they lead to."""

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
        old, new = old_onnx.read_bytes(), export.made[0].path.read_bytes()
        try:
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
                    edits: Sequence[TensorEdit | GiveEdit] = onnx_edits(old, new, where, packer)
                else:
                    edits = engine_edits(old_path.read_bytes(), changes)
                artifact = describe_artifact(made, old_path, edits)
                prove(self._manifest("patch", packer, [artifact]), bytes(packer.payload), artifact, old_path)
                proven.append((artifact, made))
            except (NotLocated, SafetyError) as error:
                failed.append((made, str(error).rstrip(".")))
        if proven:
            self._write_patch(packer, proven, old_onnx)
        for made, reason in failed:
            export.not_tested.append(f"a patch of {made.path.name}: {reason}; the whole file is packed instead")
        self.pack_whole([made for made, _ in failed])

    def _write_patch(self, packer: Packer, proven: list[tuple[PatchedArtifact, Made]], old_onnx: Path) -> None:
        from gsforget.export.build.answers import find_answers
        from gsforget.predict import TorchPredictor

        export = self.export
        export.progress("looking for seeds on which old and new answers differ")
        # The fresh file is, byte for byte, the patched one.
        new, _ = open_at(export.made[0].path, export.precision, self.scratch)
        was, _ = open_at(old_onnx, export.precision, self.scratch)
        shape, exact = export.info.preprocess.input_size, TorchPredictor(export.model)
        answers = find_answers(was, new, exact, shape, export.precision)
        name = f"patch-{export.config.sequence:04d}-{export.precision}{SUFFIX}"
        artifacts = [artifact for artifact, _ in proven]
        self._write(name, self._manifest("patch", packer, artifacts, answers), bytes(packer.payload))

    def pack_whole(self, made: Sequence[Made]) -> None:
        """A package for each file that holds the file itself."""
        from gsforget.export.build.answers import only_new
        from gsforget.predict import TorchPredictor

        if not made:
            return
        export = self.export
        export.progress("asking the new model for known answers")
        new, _ = open_at(export.made[0].path, export.precision, self.scratch)
        shape, exact = export.info.preprocess.input_size, TorchPredictor(export.model)
        answers = only_new(new, exact, shape, export.precision)
        for one in made:
            if one.extra.get("data_files"):
                raise RequestError(
                    f"{one.path.name} keeps its weights in a second file, which a package cannot carry.",
                    "Send both files by other means: gsforget export --onnx.",
                    "too_large",
                )
            packer = Packer(DTYPES[export.precision])
            content = one.path.read_bytes()
            packer.give(content)
            manifest = self._manifest("full", packer, [describe_artifact(one, None, ())], answers)
            self._write(f"{one.path.stem}{SUFFIX}", manifest, content)

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
        """Build the engine anew that an old one is to become; engines of standard TensorRT are refitted instead."""
        from gsforget.export.device.targets import choose

        export = self.export
        if sidecar.get("builder") != "tensorrt_rtx":
            export.not_tested.append(
                f"{path.name} is an engine of standard TensorRT, which no patch of bytes fits: a device refits it, or "
                "builds it again, from the patched ONNX file"
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


def _own_engines(export: Export, place: Path) -> list[Made]:
    """The engines among the artifacts of the exported model itself, each the file that its sidecar says."""
    from gsforget.export.build.exporter import Made

    source = sha256(export.folder / WEIGHTS)
    found = []
    for path in sorted(place.glob(f"{export.made[0].path.stem}-*.engine")):
        sidecar = check_hash(path)
        if sidecar is not None and sidecar.get("source_sha256") == source:
            extra = {k: sidecar[k] for k in ("builder", "builder_version", "batch")}
            found.append(Made(path, "engine", list(sidecar["targets"]), extra))
    return found


def _check_previous(export: Export, previous: str | Path | None) -> Previous:
    if not export.request:
        raise RequestError(
            f"{export.folder} is no run, so that there is no erasure to patch.",
            "For the whole model type gsforget export --patch --full.",
            "not_a_run",
        )
    parent = export.request.get("parent")
    if previous is None:
        raise RequestError(
            "A patch leads from one model to the next, and it was not said from which.",
            f"Type --from {parent or 'FOLDER'}; for devices without that model, --full.",
            "no_from",
        )
    return find_previous(export.folder, export.request, Path(previous), export.precision)


def _read_delta(folder: Path) -> dict[str, GridFactors]:
    from gsforget.export.build.chain import read_request
    from gsforget.lora.grid import read_delta

    removed = find_purged(folder, DELTA)
    if removed is not None:
        raise RequestError(
            f"The factors of {folder} were removed by gsforget purge on {day(removed.date)}, and a patch consists of them.",
            "Send the whole model: gsforget export --patch --full.",
            "purged",
        )
    return read_delta(folder / DELTA) if read_request(folder) else {}


def _check_ledger(folder: Path) -> None:
    """Refuse a run whose files are not those that its ledger names."""
    from gsforget import ledger

    if (folder / LEDGER).is_file():
        ledger.verify(folder)


def _check_delta(folder: Path, before: Previous, delta: dict[str, GridFactors]) -> None:
    """The factors must lead from the parent's weights to the run's, bit for bit, and nothing else may have changed."""
    import torch

    from gsforget.checkpoint import read_weights
    from gsforget.lora.grid import merge

    if before.folder is None:
        return
    was, now = (read_weights(f / WEIGHTS, as_saved=True) for f in (before.folder, folder))
    for name, tensor in now.items():
        wanted: Tensor | None = was.get(name)
        if wanted is not None and name in delta:
            wanted = merge(wanted.reshape(delta[name].b.shape[0], -1), delta[name]).reshape(wanted.shape)
        if wanted is None or not torch.equal(wanted, tensor):
            raise SafetyError(
                f"{folder / DELTA} does not lead from {before.folder} to the weights of {name} in {WEIGHTS}.",
                "Restore the run folders from a backup; do not deploy from them.",
                "delta_mismatch",
            )
