"""An erasure as a patch: the factors of one erasure, and where in each artifact the tensors lie that they change.

The new artifacts are made afresh; the patch is applied to the old ones by the device's own code, and only where the
result is the fresh file, byte for byte, is it published.  Where it is not, the whole new file is packed instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.export.build.artifacts import Export
from gsforget.export.build.edits import DTYPES as PATCHED
from gsforget.export.build.packages import EXPIRES, Packages, Signing
from gsforget.export.build.place import find_place
from gsforget.export.build.step import find_step
from gsforget.export.device.keys import find_signing_key, read_public_key
from gsforget.export.device.metadata import check_hash
from gsforget.folder import WEIGHTS, sha256
from gsforget.runs import newest_run

if TYPE_CHECKING:
    from gsforget.export.build.artifacts import Made


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
    annotations: str | None = None,
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
        data, annotations, out, trust_code, progress: as for `export_model`.

    Returns:
        What `export_model` does; packages come first in ``artifacts``, of kind ``patch`` or ``full``, with their
        ``replaces``: for each file the ``bytes`` that it has, and ``ratio``, how many times smaller the package is.

    Raises:
        RequestError: arguments or installation do not fit, ``no_key``, ``not_parent``, ``purged``.
        GateError: a new artifact fails its gates, or answers as the old one does; nothing was published.
        SafetyError: factors that do not lead to the weights, an artifact that is not what its sidecar says.
    """
    if precision not in PATCHED:
        raise RequestError(
            f"Patches are made at {', '.join(PATCHED)}, and not at {precision}.",
            "Type one of these, or send the file whole by other means.",
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
    export = Export(folder, precision, trust_code, tell)
    step = None if full else find_step(folder, export.request, previous, precision)
    if step is not None and precision == "int8":
        export.follow(step)
    export.find_data(Path(data) if data else None, annotations)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place, ignore_cleanup_errors=True) as scratch:
        if not (full and precision == "int8" and export.take_int8(place, Path(scratch))):
            export.write_onnx(Path(scratch))
        export.check()
        making = Packages(export, signing, Path(scratch), trust_code)
        if step is None:
            making.pack_whole([*export.made, *_own_engines(export, place)])
        else:
            making.make_patch(step.before, step.delta)
        return making.publish(place)


def _own_engines(export: Export, place: Path) -> list[Made]:
    """The engines among the artifacts of the exported model itself, each the file that its sidecar says."""
    from gsforget.export.build.artifacts import Made

    source = sha256(export.folder / WEIGHTS)
    found = []
    for path in sorted(place.glob(f"{export.made[0].path.stem}-*.engine")):
        sidecar = check_hash(path)
        if sidecar is not None and sidecar.get("source_sha256") == source:
            extra = {k: sidecar[k] for k in ("builder", "builder_version", "batch")}
            found.append(Made(path, "engine", list(sidecar["targets"]), extra))
    return found
