"""Remove from a run folder what makes its erasure reversible, and say what stays out of reach.

First the list, with hashes, is written to `audit/purged.json`; then the files are removed; then the note is closed.  A
purge that is interrupted leaves a folder that still verifies, and the next purge completes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gsforget import __version__, ledger
from gsforget.errors import GsforgetError, SafetyError
from gsforget.export.device.files import flush_folder
from gsforget.export.device.triton import RECORD
from gsforget.folder import CONFIG, WEIGHTS, read_config, sha256, write_file
from gsforget.lineage import Ancestor, ancestors, read_request
from gsforget.purge_triton import find_served
from gsforget.purged import PURGED, Removed, read_purged

DELTA = "delta.safetensors"
CORE = (WEIGHTS, CONFIG, "request.json", "metrics.json", ledger.LEDGER, PURGED.as_posix())
DATA = (".safetensors", ".npz", ".npy", ".pt", ".pth", ".pkl", ".bin", ".ckpt")
RECORDS = (".json", ".html", ".png", ".svg", ".pdf", ".txt", ".md", ".csv")
# The beginning of a data file's or folder's name, and what is in it.
SENSITIVE = (
    ("delta", "factors that undo the erasure"),
    ("factors", "factors that undo the erasure"),
    ("lora", "factors that undo the erasure"),
    ("prototype", "prototypes of the classes"),
    ("feature", "cached features of the images"),
    ("cache", "cached features of the images"),
    ("optimizer", "state of the optimiser"),
    ("optimiser", "state of the optimiser"),
    ("checkpoint", "an intermediate model"),
)
PATCH = "a patch, which holds the difference that the erasure made"
SHOWS_IMAGES = (
    "a report that shows test images of the data; remove it yourself, or audit again without --with-images, which "
    "replaces it"
)
ALWAYS = (
    "artifacts that were exported to other folders, engines and models that are already on devices, and Triton repositories "
    "that were filled from such artifacts or on another machine",
    "patches that were sent out or are on devices: with the model after it, a patch gives most of the model before; a "
    "device deletes its copy once it has applied it",
    "backups, snapshots and copies of any of these files",
    "the images themselves, and galleries or search indexes of features computed from them",
    "blocks of the disk: the files are unlinked, not overwritten, and the file system may keep their contents for a while",
)


@dataclass(frozen=True)
class Item:
    """A file to remove: the run it lies in, its path, size in bytes, SHA-256 (None for a link), and what it is."""

    run: Path
    path: Path
    bytes: int
    sha256: str | None
    why: str

    @property
    def name(self) -> str:
        """Relative to the run; of what lies elsewhere, the whole path."""
        inside = self.path.is_relative_to(self.run)
        return (self.path.relative_to(self.run) if inside else self.path).as_posix()

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "sha256": self.sha256, "why": self.why}


@dataclass(frozen=True)
class Plan:
    """What a purge would do.

    Attributes:
        run: the run folder that was named.
        items: files to remove, oldest run first.
        folders: of Triton repositories, to remove once they are empty.
        unfinished: runs whose earlier purge was interrupted after its last file.
        left: files of the runs that gsforget does not know, each with a reason why it stays.
        out_of_reach: sentences on what still knows the classes and is not removed.
    """

    run: Path
    items: list[Item] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    out_of_reach: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "files": [item.to_json() for item in self.items],
            "bytes": self.bytes,
            "left": self.left,
            "out_of_reach": self.out_of_reach,
        }


def plan(run: Path, chain: bool = False) -> Plan:
    """List what a purge of a run folder removes; nothing is changed.

    Args:
        run: a run folder; its own weights always stay.
        chain: also the earlier runs behind it: their factors, artifacts and weights, since each of those models still
            knows what was erased after it.  The original model is never touched.

    Raises:
        RequestError: ``no_model`` or ``no_ledger``: not a run folder.
        SafetyError: ``broken_ledger``: what the folder says about itself, or about its chain, cannot be trusted.
    """
    ledger.verify(run)
    entries = ledger.history(run)
    behind = ancestors(run)
    earlier = [a for a in behind if a.found and a.sequence > 0]
    made = Plan(run)
    before = {str(entry["base"]) for entry in entries}
    if chain:
        for ancestor in reversed(earlier):
            assert ancestor.path is not None
            _check_same_chain(ancestor, entries)
            _list_run(made, ancestor.path, before, keep_weights=False)
    _list_run(made, run, before, keep_weights=True)
    _list_served(made, [a.path for a in earlier if a.path is not None], entries, chain)
    made.out_of_reach.extend(_out_of_reach(run, behind, chain))
    return made


def purge(made: Plan) -> None:
    """Carry out a plan.

    Raises GsforgetError ``purge_incomplete`` where a file could not be removed; all others are, and the note in
    `audit/purged.json` stays open until a later purge succeeds.
    """
    failed: list[OSError] = []
    runs = list(dict.fromkeys([*(item.run for item in made.items), *made.unfinished]))
    for run in runs:
        items = [item for item in made.items if item.run == run]
        noted = _note(run, items)
        lost = [error for item in items if (error := _remove(item)) is not None]
        for folder in made.folders:
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()
        for folder in {run, *(item.path.parent for item in items)}:
            if folder.is_dir():
                flush_folder(folder)
        if not lost:
            _write(run, noted, complete=True)
        failed.extend(lost)
    if failed:
        raise GsforgetError(
            f"{len(failed)} of {len(made.items)} files could not be removed, first {failed[0].filename} "
            f"({failed[0].strerror}).",
            "Make them writable and type the same command again.",
            "purge_incomplete",
        )


def _list_run(made: Plan, run: Path, before: set[str], keep_weights: bool) -> None:
    noted = {entry.path: entry for entry in read_purged(run)}
    model = ledger.history(run)[-1]["model"]
    count = len(made.items)
    for path in _files(run):
        name = path.relative_to(run).as_posix()
        if name in CORE and not (name == WEIGHTS and not keep_weights):
            continue
        why, reason = _judge(run, path, str(model), before, keep_weights)
        if why is None and name in noted and not path.is_symlink() and sha256(path) == noted[name].sha256:
            why = noted[name].why  # an interrupted purge did not get to it
        if why is not None:
            digest = None if path.is_symlink() else sha256(path)
            made.items.append(Item(run, path, path.lstat().st_size, digest, why))
            if path.is_symlink():
                made.out_of_reach.append(f"what {path} points to ({os.readlink(path)})")
        elif reason:
            made.left.append(f"{path}: {reason}")
    if len(made.items) == count and noted and not _complete(run):
        made.unfinished.append(run)


def _list_served(made: Plan, earlier: Sequence[Path], entries: Sequence[dict[str, Any]], chain: bool) -> None:
    """What Triton repositories hold from before the run's erasure; of earlier runs' repositories, where they are purged too."""
    model_id, sequence = str(entries[0]["base"])[:16], int(entries[-1]["sequence"])
    served = find_served([made.run, *(earlier if chain else ())], model_id, sequence)
    for path, why in served.files:
        digest = None if path.is_symlink() else sha256(path)
        made.items.append(Item(made.run, path, path.lstat().st_size, digest, why))
    made.folders.extend(served.folders)
    made.out_of_reach.extend(served.out_of_reach)
    if not chain:
        left = {*find_served(earlier, model_id, sequence).folders} - {*served.folders}
        made.out_of_reach.extend(
            f"{folder}, a Triton model from before the erasure: --chain purges it as well"
            for folder in sorted(left)
            if folder.name.isdecimal()
        )


def _files(run: Path) -> Iterator[Path]:
    """Every file and link below a run folder; links are not followed.  Weights come last, sidecars after their file."""
    found: list[Path] = []
    for place, folders, names in os.walk(run):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found.extend(Path(place, name) for name in (*names, *links))
    return iter(sorted(found, key=lambda path: (path.name == WEIGHTS, str(path))))


def _judge(run: Path, path: Path, model: str, before: set[str], keep_weights: bool) -> tuple[str | None, str]:
    """Why a file has to go, or None and, where it is not a known record, why it stays."""
    parts = path.relative_to(run).parts
    if path.name == WEIGHTS and len(parts) == 1:
        return "weights that still know what was erased later", ""
    if path.name.endswith(".partial") and path.name.startswith("."):
        return "left behind by an interrupted write", ""
    if path.suffix.lower() in DATA:
        for part in parts:
            for start, what in SENSITIVE:
                if part.lower().startswith(start):
                    return what, ""
    if parts[0] == "artifacts":
        return _judge_artifact(path, model, before, keep_weights)
    if _is_patch(path):
        return PATCH, ""
    if path.suffix.lower() in DATA and not path.is_symlink() and sha256(path) in before:
        return "weights from before an erasure", ""
    if len(parts) == 2 and parts[0] == "audit" and path.suffix.lower() in RECORDS:
        return None, SHOWS_IMAGES if _shows_images(path) else ""
    return None, "gsforget did not write it; look at it yourself"


def _judge_artifact(path: Path, model: str, before: set[str], keep_weights: bool) -> tuple[str | None, str]:
    """An artifact by its sidecar; a sidecar goes with its file."""
    if path.name == RECORD:
        return None, ""
    is_sidecar = path.suffix == ".json" and (path.with_suffix("").is_file() or _read(path).get("file"))
    sidecar = path if is_sidecar else path.with_name(f"{path.name}.json")
    content = _read(sidecar) or _owner(path)
    artifact = path.with_suffix("") if is_sidecar else path
    if content.get("kind") == "patch" or artifact.suffix in (".patch", ".delta") or _is_patch(artifact):
        return PATCH, ""
    if not keep_weights:
        return "an artifact of a model that still knows what was erased later", ""
    source = content.get("source_sha256")
    if source == model:
        return None, ""
    if source in before:
        return "an artifact from before an erasure", ""
    return None, "no sidecar says which model it was built from; look at it yourself"


def _owner(data: Path) -> dict[str, Any]:
    """The sidecar of the ONNX file that keeps its weights in a file; empty where none says so."""
    sidecars = (_read(path) for path in sorted(data.parent.glob("*.onnx.json")))
    return next((s for s in sidecars if isinstance(s.get("data_files"), dict) and data.name in s["data_files"]), {})


def _is_patch(path: Path) -> bool:
    """Whether a file is a package for devices that holds factors: any but one that says itself to be a whole model."""
    from gsforget.export.device.package import SUFFIX, read_package

    if path.suffix.lower() != SUFFIX:
        return False
    try:
        return read_package(path).manifest.kind != "full"
    except GsforgetError:
        return True  # damaged, or the target of a link is gone: it may still hold them


def _shows_images(path: Path) -> bool:
    """Whether a record is a report that was written with --with-images."""
    return path.suffix.lower() == ".html" and b"data:image/" in path.read_bytes()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_same_chain(ancestor: Ancestor, entries: Sequence[dict[str, Any]]) -> None:
    """An earlier run may be purged only if its own ledger is the beginning of this run's."""
    assert ancestor.path is not None
    if ledger.history(ancestor.path) != list(entries[: ancestor.sequence]):
        raise SafetyError(
            f"The ledger of {ancestor.path} is not the beginning of the chain that leads to this run.",
            "Purge without --chain, and look at that folder yourself.",
            "broken_ledger",
        )


