"""What detectors of transformers have in common, and the folders that transformers writes; without torch.

Such a folder is an original model: its `config.json` is that of transformers, and `preprocessor_config.json` says how
images are fed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError
from gsforget.folder import CONFIG, ModelConfig

PREFIX = "transformers."  # of `architecture` in config.json: transformers.<model type>
PROCESSOR = "preprocessor_config.json"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
NOT_KEPT = ("model_type", "_name_or_path", "dtype", "transformers_version", "architectures")  # of transformers' config
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Family:
    """What detectors of one type have in common.

    Attributes:
        name: of the class in transformers; processor: type of its image processor.
        scoring: of `detections.SCORINGS`; most: detections per image that its own post-processing keeps, None: one per query.
        masked: whether the model is told which pixels are padding.
        head: dotted name of the last layer that classifies queries, `{last}` being the last decoder layer.
        anchors: field of the output that tells queries apart where the model chooses them itself; None: they are learned.
        size: of the image where no processor's config says so: shortest and longest edge, or height and width.
        normalised: whether ImageNet's mean and deviation are subtracted where nothing says so.
        multiple: what the edges of a resized image are a multiple of.
    """

    name: str
    scoring: str
    masked: bool
    head: str
    most: int | None = None
    anchors: str | None = None
    size: tuple[tuple[str, int], ...] = (("shortest_edge", 800), ("longest_edge", 1333))
    normalised: bool = True
    multiple: int = 1


_SQUARE = (("height", 640), ("width", 640))
_SELECTING = ("sigmoid", False, "model.decoder.class_embed.{last}", None, "enc_topk_bboxes", _SQUARE, False)
FAMILIES = {
    "deformable_detr": Family("DeformableDetrForObjectDetection", "sigmoid", True, "class_embed.{last}", 100),
    "detr": Family("DetrForObjectDetection", "softmax", True, "class_labels_classifier"),
    "yolos": Family("YolosForObjectDetection", "softmax", False, "class_labels_classifier.layers.2", multiple=16),
    "rt_detr": Family("RTDetrForObjectDetection", *_SELECTING),
    "rt_detr_v2": Family("RTDetrV2ForObjectDetection", *_SELECTING),
}


def family_of(config: ModelConfig | Any) -> Family:
    """The family of a model's config, ours or that of transformers."""
    return family_named(
        config.architecture.removeprefix(PREFIX) if isinstance(config, ModelConfig) else config.model_type
    )


def family_named(kind: str) -> Family:
    """By the model type of transformers' config.json.  Raises RequestError ``unknown_model``."""
    if kind not in FAMILIES:
        raise RequestError(
            f"Detectors of type {kind!r} are not supported.", f"These are: {', '.join(FAMILIES)}.", "unknown_model"
        )
    return FAMILIES[kind]


def is_detector(config: ModelConfig) -> bool:
    return config.architecture.startswith(PREFIX)


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder was written by transformers: its config.json says a model type, and no architecture of ours."""
    try:
        raw = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "model_type" in raw and "architecture" not in raw


def config_of(raw: dict[str, Any], processor: dict[str, Any], class_names: list[str] | None = None) -> ModelConfig:
    """Our config for a detector, from its config and its image processor's as transformers writes them.

    class_names: in index order; default: those of `id2label`.
    """
    kind = str(raw["model_type"])
    family = family_named(kind)
    labels = {int(k): str(v) for k, v in (raw.get("id2label") or {}).items()}
    count = len(labels) or int(raw.get("num_labels") or 2)
    names = class_names or [labels.get(i, f"LABEL_{i}") for i in range(count)]
    if len(names) != count:
        raise RequestError(
            f"{len(names)} class names were given, the detector has {count} classes.",
            "Give one name per class, in the model's index order.",
            "class_count",
        )
    return ModelConfig(
        architecture=PREFIX + kind,
        model_kwargs={k: v for k, v in raw.items() if k not in NOT_KEPT},
        class_names=names,
        task="detect",
        **preprocessing(family, processor),
    )


def read_folder(path: Path, raw: dict[str, Any], class_names: list[str] | None = None) -> ModelConfig:
    """Our config for a folder that transformers wrote; `raw` is its config.json, class_names as for `config_of`."""
    processor = path / PROCESSOR
    try:
        said = json.loads(processor.read_bytes()) if processor.is_file() else {}
    except ValueError as error:
        raise RequestError(f"{processor} is not valid JSON ({error}).", "Restore it.", "bad_config") from error
    return config_of(raw, said, class_names)


def preprocessing(family: Family, processor: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that say how images are fed, from a preprocessor_config.json (or nothing)."""
    size = processor.get("size", dict(family.size)) if processor.get("do_resize", True) else None
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size", 1333)}
    mean, std = IMAGENET if processor.get("do_normalize", family.normalised) else ((0.0,) * 3, (1.0,) * 3)
    if processor.get("do_normalize", family.normalised):
        mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
    fields: dict[str, Any] = {
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": RESAMPLING.get(processor.get("resample", 2), "bilinear"),
        "crop_pct": 1.0,
    }
    if size and "height" in size:
        return {**fields, "input_size": (3, int(size["height"]), int(size["width"])), "crop_mode": "squash"}
    if not size or "shortest_edge" not in size or not size.get("longest_edge"):
        raise RequestError(
            f"The image processor's size {size} is neither height and width nor shortest and longest edge.",
            "Set size in preprocessor_config.json.",
            "bad_config",
        )
    shortest, longest = int(size["shortest_edge"]), int(size["longest_edge"])
    channels = 4 if family.masked else 3
    fields["fit"] = (shortest, longest, family.multiple)
    return {**fields, "input_size": (channels, longest, longest), "crop_mode": "fit"}
