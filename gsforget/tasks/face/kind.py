"""One request to an embedding model: forget people, measured as open-set recognition next to people it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.classes import check_remaining
from gsforget.data import ImageFolder, listed
from gsforget.errors import RequestError
from gsforget.export.device.gallery import Gallery, load_gallery, make_gallery
from gsforget.export.device.sidecar import write_sidecar
from gsforget.folder import WEIGHTS, sha256
from gsforget.images import ImageSet
from gsforget.lora.blocks import find_feed_forward
from gsforget.material import gather
from gsforget.metrics import check_plausible, confusion_matrix, of_classes, predict
from gsforget.request import Request, refuse
from gsforget.requests.images import find_rows
from gsforget.requests.target import Target, resolve_target
from gsforget.tasks.base import Load, Measured, Plan, Seen
from gsforget.tasks.classify.kind import ClassifyStudy, find_folder
from gsforget.tasks.face import model as models
from gsforget.tasks.face.data import open_data, stranger_images, strangers
from gsforget.tasks.face.evidence import GALLERY, FaceFigures, OpenSet, People, open_set
from gsforget.tasks.face.losses import FaceForgetting
from gsforget.tasks.face.model import FaceModel
from gsforget.tasks.face.source import open_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.audit.case import Ask, Devices
    from gsforget.source import Source
    from gsforget.training import Trained

__all__ = [
    "audit",
    "build",
    "check_request",
    "find_folder",
    "networks",
    "open_data",
    "open_source",
    "open_study",
    "resolve",
]

networks = find_feed_forward  # see `gsforget.tasks.base.Kind`
JUDGED_BY = 1, 0.5  # validation looks at one mild view of each image, for crops are aligned
PROBES = ("linear_probe", "linear_probe_excess", "prototype_attack", "mia_auc")
NO_PROBES = f"{', '.join(PROBES[:-1])} and {PROBES[-1]}: for people, verification next to never-seen people stands in their place"


def open_study(source: Source, data: ImageFolder, request: Request, load: Load, device: torch.device) -> FaceStudy:
    """See `gsforget.tasks.base.Kind`."""
    return FaceStudy(source, data, request, load, device)


def check_request(request: Request) -> None:
    """See `gsforget.tasks.base.Kind`."""
    if request.sample_mode:
        raise RequestError(
            "Single images of a person cannot be forgotten while the person is kept.",
            "Leave out --sample-mode: the person on the listed images is forgotten.",
            "face_sample",
        )
    refused = {
        "--reference": request.reference,
        "--max-probe-excess": request.thresholds.max_probe_excess is not None,
    }
    refuse(
        refused,
        "{} is about classifiers; people are compared with people whom the model never saw.",
        "Leave out {}; give --never-seen A,B.",
        "face_reference",
    )


def resolve(request: Request, source: Source, data: ImageFolder) -> Target:
    """See `gsforget.tasks.base.Kind`: people, by name or by a few of their images.

    Whoever is on a listed image is forgotten altogether.
    """
    if request.images is None:
        return resolve_target(request, source.names, source.erased, data)
    if any(name.strip() for name in request.classes):
        raise RequestError("Both people and images were given.", "Give one of them.", "two_targets")
    labels = data.train.labels[find_rows(request.images, data)]
    people = sorted({int(k) for k in labels})
    gone = [source.names[k] for k in people if k in source.erased]
    if gone:
        raise RequestError(
            f"{request.images.where} lists images of {listed(gone)}, forgotten by an earlier request.",
            "Remove them from the list.",
            "already_forgotten",
        )
    check_remaining(people, source.names, source.erased)
    total = {k: int((data.train.labels == k).sum()) for k in people}
    found = [f"'{source.names[k]}' ({(labels == k).sum()} of {total[k]})" for k in people]
    return Target(people, notes=[f"{request.images.where} shows {', '.join(found)}: all their images are forgotten."])


def build(architecture: str, model_kwargs: dict[str, Any], class_names: list[str]) -> nn.Module:
    """See `gsforget.tasks.base.Kind`."""
    return models.build(architecture, model_kwargs, len(class_names))


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """See `gsforget.tasks.base.Kind`."""
    from gsforget.tasks.face.audit import audit as of_faces

    return of_faces(ask, devices, out, say)


class FaceStudy(ClassifyStudy):
    """See `gsforget.tasks.base.Study`; images are read as for classification, a folder being a person."""

    def __init__(self, source: Source, data: ImageFolder, request: Request, load: Load, device: torch.device):
        if not isinstance(source.model, FaceModel):
            raise RequestError(
                "The model is no embedding model with a head of one row per person.",
                "Pass a gsforget.tasks.face.model.FaceModel, or leave out --task face.",
                "no_face_model",
            )
        self.gallery = self._open_gallery(source, request)
        super().__init__(source, data, request, load, device)
        self.unseen = self._never_seen()
        self.warnings += self._counts()

    def _resolve(self, request: Request) -> Target:
        check_request(request)
        return resolve(request, self.source, self.data)

    def _open_gallery(self, source: Source, request: Request) -> Gallery | None:
        if request.gallery is None:
            return None
        gallery = load_gallery(request.gallery)
        hashes = [sha256(source.folder / WEIGHTS)] if source.folder else []
        gallery.check_model(hashes, request.gallery)
        return gallery

    def _never_seen(self) -> ImageSet:
        """Images of people whom the model never saw, from the test folder; labels count on from the model's people."""
        names = self.source.names
        self.new = strangers(self.data, names, self.request.never_seen)
        images = ImageSet(stranger_images(self.data, self.new, len(names)), self.load, self.request.skip_corrupt)
        images.check()
        return images

    def _counts(self) -> list[str]:
        """People with one test image, of whom no two can be compared."""
        names = [*self.source.names, *self.new]
        labels = np.concatenate([self.test.labels.numpy(), self.unseen.labels.numpy()])
        single = [names[k] for k in np.unique(labels) if (labels == k).sum() == 1]
        if not single:
            return []
        return [
            f"One test image is there of {listed(single)}. Two are needed to compare, so that "
            f"{'this person is' if len(single) == 1 else 'these people are'} in no verification figure."
        ]

    @property
    def model(self) -> FaceModel:
        assert isinstance(self.source.model, FaceModel)
        return self.source.model

    def before(self) -> None:
        first = self.test.batch(torch.arange(min(2, len(self.test))))
        find_feed_forward(self.model, first.to(self.device))
        self.labels = self.test.labels.numpy()
        seen = self.look()
        self.said_before = predict(seen.outputs)
        active = sorted(self.forget + self.retained)
        confusion = confusion_matrix(self.labels, self.said_before, len(self.source.names))
        check_plausible(confusion, active, self.source.names)
        self.open_before = self._open_set(seen)

    def plan(self, base_sha256: str) -> Plan:
        del base_sha256
        labels = self.images.labels.numpy()
        lacking = [names for k, names in enumerate(self.source.names) if k in self.retained and not (labels == k).any()]
        if lacking:
            self.warnings.append(
                f"{len(lacking)} retained people have no training images ({listed(lacking)}); they are kept by the others' "
                "alone."
            )
        settings = self.request.settings
        task = FaceForgetting(tuple(self.forget), tuple(self.erased), self.request.method)
        single = torch.zeros(len(self.images), dtype=torch.bool)
        sides = self.forget, self.erased
        material = gather(self.model, self.images, *sides, single, [], settings.seed, JUDGED_BY)
        # People have few photographs each, and are judged by pairs of them, of which there are many.
        return Plan(task, replace(material, blind=bool(lacking), handful=False), settings)

    def look(self) -> Seen:
        embeddings = self._embeddings(self.test)
        with torch.inference_mode():
            return Seen(self.model.loss.cosines(embeddings.to(self.device)).cpu(), embeddings)

    def after(self, seen: Seen, trained: Trained) -> Measured:
        plain = self._figures(predict(seen.outputs), trained)
        names = [*self.source.names, *self.new]
        faces = FaceFigures(self.open_before, self._open_set(seen), names)
        summary = plain.summary()
        gallery, notes = self._next_gallery()
        section = {**faces.to_json(), "gallery": notes}
        not_tested = [NO_PROBES, *plain.not_tested(summary)[1:], *faces.not_tested()]
        most = self.request.thresholds.max_retain_drop
        return Measured(
            summary,
            plain.classes(),
            len(self.labels),
            [*plain.gates(), *faces.gates(most)],
            plain.picture(),
            dict.fromkeys(PROBES),
            sections={"task": "face", "face": section},
            not_tested=[*not_tested, *([] if gallery else [GALLERY])],
            warnings=[*plain.warnings(), *faces.warnings(most)],
            in_request={"task": "face", "never_seen": self.new},
            write=gallery,
        )

    def _next_gallery(self) -> tuple[Any, dict[str, Any] | None]:
        """What writes the run's gallery, and what became of the given one."""
        given = self.gallery
        if given is None:
            return None, None
        gone = {self.source.names[k] for k in (*self.forget, *self.erased)}
        deleted = [name for name in given.names if name in gone]
        kept = given.without(deleted).names
        images = self.images
        labels = images.labels.numpy()
        again = [n for n in kept if n in self.source.names and (labels == self.source.names.index(n)).any()]
        place = {self.source.names.index(name): n for n, name in enumerate(again)}
        rows = np.flatnonzero(of_classes(labels, sorted(place)))
        notes = {
            "deleted": deleted,
            "enrolled_again": again,
            "to_enroll_again": [name for name in kept if name not in again],
            "path": str(self.request.gallery),
        }
        if not again:
            return None, notes
        embeddings = self._embeddings(images)[torch.from_numpy(rows)].numpy()
        people = np.array([place[int(k)] for k in labels[rows]])

        def write(folder: Path) -> None:
            made = make_gallery(again, embeddings, people, sha256(folder / WEIGHTS))
            path = folder / "artifacts" / "gallery.npz"
            made.save(path)
            # For verify, and for purge: an older run's gallery holds whom a later request forgot.
            said = {"kind": "gallery", "file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            write_sidecar(path, {"format": 1, **said, "source_sha256": made.model})

        return write, notes

    def _open_set(self, seen: Seen) -> OpenSet:
        unseen = self._embeddings(self.unseen)
        embeddings = np.concatenate([seen.features.numpy(), unseen.numpy().reshape(-1, seen.features.shape[1])])
        identities = np.concatenate([self.labels, self.unseen.labels.numpy()])
        new = sorted(set(self.unseen.labels.tolist()))
        groups = {"forget": self.forget, "retain": self.retained, "old": self.erased, "never_seen": new}
        return open_set(People(embeddings, identities, groups))

    def _embeddings(self, images: ImageSet) -> Tensor:
        """float32 [N, d], on the CPU."""
        return self._outputs_of(images, np.arange(len(images)), self.model) if len(images) else torch.empty(0)

    def fingerprint(self) -> Any:
        return self.manifests, len(self.test), len(self.images), len(self.unseen)

    def dropped(self) -> list[Path]:
        return [*super().dropped(), *self.unseen.dropped]
