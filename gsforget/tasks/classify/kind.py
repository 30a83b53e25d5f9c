"""One request to a classifier on its images: read them, measure the model before, plan, measure the merged model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget import control, processes
from gsforget.audit.images import PER_CLASS
from gsforget.coverage import check_counts, check_identical, count_warnings
from gsforget.data import ImageFolder, few_shot, manifest_sha256, scan
from gsforget.errors import RequestError
from gsforget.images import ImageSet
from gsforget.lora.blocks import as_logits, find_feed_forward
from gsforget.material import gather
from gsforget.metrics import check_plausible, confusion_matrix, of_classes, predict
from gsforget.models import create_timm
from gsforget.request import Request, check_sample_mode, refuse_annotations
from gsforget.requests.target import Target, resolve_target
from gsforget.samples import SETTLE_STEPS, Answers, SampleResult, copies_in_test, judge, set_aside
from gsforget.source import Source, from_timm
from gsforget.tasks.base import Load, Measured, Plan, Seen, Task
from gsforget.tasks.classify.evidence import Figures, measured
from gsforget.tasks.classify.losses import Classification, default_bound
from gsforget.tasks.classify.samples import SingleImages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from gsforget.audit.in_run import Probed, Prober
    from gsforget.training import Trained

EVAL_BATCH = 256
open_source, networks = from_timm, find_feed_forward  # see `gsforget.tasks.base.Kind`


def open_study(source: Source, data: ImageFolder, request: Request, load: Load, device: torch.device) -> ClassifyStudy:
    """See `gsforget.tasks.base.Kind`."""
    return ClassifyStudy(source, data, request, load, device)


def check_request(request: Request) -> None:
    """See `gsforget.tasks.base.Kind`: whatever can be asked is about classifiers."""
    del request


def resolve(request: Request, source: Source, data: ImageFolder) -> Target:
    """See `gsforget.tasks.base.Kind`."""
    return resolve_target(request, source.names, source.erased, data, source.erased_images)


def find_folder(name: str) -> Path | None:
    """See `gsforget.tasks.base.Kind`: what is no folder is a model of timm."""
    del name
    return None


def open_data(
    root: Path,
    names: list[str] | None,
    optional: Collection[str] = (),
    never_seen: Collection[str] = (),
    annotations: str | None = None,
) -> ImageFolder:
    """See `gsforget.tasks.base.Kind`."""
    refuse_annotations(annotations)
    return scan(root, names, optional, True, never_seen)


def build(architecture: str, model_kwargs: dict[str, Any], class_names: list[str]) -> nn.Module:
    """See `gsforget.tasks.base.Kind`."""
    return create_timm(architecture, len(class_names), model_kwargs).eval()


class ClassifyStudy:
    """See `gsforget.tasks.base.Study`."""

    def __init__(self, source: Source, data: ImageFolder, request: Request, load: Load, device: torch.device):
        self.source, self.data, self.load, self.device = source, data, load, device
        self.target = self._resolve(request)
        if self.target.rows is not None:
            check_sample_mode(request)
            request = replace(request, method="gs-lora")  # single images are forgotten by the answers alone
        self.request, self.root = request, data.root
        self.forget = self.target.classes
        self.erased = sorted(source.erased)
        self.retained = [i for i in range(len(source.names)) if i not in self.forget and i not in source.erased]
        settings = request.settings
        torch.manual_seed(settings.seed)
        self.test, self.images = self._read_images()
        self.bound = default_bound(len(source.names)) if settings.bnd is None else settings.bnd

    def _resolve(self, request: Request) -> Target:
        return resolve(request, self.source, self.data)

    def _read_images(self) -> tuple[ImageSet, ImageSet]:
        request, names, split, load = self.request, self.source.names, self.data.train, self.load
        sides = self.forget, self.retained, names
        check_counts(split.labels, *sides)
        aside, held = self._split_test()
        test, self.aside = (ImageSet(self.data.test.select(rows), load, request.skip_corrupt) for rows in (held, aside))
        test.check()
        self.aside.check()
        enough = max(1, control.STEPS_OF_IMAGES * request.settings.batch_size // len(self.forget + self.retained))
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

    def fingerprint(self) -> Any:
        return self.manifests, len(self.test), len(self.images), len(self.aside)

    def dropped(self) -> list[Path]:
        return self.test.dropped + self.aside.dropped + self.images.dropped

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
            keep &= ~again | of_classes(labels, self.forget)
        return np.flatnonzero(keep)

    def _erased_rows(self, shots: int) -> NDArray[np.int64]:
        """Training images of classes that earlier requests forgot, to see whether they come back; none for single images."""
        rows = np.flatnonzero(of_classes(self.data.train.labels, self.erased if self.target.rows is None else []))
        labels = self.data.train.labels[rows]
        return rows[few_shot(labels, shots, self.request.settings.seed)] if len(rows) else rows

    def before(self) -> None:
        # Refuses a model without feed-forward networks before all images are run.
        first = self.test.batch(torch.arange(min(2, len(self.test))))
        find_feed_forward(self.source.model, first.to(self.device))
        self.labels = self.test.labels.numpy()
        logits = self.look().outputs
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
        active = sorted(self.forget + self.retained)
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
        sides = self.forget, self.retained
        images = self._attackers_images(), self.test
        return Prober(self.source, self.data, self.request, *sides, *images, self.load, self.device)

    def _attackers_images(self) -> ImageSet:
        """Training images for an attacker, who has more than the few that --shots leaves to learn from."""
        there, mine = self.data.train.labels[self._usable()], self.images.labels.numpy()
        if all((mine == k).sum() >= min(PER_CLASS, (there == k).sum()) for k in self.forget + self.retained):
            return self.images
        rows = self._usable()[few_shot(there, PER_CLASS, self.request.settings.seed)]
        images = ImageSet(self.data.train.select(rows), self.load, self.request.skip_corrupt)
        images.check()
        return images

    def plan(self, base_sha256: str) -> Plan:
        settings, count = self.request.settings, len(self.source.names)
        labels, single = self.images.labels.numpy(), torch.from_numpy(self.single)
        lacking = [k for k in self.retained if not (labels == k).any()]
        sides = tuple(self.forget), tuple(self.erased)
        method = self.request.method
        task: Task = Classification(count, *sides, self.bound, method, base_sha256, firm=bool(lacking))
        material = gather(self.source.model, self.images, self.forget, self.erased, single, lacking, settings.seed)
        if single.any():
            shown = self._logits_of(self.aside, np.arange(len(self.aside)))
            task = SingleImages(shown, self.aside.labels, tuple(self.erased))
            if settings.epochs is None:
                per_epoch = -(-material.kept // min(settings.batch_size, material.kept))
                settings = replace(settings, epochs=SETTLE_STEPS / per_epoch)
        return Plan(task, material, settings, {"bnd": self.bound})

    def look(self) -> Seen:
        return Seen(self._logits_of(self.test, np.arange(len(self.test))))

    def after(self, seen: Seen, trained: Trained) -> Measured:
        said_after = predict(seen.outputs)
        sample = self._sample_result(seen.outputs)
        probed = processes.from_first(lambda: self.prober.after() if self.prober else None)
        return measured(self._figures(said_after, trained, sample, probed))

    def _figures(
        self,
        said_after: NDArray[np.int64],
        trained: Trained,
        sample: SampleResult | None = None,
        probed: Probed | None = None,
    ) -> Figures:
        """What classes are answered before and after; `sample` of single images, `probed` where features were attacked."""
        return Figures(
            self.source,
            self.request,
            self.forget,
            self.retained,
            self.erased,
            self.labels,
            self.said_before,
            said_after,
            sample,
            probed,
            [self.source.names[k] for k in trained.chosen["forgotten_again"]],
        )

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

    def _logits_of(self, images: ImageSet, rows: NDArray[np.int64]) -> Tensor:
        """Logits of images at `rows`, float32 [len(rows), K], on the CPU."""
        return self._outputs_of(images, rows, lambda pixels: as_logits(self.source.model(pixels)))

    def _outputs_of(self, images: ImageSet, rows: NDArray[np.int64], run: Callable[[Tensor], Tensor]) -> Tensor:
        """What `run` makes of images at `rows`, float32 [len(rows), …], on the CPU; each process runs its share."""

        def outputs(share: Tensor) -> list[Tensor]:
            return [run(images.batch(share).to(self.device)).float()]

        pieces = torch.from_numpy(rows).split(EVAL_BATCH)
        with torch.inference_mode():
            return torch.cat([processes.gather_rows(outputs, p)[0].cpu() for p in pieces])
