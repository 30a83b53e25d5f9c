"""Models in repositories of NVIDIA Triton that still know what was erased: found by what exports noted, and listed to go.

An export with `--triton-repo` notes in `triton.json` beside its artifacts where it published.  From there, every model of
the same chain with fewer erasures is found, whichever run put it there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gsforget.errors import GsforgetError
from gsforget.export.device.triton import CONFIG, left_over, model_of, read_record, versions

ARTIFACTS = "artifacts"


@dataclass
class Served:
    """Files of repositories.

    Attributes:
        files: to remove, with what each is; those that describe a model come after its weights.
        folders: to remove once they are empty, inner ones first.
        out_of_reach: sentences on repositories that could not be looked at, and on servers.
    """

    files: list[tuple[Path, str]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    out_of_reach: list[str] = field(default_factory=list)


def find_served(runs: Iterable[Path], model_id: str, sequence: int) -> Served:
    """What repositories that some runs were published in hold of a chain from before an erasure.

    Args:
        runs: whose notes are read.
        model_id: of the chain; sequence: of the erasure.
    """
    found = Served()
    for repository in _repositories(runs, found):
        try:
            models = [p for p in sorted(repository.iterdir()) if p.is_dir() and model_of(p) == model_id]
        except OSError as error:
            found.out_of_reach.append(
                f"the Triton repository {repository}, where a model of this chain was published: it cannot be read here "
                f"({error.strerror})"
            )
            continue
        for model in models:
            all_of = [*((n, model / str(n)) for n in versions(model)), *left_over(model)]
            older = [(n, folder) for n, folder in all_of if n < sequence]
            if not older:
                continue
            for n, folder in older:
                why = f"version {n} of a Triton model, from before an erasure"
                if folder.is_symlink():
                    found.files.append((folder, why))
                    found.out_of_reach.append(f"what {folder} points to ({os.readlink(folder)})")
                    continue
                found.files += [(p, why) for p in _files(folder)]
                inner = [p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()]
                found.folders += [*sorted(inner, reverse=True), folder]
            if older == all_of:  # nothing is left to serve; its labels name what was erased since
                found.files += [
                    (p, "what described a Triton model from before an erasure") for p in _files(model, False)
                ]
                found.folders.append(model)
            found.out_of_reach.append(
                f"a Triton server that has {model.name} of {repository} loaded: it serves that from its memory until it is told "
                f"to unload or load it (POST /v2/repository/models/{model.name}/unload)"
            )
    return found


def _repositories(runs: Iterable[Path], found: Served) -> list[Path]:
    named: dict[Path, None] = {}
    for run in runs:
        try:
            named |= dict.fromkeys(Path(entry["repository"]) for entry in read_record(run / ARTIFACTS))
        except GsforgetError as error:
            found.out_of_reach.append(
                f"the Triton repositories that {run} was published in: {error.message.rstrip('.')}"
            )
    return list(named)


def _files(folder: Path, below: bool = True) -> list[Path]:
    """Files and links in a folder, in those below it too; sidecars after what they describe.

    Last of all comes what says whose model it is: after a kill, the next purge finds the rest by it.
    """
    inside = folder.rglob("*") if below else folder.iterdir()
    files = (p for p in inside if p.is_symlink() or not p.is_dir())
    return sorted(files, key=lambda p: (p.name == CONFIG, p.suffix == ".json", str(p)))
