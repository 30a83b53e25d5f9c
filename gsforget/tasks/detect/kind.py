"""One request to a detector on its scenes: read them, measure the model before, plan, measure the merged model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget import control, processes
from gsforget.classes import resolve_classes
from gsforget.data import Split, split_validation
from gsforget.errors import RequestError
from gsforget.export.device.preprocess import Preprocess
from gsforget.images import ImageSet
from gsforget.material import Material
from gsforget.request import Request, refuse
from gsforget.requests.target import Target
from gsforget.tasks.base import Load, Measured, Plan, Seen
from gsforget.tasks.detect.coco import Scene, SceneFolder, category_names, open_scenes
from gsforget.tasks.detect.evidence import Figures, check_plausible, measured
from gsforget.tasks.detect.families import family_of, is_detector
from gsforget.tasks.detect.losses import Detection, feed_forward_of, targets_of
from gsforget.tasks.detect.models import HUB, build_detector, fetch_detector, reader

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.audit.case import Ask, Devices
    from gsforget.folder import ModelConfig
    from gsforget.source import Source
    from gsforget.training import Trained

PIXELS = 64 * 224 * 224  # of the images run at once, at most: large images come in smaller batches
MOST_IMAGES = 6000  # to learn from: what a detector says of an image is kept, for all its queries
MOST_BYTES = 2**31  # of what is kept


networks = feed_forward_of


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """See `gsforget.tasks.base.Kind`."""
    from gsforget.tasks.detect.audit import audit as look

    return look(ask, devices, out, say)


def open_data(
    root: Path,
    names: list[str] | None,
    optional: Collection[str] = (),
    never_seen: Collection[str] = (),
    annotations: str | None = None,
) -> SceneFolder:
    """See `gsforget.tasks.base.Kind`; `optional` and `never_seen` are of folders of images, and scenes have none."""
    del optional, never_seen
    return open_scenes(root, annotations, names if names is not None else category_names(root, annotations))


def resolve(request: Request, source: Source, data: SceneFolder) -> Target:
    """See `gsforget.tasks.base.Kind`: kinds of objects by name."""
    del data
    return Target(resolve_classes(request.classes, source.names, source.erased))


def find_folder(name: str) -> Path:
    """See `gsforget.tasks.base.Kind`: a detector is a folder, or is downloaded into one.  Raises RequestError ``no_model``."""
    if name.startswith(HUB):
        return fetch_detector(name)
    raise RequestError(
        f"There is no folder {name}.",
        f"Give --model a folder that transformers wrote, a run folder, or {HUB}NAME to download a detector.",
        "no_model",
    )


def open_source(
    name: str, names: list[str], checkpoint: Path | None, model_kwargs: dict[str, Any], given: dict[str, Any]
) -> Source:
    """See `gsforget.tasks.base.Kind`: never reached, for `find_folder` knows them all or raises RequestError."""
    del names, checkpoint, model_kwargs, given
    raise AssertionError(f"{find_folder(name)} is a folder")


def build(architecture: str, model_kwargs: dict[str, Any], class_names: list[str]) -> nn.Module:
    """See `gsforget.tasks.base.Kind`."""
    del class_names
    return build_detector(architecture, model_kwargs)


def open_study(source: Source, data: SceneFolder, request: Request, load: Load, device: torch.device) -> DetectStudy:
    """See `gsforget.tasks.base.Kind`."""
    return DetectStudy(source, data, request, load, device)


class DetectStudy:
    """See `gsforget.tasks.base.Study`."""

    def __init__(self, source: Source, data: SceneFolder, request: Request, load: Load, device: torch.device):
        check_request(request)
        check_detector(source.config)
        self.source, self.request, self.device, self.root = source, request, device, data.root
        self.family = family_of(source.config)
        prepare = Preprocess.from_dict(source.config.to_json())
        self.frame_of = (lambda size: size) if self.family.masked else prepare.frame
        self.forget = resolve(request, source, data).classes
        self.erased = sorted(source.erased)
        self.retained = [k for k in range(len(source.names)) if k not in self.forget and k not in source.erased]
        self.seed = request.settings.seed
        torch.manual_seed(self.seed)
        self._check_counts(data)
        self.warnings: list[str] = []
        self.train, self.scenes = self._open(data, self._chosen(data.train.scenes), load)
        self.test, self.tested = self._open_split(data.test.scenes, load)
        self.annotations = ",".join(str(split.annotations.resolve()) for split in (data.train, data.test))
        self.manifests = {"train": data.train.sha256, "test": data.test.sha256}
        for split in (data.train, data.test):
            if split.dropped:
                self.warnings.append(f"{split.annotations.name} holds {split.dropped} boxes without an area: left out.")
        self.read = reader(source.model, self.family)
        side = source.config.input_size[1] * source.config.input_size[2]
        self.batch = max(1, PIXELS // side)

    def _check_counts(self, data: SceneFolder) -> None:
        for split in (data.train, data.test):
            for k in self.forget:
                if not any((s.kinds == k).any() for s in split.scenes):
                    raise RequestError(
                        f"{split.annotations} annotates no object of '{self.source.names[k]}' on its {len(split.scenes)} "
                        "images, so that it can neither be forgotten nor measured.",
                        "Annotate some, or leave it out of --classes.",
                        "no_objects",
                    )
            if not any(np.isin(s.kinds, self.retained).any() for s in split.scenes):
                raise RequestError(
                    f"{split.annotations} annotates no object of the retained kinds.",
                    "Annotate what the detector is to keep.",
                    "no_objects",
                )
        if all(np.isin(s.kinds, self.forget).any() for s in data.train.scenes):
            raise RequestError(
                f"Every image of {data.train.annotations} shows an object to forget, and none shows only what is kept.",
                "Add images without the forgotten kinds.",
                "no_retained_images",
            )

    def _chosen(self, scenes: list[Scene]) -> list[Scene]:
        """Scenes to learn from: all, or with --shots so many images of each kind, or as many as can be seen and kept."""
        rng, shots = np.random.default_rng(self.seed), self.request.shots
        order = rng.permutation(len(scenes))
        if shots is None:
            enough = control.STEPS_OF_IMAGES * self.request.settings.batch_size
            return [scenes[i] for i in np.sort(order[: min(enough, MOST_IMAGES)])]
        left = dict.fromkeys(self.forget + self.retained, shots)
        rows = []
        for i in order:
            here = {int(k) for k in scenes[i].kinds if left.get(int(k), 0)}
            if here:
                rows.append(i)
                left.update({k: left[k] - 1 for k in here})
        return [scenes[i] for i in sorted(rows)]

    def _open(self, data: SceneFolder, scenes: list[Scene], load: Load) -> tuple[ImageSet, list[Scene]]:
        images, left = self._open_split(scenes, load)
        lacking = [k for k in self.forget if not any((s.kinds == k).any() for s in left)]
        if lacking:
            raise RequestError(
                f"None of the {len(left)} images to learn from shows '{self.source.names[lacking[0]]}'.",
                "Give more with --shots.",
                "no_objects",
            )
        return images, left

    def _open_split(self, scenes: list[Scene], load: Load) -> tuple[ImageSet, list[Scene]]:
        def checked(path: Path) -> np.ndarray:
            _check_size(path, sizes[path])
            return load(path)

        sizes = {s.path: s.size for s in scenes}
        split = Split([s.path for s in scenes], np.zeros(len(scenes), np.int64))
        images = ImageSet(split, checked, self.request.skip_corrupt)
        images.check()
        gone = set(images.dropped)
        return images, [replace(s, frame=self.frame_of(s.size)) for s in scenes if s.path not in gone]

    def fingerprint(self) -> Any:
        return self.manifests, len(self.test), len(self.train)

    def dropped(self) -> list[Path]:
        return self.test.dropped + self.train.dropped

    def before(self) -> None:
        feed_forward_of(self.source.model, self.test.batch(torch.arange(min(2, len(self.test)))).to(self.device))
        seen = self.look()
        said, expected = seen.outputs.shape[-1], len(self.source.names) + (self.family.scoring == "softmax")
        if said != expected:
            raise RequestError(
                f"The detector says {said} numbers per query; {len(self.source.names)} classes need {expected}.",
                "Give all class names in the model's index order.",
                "class_count",
            )
        self.seen_before = Seen(seen.outputs, more={"boxes": seen.more["boxes"]})
        self.figures = Figures(
            self.source,
            self.request,
            self.family,
            self.tested,
            self.forget,
            self.retained,
            self.erased,
            self.seen_before,
        )
        check_plausible(self.figures)

    def plan(self, base_sha256: str) -> Plan:
        del base_sha256
        settings = self.request.settings
        rows = torch.arange(len(self.scenes))
        forget = torch.tensor([bool(np.isin(s.kinds, self.forget).any()) for s in self.scenes])
        learn, val = (
            torch.from_numpy(part) for part in split_validation(forget.numpy().astype(np.int64), seed=self.seed)
        )
        task = Detection(
            self.source.model,
            self.family,
            tuple(self.forget),
            tuple(self.erased),
            targets_of(self.scenes),
            self.scenes,
            settings.bnd,
            self.request.method,
            self.seed,
            self.batch,
        )
        kept = int((~forget[learn]).sum())
        material = Material(self.train, learn, val, forget, torch.zeros(len(rows), dtype=torch.bool), learn, kept)
        settings = replace(settings, batch_size=min(settings.batch_size, max(1, self.batch)))
        return Plan(task, material, settings, task.chosen)

    def look(self) -> Seen:
        pieces = []
        with torch.inference_mode():
            for rows in torch.arange(len(self.test)).split(self.batch):
                tensors = processes.gather_rows(self._look_at, rows)
                pieces.append(Seen(tensors[0].cpu(), more={"boxes": tensors[1].cpu()}))
        return Seen.joined(pieces)

    def _look_at(self, share: Tensor) -> list[Tensor]:
        seen = self.read(self.test.batch(share).to(self.device))
        return [seen.outputs.float(), seen.more["boxes"].float()]

    def after(self, seen: Seen, trained: Trained) -> Measured:
        del trained
        found = processes.from_first(lambda: measured(self.figures, seen))
        return replace(found, in_request={"annotations": self.annotations})


def check_detector(config: ModelConfig) -> None:
    """Refuse what is no detector of transformers, and what would cut off a part of its images."""
    if not is_detector(config):
        raise RequestError(
            f"{config.architecture} is no detector that gsforget knows how to build.",
            "Save it first, model.save_pretrained(FOLDER), and give the folder.",
            "no_model",
        )
    refuse(
        {"--crop-pct": config.crop_pct != 1},
        "{} would cut off a part of each image, whose boxes are annotated on the whole of it.",
        "Leave out {}.",
        "not_for_detection",
    )


def check_request(request: Request) -> None:
    """See `gsforget.tasks.base.Kind`.  Raises RequestError ``not_for_detection``."""
    refuse(
        {"--images": request.images, "--sample-mode": request.sample_mode},
        "{} lists whole images, which show objects of several kinds, and a detector forgets kinds of objects.",
        "Name the kinds: --classes A,B, or classes: [A, B] in a request file.",
        "not_for_detection",
    )
    refuse(
        {
            "--reference": request.reference,
            "--never-seen": request.never_seen,
            "--max-probe-excess": request.thresholds.max_probe_excess is not None,
        },
        "{} compares features with those of a model that never saw the classes, which the run of a detector does not.",
        "Leave out {}, and compare afterwards: gsforget audit RUN --data DIR --tier standard --reference FOLDER.",
        "not_for_detection",
    )


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """RequestError where an image is not of the size that its annotations speak of; one that cannot be read is not judged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = image.size
    except Exception:  # the loader says what is wrong with it
        return
    if found != size:
        raise RequestError(
            f"{path} has {found[0]} x {found[1]} pixels, its annotations speak of {size[0]} x {size[1]}.",
            "Correct width and height in the annotation file, or put back the image that was annotated.",
            "wrong_size",
        )
