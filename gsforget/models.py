"""timm models by name: creation with clear refusals, and the preprocessing that belongs to them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from torch import nn


def create_timm(
    name: str, num_classes: int | None, model_kwargs: dict[str, Any], pretrained: bool = False
) -> nn.Module:
    """`timm.create_model` in eval mode.

    Args:
        name: timm model name; nearest names are given where it is unknown.
        num_classes: rows of the head; None keeps timm's own.
        pretrained: load the hub's weights (the only case in which anything is downloaded).
    """
    import timm

    if not timm.is_model(name.split(".")[0].removeprefix("hf-hub:").removeprefix("hf_hub:")) and "hub:" not in name:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise RequestError(
            f"timm has no model named {name!r}.",
            f"Did you mean {', '.join(near)}?" if near else "See timm.list_models() for the names.",
            "unknown_model",
        )
    kwargs = dict(model_kwargs)
    if num_classes is not None:
        kwargs.setdefault("num_classes", num_classes)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        if pretrained and not isinstance(error, TypeError):
            raise RequestError(
                f"The pretrained weights of {name} could not be had ({first_line(error)}).",
                "Give the weights as a file: --checkpoint FILE.",
                "no_weights",
            ) from error
        raise RequestError(
            f"timm cannot build {name} with {kwargs} ({first_line(error)}).",
            "Check --model-kwargs.",
            "bad_model_kwargs",
        ) from error


def preprocessing_of(model: nn.Module, model_kwargs: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop of a timm model, overridden by what the user gave.

    Returns the fields of ``ModelConfig`` that describe preprocessing.
    """
    import timm.data

    size = overrides.get("img_size") or model_kwargs.get("img_size")
    args: dict[str, Any] = {"in_chans": model_kwargs.get("in_chans", 3)}
    if size:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        args["input_size"] = (args["in_chans"], height, width)
    for key in ("mean", "std", "crop_pct", "interpolation"):
        if overrides.get(key) is not None:
            args[key] = overrides[key]
    try:
        resolved = timm.data.resolve_model_data_config(model, args=args)
    except AssertionError as error:
        raise RequestError(
            f"--mean and --std must have one value or one per channel ({args['in_chans']}).",
            "For example --mean 0.5.",
            "bad_mean",
        ) from error
    channels = args["in_chans"]
    fit = {
        k: tuple(resolved[k])[:channels] if len(resolved[k]) >= channels else tuple(resolved[k]) * channels
        for k in ("mean", "std")
    }
    chosen = resolved["input_size"] if size else (channels, *resolved["input_size"][1:])
    return {
        "input_size": tuple(chosen),
        **fit,
        "interpolation": "bicubic" if resolved["interpolation"] == "random" else resolved["interpolation"],
        "crop_pct": float(resolved["crop_pct"]),
        "crop_mode": resolved["crop_mode"],
    }


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
