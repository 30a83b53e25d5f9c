"""Models of a bench: what it asks of each is a class per image, of a face model whom of its head's people the image shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.folder import ModelConfig, load_model, save_model
from gsforget.tasks.face.answers import PREFIX, FaceClassifier

if TYPE_CHECKING:
    from torch import Tensor, nn

START = "start"


def open_subject(folder: Path) -> tuple[nn.Module, ModelConfig]:
    """A model folder's model, answering with a class per image.  Raises RequestError ``not_a_classifier``."""
    model, config = load_model(folder)
    if config.task == "face":
        return FaceClassifier(model), config  # type: ignore[arg-type]
    if config.task != "classify":
        raise RequestError(
            f"The model in {folder} is of the task {config.task}, and a bench compares answers of one class an image.",
            "Name a classifier or a face model.",
            "not_a_classifier",
        )
    return model, config


def stored_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of the model folder."""
    cut = PREFIX if isinstance(model, FaceClassifier) else ""
    return {name.removeprefix(cut): tensor for name, tensor in state.items()}


def start_folder(
    model: str | Path, names: list[str], checkpoint: Path | None, kwargs: dict[str, Any], task: str | None, out: Path
) -> Path:
    """The model folder to start from: the given one, or one made in `out` of a model's name and its checkpoint.

    Raises:
        RequestError, SafetyError: as `gsforget.source.load_source`.
    """
    from gsforget.source import check_own_weights, load_source

    if Path(model).is_dir():
        check_own_weights(str(model), checkpoint, kwargs)
        return Path(model)
    if checkpoint is not None and task not in (None, "classify", "face"):
        raise RequestError(
            f"A model of the task {task} is not given by its name and a checkpoint.",
            "Give its folder, or type --task classify or --task face.",
            "not_a_classifier",
        )
    if checkpoint is None:
        raise RequestError(
            f"There is no model folder {model}.",
            "Name one, or the model that the weights in a file are of: --model NAME --checkpoint FILE.",
            "no_model",
        )
    source = load_source(str(model), lambda: names, checkpoint=checkpoint, model_kwargs=kwargs, task=task)
    folder = out / START
    folder.mkdir(parents=True, exist_ok=True)
    save_model(source.model.state_dict(), source.config, folder)
    return folder
