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

from gsforget import __version__, samples
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, save_model, sha256, write_file
from gsforget.metrics import accuracy, h_mean, of_classes, per_class

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gsforget.audit.in_run import Probed
    from gsforget.gates import Gate
    from gsforget.lora.grid import GridFactors
    from gsforget.request import Request
    from gsforget.samples import SampleResult
    from gsforget.source import Source
    from gsforget.training import Trained

PROBES = ("linear_probe", "linear_probe_excess", "prototype_attack", "mia_auc")
NO_PROBE = (
    f"{', '.join(PROBES[:-1])} and {PROBES[-1]}: they are about whole classes; single images are judged by the membership "
    "attack under sample"
)


@dataclass(frozen=True)
class Evidence:
    """All that was asked, chosen and measured in one erasure, complete before anything is written.

    Attributes:
        config: of the erased model.
        forget, retain, old: class indices of this request, never forgotten, and of earlier requests.
        labels, said_before, said_after: int64 [N] of the test images.
        group_names, active: of the LoRA groups, and which of them changed the model.
        original, state: state dicts before and after.
        delta: grid factors by parameter name.
        base_sha256: of the weights that the run started from, see `weights_sha256`.
        sample: what became of single images that were forgotten; None where whole classes were.
        probed: what attacks on features and answers found; None for single images.
        merge_difference: largest absolute difference of logits between the LoRA model and the merged one.
    """

    source: Source
    request: Request
    config: ModelConfig
    forget: Sequence[int]
    retain: Sequence[int]
    old: Sequence[int]
    labels: np.ndarray
    said_before: np.ndarray
    said_after: np.ndarray
    gates: list[Gate]
    trained: Trained
    group_names: list[str]
    active: list[int]
    original: dict[str, Tensor]
    state: dict[str, Tensor]
    delta: dict[str, GridFactors]
    merge_difference: float
    bound: float
    device: str
    base_sha256: str
    data_root: Path
    manifests: dict[str, str]
    dropped_images: list[str]
    warnings: Sequence[str] = ()
    sample: SampleResult | None = None
    probed: Probed | None = None

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @cached_property
    def changed(self) -> list[str]:
        """Names of the tensors that differ from the model before the run."""
        import torch

        return [name for name, tensor in self.state.items() if not torch.equal(tensor, self.original[name])]

    def summary(self) -> dict[str, float | None]:
        """The `metrics` of the design's JSON, percent."""
        before, after = self.said_before == self.labels, self.said_after == self.labels
        forget, retain, old = (of_classes(self.labels, c) for c in (self.forget, self.retain, self.old))
        forget_before, forget_after = (accuracy(right, forget).percent or 0.0 for right in (before, after))
        if self.sample is not None:
            forget_before, forget_after = (found.percent or 0.0 for found in self.sample.accuracies)
        retain_before, retain_after = (accuracy(right, retain).percent or 0.0 for right in (before, after))
        return {
            "forget_acc_before": forget_before,
            "forget_acc_after": forget_after,
            "retain_acc_before": retain_before,
            "retain_acc_after": retain_after,
            "old_acc_after": accuracy(after, old).percent,
            # Single images are not to be answered wrongly, so the drop of their accuracy is no aim.
            "h_mean": None if self.sample else h_mean(forget_before - forget_after, retain_after),
        }


def document(e: Evidence, seconds: float) -> dict[str, Any]:
    """The JSON of `forget`; artifacts and hashes are added when the run folder stands."""
    summary = e.summary()
    not_tested = e.probed.not_tested() if e.probed else [NO_PROBE]
    if e.old and summary["old_acc_after"] is None:
        not_tested.append("old_acc_after: the test folder holds no images of the classes erased before")
    untested = [e.source.names[i] for i in e.retain if not (e.labels == i).any()]
    if untested:
        not_tested.append(f"retained classes without test images: {', '.join(untested)}")
    if e.sample is not None:
        not_tested.append(samples.NOT_TESTED)
    if e.source.erased_images:
        not_tested.append(samples.EARLIER)
    seconds_of = {"total": seconds, "train": e.trained.seconds, "audit": e.probed.seconds if e.probed else 0.0}
    return {
        "sequence": e.config.sequence,
        "classes": [e.source.names[i] for i in e.forget],
        **({"mode": "sample", "sample": e.sample.to_json()} if e.sample else {}),
        "forgotten_again": [e.source.names[k] for k in e.trained.chosen["forgotten_again"]],
        "method": e.request.method,
        "seed": e.request.settings.seed,
        "device": e.device,
        "verdict": "pass" if e.passed else "fail",
        "metrics": summary,
        "groups": {"total": len(e.group_names), "active": e.active},
        "changed_tensors": e.changed,
        "seconds": {name: round(value, 2) for name, value in seconds_of.items()},
        "audit": e.probed.document() if e.probed else dict.fromkeys(PROBES),
        "not_tested": not_tested,
        "warnings": list(e.warnings),
        "gates": [gate.to_json() for gate in e.gates],
        "artifacts": {},
        "sha256": {},
    }


