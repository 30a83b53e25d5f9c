"""What an exported file of each task gives, and how it is compared with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from torch import nn

    from gsforget.export.device.metadata import ArtifactInfo
    from gsforget.export.device.runtime import Predictor

KINDS = {  # tasks and the modules that offer an `ExportKind`
    "classify": "gsforget.export.build.parity",
    "face": "gsforget.export.build.faces",
    "detect": "gsforget.export.build.detection",
}


@dataclass(frozen=True)
class Comparison:
    """An artifact next to its model.

    Attributes:
        model: in eval mode on the CPU, float32, at the artifact's weights.
        artifact: opened, `where` its name for people.
        samples: as `ExportKind.find_samples` found them; None without data.
        thresholds: of the run's gates; None for a model that is no run.
    """

    model: nn.Module
    artifact: Predictor
    info: ArtifactInfo
    samples: Any | None
    thresholds: dict[str, float] | None
    where: str


class ExportKind(Protocol):
    """What the module of a task's export offers.

    Attributes:
        OUTPUT: name of the file's first output; MORE: of further ones.
    """

    OUTPUT: str
    MORE: tuple[str, ...]

    @staticmethod
    def traced(model: nn.Module) -> nn.Module:
        """What is traced: images to one tensor per output; parameters must keep the model's names, as `model` itself does."""
        ...

    @staticmethod
    def find_samples(
        data: Path, names: list[str], erased: list[str], forgotten: Sequence[int], annotations: str | None = None
    ) -> Any:
        """Test images to compare on.  Raises RequestError where the data, or `--annotations`, do not fit."""
        ...

    @staticmethod
    def check(c: Comparison) -> dict[str, Any]:
        """The `parity` entry.  Raises GateError ``parity`` or ``forgetting`` where the artifact may not be published."""
        ...


def find_kind(task: str) -> ExportKind:
    """The export of a task.  Raises RequestError ``no_export``."""
    if task not in KINDS:
        raise RequestError(f"Models of the task {task!r} cannot be exported.", "Use the run folder.", "no_export")
    return cast("ExportKind", import_module(KINDS[task]))
