"""One erasure from request to run folder: check, train, merge on the grid, measure what was merged, gate, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget import ledger, processes, records
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import WEIGHTS, ModelConfig, sha256
from gsforget.records import Evidence
from gsforget.request import Request, check_request
from gsforget.tasks import find_task

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.source import Source
    from gsforget.tasks.base import Load
    from gsforget.training import Event, Trained


@dataclass
class Outcome:
    """What a request led to; `folder` is the run folder, or the failed-NNNN folder when a gate was breached."""

    document: dict[str, Any]
    metrics: dict[str, Any]
    folder: Path | None
    state: dict[str, Tensor]
    config: ModelConfig

    @property
    def passed(self) -> bool:
        return self.document["verdict"] == "pass"


def forget(
    source: Source,
    data: Any,
    request: Request,
    load: Load,
    runs: Path | None = Path("runs"),
    out: Path | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Outcome:
    """Erase classes from a model.

    Args:
        source: the model to start from; its own files are never written to.
        data: what the task of `source.config` learns from; for classification an `ImageFolder` in the order of `source.names`.
        load: reads and preprocesses one image file, float32 [C, H, W].
        runs: where run folders are numbered; None publishes nothing.
        out: the run folder itself, instead of a number under `runs`.

    Returns:
        The outcome; verdict "fail" when a gate was breached (nothing but reports was published then).

    Raises:
        RequestError: the request, model or data do not fit.
    """
    import torch

    from gsforget.export.device.key_places import own_signing_key
    from gsforget.runs import check_out, check_writable

    started = time.perf_counter()
    report = progress or (lambda _event: None)
    check_request(request)
    if out is not None:
        check_out(out)
    elif runs is not None:
        check_writable(runs.absolute())
    own_signing_key()  # one that cannot be used is refused before any work, and so is a broken chain
    if source.folder:
        ledger.parent_lines(source.folder)
    required = {name: p.requires_grad for name, p in source.model.named_parameters()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's own encoder layer would pass over the hooks of LoRA
        session = _Session(source, data, request, load)
        report({"stage": "before"})
        session.study.before()
        trained = session.train(report)
        report({"stage": "merge"})
        evidence = session.merge_and_measure(trained)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, p in source.model.named_parameters():
            p.requires_grad_(required[name])
    if not evidence.passed:
        source.model.load_state_dict(session.original)
    return _publish(evidence, runs, out, started)


class _Session:
    """One erasure on its way from images to evidence; the task's part of it is its study."""

    def __init__(self, source: Source, data: Any, request: Request, load: Load):
        import torch

        from gsforget.predict import pick_device

        self.source = source
        self.device = pick_device(request.device)
        self.study = find_task(source.config.task).open_study(source, data, request, load, self.device)
        half = [n for n, p in source.model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
        if half:
            raise RequestError(
                f"Tensor {half[0]} and {len(half) - 1} more are not float32.",
                "Convert the model first: model.float().",
                "not_float32",
            )
        self.model = source.model.to(self.device).eval()
        processes.join(self.device)
        self._check_same()
        processes.broadcast_(*self.model.state_dict().values())
        self.original = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.base_sha256 = records.weights_sha256(source, self.original)

    def _check_same(self) -> None:
        """RequestError unless all processes see the same images."""
        seen = processes.of_all(self.study.fingerprint())
        if any(other != seen[0] for other in seen):
            raise RequestError(
                f"The processes see different images under {self.study.root}.",
                "Give every machine the same data.",
                "different_data",
            )

    def train(self, report: Callable[[Event], None]) -> Trained:
        from gsforget.training import Loop

        self.model.requires_grad_(False)
        self.plan = self.study.plan(self.base_sha256)
        loop = Loop(self.model, self.plan.task, self.plan.material, self.plan.settings, report)
        try:
            return loop.run()
        except BaseException:  # the module may be the caller's: take the hooks off, also after Ctrl-C
            loop.groups.detach()
            raise

    def merge_and_measure(self, trained: Trained) -> Evidence:
        """Put the factors on the grid, merge them, and measure the merged weights; nothing else is ever measured."""
        from gsforget.checkpoint import check_finite
        from gsforget.lora.grid import merge, to_grid

        processes.broadcast_(trained.groups.flat)
        pairs = trained.groups.named_deltas()
        delta = {name: to_grid(pair.a, pair.b) for name, pair in pairs.items()}
        for name, pair in pairs.items():
            for factor, rounded in zip((pair.a, pair.b), delta[name].factors()):
                factor.data.copy_(rounded)
        adapted = self.study.look()
        trained.groups.detach()
        state = {
            name: merge(tensor, delta[name]) if name in delta else tensor for name, tensor in self.original.items()
        }
        check_finite(state, "the merged model")
        self.model.load_state_dict(state)
        merged = self.study.look()
        measured = self.study.after(merged, trained)
        evidence = Evidence(
            source=self.source,
            request=self.study.request,
            config=self.source.config.erase(self.study.forget),
            forget=self.study.forget,
            measured=measured,
            trained=trained,
            chosen={**trained.chosen, **self.plan.chosen, "rank": self.plan.settings.rank},
            group_names=[block.name for block in trained.groups.blocks],
            active=sorted({pair.group for pair in pairs.values()}),
            original=self.original,
            state=state,
            delta=delta,
            merge_difference=max(
                float((a - b).abs().max()) for a, b in zip(adapted.tensors, merged.tensors, strict=True)
            ),
            device=self.device.type,
            base_sha256=self.base_sha256,
            data_root=self.study.root,
            manifests=self.study.manifests,
            warnings=self.study.warnings + measured.warnings,
            dropped_images=[str(p) for p in self.study.dropped()],
        )
        outside = sorted(set(evidence.changed) - delta.keys())
        if outside:
            raise GsforgetError(
                f"Tensors outside the active groups changed: {', '.join(outside)}.", "Please report this."
            )
        return evidence


def _publish(evidence: Evidence, runs: Path | None, out: Path | None, started: float) -> Outcome:
    from gsforget.runs import publish

    document = records.document(evidence, time.perf_counter() - started)
    outcome = Outcome(document, records.metrics(evidence), None, evidence.state, evidence.config)
    if runs is None and out is None:
        return outcome
    # A failed run never takes the place that was meant for a model.
    place = out if evidence.passed else None
    prefix = "forget" if evidence.passed else "failed"

    def write() -> tuple[Path, dict[str, Any], dict[str, Any]]:
        folder = publish(
            lambda path: records.write_run(path, evidence, outcome.metrics), runs or Path("runs"), place, prefix
        )
        if evidence.passed:
            document["artifacts"] = {"model": str(folder / WEIGHTS)}
            document["sha256"] = {"model": sha256(folder / WEIGHTS)}
        return folder, document, outcome.metrics

    processes.of_all(None)  # nothing is published where one of the processes failed
    outcome.folder, outcome.document, outcome.metrics = processes.from_first(write)
    return outcome
