"""A detector and its annotated scenes, as `forget` needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, is_model_folder, read_config
from gsforget.source import Source, load_source
from gsforget.tasks.detect.coco import SceneFolder, open_scenes
from gsforget.tasks.detect.families import is_detector, is_transformers_folder
from gsforget.tasks.detect.models import HUB, fetch_detector, load_detector

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def open_detector(
    model: str | Path | nn.Module,
    data: Path,
    annotations: str | None,
    *,
    class_names: list[str] | None = None,
    **options: Any,
) -> tuple[Source, SceneFolder, Callable[[Path], np.ndarray]]:
    """Load a detector and read its scenes.

    Args:
        model: a run folder, a folder that transformers wrote, or `hf-hub:NAME`.
        annotations: see `gsforget.tasks.detect.coco.open_scenes`.
        class_names: in index order; default: those of the model.
        options: what concerns models of other tasks; refused where given.

    Returns the source, the scenes, and the function that reads one image file for this model.
    """
    given = [name for name, value in options.items() if (any(value.values()) if isinstance(value, dict) else value)]
    if given:
        raise RequestError(
            f"--{given[0].replace('_', '-')} does not apply to detectors: their folder says how they are built and fed.",
            "Leave it out; preprocessor_config.json holds size, mean and deviation.",
            "not_for_detection",
        )
    if not isinstance(model, (str, Path)):
        raise RequestError(
            "A detector is given as a folder.", "Save it first: model.save_pretrained(FOLDER).", "no_model"
        )
    source = _load(str(model), class_names)
    # Names that earlier requests replaced are still those of the annotations.
    names = [source.erased.get(k, name) for k, name in enumerate(source.names)]
    return source, open_scenes(data, annotations, names), Preprocess.from_dict(source.config.to_json()).load


def _load(model: str, class_names: list[str] | None) -> Source:
    path = fetch_detector(model) if model.startswith(HUB) else Path(model)
    if path.is_dir() and is_transformers_folder(path):
        detector, config = load_detector(path, class_names)
        return Source(detector, config, list(config.class_names), folder=path)
    if not path.is_dir():
        raise RequestError(
            f"There is no folder {model}.",
            f"Give --model a folder that transformers wrote, a run folder, or {HUB}NAME to download a detector.",
            "no_model",
        )
    _check_folder(path)
    return load_source(model, class_names=class_names)


def _check_folder(path: Path) -> None:
    if is_model_folder(path) and not is_detector(read_config(path)):
        config: ModelConfig = read_config(path)
        raise RequestError(
            f"{path} holds {config.architecture}, which is no detector.",
            "Leave out --task detect, or name a detector's folder.",
            "not_a_detector",
        )
