"""One object that picks its runtime by the file's suffix: `.onnx` runs in ONNX Runtime.

Engines are refused with a sentence until their inference has been run on the hardware it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.device.files import sha256
from gsforget.export.device.gpu import cuda_devices
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, check_hash, check_outside, find_info
from gsforget.export.device.onnx_file import read_properties
from gsforget.export.device.preprocess import Preprocess

ERRORS_ONLY = 3  # ONNX Runtime's severity: it otherwise warns about GPUs it does not find
SUFFIXES = (".onnx", ".engine")
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "trt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}


class Predictor(Protocol):
    """A loaded artifact.

    Attributes:
        info: what it says of itself.
        path, sha256: the file, and the hash of its bytes.
    """

    info: ArtifactInfo
    path: Path
    sha256: str

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """float32 images [N, C, H, W] to float32 logits [N, K]."""
        ...

    def features(self, batch: np.ndarray) -> np.ndarray | None:
        """float32 images [N, C, H, W] to what the classifier reads, float32 [N, d]; None without such an output."""
        ...


def open_model(
    path: str | Path,
    device: str = "auto",
    foreign: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> Predictor:
    """Load an artifact for inference.

    Args:
        path: an exported `.onnx` file; its hash is checked where it has a sidecar.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, or ``trt`` and ``rtx`` for ONNX Runtime's
            TensorRT and TensorRT for RTX, which build an engine of their own from an ONNX file.
        foreign: ``class_names`` and ``preprocess`` (fields of `Preprocess`) for a file that says nothing of itself, as
            other exporters write them; its only input and its first output are taken.
        cache: folder in which a runtime keeps what it builds from this very file, and from no other: its key is the
            file's name and graph, not the weights, so that it would take an engine of the old ones for the new.  None:
            nothing is kept.

    Raises RequestError for a file that is absent, unreadable, not ours or cannot run here, and SafetyError
    (kind ``hash_mismatch``) for one that its sidecar does not describe.
    """
    path = check_artifact(path)
    if path.suffix.lower() == ".engine":
        raise _no_engines(path)
    return OnnxPredictor(path, device, foreign, cache)


class OnnxPredictor:
    """An ONNX file in ONNX Runtime; where it is not ``optimised``, operator by operator as the file says."""

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        foreign: Mapping[str, Any] | None = None,
        cache: Path | None = None,
        optimised: bool = True,
    ):
        sidecar = check_hash(path)
        check_outside(path, sidecar)
        self.path, self.sha256 = path, str(sidecar["sha256"]).lower() if sidecar else sha256(path)
        self._session = _session(path, _providers(device, cache), optimised)
        if PROVIDERS.get(device, "") not in ("", *self._session.get_providers()):
            raise RequestError(
                f"ONNX Runtime could not start {PROVIDERS[device]} on this machine.",
                "Install the CUDA, cuDNN and TensorRT libraries that it needs, or use --device cpu.",
                "no_cuda",
            )
        try:
            self.info = find_info(path, self._session.get_modelmeta().custom_metadata_map, sidecar)
        except RequestError as error:
            if error.kind != "not_ours" or foreign is None:
                raise
            self.info = _foreign_info(self._session, path, foreign)
        self._dtype = _input_dtype(self._session, self.info, path)
        first = self._session.get_inputs()[0].shape[:1]
        self._batch = first[0] if first and isinstance(first[0], int) else None  # the only size that a file takes

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """float32 images [N, C, H, W] to float32 logits [N, K].  Raises RequestError for another shape."""
        return self._run(batch, [self.info.output_name])[0]

    def features(self, batch: np.ndarray) -> np.ndarray | None:
        """float32 images [N, C, H, W] to features float32 [N, d]; None where the file was exported without them."""
        return self._run(batch, [self.info.features_name])[0] if self.info.features_name else None

    def features_and_logits(self, batch: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Both in one run: features float32 [N, d] (None where there are none) and logits float32 [N, K]."""
        if not self.info.features_name:
            return None, self.predict(batch)
        features, logits = self._run(batch, [self.info.features_name, self.info.output_name])
        return features, logits

    def outputs(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of the task by name in one run, float32, each [N, …]."""
        names = [self.info.output_name, *self.info.more_names]
        return dict(zip(names, self._run(batch, names), strict=True))

    def _run(self, batch: np.ndarray, names: list[str]) -> list[np.ndarray]:
        wanted = self.info.preprocess.input_size
        if batch.ndim != 4 or batch.shape[1:] != wanted:
            raise RequestError(
                f"The batch has shape {list(batch.shape)}; the model takes [N, {', '.join(map(str, wanted))}].",
                "Prepare images with the artifact's own preprocessing: predictor.info.preprocess.load(path).",
                "bad_batch",
            )
        images = np.ascontiguousarray(batch, self._dtype)
        size = self._batch or max(len(images), 1)
        parts = [images[i : i + size] for i in range(0, len(images), size)] or [images]
        short = size - len(parts[-1]) if self._batch else 0
        if short:
            parts[-1] = np.pad(parts[-1], ((0, short), (0, 0), (0, 0), (0, 0)))
        runs = [self._session.run(names, {self.info.input_name: part}) for part in parts]
        whole = (np.concatenate(of_one) if len(of_one) > 1 else of_one[0] for of_one in zip(*runs, strict=True))
        return [one[: len(images)].astype(np.float32, copy=False) for one in whole]


def check_artifact(path: str | Path) -> Path:
    """The path, if it is a file of a kind that can be opened; else RequestError."""
    path = Path(path)
    if not path.is_file():
        raise RequestError(
            f"There is no file {path}.",
            "Name an exported model, such as runs/forget-0001/artifacts/model.onnx.",
            "no_model",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"{path} is not an exported model: its name ends in none of {', '.join(SUFFIXES)}.",
            "Name a run folder, a model folder or an .onnx file.",
            "no_model",
        )
    return path


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(
            f"ONNX Runtime cannot be loaded ({error}).",
            "pip install onnxruntime (onnxruntime-gpu on a machine with an NVIDIA GPU).",
            "no_runtime",
        ) from error
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    return onnxruntime


def _providers(device: str, cache: Path | None = None) -> list[Any]:
    if device not in ("auto", "cpu", *PROVIDERS):
        raise RequestError(f"There is no device {device!r}.", "Use --device auto, cpu or cuda.", "unknown_device")
    runtime = _runtime()
    name = PROVIDERS.get(device, PROVIDERS["cuda"])
    has_gpu = device != "cpu" and cuda_devices() > 0 and name in runtime.get_available_providers()
    if device in PROVIDERS and not has_gpu:
        why = f"this ONNX Runtime has no {name}" if cuda_devices() else "this machine has no NVIDIA GPU"
        raise RequestError(f"--device {device} cannot be used: {why}.", "Use --device cpu.", "no_cuda")
    if not has_gpu:
        return ["CPUExecutionProvider"]
    runtime.preload_dlls()
    # TensorFloat-32 would round fp32 inputs to 10 bits, and the outputs would no longer be those that were measured.
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    return [*([(name, cache_options(device, cache))] if device in ("trt", "rtx") else []), cuda, "CPUExecutionProvider"]


def cache_options(device: str, cache: Path | None) -> dict[str, str]:
    """The options with which a provider keeps what it builds in a folder; none where there is no folder."""
    if cache is None:
        return {}
    cache.mkdir(parents=True, exist_ok=True)
    if device == "rtx":
        return {"nv_runtime_cache_path": str(cache)}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": cache.name[:16],
    }


def _session(path: Path, providers: list[Any], optimised: bool = True) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if _precision(path) == "fp8":  # it takes fp8 for int8 where it puts operators together, and then refuses the graph
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimised:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "NOT_IMPLEMENTED" in first:
            raise RequestError(
                f"ONNX Runtime has no code for {path} on this machine ({first}).",
                "Run it on a GPU; on a CPU use a file of --precision fp32 or fp16, since ONNX Runtime knows no bf16 there.",
                "no_kernel",
            ) from error
        raise RequestError(
            f"ONNX Runtime cannot load {path} ({first}).", "Copy the file again, or export it again.", "bad_artifact"
        ) from error


def _precision(path: Path) -> str | None:
    """What an ONNX file of ours says of its precision; None for one that is not, or is damaged."""
    try:
        return str(json.loads(read_properties(path)[METADATA_KEY])["precision"])
    except (RequestError, KeyError, ValueError, TypeError):
        return None


def _input_dtype(session: Any, info: ArtifactInfo, path: Path) -> type[np.floating]:
    inputs = {i.name: i.type for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    dtypes: dict[str | None, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    named = [n for n in (info.output_name, info.features_name, *info.more_names) if n]
    if list(inputs) != [info.input_name] or not set(named) <= set(outputs) or inputs[info.input_name] not in dtypes:
        said = " and ".join(repr(n) for n in (info.input_name, *named))
        raise RequestError(
            f"{path} takes {inputs} and gives {outputs}, where its metadata says {said}.",
            "Export it again: gsforget export --onnx.",
            "bad_metadata",
        )
    return dtypes[inputs[info.input_name]]


def _foreign_info(session: Any, path: Path, foreign: Mapping[str, Any]) -> ArtifactInfo:
    """What a file of another exporter is taken to be; RequestError ``foreign_shape`` where it cannot be that."""
    names, preprocess = list(foreign["class_names"]), Preprocess.from_dict(foreign["preprocess"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = list(inputs[0].shape) if len(inputs) == 1 else []
    wanted, given = list(preprocess.input_size), shape[1:]
    fits = len(given) == 3 and all(not isinstance(g, int) or g == w for g, w in zip(given, wanted))
    classes = list(outputs[0].shape)[-1] if outputs[0].shape else None
    if not fits or (isinstance(classes, int) and classes != len(names)):
        listed = {i.name: i.shape for i in inputs}, {o.name: o.shape for o in outputs}
        raise RequestError(
            f"{path} takes {listed[0]} and gives {listed[1]}, which are not images [N, {', '.join(map(str, wanted))}] and "
            f"{len(names)} classes.",
            "Name the model folder that it was exported from, or one with the same classes and preprocessing.",
            "foreign_shape",
        )
    return ArtifactInfo(names, (), 0, preprocess, "unknown", "foreign", inputs[0].name, outputs[0].name)


def _no_engines(path: Path) -> RequestError:
    if not cuda_devices():
        return RequestError(
            f"{path} cannot run: engines run on the device with a GPU; this machine has none.",
            "Run the .onnx file of the same export here.",
            "no_gpu",
        )
    return RequestError(
        f"{path} cannot run: this version of gsforget does not run engines by itself.",
        "Run the .onnx file of the same export, or load the engine with TensorRT's own tools.",
        "no_engine_runtime",
    )