def _out_of_reach(run: Path, behind: Sequence[Ancestor], chain: bool) -> Iterator[str]:
    erased = set(read_config(run).forgotten)
    for ancestor in behind:
        if ancestor.sequence == 0:
            place = (
                "whatever the first run was given, which was no model folder"
                if ancestor.path is None
                else ancestor.path
            )
            state = (
                "it still knows every class" if ancestor.found or ancestor.path is None else "it was not found there"
            )
            yield f"the original model ({place}): {state}; gsforget never removes it"
        elif not ancestor.found:
            yield f"the run before erasure {ancestor.sequence + 1} ({ancestor.path}): it was not found there"
        elif not chain and ancestor.path is not None:
            state = (
                "its weights still know what was erased later" if ancestor.weights else "its factors, if any are left"
            )
            yield f"the earlier run {ancestor.path}: {state}; --chain purges it as well"
    own = {run.resolve(), *(a.path.resolve() for a in behind if a.path)}
    for named in _named_parents(run, behind):
        if named.resolve() not in own and (named / WEIGHTS).is_file():
            yield f"{named}, from which a run of this chain was copied: it is left as it is"
    base = ledger.history(run)[0]["base"]
    for other in sorted(
        p for p in run.absolute().parent.iterdir() if p.resolve() not in own and (p / WEIGHTS).is_file()
    ):
        try:
            knows = sorted(erased - set(read_config(other).forgotten))
            related = ledger.history(other)[0]["base"] == base
        except GsforgetError:
            continue
        if related and knows:
            yield f"{other}, another run from the same original: it still knows {', '.join(f'forgotten-{i}' for i in knows)}"
    yield from ALWAYS


def _named_parents(run: Path, behind: Sequence[Ancestor]) -> list[Path]:
    """Where the models behind a run lay when they were used, as the requests of its chain noted it."""
    folders = [run, *(a.path for a in behind if a.found and a.path is not None)]
    named = [read_request(folder).get("parent") for folder in folders]
    return [Path(place) for place in named if place]


def _note(run: Path, items: Sequence[Item]) -> list[Removed]:
    """Write what is about to go; returns all that was noted so far."""
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    noted = read_purged(run)
    known = {(entry.path, entry.sha256) for entry in noted}
    noted += [Removed(i.name, i.sha256, i.bytes, i.why, date) for i in items if (i.name, i.sha256) not in known]
    _write(run, noted, complete=False)
    return noted


def _write(run: Path, noted: Sequence[Removed], complete: bool) -> None:
    (run / PURGED).parent.mkdir(exist_ok=True)
    content = {"gsforget": __version__, "complete": complete, "removed": [entry.to_json() for entry in noted]}
    write_file(run / PURGED, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _complete(run: Path) -> bool:
    return bool(_read(run / PURGED).get("complete"))


def _remove(item: Item) -> OSError | None:
    try:
        item.path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None
