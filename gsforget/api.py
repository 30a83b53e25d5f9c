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

    from gsforget.forgetting import Outcome
    from gsforget.request import Request, Thresholds
    from gsforget.requests.course import Course
    from gsforget.settings import Settings
    from gsforget.source import Source
    from gsforget.training import Event


def forget(
    model: str | Path | nn.Module,
    data: str | Path,
    classes: str | int | Sequence[str | int] = (),
    *,
    images: str | Path | None = None,
    sample_mode: bool = False,
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
    never_seen: Sequence[str] = (),
    trust_code: bool = False,
    task: str | None = None,
    gallery: str | Path | None = None,
    runs: str | Path | None = "runs",
    out: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    annotations: str | None = None,
) -> Outcome:
    """Make a model forget classes and publish a run folder.

    Args:
        model: a model or run folder, a timm name, or any module that maps images [B, C, H, W] to logits [B, K].
        data: image folder with `train/<class>/*` and `test/<class>/*` (or `val`).
        classes: names, or 0-based indices; one alone may be given without a list.
        images: instead of classes: a file that lists all training images of one or several classes, a path or SHA-256
            per line.
        sample_mode: forget just the listed images and keep their classes; the evidence is weaker then.
        class_names: names in index order; default: the model folder's, else the sorted folders of the data.
        preprocessing: for a module: `input_size` (C, H, W), `mean`, `std`, and optionally `interpolation`, `crop_pct`,
            `crop_mode`; for timm names: overrides `img_size`, `mean`, `std`, `crop_pct`, `interpolation`.
        architecture: for a module: the import path `package.module:factory` that builds it again, written to
            `config.json`; without it the run folder can be read back only with your own code.
        method: "gs-lora" or "gs-lora++"; None: the default.
        reference: model folder of a model trained without the classes; needed for `max_probe_excess`.
        never_seen: instead of `reference`: class folders of the data that the model was never trained on.
        task: "classify", "face", or "detect" for object kinds; None: as the model folder says, else "classify".
        gallery: of faces: a gallery made with the model; the run gets one of its own without the forgotten people.
        runs: folder in which runs are numbered; None publishes nothing and only returns the outcome.
        annotations: of "detect": a folder of COCO's JSON files, or two of them separated by a comma (training first).

    Returns:
        Outcome with the JSON document, the metrics, the run folder and the merged state dict.  A module that was
        passed in is in eval mode afterwards and carries the erased weights, or its own where a gate was breached.

    Raises:
        RequestError, SafetyError: see `gsforget.errors`.
    """
    from gsforget import forgetting

    source, folder, load = open_model_and_data(
        model,
        Path(data),
        checkpoint=Path(checkpoint) if checkpoint else None,
        model_kwargs=model_kwargs,
        class_names=list(class_names) if class_names is not None else None,
        preprocessing=preprocessing,
        architecture=architecture,
        trust_code=trust_code,
        never_seen=never_seen,
        task=task,
        annotations=annotations,
    )
    request = _request(
        classes,
        images=images,
        sample_mode=sample_mode,
        settings=settings,
        thresholds=thresholds,
        shots=shots,
        device=device,
        skip_corrupt=skip_corrupt,
        method=method,
        reference=reference,
        never_seen=never_seen,
        trust_code=trust_code,
        gallery=gallery,
    )
    return forgetting.forget(
        source, folder, request, load, Path(runs) if runs else None, Path(out) if out else None, progress
    )


def open_requests(
    model: str | Path | nn.Module,
    data: str | Path,
    requests: str | Path,
    *,
    checkpoint: str | Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    architecture: str | None = None,
    trust_code: bool = False,
    task: str | None = None,
    runs: str | Path | None = "runs",
    out: str | Path | None = None,
    annotations: str | None = None,
    **options: Any,
) -> Course:
    """Check the requests of a file, all of them, and make them ready to be served in order: ``open_requests(…).run()``.

    Args:
        requests: YAML or JSON, one request or several; see `gsforget.requests.file`.
        options: what entries leave open: settings, thresholds, shots, device, skip_corrupt, method, reference,
            never_seen; these and the others as for `forget`.

    Raises:
        RequestError, SafetyError: see `gsforget.errors`; nothing has run then.
    """
    from gsforget.requests.course import Course
    from gsforget.requests.file import read_requests

    entries = read_requests(Path(requests))
    source, folder, load = open_model_and_data(
        model,
        Path(data),
        checkpoint=Path(checkpoint) if checkpoint else None,
        model_kwargs=model_kwargs,
        class_names=list(class_names) if class_names is not None else None,
        preprocessing=preprocessing,
        architecture=architecture,
        trust_code=trust_code,
        never_seen=options.get("never_seen", ()),
        task=task,
        annotations=annotations,
    )
    base = _request((), trust_code=trust_code, **options)
    return Course(source, folder, load, base, entries, Path(runs) if runs else None, Path(out) if out else None)


