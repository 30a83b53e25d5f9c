"""One audit, of whatever task and file: opened, judged, written, as `gsforget.audit_model` promises it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from gsforget.audit.case import Ask


def audit(
    ask: Ask,
    out: Path | None,
    progress: Callable[[str], None] | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The document of `audit.json`, see `gsforget.audit_model`; `out`, `progress` and `show` are as there."""
    from dataclasses import replace

    from gsforget.audit.audit import audit as of_classifier
    from gsforget.audit.case import open_case
    from gsforget.audit.publish import places, plain, shown, write
    from gsforget.request import refuse_annotations
    from gsforget.runs import newest_run
    from gsforget.tasks import find_task

    say = progress or (lambda _text: None)
    devices = Devices()
    target = ask.target or newest_run()
    task = _task_of(target, devices)
    if task != "classify":
        document = find_task(task).audit(replace(ask, target=target), devices, out, say)
    else:
        refuse_annotations(ask.annotations)
        say("opening the models")
        case = open_case(ask, devices)
        where = places(case, out)
        document, evidence = of_classifier(case, say)
        say("writing the report")
        write(where, document, evidence, ask.with_images)
    if show:
        show(plain(document))
    return shown(document)


def _task_of(target: Path, devices: Devices) -> str:
    """Of a folder or an exported file; what does not say is taken for a classifier."""
    from gsforget.folder import is_model_folder, read_config

    if target.is_file():
        return devices.task(target)
    return read_config(target).task if is_model_folder(target) else "classify"


class Devices:
    """What the room of devices lends to the audit: reading images, opening exported files."""

    def __init__(self) -> None:
        self._loads: dict[str, Callable[[Path], np.ndarray]] = {}

    def loader(self, preprocessing: Mapping[str, Any]) -> Callable[[Path], np.ndarray]:
        from gsforget.export.device.preprocess import Preprocess

        prepare = Preprocess.from_dict(preprocessing)
        return self._loads.setdefault(repr(prepare), prepare.load)

    def task(self, path: Path) -> str:
        """Of an exported file, as its sidecar says; one without is taken for a classifier."""
        from gsforget.export.device.metadata import read_sidecar

        told = (read_sidecar(path) or {}).get("model") or {}
        return str(told.get("task", "classify"))

    def open(self, path: Path, device: str, foreign: dict[str, Any] | None) -> tuple[Any, Any]:
        from gsforget.export.device.runtime import open_model

        predictor = open_model(path, device, foreign)
        return predictor, predictor.info
