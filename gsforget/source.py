"""Where a request starts: a model folder, a run folder, a timm name with weights, or a module in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError, SafetyError
from gsforget.folder import ModelConfig, load_model
from gsforget.ledger import HINT

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Source:
    """A model ready to be erased from.

    Attributes:
        model: in eval mode; on the CPU.
        config: how to build and feed it; names of erased classes are already replaced.
        names: class names of the data folder in index order, erased ones included.
        erased: original names of classes that earlier requests erased, by index.
        erased_images: SHA-256 of images that earlier requests forgot while their classes stayed.
        folder: the model or run folder it came from; None for a timm name or a module.
        sequence: erasures behind this model.
    """

    model: nn.Module
    config: ModelConfig
    names: list[str]
    erased: dict[int, str] = field(default_factory=dict)
    folder: Path | None = None
    erased_images: frozenset[str] = frozenset()

    @property
    def sequence(self) -> int:
        return self.config.sequence


def check_own_weights(model: str, checkpoint: Path | None, model_kwargs: dict[str, Any] | None) -> None:
    """Refuse for a model folder what is said of a model by its name.  Raises RequestError ``two_sources``."""
    if checkpoint or model_kwargs:
        raise RequestError(
            f"--model {model} has its own weights and configuration; --checkpoint and --model-kwargs do not apply.",
            "Leave them out, or give --model a timm name.",
            "two_sources",
        )


def check_task(model: str, config: ModelConfig, task: str | None) -> None:
    """Refuse a folder's model that is not of the task asked for, None being any.  Raises RequestError ``other_task``."""
    if task not in (None, config.task):
        raise RequestError(
            f"The model in {model} is of the task {config.task}, not {task}.",
            f"Type --task {config.task}, or leave it out.",
            "other_task",
        )


def load_source(
    model: str,
    data_classes: Callable[[], list[str]] | None = None,
    *,
    checkpoint: Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    trust_code: bool = False,
    task: str | None = None,
) -> Source:
    """Load what `--model` and its companions name.

    Args:
        model: a model or run folder, else a timm model name.
        data_classes: finds the sorted class folders of the data; the index order where neither config nor `class_names`
            gives one.
        checkpoint: weights for a timm name; without it the hub's own weights are loaded.
        preprocessing: img_size, mean, std, crop_pct, interpolation given by the user; None entries are ignored.
        task: what the model is for; None: as its folder says, else ``classify``.

    Raises:
        RequestError: unknown task, ``other_task`` where the folder is of another one; unknown model, weights that do
            not fit, wrong number of classes.
        SafetyError: a pickle with code, or code of the user's without trust_code.
    """
    from gsforget.tasks import find_task

    kind = find_task(task or "classify")
    given = {k: v for k, v in (preprocessing or {}).items() if v is not None}
    path = Path(model)
    if not path.exists():
        path = kind.find_folder(model) or path
    if path.is_dir():
        check_own_weights(model, checkpoint, model_kwargs)
        source = _from_folder(path, class_names, given, trust_code)
        check_task(model, source.config, task)
        return source
    if path.is_file():
        raise RequestError(
            f"--model {model} is a file.",
            f"Name the model that it was trained as, and the file apart: --model NAME --checkpoint {model}.",
            "no_model",
        )
    if "/" in model and "hub:" not in model:
        raise RequestError(
            f"There is no folder {model}.", "Give --model a model folder or a timm model name.", "no_model"
        )
    names = class_names or (data_classes() if data_classes else None)
    if not names:
        raise RequestError(
            "The class names are not known.", "Give --class-names FILE, one name per line.", "no_class_names"
        )
    return kind.open_source(model, names, checkpoint, dict(model_kwargs or {}), given)


def _from_folder(path: Path, class_names: list[str] | None, given: dict[str, Any], trust_code: bool) -> Source:
    model, config = load_model(path, trust_code)
    if given:
        config = _override(config, given)
    history = _read_request(path / "request.json")
    names = class_names or history.get("names") or config.class_names
    if len(names) != config.num_classes:
        raise RequestError(
            f"{len(names)} class names were given, the model in {path} has {config.num_classes}.",
            "Give one name per class, in the model's index order.",
            "class_count",
        )
    erased = {int(k): v for k, v in history.get("erased", {}).items()} or {i: names[i] for i in config.forgotten}
    if class_names and not erased:
        config = replace(config, class_names=list(class_names))
    return Source(model, config, names, erased, path, frozenset(history.get("erased_images", [])))


def _read_request(path: Path) -> dict[str, Any]:
    """request.json of a run folder; an original model has none.  Raises SafetyError where it is not as it was written."""
    if not path.is_file():
        return {}
    try:
        request = json.loads(path.read_bytes())
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise SafetyError(f"{path} is not the JSON object that it was.", HINT, "broken_ledger")
    return request


def _override(config: ModelConfig, given: dict[str, Any]) -> ModelConfig:
    fields = {k: v for k, v in given.items() if k in ("crop_pct", "interpolation")}
    channels = len(config.mean)  # a detector's images may have one more, which says where padding is
    for key in ("mean", "std"):
        if key in given:
            fields[key] = tuple(given[key]) * (channels if len(given[key]) == 1 else 1)
    if "img_size" in given:
        raise RequestError(
            f"The size of the input is fixed by the model folder ({config.input_size[1]} x {config.input_size[2]}).",
            "Leave out --img-size.",
            "fixed_size",
        )
    return replace(config, **fields)


def from_timm(
    name: str, names: list[str], checkpoint: Path | None, model_kwargs: dict[str, Any], given: dict[str, Any]
) -> Source:
    """A classifier by its timm name; arguments as of `gsforget.tasks.base.Kind.open_source`."""
    from gsforget.checkpoint import apply_weights, read_weights
    from gsforget.models import create_timm, preprocessing_of

    def create(classes: int | None, pretrained: bool = False) -> nn.Module:
        nonlocal model_kwargs
        if "img_size" in given and "img_size" not in model_kwargs:
            try:
                sized = {**model_kwargs, "img_size": given["img_size"]}
                model = create_timm(name, classes, sized, pretrained)
                model_kwargs = sized
                return model
            except RequestError as error:
                if "unexpected keyword argument 'img_size'" not in error.message:
                    raise  # else: the model takes images of any size
        return create_timm(name, classes, model_kwargs, pretrained)

    if checkpoint is None:
        model = create(None, pretrained=True)
        rows = model.num_classes
        if rows != len(names):
            raise RequestError(
                f"The hub's {name} has {rows} classes, the data has {len(names)}.",
                "Give your own weights with --checkpoint FILE, or all names in index order with --class-names FILE.",
                "class_count",
            )
    else:
        state = read_weights(checkpoint)
        model = create(len(names))
        _check_head(model, state, len(names), checkpoint)
        apply_weights(model, state, checkpoint)
    config = ModelConfig(
        architecture=name,
        model_kwargs=model_kwargs,
        class_names=list(names),
        **preprocessing_of(model, model_kwargs, given),
    )
    return Source(model, config, list(names))


def _check_head(model: nn.Module, state: dict[str, Any], classes: int, checkpoint: Path) -> None:
    """Say plainly when only the number of classes differs."""
    from torch import nn

    own = model.state_dict()
    heads = [f"{n}.bias" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is model.get_classifier()]
    for head in heads:
        if head in state and state[head].shape != own[head].shape:
            raise RequestError(
                f"{checkpoint} has {state[head].shape[0]} classes, the data has {classes}.",
                "Give all class names in the model's index order with --class-names FILE, one per line.",
                "class_count",
            )
