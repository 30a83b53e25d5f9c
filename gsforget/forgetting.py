"""One erasure from request to run folder: check, train, merge on the grid, measure what was merged, gate, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget import control, ledger, processes, records
from gsforget.audit.images import PER_CLASS
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import WEIGHTS, ModelConfig, sha256
from gsforget.gates import Gate, evaluate_gates, retention_gates
from gsforget.metrics import check_plausible, confusion_matrix, of_classes, predict
from gsforget.predict import pick_device
from gsforget.records import Evidence
from gsforget.request import Request, check_request, check_sample_mode
from gsforget.requests.target import Target, resolve_target
from gsforget.samples import SETTLE_STEPS, Answers, SampleResult, copies_in_test, judge, set_aside

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from gsforget.audit.in_run import Prober
    from gsforget.data import ImageFolder, ImageSet
    from gsforget.source import Source
    from gsforget.tasks.base import Task
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

    from gsforget.export.device.keys import own_signing_key
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
    target = resolve_target(request, source.names, source.erased, data, source.erased_images)
    if target.rows is not None:
        check_sample_mode(request)
        request = replace(request, method="gs-lora")  # single images are forgotten by the answers alone
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

        self.source, self.data, self.request, self.target, self.load = source, data, request, target, load
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
        processes.join(self.device)
        self._check_same()
        processes.broadcast_(*self.model.state_dict().values())
        self.original = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.base_sha256 = records.weights_sha256(source, self.original)

    def _read_images(self, load: Callable) -> tuple[ImageSet, ImageSet]:
        from gsforget.coverage import check_counts, check_identical, count_warnings
        from gsforget.data import ImageSet, few_shot, manifest_sha256

        request, names, split = self.request, self.source.names, self.data.train
        sides = self.wanted, self.retained, names
        check_counts(split.labels, *sides)
        aside, measured = self._split_test()
        test, self.aside = (
            ImageSet(self.data.test.select(rows), load, request.skip_corrupt) for rows in (measured, aside)
        )
        test.check()
        self.aside.check()
        enough = max(1, control.STEPS_OF_IMAGES * request.settings.batch_size // len(self.wanted + self.retained))
        shots = enough if request.shots is None else min(request.shots, enough)
        listed = np.zeros(0, np.int64) if self.target.rows is None else self.target.rows
        others = np.setdiff1d(self._usable(), listed)
        drawn = others[few_shot(split.labels[others], shots, request.settings.seed)]
        again = self._erased_rows(min(shots, PER_CLASS))
        chosen = np.union1d(np.union1d(drawn, listed), again)
        images = ImageSet(split.select(chosen), load, request.skip_corrupt)
        images.check()
        paths = {split.paths[i] for i in listed}
        self.single = np.array([path in paths for path in images.paths], dtype=bool)
        labels = images.labels.numpy()[~self.single]
        check_counts(labels, *sides)
        self.warnings = self.target.notes + count_warnings(labels, *sides)
        self.manifests = {}
        for name, part, hashes in (
            ("train", self.data.train, self.data.train_sha256),
            ("test", self.data.test, self.data.test_sha256),
        ):
            self.warnings += check_identical(part, hashes, *sides, name)
            self.manifests[name] = manifest_sha256(part, hashes)
        self.warnings += copies_in_test(self.data.test.paths, self.data.test_sha256, self.target.sha256(self.data))
        return test, images

    def _check_same(self) -> None:
        """RequestError unless all processes see the same images."""
        seen = processes.of_all((self.manifests, len(self.test), len(self.images), len(self.aside)))
        if any(other != seen[0] for other in seen):
            raise RequestError(
                f"The processes see different images under {self.data.root}.",
                "Give every machine the same data.",
                "different_data",
            )

    def _split_test(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Test images that show what never-seen ones look like, for single images alone, and those that are measured."""
        labels = self.data.test.labels
        classes = [] if self.target.rows is None else self.data.train.labels[self.target.rows].tolist()
        return set_aside(labels, sorted(set(classes)), self.source.names, self.request.settings.seed)

    def _usable(self) -> NDArray[np.int64]:
        """Training images to learn from: none of erased classes, and of images forgotten singly only their class's end."""
        labels, gone = self.data.train.labels, self.source.erased_images
        keep = ~of_classes(labels, self.erased)
        if gone:
            again = np.fromiter((digest in gone for digest in self.data.train_sha256), bool, len(labels))
            keep &= ~again | of_classes(labels, self.wanted)
        return np.flatnonzero(keep)

    def _erased_rows(self, shots: int) -> NDArray[np.int64]:
        """Training images of classes that earlier requests forgot, to see whether they come back; none for single images."""
        from gsforget.data import few_shot

        rows = np.flatnonzero(of_classes(self.data.train.labels, self.erased if self.target.rows is None else []))
        labels = self.data.train.labels[rows]
        return rows[few_shot(labels, shots, self.request.settings.seed)] if len(rows) else rows

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
        prober = self._prober() if processes.is_first() else None
        self.answers_before = self._answers(logits)
        active = sorted(self.wanted + self.retained)
        confusion = confusion_matrix(self.labels, self.said_before, len(self.source.names))
        check_plausible(confusion, active, self.source.names)
        if prober:
            prober.before()
        self.prober = prober

    def _prober(self) -> Prober | None:
        """What attacks the features of whole classes; None for single images."""
        from gsforget.audit.in_run import Prober

        if self.target.rows is not None:
            return None
        return Prober(
            self.source,
            self.data,
            self.request,
            self.wanted,
            self.retained,
            self._attackers_images(),
            self.test,
            self.load,
            self.device,
        )

    def _attackers_images(self) -> ImageSet:
        """Training images for an attacker, who has more than the few that --shots leaves to learn from."""
        from gsforget.data import ImageSet, few_shot

        there, mine = self.data.train.labels[self._usable()], self.images.labels.numpy()
        if all((mine == k).sum() >= min(PER_CLASS, (there == k).sum()) for k in self.wanted + self.retained):
            return self.images
        rows = self._usable()[few_shot(there, PER_CLASS, self.request.settings.seed)]
        images = ImageSet(self.data.train.select(rows), self.load, self.request.skip_corrupt)
        images.check()
        return images

    def train(self, report: Callable[[Event], None]) -> Trained:
        import torch

        from gsforget.material import gather
        from gsforget.tasks.classify import Classification, default_bound
        from gsforget.tasks.samples import SingleImages
        from gsforget.training import Loop

        settings, count = self.request.settings, len(self.source.names)
        labels, single = self.images.labels.numpy(), torch.from_numpy(self.single)
        self.bound = default_bound(count) if settings.bnd is None else settings.bnd
        lacking = [k for k in self.retained if not (labels == k).any()]
        task: Task = Classification(
            count,
            tuple(self.wanted),
            tuple(self.erased),
            self.bound,
            self.request.method,
            self.base_sha256,
            firm=bool(lacking),
        )
        self.model.requires_grad_(False)
        material = gather(self.model, self.images, self.wanted, self.erased, single, lacking, settings.seed)
        if single.any():
            shown = self._logits_of(self.aside, np.arange(len(self.aside)))
            task = SingleImages(shown, self.aside.labels, tuple(self.erased))
            if settings.epochs is None:
                per_epoch = -(-material.kept // min(settings.batch_size, material.kept))
                settings = replace(settings, epochs=SETTLE_STEPS / per_epoch)
        loop = Loop(self.model, task, material, settings, report)
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
        adapted = self._test_logits()
        trained.groups.detach()
        state = {
            name: merge(tensor, delta[name]) if name in delta else tensor for name, tensor in self.original.items()
        }
        check_finite(state, "the merged model")
        self.model.load_state_dict(state)
        merged = self._test_logits()
        said_after = predict(merged)
        sample = self._sample_result(merged)
        probed = processes.from_first(lambda: self.prober.after() if self.prober else None)
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
            gates=[*self._gates(said_after, sample), *(probed.gates() if probed else [])],
            sample=sample,
            probed=probed,
            trained=trained,
            group_names=[block.name for block in trained.groups.blocks],
            active=sorted({pair.group for pair in pairs.values()}),
            original=self.original,
            state=state,
            delta=delta,
            merge_difference=float((adapted - merged).abs().max()),
            bound=self.bound,
            device=self.device.type,
            base_sha256=self.base_sha256,
            data_root=self.data.root,
            manifests=self.manifests,
            warnings=self.warnings + self._came_back(trained) + (sample.warnings() if sample else []),
            dropped_images=[str(p) for p in self.test.dropped + self.aside.dropped + self.images.dropped],
        )
        outside = sorted(set(evidence.changed) - delta.keys())
        if outside:
            raise GsforgetError(
                f"Tensors outside the active groups changed: {', '.join(outside)}.", "Please report this."
            )
        return evidence

    def _came_back(self, trained: Trained) -> list[str]:
        again = [self.source.names[k] for k in trained.chosen["forgotten_again"]]
        if not again:
            return []
        return [f"Named again on validation images, and so forgotten again in this run: {', '.join(again)}."]

    def _gates(self, said_after: NDArray[np.int64], sample: SampleResult | None) -> list[Gate]:
        right = self.said_before == self.labels, said_after == self.labels
        t = self.request.thresholds
        limits = t.max_forget_acc, t.max_retain_drop, t.max_class_drop
        if sample is None:
            return evaluate_gates(*right, self.labels, self.wanted, self.retained, self.erased, *limits)
        return [sample.gate(), *retention_gates(*right, self.labels, self.retained, self.erased, *limits)]

    def _answers(self, test_logits: Tensor) -> Answers | None:
        """Answers on single images to forget, and on the test images of their classes; None where there are none."""
        rows = np.flatnonzero(self.single)
        if not len(rows):
            return None
        held = of_classes(self.labels, self.images.labels[rows].tolist())
        return Answers(self._logits_of(self.images, rows), test_logits[held])

    def _sample_result(self, test_logits: Tensor) -> SampleResult | None:
        before, after = self.answers_before, self._answers(test_logits)
        if before is None or after is None:
            return None
        labels = self.images.labels.numpy()[self.single]
        held_labels = self.labels[of_classes(self.labels, labels.tolist())]
        return judge(labels, held_labels, before, after, len(self.aside), sorted(self.target.sha256(self.data)))

    def _test_logits(self) -> Tensor:
        """Logits of all test images, float32 [N, K], on the CPU."""
        return self._logits_of(self.test, np.arange(len(self.test)))

    def _logits_of(self, images: ImageSet, rows: NDArray[np.int64]) -> Tensor:
        """Logits of images at `rows`, float32 [len(rows), K], on the CPU."""
        import torch

        from gsforget.lora.blocks import as_logits

        def logits(share: Tensor) -> list[Tensor]:
            return [as_logits(self.model(images.batch(share).to(self.device))).float()]

        pieces = torch.from_numpy(rows).split(EVAL_BATCH)
        with torch.inference_mode():
            return torch.cat([processes.gather_rows(logits, p)[0].cpu() for p in pieces])


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