def _request(
    classes: str | int | Sequence[str | int],
    *,
    images: str | Path | None = None,
    sample_mode: bool = False,
    settings: Settings | None = None,
    thresholds: Thresholds | None = None,
    shots: int | None = None,
    device: str = "auto",
    skip_corrupt: bool = False,
    method: str | None = None,
    reference: str | Path | None = None,
    never_seen: Sequence[str] = (),
    trust_code: bool = False,
    gallery: str | Path | None = None,
) -> Request:
    from gsforget.request import DEFAULT_METHOD, Request, Thresholds
    from gsforget.requests.images import read_image_list
    from gsforget.settings import Settings

    return Request(
        [str(c) for c in ([classes] if isinstance(classes, (str, int)) else classes)],
        settings or Settings(),
        thresholds or Thresholds(),
        shots,
        device,
        skip_corrupt,
        method or DEFAULT_METHOD,
        Path(reference) if reference else None,
        list(dict.fromkeys(str(c) for c in never_seen)),
        images=read_image_list(Path(images)) if images else None,
        sample_mode=sample_mode,
        trust_code=trust_code,
        gallery=Path(gallery) if gallery else None,
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
    never_seen: Sequence[str] = (),
    task: str | None = None,
    annotations: str | None = None,
) -> tuple[Source, Any, Callable[[Path], np.ndarray]]:
    """Load a model and list its images in the model's class order; arguments as for `forget`.

    Returns the source, the task's data (an image folder, or annotated scenes), and the function that reads one image
    file for this model.
    """
    from dataclasses import replace

    from gsforget.export.device.preprocess import Preprocess
    from gsforget.source import load_source
    from gsforget.tasks import find_task

    asked = find_task(task or "classify")

    def data_classes() -> list[str]:
        found: list[str] = asked.open_data(data, None, never_seen=never_seen, annotations=annotations).class_names
        return found

    if isinstance(model, (str, Path)):
        source = load_source(
            str(model),
            data_classes,
            checkpoint=checkpoint,
            model_kwargs=model_kwargs,
            class_names=class_names,
            preprocessing=preprocessing,
            trust_code=trust_code,
            task=task,
        )
    else:
        source = source_of_module(model, class_names or data_classes(), preprocessing or {}, architecture)
        source.config = replace(source.config, task=task or "classify")
    kind = find_task(source.config.task)
    images = kind.open_data(data, source.names, list(source.erased.values()), never_seen, annotations)
    return source, images, Preprocess.from_dict(source.config.to_json()).load


def audit_model(
    model: str | Path | None = None,
    data: str | Path = "data",
    *,
    tier: str = "quick",
    reference: str | Path | None = None,
    never_seen: Sequence[str] = (),
    original: str | Path | None = None,
    classes: Sequence[str | int] = (),
    class_names: Sequence[str] | None = None,
    with_images: bool = False,
    device: str = "auto",
    seed: int = 0,
    max_probe_excess: float = 0.25,
    out: str | Path | None = None,
    trust_code: bool = False,
    skip_corrupt: bool = False,
    progress: Callable[[str], None] | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
    annotations: str | None = None,
) -> dict[str, Any]:
    """Look for what a model still knows of forgotten classes, and write the evidence.

    Args:
        model: a run folder (default: the newest under `runs/`), a model folder, or an exported `.onnx` file.
        data: image folder as for `forget`; splits and classes that are not there are named in ``not_tested``.
        tier: ``quick`` (no training), ``standard`` (a probe, blocks, relearning of the head) or ``full`` (relearning).
        reference: model folder of a model trained without the classes, with the same class names.
        never_seen: instead: class folders of the data that the model was never trained on.  They are shown to the
            original, which no forgetting has touched, or to the audited model where the original is not at hand.
        original: model folder from before the forgetting; default: the oldest model of the run's chain still there.
        classes: which forgotten classes to look at (default: all so far); for a model from which nothing was forgotten by
            gsforget, the classes that it should not know.
        class_names: names of the data's folders in index order; default: the run's, the original's, or the model's own.
        with_images: show test images in the report.
        max_probe_excess: ratio; (probe - never seen) / (original - never seen) on the features.
        annotations: of detectors, as for `forget`; default: those of the run, else `annotations` in `data`.
        out: folder, or file ending in .json; default: `audit/` of the run, nothing for a model that is no run.
        show: called with the document in which erased classes still have their names, for people at the workstation.

    Returns:
        The document of `audit.json`, in which erased classes are called forgotten-N: ``verdict`` ``pass``, ``fail`` or
        ``inconclusive``, ``checks``, ``details``, ``not_tested``, ``artifacts`` (the files written), and what the README's
        JSON section lists.

    Raises:
        RequestError, SafetyError: see `gsforget.errors`.
    """
    from gsforget import auditing
    from gsforget.audit.case import Ask

    ask = Ask(
        Path(model) if model is not None else None,
        Path(data),
        tier,
        Path(reference) if reference else None,
        list(dict.fromkeys(str(c) for c in never_seen)),
        Path(original) if original else None,
        [str(c) for c in classes],
        list(class_names) if class_names is not None else None,
        device,
        seed,
        max_probe_excess,
        trust_code,
        skip_corrupt,
        with_images,
        annotations,
    )
    return auditing.audit(ask, Path(out) if out else None, progress, show)


def export_model(run: str | Path, **options: Any) -> dict[str, Any]:
    """Export a run: see `gsforget.export.build.exporter.export_model` for the options and what comes back."""
    from gsforget.export.build.exporter import export_model as build

    return build(Path(run), **options)


def export_patch(run: str | Path, **options: Any) -> dict[str, Any]:
    """Export an erasure as a signed patch: see `gsforget.export.build.patch.export_patch`."""
    from gsforget.export.build.patch import export_patch as build

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
