"""One erasure between two models, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build.chain import DELTA, LEDGER
from gsforget.export.build.previous import Previous, find_previous
from gsforget.folder import WEIGHTS, read_state
from gsforget.purged import day, find_purged

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.lora.grid import GridFactors


@dataclass(frozen=True)
class Step:
    """One erasure: the model before it, as far as it is there, and the factors that lead from it to the run's weights."""

    before: Previous
    delta: dict[str, GridFactors]


def find_step(run: Path, request: Mapping[str, Any], previous: str | Path | None, precision: str) -> Step:
    """The erasure of a run, checked: its ledger is whole, and its factors give its weights, bit for bit.

    Args:
        previous: folder of the model that the run started from, or one of its artifacts at ``precision``.

    Raises:
        RequestError: ``not_a_run``, ``no_from``, ``purged``, and as `find_previous` does.
        SafetyError: ``delta_mismatch``, a broken ledger, an artifact that is not what its sidecar says.
    """
    if not request:
        raise RequestError(
            f"{run} is no run, so that there is no erasure to patch.",
            "For the whole model type gsforget export --patch --full.",
            "not_a_run",
        )
    parent = request.get("parent")
    if previous is None:
        raise RequestError(
            "A patch leads from one model to the next, and it was not said from which.",
            f"Type --from {parent or 'FOLDER'}; for devices without that model, --full.",
            "no_from",
        )
    delta = _read_delta(run)
    before = find_previous(run, request, Path(previous), precision)
    _check_ledger(run)
    _check_delta(run, before, delta)
    return Step(before, delta)


def _read_delta(folder: Path) -> dict[str, GridFactors]:
    from gsforget.lora.grid import read_delta

    removed = find_purged(folder, DELTA)
    if removed is not None:
        raise RequestError(
            f"The factors of {folder} were removed by gsforget purge on {day(removed.date)}, and a patch consists of them.",
            "Send the whole model: gsforget export --patch --full.",
            "purged",
        )
    return read_delta(folder / DELTA)


def _check_ledger(folder: Path) -> None:
    """Refuse a run whose files are not those that its ledger names."""
    from gsforget import ledger

    if (folder / LEDGER).is_file():
        ledger.verify(folder)


def _check_delta(folder: Path, before: Previous, delta: dict[str, GridFactors]) -> None:
    """The factors must lead from the parent's weights to the run's, bit for bit, and nothing else may have changed."""
    import torch

    from gsforget.lora.grid import merge

    if before.folder is None:
        return
    was, now = (read_state(f) for f in (before.folder, folder))
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
