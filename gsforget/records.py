"""What a run writes down: the JSON document of `forget`, metrics.json, request.json, the delta and the ledger line."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget import __version__
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, save_model, sha256, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.lora.grid import GridFactors
    from gsforget.request import Request
    from gsforget.source import Source
    from gsforget.tasks.base import Measured
    from gsforget.training import Trained


@dataclass(frozen=True)
class Evidence:
    """All that was asked, chosen and measured in one erasure, complete before anything is written.

    Attributes:
        config: of the erased model.
        forget: class indices of this request.
        measured: by the task, before and after.
        chosen: the numbers of this run, whether given or chosen by task and loop.
        group_names, active: of the LoRA groups, and which of them changed the model.
        original, state: state dicts before and after.
        delta: grid factors by parameter name.
        base_sha256: of the weights that the run started from, see `weights_sha256`.
        merge_difference: largest absolute difference of outputs between the LoRA model and the merged one.
    """

    source: Source
    request: Request
    config: ModelConfig
    forget: Sequence[int]
    measured: Measured
    trained: Trained
    chosen: dict[str, Any]
    group_names: list[str]
    active: list[int]
    original: dict[str, Tensor]
    state: dict[str, Tensor]
    delta: dict[str, GridFactors]
    merge_difference: float
    device: str
    base_sha256: str
    data_root: Path
    manifests: dict[str, str]
    dropped_images: list[str]
    warnings: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.measured.gates)

    @cached_property
    def changed(self) -> list[str]:
        """Names of the tensors that differ from the model before the run."""
        import torch

        return [name for name, tensor in self.state.items() if not torch.equal(tensor, self.original[name])]


def document(e: Evidence, seconds: float) -> dict[str, Any]:
    """The JSON of `forget`; artifacts and hashes are added when the run folder stands."""
    m = e.measured
    seconds_of = {"total": seconds, "train": e.trained.seconds, "audit": m.audit_seconds}
    return {
        "sequence": e.config.sequence,
        "classes": [e.source.names[i] for i in e.forget],
        **m.sections,
        "forgotten_again": [e.source.names[k] for k in e.trained.chosen["forgotten_again"]],
        "method": e.request.method,
        "seed": e.request.settings.seed,
        "device": e.device,
        "verdict": "pass" if e.passed else "fail",
        "metrics": m.summary,
        "groups": {"total": len(e.group_names), "active": e.active},
        "changed_tensors": e.changed,
        "seconds": {name: round(value, 2) for name, value in seconds_of.items()},
        "audit": m.audit,
        "not_tested": list(m.not_tested),
        "warnings": list(e.warnings),
        "gates": [gate.to_json() for gate in m.gates],
        "artifacts": {},
        "sha256": {},
    }


def metrics(e: Evidence) -> dict[str, Any]:
    """metrics.json: what the task measured, per class, gates, groups, tensors, the course of the training."""
    m = e.measured
    last = e.trained.norms[-1]
    hashes = {name: tensor_sha256(tensor) for name, tensor in e.state.items()}
    same = [name for name, tensor in e.original.items() if tensor_sha256(tensor) == hashes[name]]
    return {
        "summary": m.summary,
        **m.sections,
        "gates": [gate.to_json() for gate in m.gates],
        "audit": m.attacks,
        "classes": m.classes,
        "groups": [{"name": n, "active": g in e.active, "norm": last[g]} for g, n in enumerate(e.group_names)],
        "merge": {"max_logit_difference": e.merge_difference, "images": m.images},
        "tensors": {"changed": e.changed, "identical": len(same), "total": len(hashes), "sha256": hashes},
        "chosen": e.chosen,
        "validation": [watch.to_json() for watch in e.trained.watches],
        "dropped_images": e.dropped_images,
        "warnings": list(e.warnings),
        "norms_every_5_steps": e.trained.norms[::5],
    }


def request_record(e: Evidence) -> dict[str, Any]:
    """request.json: what was asked, what was chosen, and where the run started."""
    import timm
    import torch

    folder = e.source.folder
    erased = {**{str(k): v for k, v in e.source.erased.items()}, **{str(i): e.source.names[i] for i in e.forget}}
    return {
        "gsforget": __version__,
        "method": e.request.method,
        "classes": [e.source.names[i] for i in e.forget],
        "indices": list(e.forget),
        **e.measured.in_request,
        "sequence": e.config.sequence,
        "names": e.source.names,
        "erased": erased,
        "parent": str(folder.resolve()) if folder else None,
        "parent_sha256": e.base_sha256,
        "data": str(e.data_root.resolve()),
        "data_sha256": e.manifests,
        "settings": asdict(e.request.settings),
        "thresholds": asdict(e.request.thresholds),
        "shots": e.request.shots,
        **({"request": e.request.origin} if e.request.origin else {}),
        "chosen": e.chosen,
        "device": e.device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


def write_run(folder: Path, e: Evidence, measured: dict[str, Any]) -> None:
    """Fill a run folder, `measured` as its metrics.json; of a failed run only the reports, no model."""
    if e.passed:
        save_model(e.state, e.config, folder)
        _write_delta(folder / "delta.safetensors", e)
    write_file(folder / "request.json", _json(request_record(e)))
    write_file(folder / "metrics.json", _json(measured))
    (folder / "audit").mkdir()
    _plot(folder / "audit" / "groups.png", e)
    if e.passed:
        (folder / "artifacts").mkdir()
        if e.measured.write is not None:
            e.measured.write(folder)
        _write_ledger(folder, e)


def _write_delta(path: Path, e: Evidence) -> None:
    from safetensors.torch import save

    tensors = {key: value for name, factors in e.delta.items() for key, value in factors.tensors(name).items()}
    write_file(path, save(tensors, {"format": "gsforget-delta-1"}))


def _write_ledger(folder: Path, e: Evidence) -> None:
    from gsforget import ledger
    from gsforget.export.device.key_places import own_signing_key

    lines = ledger.parent_lines(e.source.folder) if e.source.folder else []
    summary = e.measured.summary
    entry = {
        "sequence": e.config.sequence,
        "classes": [{"index": i, "name": e.source.names[i]} for i in e.forget],
        **e.measured.in_ledger,
        "method": e.request.method,
        "base": e.base_sha256,
        "model": sha256(folder / WEIGHTS),
        "config": sha256(folder / CONFIG),
        "delta": sha256(folder / "delta.safetensors"),
        "request": sha256(folder / "request.json"),
        "verdict": "pass",
        "metrics": {k: summary[k] for k in ("forget_acc_after", "retain_acc_after", "old_acc_after")},
    }
    write_file(folder / "ledger.jsonl", "".join(f"{line}\n" for line in ledger.append(lines, entry, own_signing_key())))


def _plot(path: Path, e: Evidence) -> None:
    from gsforget.plots import plot_run

    shown = e.measured.picture
    plot_run(
        path,
        e.trained.norms,
        [name.removesuffix(".mlp") for name in e.group_names],
        e.active,
        shown.before,
        shown.after,
        shown.names,
        shown.forgotten,
        *([shown.what] if shown.what else []),
    )


def weights_sha256(source: Source, state: dict[str, Tensor]) -> str:
    """SHA-256 of the weights that a run starts from: of the file, else of names and tensors."""
    if source.folder:
        return sha256(source.folder / WEIGHTS)
    listed = "".join(f"{name}:{tensor_sha256(state[name])}\n" for name in sorted(state))
    return hashlib.sha256(listed.encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    import torch

    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
