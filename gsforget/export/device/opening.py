"""Load what a device folder holds: only bytes that its state names, with a cache of their own, and asked what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.manifest import KnownAnswers
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.records import Held, State
from gsforget.export.device.runtime import Predictor, open_model
from gsforget.export.device.store import REPAIR, DeviceFolder

NOT_HERE = ("no_runtime", "no_gpu", "no_engine_runtime", "no_kernel")  # kinds of "this machine cannot run it"
DAMAGED = ("bad_artifact", "bad_metadata", "not_ours")  # kinds of "no machine can"


@dataclass
class Loaded:
    """What ran: the first model that did, the names of artifacts that answered the known tests, and why others did not."""

    predictor: Predictor | None = None
    answered: list[str] = field(default_factory=list)
    not_tested: list[str] = field(default_factory=list)


def load(folder: DeviceFolder, state: State, device: str) -> Predictor:
    """The artifact of a state that runs here: an engine where one does, else the ONNX file.

    Raises RequestError ``cannot_run`` where none does, SafetyError for bytes that are not those of the state.
    """
    reasons = []
    for held in _by_preference(state.artifacts):  # data beside an ONNX file is checked with it, by its sidecar
        folder.check_artifact(held)
        try:
            predictor = _open(folder, held, device)
        except RequestError as error:
            if not _passes_over(held, error):
                raise
            reasons.append(error.message)
            continue
        info = predictor.info
        if (info.model_id, info.sequence, info.precision) != (state.model_id, state.sequence, state.precision):
            raise SafetyError(f"{held.name} says that it is another model than the state does.", REPAIR, "wrong_model")
        return predictor
    raise RequestError(
        f"Nothing in {folder.root} can run on this machine: {' '.join(reasons)}",
        "Install a runtime: pip install onnxruntime.",
        "cannot_run",
    )


def try_out(
    folder: DeviceFolder, artifacts: Sequence[Held], device: str, info: ArtifactInfo, known: KnownAnswers | None
) -> Loaded:
    """Load every artifact that runs here and ask it what is known; the caller has just written them and read them back.

    Args:
        info: what each must say of itself (but for a features output, which one may have and another not).
        known: of its package; None: there is no package.

    Raises SafetyError: ``known_answers`` where one of a package cannot be loaded by any machine, or answers otherwise;
    ``wrong_model`` where it says something else of itself.
    """
    done = Loaded()
    for held in _by_preference(artifacts):
        try:
            predictor = _open(folder, held, device)
        except RequestError as error:
            if _passes_over(held, error):
                done.not_tested.append(f"answers of {held.name}: {error.message.rstrip('.')}")
                continue
            if known is None or error.kind not in DAMAGED:
                raise
            raise SafetyError(error.message, REPAIR, "known_answers") from error
        if replace(predictor.info, features_name=None) != replace(info, features_name=None):
            message = f"{held.name} says something else of itself than its package or sidecar does."
            raise SafetyError(message, REPAIR, "wrong_model")
        if known is not None and known.tests:
            ask(predictor, known, held.name)
            done.answered.append(held.name)
        done.predictor = done.predictor or predictor
    if known is None or not known.tests:
        done.not_tested.append("answers of the model: none are known for it")
    return done


def noise(seed: int, batch: int, input_size: tuple[int, int, int]) -> np.ndarray:
    """The input of a known answer, float32 [batch, C, H, W]: standard normal noise, never a picture."""
    return np.random.default_rng(seed).standard_normal((batch, *input_size)).astype(np.float32)


def ask(predictor: Predictor, known: KnownAnswers, name: str) -> None:
    """Raise SafetyError ``known_answers`` unless a model answers as its package says."""
    for test in known.tests:
        logits = predictor.predict(noise(test.seed, test.batch, predictor.info.preprocess.input_size))
        expected = np.array(test.new)
        distance = np.abs(logits.astype(np.float64) - expected).max() if logits.shape == expected.shape else np.inf
        if not distance <= known.tolerance:  # also where it is NaN
            raise SafetyError(
                f"{name} answers a known test otherwise than where it was built: off by {distance:.3g}, and "
                f"{known.tolerance:.3g} is allowed.",
                REPAIR,
                "known_answers",
            )


def _open(folder: DeviceFolder, held: Held, device: str) -> Predictor:
    return open_model(folder.models / held.name, device, cache=folder.cache(held.sha256))


def _by_preference(artifacts: Sequence[Held]) -> list[Held]:
    return sorted((held for held in artifacts if held.kind != "data"), key=lambda held: held.kind != "engine")


def _passes_over(held: Held, error: RequestError) -> bool:
    """Whether an artifact is left to other machines: an engine that does not run here, a runtime that is not installed."""
    return held.kind == "engine" or error.kind in NOT_HERE
