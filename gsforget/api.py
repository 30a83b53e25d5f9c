"""The functions that `import gsforget` offers: they connect the rooms, as the command line does.

result = gsforget.forget("models/pets", data="data/pets", classes=["abyssinian"])
gsforget.export_model(result.folder, onnx=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from gsforget.data import ImageFolder
    from gsforget.forgetting import Outcome
    from gsforget.request import Thresholds
    from gsforget.source import Source
    from gsforget.training import Event, Settings


def forget(
    model: str | Path | nn.Module,
    data: str | Path,
    classes: str | int | Sequence[str | int],
    *,
    checkpoint: str | Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    architecture: str | None = None,
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
    shots: int | None = None,
    device: str = "auto",
    skip_corrupt: bool = False,
    method: str | None = None,
    reference: str | Path | None = None,
    never_seen: Sequence[str | int] = (),
    trust_code: bool = False,
    runs: str | Path | None = "runs",
    out: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Outcome:
    """Make a model forget classes and publish a run folder.

    Args:
        model: a model or run folder, a timm name, or any module that maps images [B, C, H, W] to logits [B, K].
        data: image folder with `train/<class>/*` and `test/<class>/*` (or `val`).
        classes: names, or 0-based indices; one alone may be given without a list.
        class_names: names in index order; default: the model folder's, else the sorted folders of the data.
        preprocessing: for a module: `input_size` (C, H, W), `mean`, `std`, and optionally `interpolation`, `crop_pct`,
            `crop_mode`; for timm names: overrides `img_size`, `mean`, `std`, `crop_pct`, `interpolation`.
        architecture: for a module: the import path `package.module:factory` that builds it again, written to
            `config.json`; without it the run folder can be read back only with your own code.
        method: "gs-lora" or "gs-lora++"; None: the default.
        reference: model folder of a model trained without the classes; needed for `max_probe_excess`.
        never_seen: instead of `reference`: classes of the data that the model was never trained on.
        runs: folder in which runs are numbered; None publishes nothing and only returns the outcome.

    Returns:
        Outcome with the JSON document, the metrics, the run folder and the merged state dict.  A module that was
        passed in is in eval mode afterwards and carries the erased weights, or its own where a gate was breached.

    Raises:
        RequestError, SafetyError: see `gsforget.errors`.
    """
    from gsforget import forgetting
    from gsforget.request import DEFAULT_METHOD, Request, Thresholds
    from gsforget.training import Settings

    source, folder, load = open_model_and_data(
        model,
        Path(data),
        checkpoint=Path(checkpoint) if checkpoint else None,
        model_kwargs=model_kwargs,
        class_names=list(class_names) if class_names is not None else None,
        preprocessing=preprocessing,
        architecture=architecture,
        trust_code=trust_code,
    )
    request = Request(
        [str(c) for c in ([classes] if isinstance(classes, (str, int)) else classes)],
        settings or Settings(),
        thresholds or Thresholds(),
        shots,
        device,
        skip_corrupt,
        method or DEFAULT_METHOD,
        Path(reference) if reference else None,
        [str(c) for c in never_seen],
    )
    return forgetting.forget(
        source, folder, request, load, Path(runs) if runs else None, Path(out) if out else None, progress
    )


def open_model_and_data(
    model: str | Path | nn.Module,
    data: Path,
    *,
    checkpoint: Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    architecture: str | None = None,
    trust_code: bool = False,
) -> tuple[Source, ImageFolder, Callable[[Path], np.ndarray]]:
    """Load a model and list its images in the model's class order; arguments as for `forget`.

    Returns the source, the image folder, and the function that reads one image file for this model.
    """
    from gsforget.data import scan
    from gsforget.export.device.preprocess import Preprocess
    from gsforget.source import load_source

    if isinstance(model, (str, Path)):
        source = load_source(
            str(model),
            None if class_names or Path(model).is_dir() else scan(data, None, missing_ok=True).class_names,
            checkpoint=checkpoint,
            model_kwargs=model_kwargs,
            class_names=class_names,
            preprocessing=preprocessing,
            trust_code=trust_code,
        )
    else:
        names = class_names or scan(data, None, missing_ok=True).class_names
        source = source_of_module(model, names, preprocessing or {}, architecture)
    images = scan(data, source.names, optional=list(source.erased.values()), missing_ok=True)
    return source, images, Preprocess.from_dict(source.config.to_json()).load


def export_model(run: str | Path, **options: Any) -> dict[str, Any]:
    """Export a run: see `gsforget.export.build.exporter.export_model` for the options and what comes back."""
    from gsforget.export.build.exporter import export_model as build

    return build(Path(run), **options)


def source_of_module(
    model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], architecture: str | None = None
) -> Source:
    """A source from a module in memory.  Raises RequestError where the preprocessing is not said."""
    from gsforget.errors import RequestError
    from gsforget.folder import ModelConfig
    from gsforget.source import Source

    missing = [k for k in ("input_size", "mean", "std") if k not in preprocessing]
    if missing:
        raise RequestError(
            f"The preprocessing of the module lacks {', '.join(missing)}.",
            "Pass preprocessing={'input_size': (3, 224, 224), 'mean': (0.5,), 'std': (0.5,)}.",
            "no_preprocessing",
        )
    unknown = sorted(preprocessing.keys() - {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"})
    if unknown:
        raise RequestError(
            f"There is no preprocessing called {', '.join(unknown)}.",
            "The fields are input_size, mean, std, interpolation, crop_pct and crop_mode.",
            "no_preprocessing",
        )
    channels = preprocessing["input_size"][0]
    values = {
        k: (v,) if isinstance(v, (int, float)) else tuple(v) for k, v in preprocessing.items() if k in ("mean", "std")
    }
    fields = {k: v * (channels if len(v) == 1 else 1) for k, v in values.items()}
    config = ModelConfig(
        architecture=architecture or f"{type(model).__module__}:{type(model).__qualname__}",
        model_kwargs={},
        class_names=list(class_names),
        **{**preprocessing, **fields},
    )
    return Source(model, config, list(class_names))
