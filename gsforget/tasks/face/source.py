"""Where a face model comes from: a published Face Transformer checkpoint, or weights of a timm backbone with a head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.folder import ModelConfig
from gsforget.tasks.face.model import FACE_TRANSFORMER, TimmFace, build, describe

if TYPE_CHECKING:
    from gsforget.source import Source


def open_source(
    name: str, names: list[str], checkpoint: Path | None, model_kwargs: dict[str, Any], given: dict[str, Any]
) -> Source:
    """See `gsforget.tasks.base.Kind`.  The published models read pixels from 0 to 1, unchanged.

    Raises:
        RequestError: ``no_weights``, ``not_published_layout``, ``class_count``, ``wrong_architecture``.
    """
    from gsforget.checkpoint import apply_weights, read_weights
    from gsforget.source import Source

    if checkpoint is None:
        raise RequestError(
            f"The weights of {name} are not known: a face model is its weights and its head.",
            "Give them with --checkpoint FILE, or --model a model folder.",
            "no_weights",
        )
    state = read_weights(checkpoint)
    if name == FACE_TRANSFORMER:
        found, identities = describe(state, checkpoint)
        kwargs = {**found, **model_kwargs}
    else:
        kwargs = dict(model_kwargs)
        if "img_size" in given:
            kwargs.setdefault("img_size", given["img_size"])
        identities = len(state["loss.weight"]) if "loss.weight" in state else 0
        if not identities:
            raise RequestError(
                f"{checkpoint} has no loss.weight, the head with a row per person.",
                "Its tensors are named backbone.*, embedding.* and loss.weight; see docs/faces.md.",
                "wrong_architecture",
            )
        if "embedding.weight" in state:
            kwargs.setdefault("embedding_dim", len(state["embedding.weight"]))
        if "loss.bias" in state:
            kwargs.setdefault("head", "softmax")
    if identities != len(names):
        raise RequestError(
            f"The head in {checkpoint} has {identities} rows, and {len(names)} people are known.",
            "Give all names in the order of the head's rows with --class-names FILE, one per line.",
            "class_count",
        )
    model = build(name, kwargs, len(names))
    apply_weights(model, state, checkpoint)
    return Source(
        model, ModelConfig(name, kwargs, list(names), **_reading(model, kwargs, given), task="face"), list(names)
    )


def _reading(model: Any, kwargs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Input size and preprocessing, overridden by what the user gave."""
    from gsforget.models import preprocessing_of

    if isinstance(model, TimmFace):
        of_timm = {k: v for k, v in kwargs.items() if k not in ("embedding_dim", "head", "scale")}
        return preprocessing_of(model.backbone, of_timm, given)
    size, channels = kwargs["image_size"], kwargs.get("channels", 3)
    found: dict[str, Any] = {
        "input_size": (channels, size, size),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "interpolation": given.get("interpolation", "bilinear"),
        "crop_pct": given.get("crop_pct", 1.0),
    }
    for key in ("mean", "std"):
        if key in given:
            found[key] = tuple(given[key]) * (channels if len(given[key]) == 1 else 1)
    return found
