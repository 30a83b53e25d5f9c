"""One erasure from request to run folder: check, train, merge on the grid, measure what was merged, gate, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget import control, ledger, records
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import WEIGHTS, ModelConfig, sha256
from gsforget.gates import evaluate_gates
from gsforget.metrics import check_plausible, confusion_matrix, of_classes, predict
from gsforget.predict import pick_device
from gsforget.records import Evidence
from gsforget.request import Request, check_request
from gsforget.requests.target import Target, resolve_target

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.data import ImageFolder, ImageSet
    from gsforget.source import Source
    from gsforget.training import Event, Trained

EVAL_BATCH = 256


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
    data: ImageFolder,
    request: Request,
    load: Callable[[Path], np.ndarray],
    runs: Path | None = Path("runs"),
    out: Path | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Outcome:
    """Erase classes from a model.

    Args:
        source: the model to start from; its own files are never written to.
        data: image folder whose class order is `source.names`.
        load: reads and preprocesses one image file, float32 [C, H, W].
        runs: where run folders are numbered; None publishes nothing.
        out: the run folder itself, instead of a number under `runs`.

    Returns:
        The outcome; verdict "fail" when a gate was breached (nothing but reports was published then).

    Raises:
        RequestError: the request, model or data do not fit.
    """
    import torch

    from gsforget.runs import check_out, check_writable

    started = time.perf_counter()
    report = progress or (lambda _event: None)
    check_request(request)
    if out is not None:
        check_out(out)
    elif runs is not None:
        check_writable(runs.absolute())
    if source.folder:
        ledger.parent_lines(source.folder)  # refuses a broken chain before any work
    target = resolve_target(request, source.names, source.erased, data)
    required = {name: p.requires_grad for name, p in source.model.named_parameters()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # torch's own encoder layer would pass over the hooks of LoRA
        session = _Session(source, data, request, load, target)
        report({"stage": "before"})
        session.measure_before()
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
    """One erasure on its way from images to evidence."""

    def __init__(self, source: Source, data: ImageFolder, request: Request, load: Callable, target: Target):
        import torch

        self.source, self.data, self.request, self.target = source, data, request, target
        self.wanted = wanted = target.classes
        self.device = pick_device(request.device)
        self.erased = sorted(source.erased)
        self.retained = [i for i in range(len(source.names)) if i not in wanted and i not in source.erased]
        torch.manual_seed(request.settings.seed)
        self.test, self.images = self._read_images(load)
        half = [n for n, p in source.model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
        if half:
            raise RequestError(
                f"Tensor {half[0]} and {len(half) - 1} more are not float32.",
                "Convert the model first: model.float().",
                "not_float32",
            )
        self.model = source.model.to(self.device).eval()
        self.original = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def _read_images(self, load: Callable) -> tuple[ImageSet, ImageSet]:
        from gsforget.coverage import check_counts, check_identical, count_warnings
        from gsforget.data import ImageSet, few_shot, manifest_sha256

        request, names = self.request, self.source.names
        sides = self.wanted, self.retained, names
        check_counts(self.data.train.labels, *sides)
        test = ImageSet(self.data.test, load, request.skip_corrupt)
        test.check()
        split = self.data.train.select(np.flatnonzero(~of_classes(self.data.train.labels, self.erased)))
        enough = max(1, control.STEPS_OF_IMAGES * request.settings.batch_size // len(self.wanted + self.retained))
        shots = enough if request.shots is None else min(request.shots, enough)
        split = split.select(few_shot(split.labels, shots, request.settings.seed))
        images = ImageSet(split, load, request.skip_corrupt)
        images.check()
        check_counts(images.labels.numpy(), *sides)
        self.warnings = self.target.notes + count_warnings(images.labels.numpy(), *sides)
        self.manifests = {}
        for name, part, hashes in (
            ("train", self.data.train, self.data.train_sha256),
            ("test", self.data.test, self.data.test_sha256),
        ):
            self.warnings += check_identical(part, hashes, *sides, name)
            self.manifests[name] = manifest_sha256(part, hashes)
        return test, images

    def measure_before(self) -> None:
        import torch

        from gsforget.lora.blocks import find_feed_forward

        # Refuses a model without feed-forward networks before all images are run.
        find_feed_forward(self.model, self.test.batch(torch.arange(min(2, len(self.test)))).to(self.device))
        self.labels = self.test.labels.numpy()
        logits = self._test_logits()
        if logits.shape[1:] != (len(self.source.names),):
            raise RequestError(
                f"The model's logits have shape {list(logits.shape)}; {len(self.source.names)} classes need "
                f"[{len(logits)}, {len(self.source.names)}].",
                "Give all class names in the model's index order.",
                "class_count",
            )
        self.said_before = predict(logits)
        active = sorted(self.wanted + self.retained)
        confusion = confusion_matrix(self.labels, self.said_before, len(self.source.names))
        check_plausible(confusion, active, self.source.names)

    def train(self, report: Callable[[Event], None]) -> Trained:
        import torch

        from gsforget.data import split_validation
        from gsforget.tasks.classify import Classification, default_bound
        from gsforget.training import Loop

        settings, count = self.request.settings, len(self.source.names)
        train, val = (
            torch.from_numpy(rows) for rows in split_validation(self.images.labels.numpy(), seed=settings.seed)
        )
        forget = torch.from_numpy(of_classes(self.images.labels, self.wanted))
        self.bound = default_bound(count) if settings.bnd is None else settings.bnd
        task = Classification(
            count, tuple(self.wanted), tuple(self.erased), self.bound, self.request.method, self.base_sha256
        )
        loop = Loop(self.model, task, self.images, train, val, forget, settings, report)
        try:
            return loop.run()
        except BaseException:  # the module may be the caller's: take the hooks off, also after Ctrl-C
            loop.groups.detach()
            raise

    def merge_and_measure(self, trained: Trained) -> Evidence:
        """Put the factors on the grid, merge them, and measure the merged weights; nothing else is ever measured."""
        from gsforget.checkpoint import check_finite
        from gsforget.lora.grid import merge, to_grid

        pairs = trained.groups.named_deltas()
        delta = {name: to_grid(pair.a, pair.b) for name, pair in pairs.items()}
        for name, pair in pairs.items():
            for factor, rounded in zip((pair.a, pair.b), delta[name].factors()):
                factor.data.copy_(rounded)
        adapted = self._test_logits()
        trained.groups.detach()
        state = {
            name: merge(tensor, delta[name]) if name in delta else tensor for name, tensor in self.original.items()
        }
        check_finite(state, "the merged model")
        self.model.load_state_dict(state)
        merged = self._test_logits()
        said_after = predict(merged)
        t = self.request.thresholds
        evidence = Evidence(
            source=self.source,
            request=self.request,
            config=self.source.config.erase(self.wanted),
            forget=self.wanted,
            retain=self.retained,
            old=self.erased,
            labels=self.labels,
            said_before=self.said_before,
            said_after=said_after,
            gates=evaluate_gates(
                self.said_before == self.labels,
                said_after == self.labels,
                self.labels,
                self.wanted,
                self.retained,
                self.erased,
                t.max_forget_acc,
                t.max_retain_drop,
                t.max_class_drop,
            ),
            trained=trained,
            group_names=[block.name for block in trained.groups.blocks],
            active=sorted({pair.group for pair in pairs.values()}),
            original=self.original,
            state=state,
            delta=delta,
            merge_difference=float((adapted - merged).abs().max()),
            bound=self.bound,
            device=self.device.type,
            data_root=self.data.root,
            manifests=self.manifests,
            warnings=self.warnings,
            dropped_images=[str(p) for p in self.test.dropped + self.images.dropped],
        )
        outside = sorted(set(evidence.changed) - delta.keys())
        if outside:
            raise GsforgetError(
                f"Tensors outside the active groups changed: {', '.join(outside)}.", "Please report this."
            )
        return evidence

    def _test_logits(self) -> Tensor:
        """Logits of all test images, float32 [N, K], on the CPU."""
        import torch

        from gsforget.lora.blocks import as_logits

        pieces = torch.arange(len(self.test)).split(EVAL_BATCH)
        with torch.inference_mode():
            return torch.cat([as_logits(self.model(self.test.batch(p).to(self.device))).float().cpu() for p in pieces])


def _publish(evidence: Evidence, runs: Path | None, out: Path | None, started: float) -> Outcome:
    from gsforget.runs import publish

    document = records.document(evidence, time.perf_counter() - started)
    outcome = Outcome(document, records.metrics(evidence), None, evidence.state, evidence.config)
    if runs is None and out is None:
        return outcome
    # A failed run never takes the place that was meant for a model.
    place = out if evidence.passed else None
    prefix = "forget" if evidence.passed else "failed"
    folder = publish(
        lambda path: records.write_run(path, evidence, outcome.metrics), runs or Path("runs"), place, prefix
    )
    outcome.folder = folder
    if evidence.passed:
        document["artifacts"] = {"model": str(folder / WEIGHTS)}
        document["sha256"] = {"model": sha256(folder / WEIGHTS)}
    return outcome