def metrics(e: Evidence) -> dict[str, Any]:
    """metrics.json: per class with counts and 95 % Wilson intervals, gates, groups, tensors, the course of the training."""
    names, count = e.source.names, len(e.source.names)
    before, after = (per_class(said == e.labels, e.labels, count) for said in (e.said_before, e.said_after))
    role = {**dict.fromkeys(e.retain, "retain"), **dict.fromkeys(e.forget, "forget"), **dict.fromkeys(e.old, "old")}
    last = e.trained.norms[-1]
    hashes = {name: tensor_sha256(tensor) for name, tensor in e.state.items()}
    same = [name for name, tensor in e.original.items() if tensor_sha256(tensor) == hashes[name]]
    return {
        "summary": e.summary(),
        **({"mode": "sample", "sample": e.sample.to_json()} if e.sample else {}),
        "gates": [gate.to_json() for gate in e.gates],
        "audit": e.probed.to_json() if e.probed else None,
        "classes": [
            {"index": i, "name": names[i], "role": role[i], "before": before[i].to_json(), "after": after[i].to_json()}
            for i in range(count)
        ],
        "groups": [{"name": n, "active": g in e.active, "norm": last[g]} for g, n in enumerate(e.group_names)],
        "merge": {"max_logit_difference": e.merge_difference, "images": len(e.labels)},
        "tensors": {"changed": e.changed, "identical": len(same), "total": len(hashes), "sha256": hashes},
        "chosen": chosen(e),
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
    gone = sorted(e.source.erased_images.union(e.sample.sha256 if e.sample else ()))
    erased = {**{str(k): v for k, v in e.source.erased.items()}, **{str(i): e.source.names[i] for i in e.forget}}
    return {
        "gsforget": __version__,
        "method": e.request.method,
        "classes": [e.source.names[i] for i in e.forget],
        "indices": list(e.forget),
        **({"mode": "sample", "images": e.sample.sha256} if e.sample else {}),
        **({"erased_images": gone} if gone else {}),
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
        **({"compared_with": e.probed.compared} if e.probed and e.probed.compared else {}),
        **({"request": e.request.origin} if e.request.origin else {}),
        "chosen": chosen(e),
        "device": e.device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


def chosen(e: Evidence) -> dict[str, Any]:
    """The numbers of this run, whether given or chosen by the loop."""
    return {**e.trained.chosen, "bnd": e.bound, "rank": e.request.settings.rank}


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
        _write_ledger(folder, e)


def _write_delta(path: Path, e: Evidence) -> None:
    from safetensors.torch import save

    tensors = {key: value for name, factors in e.delta.items() for key, value in factors.tensors(name).items()}
    write_file(path, save(tensors, {"format": "gsforget-delta-1"}))


def _write_ledger(folder: Path, e: Evidence) -> None:
    from gsforget import ledger
    from gsforget.export.device.keys import own_signing_key

    lines = ledger.parent_lines(e.source.folder) if e.source.folder else []
    summary = e.summary()
    entry = {
        "sequence": e.config.sequence,
        "classes": [{"index": i, "name": e.source.names[i]} for i in e.forget],
        **({"mode": "sample", "images": len(e.sample.labels)} if e.sample else {}),
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

    forgotten = of_classes(e.labels, e.forget)
    said = (e.said_before[forgotten], e.said_after[forgotten])
    if e.sample is not None:
        said = e.sample.said_before, e.sample.said_after
    plot_run(
        path,
        e.trained.norms,
        [name.removesuffix(".mlp") for name in e.group_names],
        e.active,
        *said,
        e.source.names,
        e.forget,
        *(["the forgotten images"] if e.sample else []),
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
