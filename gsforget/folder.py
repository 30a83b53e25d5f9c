"""Model folders: `model.safetensors` (plain weights, original names) and `config.json` (how to build and feed it)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import sha256 as sha256  # both are for all of the core
from gsforget.export.device.files import write_file as write_file
from gsforget.purged import day, find_purged

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` holds.

    ``architecture`` is a timm model name, ``transformers.<model type>`` of a detector, or an import path
    ``package.module:factory`` that is called with ``model_kwargs`` and used only with trust_code.  ``class_names`` are in
    index order; an erased class keeps its index and is named ``forgotten-<index>``.  ``mean`` and ``std`` are per channel
    for pixels scaled to 0..1; ``fit`` is of detectors, see `export/device/preprocess.py`.
    """

    architecture: str
    model_kwargs: dict[str, Any]
    class_names: list[str]
    input_size: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    fit: tuple[int, int, int] | None = None
    forgotten: tuple[int, ...] = ()
    sequence: int = 0
    task: str = "classify"
    format: int = field(default=FORMAT)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def retained(self) -> list[int]:
        return [i for i in range(self.num_classes) if i not in self.forgotten]

    def erase(self, indices: list[int]) -> ModelConfig:
        """The config after one more erasure: names replaced, sequence advanced."""
        names = [f"forgotten-{i}" if i in indices else n for i, n in enumerate(self.class_names)]
        return dataclasses.replace(
            self,
            class_names=names,
            forgotten=tuple(sorted({*self.forgotten, *indices})),
            sequence=self.sequence + 1,
        )

    def to_json(self) -> dict[str, Any]:
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "fit" or v is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str = CONFIG) -> ModelConfig:
        if not isinstance(raw, dict):
            raise RequestError(
                f"{where} does not hold a JSON object.", "Restore it from the original model.", "bad_config"
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        missing = [
            n
            for n, f in known.items()
            if n not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise RequestError(
                f"{where} lacks {', '.join(missing)}.",
                "Write these fields, or name a timm model and a checkpoint with --model NAME --checkpoint FILE.",
                "bad_config",
            )
        if raw.get("format", FORMAT) not in range(FORMAT + 1):
            raise RequestError(
                f"{where} has format {raw['format']}, newer than this gsforget reads ({FORMAT}).",
                "Update gsforget: pip install --upgrade gsforget.",
                "bad_config",
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) and k != "class_names" else v for k, v in raw.items() if k in known
        }
        wrong = [n for n, right in _SHAPES.items() if n in values and not right(values[n])]
        if wrong:
            raise RequestError(
                f"{where}: {wrong[0]} cannot be {json.dumps(raw[wrong[0]])[:60]}.",
                "Compare with the config.json of a run folder.",
                "bad_config",
            )
        return cls(**values)


def _numbers(count: int | None = None, kind: type | tuple[type, ...] = (int, float)) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, tuple) and (count in (None, len(v))) and all(isinstance(x, kind) and x is not True for x in v)
    )


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "architecture": lambda v: isinstance(v, str) and bool(v),
    "model_kwargs": lambda v: isinstance(v, dict),
    "class_names": lambda v: isinstance(v, list) and bool(v) and all(isinstance(x, str) for x in v),
    "input_size": _numbers(3, int),
    "mean": _numbers(),
    "std": _numbers(),
    "forgotten": _numbers(None, int),
    "fit": lambda v: v is None or _numbers(3, int)(v),
    "crop_pct": lambda v: isinstance(v, (int, float)) and v > 0,
    "sequence": lambda v: isinstance(v, int) and v >= 0,
}


def is_model_folder(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read_config(folder: Path, weights: bool = True) -> ModelConfig:
    """Read `config.json` of a model folder.

    Raises RequestError when it is absent or malformed, or, unless ``weights`` is False, when there are no weights.
    """
    path = folder / CONFIG
    if not path.is_file() or (weights and not (folder / WEIGHTS).is_file()):
        gone = find_purged(folder, WEIGHTS) if path.is_file() else None
        if gone:
            raise RequestError(
                f"{folder} no longer holds a model: gsforget purge removed its weights on {day(gone.date)}.",
                "Name the newest run of the chain.",
                "no_model",
            )
        lacking = CONFIG if not path.is_file() else WEIGHTS
        raise RequestError(
            f"{folder} is not a model folder: {lacking} is missing.",
            "Name a run folder such as runs/forget-0001, or a folder with model.safetensors and config.json.",
            "no_model",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"{path} is not valid JSON ({error}).", "Restore it from the original model.", "bad_config"
        ) from error
    if isinstance(raw, dict) and "model_type" in raw and "architecture" not in raw:
        from gsforget.tasks.detect.families import read_folder

        return read_folder(folder, raw)
    return ModelConfig.from_json(raw, str(path))


def build_model(config: ModelConfig, trust_code: bool = False) -> nn.Module:
    """Build the bare architecture of a config, with untrained weights, in eval mode."""
    if ":" in config.architecture and not config.architecture.startswith(("hf-hub:", "hf_hub:")):
        if not trust_code:
            raise SafetyError(
                f"The model is built by {config.architecture}, which would run code that gsforget does not know.",
                "Add --trust-code if you trust that module.",
                "untrusted_code",
            )
        module_name, _, factory = config.architecture.partition(":")
        try:
            module: Any = importlib.import_module(module_name)
            build = functools.reduce(getattr, factory.split("."), module)
        except (ImportError, AttributeError, ValueError) as error:
            raise RequestError(
                f"{config.architecture} cannot be imported ({error}).",
                "Check the import path in config.json.",
                "no_model",
            ) from error
        return build(**config.model_kwargs).eval()
    from gsforget.tasks import find_task

    return find_task(config.task).build(config.architecture, config.model_kwargs, config.class_names)


def load_model(folder: Path, trust_code: bool = False) -> tuple[nn.Module, ModelConfig]:
    """Load a model folder: the model in eval mode on the CPU, and its config."""
    from gsforget.checkpoint import apply_weights, read_weights

    config = read_config(folder)
    if config.architecture.startswith("transformers."):
        from gsforget.tasks.detect.families import is_transformers_folder
        from gsforget.tasks.detect.models import load_detector

        if is_transformers_folder(folder):  # transformers knows other names in files than in memory
            return load_detector(folder)
    model = build_model(config, trust_code)
    apply_weights(model, read_weights(folder / WEIGHTS, as_saved=True), folder / WEIGHTS)
    return model, config


def read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder under the names that they have in the model, which is where erasures change them.

    Raises RequestError, SafetyError as `checkpoint.read_weights`.
    """
    from gsforget.checkpoint import read_weights
    from gsforget.tasks.detect.families import is_transformers_folder

    if is_transformers_folder(folder):  # as in `load_model`
        return load_model(folder)[0].state_dict()
    return read_weights(folder / WEIGHTS, as_saved=True)


def save_model(state: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    """Write a model folder's two files, flushed to disk.  The folder must exist; callers publish it by renaming."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory (tied weights).
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_file(folder / WEIGHTS, save(plain, {"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config.to_json(), indent=2) + "\n")
