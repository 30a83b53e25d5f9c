"""Weights from files: safetensors or a `weights_only` torch file, unwrapped, checked, and fitted to a model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from gsforget.errors import RequestError, SafetyError

if TYPE_CHECKING:
    from torch import Tensor, nn

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module", "teacher")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


def read_weights(path: Path, as_saved: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint into a flat state dict.

    A torch file is read with ``weights_only=True``: a pickle that would run code is refused (SafetyError).
    Wrappers such as ``{"state_dict": …}`` and name prefixes such as ``module.`` are removed; names in a safetensors
    file stay as they are with ``as_saved`` (the model that a model folder holds may itself be a wrapper).
    Raises RequestError for a missing, unreadable or empty file and for NaN or infinite weights.
    """
    if not path.is_file():
        raise RequestError(f"There is no checkpoint {path}.", "Check --checkpoint.", "no_checkpoint")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path) if as_saved else strip_prefix(_read_safetensors(path))
    else:
        state = _read_torch(path)
    if not state:
        raise RequestError(
            f"{path} holds no tensors.", "Save the model's state_dict() and give that file.", "bad_checkpoint"
        )
    check_finite(state, path)
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(
            f"{path} is not a readable safetensors file ({error}).", "Give a complete file.", "bad_checkpoint"
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported operand" not in str(error).lower() or _begins_as_pickle(path):
            raise SafetyError(
                f"{path} is a pickle that holds more than tensors; loading it could run code.",
                "Save it again as tensors only: safetensors.torch.save_file(model.state_dict(), 'model.safetensors').",
                "pickle_with_code",
            ) from error
        raise RequestError(
            f"{path} is not a readable torch file.", "Give a complete file.", "bad_checkpoint"
        ) from error
    except Exception as error:  # a damaged file may fail anywhere in the unpickler
        raise RequestError(
            f"{path} is not a readable torch file ({type(error).__name__}).", "Give a complete file.", "bad_checkpoint"
        ) from error
    return unwrap(raw, path)


def _begins_as_pickle(path: Path) -> bool:
    """Whether a file begins like a torch file or a pickle of protocol 2 or newer, and not like text or zeros."""
    with open(path, "rb") as handle:
        return handle.read(2).startswith((b"PK", b"\x80"))


def unwrap(raw: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint object: wrappers first, then a common name prefix."""
    import torch

    for _ in WRAPPERS:  # nested at most so deep; a pickle may hold itself
        if isinstance(raw, dict):
            raw = next((raw[k] for k in WRAPPERS if isinstance(raw.get(k), dict)), raw)
    items = raw.items() if isinstance(raw, dict) else ()
    state = {k: v for k, v in items if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not state:
        raise RequestError(
            f"{path} holds no state dict.", "Save the model's state_dict() and give that file.", "bad_checkpoint"
        )
    return strip_prefix(state)


def strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove name prefixes that every entry carries (`module.` of DataParallel and its like)."""
    stripped = True
    while stripped and state:
        stripped = False
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
                stripped = True
    return state


def check_finite(state: dict[str, Tensor], where: Path | str) -> None:
    for name, tensor in state.items():
        # The extremes are NaN or infinite where any value is, and cost a fifth of asking each value.
        if tensor.is_floating_point() and tensor.numel() and not all(e.isfinite() for e in tensor.aminmax()):
            raise RequestError(
                f"{where}: tensor {name} holds NaN or infinite values.",
                "Give a checkpoint from before training diverged.",
                "nan_weights",
            )


def apply_weights(model: nn.Module, state: dict[str, Tensor], where: Path | str) -> None:
    """Load a state dict that must fit exactly; says which tensors do not.  Buffers may be absent."""
    wanted = model.state_dict()
    required = {n for n, _ in model.named_parameters()}
    missing = sorted(required - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{n} is {list(state[n].shape)}, the model has {list(wanted[n].shape)}"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    if missing or extra or shapes:
        parts = []
        if shapes:
            parts.append(shapes[0])
        if missing:
            parts.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
        if extra:
            parts.append(f"{len(extra)} are unknown to the model, such as {extra[0]}")
        raise RequestError(
            f"{where} does not fit the model: {'; '.join(parts)}.",
            "Name the model that the checkpoint was trained as: --model NAME, and --model-kwargs where it was changed.",
            "wrong_architecture",
        )
    model.load_state_dict(state, strict=False)
