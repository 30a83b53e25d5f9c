"""What a task gives to an erasure; loop, groups, grid, ledger, gates, records and patches know nothing else of it.

A task is a module with the functions of `Kind`.  Its `Study` is one request on its images: it reads them, measures the
model before, says what the loop learns from (`Plan`: a `Task` with its `Objective`, material, settings), and measures
the merged model (`Measured`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from gsforget.audit.case import Ask, Devices
    from gsforget.gates import Gate
    from gsforget.lora.blocks import FeedForward
    from gsforget.material import Material
    from gsforget.request import Request
    from gsforget.requests.target import Target
    from gsforget.settings import Settings
    from gsforget.source import Source
    from gsforget.training import Trained

Load = Callable[[Path], "np.ndarray"]


@dataclass(frozen=True)
class Seen:
    """What a model makes of B images.

    Attributes:
        outputs: [B, …]: logits of a classifier, of a detector's queries, …
        features: [B, d] for tasks that look at them; else empty.
        more: further outputs by name, each [B, …], such as a detector's boxes.
    """

    outputs: Tensor
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    more: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All that there is, each [B, …]."""
        return [self.outputs, *([self.features] if self.features.ndim > 1 else []), *self.more.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Seen:
        """The same with other `tensors`."""
        outputs, *rest = tensors
        features = rest.pop(0) if self.features.ndim > 1 else self.features
        return Seen(outputs, features, dict(zip(self.more, rest, strict=True)))

    def rows(self, rows: Tensor) -> Seen:
        """Of some of the images only, int64 [M]."""
        return self.with_tensors([tensor[rows] for tensor in self.tensors])

    @classmethod
    def joined(cls, pieces: Sequence[Seen]) -> Seen:
        """Pieces one after the other, float32."""
        parts = zip(*(piece.tensors for piece in pieces), strict=True)
        return pieces[0].with_tensors([torch.cat([p.float() for p in part]) for part in parts])


Reader = Callable[["Tensor"], Seen]  # images [B, C, H, W] -> what the model makes of them


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a scalar in nats; `total` is what is minimised next to the group penalty."""

    total: Tensor
    retain: Tensor
    forget: Tensor


@dataclass(frozen=True)
class Duel:
    """Two losses over forgotten images `rows`, int64 [B] on the host, each a scalar.

    Attributes:
        attack: what somebody would minimise to bring them back.
        defence: what is minimised against it, at the attacked weights.
    """

    attack: Callable[[Seen, Tensor], Tensor]
    defence: Callable[[Seen, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """What validation images say, in percent of the task's own measure and points; None where there are none.

    Attributes:
        forget, retain: of what is to be forgotten and of what is retained, now; retain_before: before the request.
        drop_bound, drop_most: one-sided 95 % bounds, lower and upper, of the loss on what is retained.
        class_bound: the lower bound of the retained class that lost most, for tasks that have a gate for it.
    """

    forget: float | None
    retain: float | None
    retain_before: float | None
    drop_bound: float | None
    drop_most: float | None
    class_bound: float | None = None


class Objective(Protocol):
    """The losses of one request, fixed by what the model before the request makes of all images; rows are int64 [B]."""

    def losses(self, seen: Seen, rows: Tensor, depth: float = 1.0) -> Losses:
        """Losses of a batch: what the model in training makes of the images `rows`, which are on the host or its device.

        `depth` weighs what is taken from the features against the rest; without effect where `deepens` is False.
        """
        ...

    def score(self, seen: Seen, rows: Tensor, shows: Tensor) -> Score:
        """How far it has come, on validation images; shows: int64 [B], which image each is a view of."""
        ...

    def right(self, seen: Seen, rows: Tensor) -> Tensor:
        """Which images of classes that earlier requests forgot the model names (again), bool [B]."""
        ...

    def named(self, seen: Seen, rows: Tensor) -> Tensor | None:
        """Whether a fresh probe on the features names each image, bool [B], or each object on them, bool [M].

        None where features are not looked at.
        """
        ...

    def with_earlier(self, see: Callable[[], Seen], rows: Tensor, depth: float) -> Objective | None:
        """The same losses, whose `depth` is that of classes forgotten earlier from now on; None where there is no such thing.

        Args:
            see: gives what the model in training makes of all N images now; asked only where it is needed.
            rows: int64, the images that teach what is taken.
            depth: of the classes to forget, which stays.
        """
        ...

    @property
    def deepens(self) -> bool:
        """Whether more can be taken from the features than is at first."""
        ...

    @property
    def noise(self) -> float:
        """Points of `Score.retain` whose loss on validation images still counts as none, when more is taken."""
        ...

    @property
    def duel(self) -> Duel | None:
        """What is rehearsed while groups settle, see `rehearsal`; None where nothing is."""
        ...


class Task(Protocol):
    """The losses of one kind of model and request, before it has met the images."""

    @property
    def name(self) -> str:
        """As `--task` spells it."""
        ...

    def networks(self, model: nn.Module, example: Tensor) -> list[FeedForward]:
        """The feed-forward networks that LoRA may change, one group each.  Raises RequestError ``no_feed_forward``."""
        ...

    def reader(self, model: nn.Module, example: Tensor) -> Reader:
        """What runs the model and returns all that the losses need; `example` is a batch of its images."""
        ...

    def objective(self, before: Seen, labels: Tensor, forget: Tensor, train: Tensor) -> Objective:
        """Fix the losses of a request.

        Args:
            before: what the model before the request makes of all N images.
            labels: int64 [N], of the material's images; a task whose images hold several objects knows them by row.
            forget: bool [N]; train: int64, the rows that may be learned from.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """What the loop learns, from what, and for how long; `chosen`: numbers of the task for metrics.json."""

    task: Task
    material: Material
    settings: Settings
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Counts of what a model says about forgotten images, before and after, as bars.

    Attributes:
        before, after: int64 [N], an index into `names` for each image; forgotten: indices to mark.
        what: these images are, for the title; None: images of the forgotten classes.
    """

    before: np.ndarray
    after: np.ndarray
    names: Sequence[str]
    forgotten: Sequence[int]
    what: str | None = None


@dataclass(frozen=True)
class Measured:
    """What a request did, as its task measures it on the merged model; it goes into the documents as it stands.

    Attributes:
        summary: `metrics` of the document, percent; its `forget_acc_after`, `retain_acc_after` and `old_acc_after` go
            into the ledger.
        classes: one entry per class for metrics.json; images: how many test images there were.
        gates: what must hold.
        audit: `audit` of the document; attacks: `audit` of metrics.json.
        sections: further parts of the document and of metrics.json, by name.
        in_request, in_ledger: further fields of request.json and of the ledger's line.
        write: puts further files into the folder of a run that passed, whose model lies there already.
    """

    summary: dict[str, float | None]
    classes: list[dict[str, Any]]
    images: int
    gates: list[Gate]
    picture: Picture
    audit: dict[str, Any]
    attacks: dict[str, Any] | None = None
    audit_seconds: float = 0.0
    sections: dict[str, Any] = field(default_factory=dict)
    not_tested: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    in_request: dict[str, Any] = field(default_factory=dict)
    in_ledger: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Path], None] | None = None


class Study(Protocol):
    """One request on its images.

    Attributes:
        request: what was asked, as it is understood.
        forget: class indices that the request forgets, sorted; none for single images.
        warnings: sentences on what to expect of these images.
        manifests: SHA-256 of each list of images, by split; root: where they lie.
    """

    request: Request
    forget: list[int]
    warnings: list[str]
    manifests: dict[str, str]
    root: Path

    def fingerprint(self) -> Any:
        """The same in all processes that see the same images."""
        ...

    def before(self) -> None:
        """Measure the model before the request.

        Raises RequestError where it has no feed-forward networks, or what it says makes no sense.
        """
        ...

    def plan(self, base_sha256: str) -> Plan:
        """What to train, the model's parameters being frozen; `base_sha256` is of its weights."""
        ...

    def look(self) -> Seen:
        """What the model makes of all test images, float32, on the CPU."""
        ...

    def after(self, seen: Seen, trained: Trained) -> Measured:
        """Measure the merged model, which made `seen` of the test images."""
        ...

    def dropped(self) -> list[Path]:
        """Images that could not be read."""
        ...


class Kind(Protocol):
    """What the module of a task offers; what leaves the workstation is said in `gsforget.export.build.kinds`."""

    @staticmethod
    def networks(model: nn.Module, example: Tensor) -> list[FeedForward]:
        """As `Task.networks`, for models of this task, whatever the request."""
        ...

    @staticmethod
    def find_folder(name: str) -> Path | None:
        """The folder of a model that is named otherwise, downloaded where need be; None: `open_source` knows the name.

        Raises RequestError where a task's models are folders, and the name stands for none.
        """
        ...

    @staticmethod
    def open_source(
        name: str, names: list[str], checkpoint: Path | None, model_kwargs: dict[str, Any], given: dict[str, Any]
    ) -> Source:
        """A model that is no model folder yet, as `gsforget.source.load_source` opens it.

        Args:
            name: of the architecture; names: class names in index order; given: preprocessing that the user asked for.
        """
        ...

    @staticmethod
    def open_data(
        root: Path,
        names: list[str] | None,
        optional: Collection[str] = (),
        never_seen: Collection[str] = (),
        annotations: str | None = None,
    ) -> Any:
        """The images under `--data`, with `class_names` in the model's index order; `names` None: as the data has them.

        Args:
            optional: names that may lack images; never_seen: folders that are no classes of the model.
            annotations: what `--annotations` says; refused by tasks whose images need none.

        Raises:
            RequestError: the data do not fit.
        """
        ...

    @staticmethod
    def check_request(request: Request) -> None:
        """Refuse what makes no sense for the task, before any image is read.  Raises RequestError."""
        ...

    @staticmethod
    def resolve(request: Request, source: Source, data: Any) -> Target:
        """What a request means on the images that `open_data` found.

        Raises:
            RequestError: it does not fit the model, the data, or what earlier requests forgot.
        """
        ...

    @staticmethod
    def build(architecture: str, model_kwargs: dict[str, Any], class_names: list[str]) -> nn.Module:
        """The bare model of a config.json, with untrained weights, in eval mode.  Raises RequestError."""
        ...

    @staticmethod
    def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
        """`gsforget audit` of a model folder; that of classification is `gsforget.audit` itself.  Raises RequestError."""
        ...

    @staticmethod
    def open_study(source: Source, data: Any, request: Request, load: Load, device: torch.device) -> Study:
        """Resolve a request, and read its images; `source.model` is moved to the device afterwards.

        Raises:
            RequestError: the request or the data do not fit.
        """
        ...
