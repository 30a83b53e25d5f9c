"""Detectors of transformers: built from a config, loaded from a folder, and asked for all that losses need.

A detector takes images as one tensor, as every other model here: [B, 3, H, W], or [B, 4, H, W] where the fourth channel
says which pixels belong to the image and which are padding.  Its parameters keep the names that transformers gives them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gsforget.errors import RequestError
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig
from gsforget.tasks.base import Reader, Seen
from gsforget.tasks.detect.families import FAMILIES, PREFIX, Family, family_of, read_folder

HUB = "hf-hub:"
HEADS = ("class_embed", "bbox_embed", "bbox_predictor", "classifier", "_head", "attn")

if TYPE_CHECKING:
    from torch.nn import Module


class _ByImages:
    """Lets a detector of transformers take one tensor of images."""

    def forward(self, images: Tensor) -> Any:
        kwargs = {}
        if images.shape[1] == 4:
            kwargs["pixel_mask"] = images[:, 3].long()
        return super().forward(pixel_values=images[:, :3], **kwargs)  # type: ignore[misc]

    def is_feed_forward(self, linears: Sequence[str]) -> bool:
        """Whether linear layers that look like a feed-forward network are one of the encoder's or decoder's."""
        return not any(mark in name for name in linears for mark in HEADS) and any(
            part in linears[0] for part in ("encoder", "decoder")
        )


def build_detector(architecture: str, model_kwargs: dict[str, Any]) -> nn.Module:
    """A detector with untrained weights, in eval mode.

    Args:
        architecture: `transformers.<model type>`; model_kwargs: fields of its config.

    Raises RequestError ``unknown_model``, ``bad_model_kwargs``, ``not_installed``.
    """
    transformers = _transformers()
    kind = architecture.removeprefix(PREFIX)
    if kind not in FAMILIES:
        raise RequestError(
            f"{architecture} is not a detector that gsforget knows.",
            f"These are: {', '.join(FAMILIES)}.",
            "unknown_model",
        )
    try:
        with _quiet():
            fields = {k: v for k, v in model_kwargs.items() if k != "model_type"}
            config = transformers.AutoConfig.for_model(kind, **fields)
            _never_download(config)
            return _class_of(config)(config).eval()
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(
            f"transformers cannot build {kind} ({first}).", "Check model_kwargs in config.json.", "bad_model_kwargs"
        ) from error


def load_detector(folder: Path, class_names: list[str] | None = None) -> tuple[nn.Module, ModelConfig]:
    """A detector from a folder that transformers wrote.

    Returns:
        The model in eval mode on the CPU, and its config: class names are those of `id2label` unless given.

    Raises RequestError where the folder holds no detector, or weights that are not one file of safetensors.
    """
    transformers = _transformers()
    config = read_folder(folder, json.loads((folder / CONFIG).read_bytes()), class_names)
    if not (folder / WEIGHTS).is_file():
        raise RequestError(
            f"{folder} holds no {WEIGHTS}.",
            "Save the detector as one file of safetensors: model.save_pretrained(FOLDER, max_shard_size='100GB').",
            "no_weights",
        )
    try:
        with _quiet():
            own = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            _never_download(own)
            model = _class_of(own).from_pretrained(
                folder, config=own, use_safetensors=True, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(f"{folder} cannot be loaded ({first}).", "Check the folder.", "no_model") from error
    return model.eval(), config


def fetch_detector(name: str) -> Path:
    """Download a detector that the user named as `hf-hub:NAME`; returns its folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(
            f"{name} could not be downloaded ({first}).", "Download it elsewhere, and give its folder.", "no_model"
        ) from error


def reader(model: nn.Module, family: Family) -> Reader:
    """Images -> logits [B, Q, K], with boxes [B, Q, 4], what the head reads [B, Q, d] and, where queries are chosen, anchors."""
    head = head_of(model, family)

    def read(images: Tensor) -> Seen:
        inputs: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        try:
            output = model(images)
        finally:
            handle.remove()
        queries = inputs[-1]
        if queries.ndim == 4:  # all decoder layers at once
            queries = queries[:, -1]
        more = {"boxes": output.pred_boxes, "queries": queries}
        if family.anchors:
            more["anchors"] = getattr(output, family.anchors)
        return Seen(output.logits, more=more)

    return read


def head_of(model: nn.Module, family: Family) -> Module:
    """The linear layer that classifies the last decoder layer's queries; its rows are the kinds' prototypes."""
    last = getattr(model.config, "decoder_layers", 1) - 1
    return model.get_submodule(family.head.format(last=last))


def own_loss(model: nn.Module, seen: Seen, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The detector's own loss on its last layer, by transformers: classification and boxes, each weighted as there.

    Args:
        targets: per image `class_labels` int64 [n] and `boxes` float32 [n, 4] (centre, width, height, as shares).
    """
    import copy

    config = copy.copy(model.config)
    config.auxiliary_loss = False
    logits, boxes = seen.outputs.float(), seen.more["boxes"].float()
    loss, parts, _ = model.loss_function(logits, targets, logits.device, boxes, config, None, None)
    weights = {
        "loss_bbox": getattr(config, "bbox_loss_coefficient", 1.0),
        "loss_giou": getattr(config, "giou_loss_coefficient", 1.0),
    }  # those of RT-DETR are weighted already
    around = sum((weights[k] * parts[k] for k in weights), torch.zeros((), device=logits.device))
    return loss - around, around


def _class_of(config: Any) -> Any:
    """The class of transformers for a config, taking images as one tensor; of the same name, by which it finds its loss."""
    own = getattr(_transformers(), family_of(config).name)
    return type(own.__name__, (_ByImages, own), {"__module__": own.__module__})


def _never_download(config: Any) -> None:
    """A detector's config may ask for a backbone's weights from the hub: the detector's own weights replace them anyway."""
    for part in (config, getattr(config, "backbone_config", None)):
        if part is not None and getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False


def _transformers() -> Any:
    try:
        import scipy.optimize  # noqa: F401  the matching of transformers' losses
        import transformers
    except ImportError as error:
        raise RequestError(
            f"Object detection needs transformers and scipy ({error}).",
            "pip install 'gsforget[detect]'.",
            "not_installed",
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
