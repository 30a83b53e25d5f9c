"""Weights at a deployed precision p, replayed as a device would: W_p(n) = round_p(W_p(n-1) + D_n), W_p(0) = round_p(W(0)).

At fp32 the run's own file is the truth.  Below, rounding the final weights once gives other bits than rounding after
every erasure, so the chain is walked back to the original model and replayed from the stored factors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.factors import to_bfloat16
from gsforget.folder import WEIGHTS, is_model_folder, read_config, read_state, sha256
from gsforget.lineage import ancestors
from gsforget.purged import day, find_purged

if TYPE_CHECKING:
    from torch import Tensor

REQUEST, DELTA, LEDGER = "request.json", "delta.safetensors", "ledger.jsonl"
BITS = {"fp16": 11, "bf16": 8}  # significant bits, with the leading one that is not stored
ROUNDED = tuple(BITS)


@dataclass(frozen=True)
class ChainInfo:
    """From where to where a replay went.

    Attributes:
        position: number of erasures in the weights.
        base: the position that was rounded without replay; 0 is the original model.
        complete: whether the replay began at the original model (always so at fp32, where nothing is replayed).
        reason: why it did not.
    """

    position: int
    base: int
    complete: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"position": self.position, "base": self.base, "complete": self.complete, "reason": self.reason}


def weights_at(folder: Path, precision: str) -> tuple[dict[str, Tensor], ChainInfo]:
    """The weights of a run or model folder at ``fp32``, ``fp16`` or ``bf16``.

    Returns:
        The state dict (tensors that are not floating point stay as they are) and where its replay began.  Where an
        ancestor or its factors are gone, the oldest model that can still be replayed from is rounded instead.

    Raises:
        RequestError: another precision; weights beyond its range.
        SafetyError: the factors do not lead to the run's own weights.
    """
    own = read_state(folder)
    position = read_config(folder).sequence
    if precision == "fp32":
        return own, ChainInfo(position, 0, True)
    if precision not in ROUNDED:
        raise RequestError(
            f"There are no weights at precision {precision!r}.", "Type --precision fp32, fp16 or bf16.", "bad_precision"
        )
    base, steps, reason = _walk_back(folder)
    first = own if base == folder else read_state(base)
    state = {n: round_to(t, n, precision) for n, t in first.items()}
    for run in steps:
        state = _replay(state, run, precision)
    if steps:
        _check_close(state, own, len(steps), folder, precision)
    start = read_config(base).sequence
    return state, ChainInfo(position, start, not reason, reason)


def model_id(folder: Path) -> str:
    """Which chain of erasures a folder belongs to: the first 16 digits of the original weights' SHA-256."""
    ledger = folder / LEDGER
    if ledger.is_file():
        first = ledger.read_text(encoding="utf-8").splitlines()[:1]
        if first:
            return str(json.loads(first[0])["base"])[:16]
    behind = ancestors(folder)
    return str((behind[-1].sha256 if behind else None) or sha256(folder / WEIGHTS))[:16]


def read_request(folder: Path) -> dict[str, Any]:
    """A run's `request.json`; empty for a model folder that is no run."""
    path = folder / REQUEST
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} is not valid JSON ({error}).", "Restore the run folder.", "bad_run") from error


def round_to(tensor: Tensor, name: str, precision: str) -> Tensor:
    """Round once to float16 (``fp16``) or bfloat16 (``bf16``), to nearest even.

    Not by torch, which rounds float64 to float32 on the way: that gives other bits for about one value in 20 000.
    Raises RequestError where a value does not fit.
    """
    import torch

    if not tensor.is_floating_point():
        return tensor
    exact = (
        tensor.dtype == torch.float32 and precision == "fp16"
    )  # numpy rounds these once as they are, five times sooner
    values = tensor.detach().cpu().to(torch.float32 if exact else torch.float64).numpy()
    if precision == "bf16":
        rounded = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    else:
        with np.errstate(over="ignore"):
            rounded = torch.from_numpy(values.astype(np.float16))
    if not torch.isfinite(rounded).all():
        largest = "65504" if precision == "fp16" else "3.4e38"
        raise RequestError(
            f"Tensor {name} holds values beyond the range of {precision} ({largest}).",
            "Type --precision fp32.",
            "out_of_range",
        )
    return rounded


def _walk_back(folder: Path) -> tuple[Path, list[Path], str]:
    """The oldest folder to start from, the runs to replay in order, and why the walk ended before the original model."""
    steps: list[Path] = []
    while True:
        request = read_request(folder)
        if not request:
            sequence = read_config(folder).sequence
            reason = f"{folder.name} holds {sequence} erasures but no request" if sequence else ""
            return folder, steps, reason
        number = request.get("sequence", "?")
        if not (folder / DELTA).is_file():
            return folder, steps, f"the factors of erasure {number} {_gone(folder, DELTA)}"
        parent = _parent(folder, request)
        if parent is None:
            return folder, steps, f"the model before erasure {number} {_gone_parent(request)}"
        steps.insert(0, folder)
        folder = parent


def _gone(folder: Path, name: str) -> str:
    removed = find_purged(folder, name)
    return f"were removed by gsforget purge on {day(removed.date)}" if removed else "are gone"


def _gone_parent(request: dict[str, Any]) -> str:
    removed = find_purged(Path(request["parent"]), WEIGHTS) if request.get("parent") else None
    return f"was removed by gsforget purge on {day(removed.date)}" if removed else "is gone, or is not a folder"


def _parent(folder: Path, request: dict[str, Any]) -> Path | None:
    """The folder of the weights that a run started from, if they are still there, unchanged."""
    if not request.get("parent"):
        return None
    named = Path(request["parent"])
    for place in (named, folder.parent / named.name):  # runs may have been moved together
        if is_model_folder(place) and sha256(place / WEIGHTS) == request.get("parent_sha256"):
            return place
    return None


def _replay(state: dict[str, Tensor], run: Path, precision: str) -> dict[str, Tensor]:
    import torch

    from gsforget.lora.grid import read_delta

    after = dict(state)
    for name, factors in read_delta(run / DELTA).items():
        if name not in state:
            raise _mismatch(run, f"names {name}, which the model before it does not have")
        product = factors.product()
        if product.numel() != state[name].numel():
            raise _mismatch(run, f"has {list(product.shape)} for {name}, which is {list(state[name].shape)}")
        exact = state[name].to(torch.float64) + product.reshape(state[name].shape)
        after[name] = round_to(exact, name, precision)
    return after


def _check_close(state: dict[str, Tensor], own: dict[str, Tensor], steps: int, folder: Path, precision: str) -> None:
    """Replayed weights may differ from the run's own by one rounding per step, and not by more."""
    for name, tensor in own.items():
        if tensor.is_floating_point() and tensor.numel():
            allowed = (steps + 1) * 2.0 ** (1 - BITS[precision]) * max(float(tensor.abs().max()), 2.0**-14)
            if name not in state or (tensor.double() - state[name].double()).abs().amax().item() > allowed:
                raise _mismatch(folder, f"does not lead to the weights of {name} in {WEIGHTS}")


def _mismatch(run: Path, what: str) -> SafetyError:
    return SafetyError(
        f"{run / DELTA}, or one before it, {what}.",
        "Restore the run folders from a backup; do not deploy from them.",
        "delta_mismatch",
    )
