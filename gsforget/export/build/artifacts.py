"""The artifacts of one export: weights at their precision, ONNX, parity and gates on the file, engine, sidecars.

They are made in a folder that nobody else reads, and move to their place when all gates have passed.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import RequestError
from gsforget.export.build.kinds import Comparison, find_kind
from gsforget.folder import WEIGHTS, ModelConfig, load_model, sha256
from gsforget.lineage import annotations_of
from gsforget.request import refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.export.build.chain import ChainInfo
    from gsforget.export.build.step import Step
    from gsforget.export.device.metadata import ArtifactInfo
    from gsforget.export.device.runtime import OnnxPredictor

CALIBRATED = ("int8", "fp8")  # their ranges are measured on images
Progress = Callable[[str], None]


@dataclass
class Made:
    """An artifact that is not published yet: its file, kind, GPUs, and further fields for its sidecar."""

    path: Path
    kind: str
    targets: list[str]
    extra: dict[str, Any]


class Export:
    """The state of one export while it runs."""

    def __init__(self, folder: Path, precision: str, trust_code: bool, progress: Progress, with_features: bool = False):
        from gsforget.export.build.chain import model_id, read_request, weights_at

        self.folder, self.precision, self.progress = folder, precision, progress
        progress("reading the weights")
        self.model: nn.Module
        self.config: ModelConfig
        self.model, self.config = load_model(folder, trust_code)
        self.kind = find_kind(self.config.task)
        self._check_outputs(with_features)
        of_state = "fp32" if precision in CALIBRATED else precision
        state, chain = weights_at(folder, of_state)
        self.chain: ChainInfo = chain
        self.state = _fit(self.model, state, of_state)
        self.request = read_request(folder)
        self.info = self._info(model_id(folder), "features" if with_features else None)
        self.step: Step | None = None
        self.data: Path | None = None
        self.samples: Any | None = None
        self.measured_on = ""
        self.not_tested: list[str] = []
        self.made: list[Made] = []
        self.published: dict[str, tuple[Path, dict[str, Any]]] = {}  # kind to the file and its sidecar
        if not chain.complete:
            self.not_tested.append(
                f"rounding is replayed from erasure {chain.base}, not from the original model: {chain.reason}"
            )

    def _check_outputs(self, with_features: bool) -> None:
        if not self.kind.MORE:  # one output, read as features or logits are
            return
        asked = {"--with-features": with_features, f"--precision {self.precision}": self.precision in CALIBRATED}
        refuse(
            asked,
            f"{{}} is made for models with one output, and {self.folder} holds a model of the task {self.config.task}.",
            "Leave out {}; the run folder can be audited, and --precision fp16 or bf16 halves the file.",
            "several_outputs",
        )

    def _info(self, chain_id: str, features: str | None) -> ArtifactInfo:
        from gsforget.export.device.metadata import ArtifactInfo
        from gsforget.export.device.preprocess import Preprocess

        preprocess = Preprocess.from_dict(self.config.to_json())
        c = self.config
        return ArtifactInfo(
            c.class_names,
            tuple(c.forgotten),
            c.sequence,
            preprocess,
            self.precision,
            chain_id,
            output_name=self.kind.OUTPUT,
            features_name=features,
            task=c.task,
            more_names=self.kind.MORE,
        )

    def find_data(self, given: Path | None, annotations: str | None = None) -> None:
        """The images to measure on, and their annotations: those given, else those of the run where they still are."""
        stored = Path(self.request["data"]) if self.request.get("data") else None
        self.data = data = given or (stored if stored and stored.is_dir() else None)
        if data is None:
            self.not_tested.append(
                "accuracies of the artifact: no images were given with --data; parity is on seeded noise"
            )
            return
        annotations = annotations_of(self.request, data, annotations)
        self.samples = self.kind.find_samples(data, *self._classes(), self.config.forgotten, annotations)

    def _classes(self) -> tuple[list[str], list[str]]:
        """Folder names in index order, and those of them that were erased."""
        names = self.request.get("names") or self.config.class_names
        return names, [names[i] for i in self.config.forgotten]

    def follow(self, step: Step) -> None:
        """Make the int8 file from the one before an erasure, with its scales."""
        from gsforget.export.build.int8 import ANEW

        if step.before.onnx is None:
            raise RequestError(
                "The int8 file of the model before the erasure is gone, and its scales with it.",
                f"Restore it from a backup. {ANEW}",
                "no_base",
            )
        self.step = step

    def write_onnx(self, scratch: Path) -> None:
        """Write the ONNX file at the export's precision into a folder that nobody else reads."""
        if self.precision in CALIBRATED:
            self._write_int8(scratch)
            return
        path = scratch / f"{self._stem}.onnx"
        extra = self._write_exact(path, self.info)
        self.made.append(Made(path, "onnx", [], extra))

    @property
    def _stem(self) -> str:
        return f"model-{self.config.sequence:04d}-{self.precision}{'-features' if self.info.features_name else ''}"

    def _write_exact(self, path: Path, info: ArtifactInfo) -> dict[str, Any]:
        """Write the state as it is; returns fields for the file's sidecar."""
        from gsforget.export.build.onnx import data_files, export_onnx
        from gsforget.export.build.trt import erasable

        self.progress("writing ONNX")
        unused = export_onnx(self.kind.traced(self.model), self.state, info, path)
        if unused:
            self.not_tested.append(f"parameters that the model never uses are not in the artifact: {', '.join(unused)}")
        files = {p.name: sha256(p) for p in data_files(path)}
        extra = {"erasable": erasable(self.model, self.info.preprocess.input_size, self.info.task)}
        return {**extra, "data_files": files} if files else extra

    def _write_int8(self, scratch: Path) -> None:
        from gsforget.export.build import int8
        from gsforget.export.build.trt import erasable

        path = scratch / f"{self._stem}.onnx"
        if self.step is None:
            extra = self._calibrate(path)
            self.chain = int8.first_in_chain(self.config.sequence, self.precision)
        else:
            self.progress("taking the erasure into the int8 file before it, with its scales")
            kept, self.chain = int8.write_next(self.step, self.info, path)
            extra = {
                "erasable": erasable(self.model, self.info.preprocess.input_size, self.info.task),
                "erasure_kept": kept,
            }
        self.made.append(Made(path, "onnx", [], extra))

    def _calibrate(self, path: Path) -> dict[str, Any]:
        """Write a first int8 or fp8 file; returns fields for its sidecar."""
        from gsforget.export.build.calibrate import calibrate, calibration_images

        self.progress(f"calibrating {self.precision} on training images")
        images = calibration_images(
            self.calibration_data(), *self._classes(), self.config.forgotten, self.info.preprocess, self.info.task
        )
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            plain = Path(folder) / "fp32.onnx"
            extra = self._write_exact(plain, dataclasses.replace(self.info, precision="fp32"))
            calibrate(plain, path, self.info, images, extra["erasable"])
        return extra

    def calibration_data(self) -> Path:
        """The image folder to calibrate on.  Raises RequestError ``no_calibration`` where there is none."""
        if self.data is None:
            raise RequestError(
                f"At {self.precision}, the ranges of activations are measured on training images, and none were given.",
                f"Add --data DIR{'; or --from PREVIOUS, for the file before with its scales' * (self.precision == 'int8')}.",
                "no_calibration",
            )
        return self.data

    def take_int8(self, place: Path, scratch: Path) -> bool:
        """Take the int8 file that was exported of this very model, so that its scales go on; whether there is one."""
        from gsforget.export.build.chain import ChainInfo
        from gsforget.export.device.metadata import check_hash

        path = place / f"{self._stem}.onnx"
        sidecar = check_hash(path) if path.is_file() else None
        if sidecar is None or sidecar.get("source_sha256") != sha256(self.folder / WEIGHTS):
            return False
        shutil.copyfile(path, scratch / path.name)
        self.chain = ChainInfo(**sidecar["chain"])
        extra: dict[str, Any] = {k: sidecar[k] for k in ("erasable", "erasure_kept") if k in sidecar}
        self.made.append(Made(scratch / path.name, "onnx", [], extra))
        return True

    def check(self) -> None:
        """Parity of the ONNX file with the model, and the run's gates on the file itself."""
        self.progress("comparing the artifact with the model")
        onnx_file = self.made[0].path
        artifact, self.measured_on = open_at(onnx_file, self.precision, onnx_file.parent)
        thresholds = self.request.get("thresholds", {}) if self.request else None
        self.parity = self.kind.check(
            Comparison(self.model, artifact, self.info, self.samples, thresholds, onnx_file.name)
        )

    def write_engine(self, scratch: Path, plan: Any, batch: tuple[int, int, int]) -> None:
        from gsforget.export.device.builder import build_engine
        from gsforget.export.device.engine import NOT_RUN

        self.progress(f"building the engine for {', '.join(plan.targets)}")
        source = self.made[0].path
        path = scratch / f"{source.stem}-{plan.label}.engine"
        built = build_engine(source, path, plan, batch, self.made[0].extra["erasable"], self.progress)
        extra = {**built.to_json(), "onnx_sha256": sha256(source)}
        self.made.append(Made(path, "engine", list(plan.targets), extra))
        self.not_tested.append(NOT_RUN)

    def publish(self, place: Path, onnx: bool) -> dict[str, Any]:
        """Move the artifacts to their place, each followed by its sidecar; until then the old sidecar refuses it."""
        from gsforget.export.device.sidecar import describe, write_sidecar

        self.progress("publishing")
        source = sha256(self.folder / WEIGHTS)
        entries = []
        for made in self.made:
            if made.kind == "onnx" and not onnx:
                continue
            same = "" if made.kind == "onnx" or self.precision == "bf16" else ", same precision"
            parity = {**self.parity, "measured_on": f"{self.measured_on}{same}"}
            content = describe(
                made.path, made.kind, self.info, self.chain.to_json(), source, made.targets, parity, made.extra
            )
            final = place / made.path.name
            stale = _old_data(final)
            for name in made.extra.get("data_files", ()):
                made.path.with_name(name).replace(place / name)
            made.path.replace(final)
            write_sidecar(final, content)
            self.published[made.kind] = (final, content)
            for path in stale - {place / n for n in made.extra.get("data_files", ())}:
                path.unlink(missing_ok=True)
            shown = ("kind", "bytes", "sha256", "precision", "targets", "parity")
            entries.append({"path": str(final), **{k: content[k] for k in shown}})
        chain = self.chain.to_json()
        return {"artifacts": entries, "verdict": "pass", "chain": chain, "not_tested": self.not_tested}


def open_at(onnx_file: Path, precision: str, scratch: Path) -> tuple[OnnxPredictor, str]:
    """An ONNX file ready to answer on the CPU at its precision, and in words what computes its answers."""
    from gsforget.export.build import bfloat16
    from gsforget.export.device.runtime import OnnxPredictor

    if precision == "bf16":
        return bfloat16.open_emulated(onnx_file, scratch), bfloat16.MEASURED_ON
    return OnnxPredictor(onnx_file, "cpu"), "onnxruntime"


def _fit(model: nn.Module, state: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Load weights at a precision into the float32 model, and return them with its buffers at that precision."""
    from gsforget.checkpoint import apply_weights
    from gsforget.export.build.chain import ROUNDED, round_to

    if precision in ROUNDED:
        single = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        apply_weights(model, single, WEIGHTS)
        return {n: round_to(t, n, precision) for n, t in model.state_dict().items()}
    return dict(model.state_dict())


def _old_data(path: Path) -> set[Path]:
    """External data of an export that is about to be replaced."""
    from gsforget.export.build.onnx import data_files

    return set(data_files(path)) if path.is_file() and path.suffix == ".onnx" else set()
