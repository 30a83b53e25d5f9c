"""What an audit looks at, opened and checked before anything is measured: model, original, never-seen reference, images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gsforget import ledger
from gsforget.audit.images import AuditImages, list_images
from gsforget.audit.subjects import ArtifactSubject, Subject, TorchSubject
from gsforget.classes import resolve_classes
from gsforget.data import listed
from gsforget.errors import RequestError
from gsforget.folder import WEIGHTS, ModelConfig, read_config, sha256
from gsforget.lineage import REQUEST, ancestors, read_request
from gsforget.source import Source, load_source

if TYPE_CHECKING:
    import numpy as np

Load = Callable[[Path], "np.ndarray"]
TIERS = ("quick", "standard", "full")
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Devices(Protocol):
    """What the core must be handed, because it lies in the room of devices."""

    def loader(self, preprocessing: Mapping[str, Any]) -> Load:
        """The function that reads one image file; the same one for the same preprocessing."""
        ...

    def open(self, path: Path, device: str, foreign: dict[str, Any] | None) -> tuple[Any, Any]:
        """A predictor and its info (``class_names``, ``forgotten``, ``preprocess.to_dict()``) of an exported file.

        ``foreign`` holds ``class_names`` and ``preprocess`` for a file that says nothing of itself.
        """
        ...


@dataclass(frozen=True)
class Ask:
    """What the person asked for; see `gsforget.audit`."""

    target: Path | None
    data: Path
    tier: str = "quick"
    reference: Path | None = None
    never_seen: Sequence[str] = ()
    original: Path | None = None
    classes: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    device: str = "auto"
    seed: int = 0
    max_probe_excess: float = 0.25
    trust_code: bool = False
    skip_corrupt: bool = False
    with_images: bool = False
    annotations: str | None = None


@dataclass(frozen=True)
class Side:
    """One model of an audit: how to ask it, how it reads images, where it lies, and its hash."""

    subject: Subject
    load: Load
    path: Path
    sha256: str
    erased: tuple[int, ...] = ()
    sequence: int = 0


@dataclass
class Case:
    """One audit before it is measured.

    Attributes:
        kind: ``run``, ``model``, ``onnx`` or ``engine``; run: the run folder that it belongs to, if any.
        names: class names in index order as the data's folders have them.
        forget, old: indices of the classes of the last request and of earlier ones; retained: all others.
        audited: those of forget and old that the deep checks look at.
        notes: sentences on what could not be looked at.
    """

    ask: Ask
    kind: str
    run: Path | None
    side: Side
    original: Side | None
    reference: Side | None
    names: list[str]
    forget: list[int]
    old: list[int]
    audited: list[int]
    sequence: int
    images: AuditImages
    device: Any
    notes: list[str] = field(default_factory=list)

    @property
    def retained(self) -> list[int]:
        gone = {*self.forget, *self.old}
        return [k for k in range(len(self.names)) if k not in gone]


def open_case(ask: Ask, devices: Devices) -> Case:
    """Open all that an audit looks at.

    Raises:
        RequestError: what is absent or does not fit, with what to type instead.
        SafetyError: ``broken_ledger`` and others, where a run or an artifact is not what it was.
    """
    from gsforget.predict import pick_device
    from gsforget.runs import newest_run

    if ask.tier not in TIERS:
        raise RequestError(
            f"There is no tier {ask.tier!r}.", "Type --tier quick, --tier standard or --tier full.", "unknown_tier"
        )
    if not math.isfinite(ask.max_probe_excess):
        raise RequestError(
            f"--max-probe-excess is {ask.max_probe_excess}; it must be a finite number.",
            "Leave it out, or give a number such as 0.25.",
            "bad_number",
        )
    if ask.reference and ask.never_seen:
        raise RequestError(
            "--reference and --never-seen both say what to compare with.", "Give one of them.", "two_references"
        )
    opening = _Opening(ask, devices, pick_device(ask.device))
    return opening.case(ask.target if ask.target is not None else newest_run())


class _Opening:
    def __init__(self, ask: Ask, devices: Devices, device: Any):
        self.ask, self.devices, self.device = ask, devices, device
        self.notes: list[str] = []

    def case(self, target: Path) -> Case:
        if not target.exists():
            raise RequestError(
                f"There is no run, model folder or file {target}.",
                "Name a run folder such as runs/forget-0001, a model folder or an exported file; without a name the newest run "
                "is audited.",
                "no_model",
            )
        is_file = not target.is_dir()
        run = run_of(target)
        request = read_request(run) if run else {}
        if run:
            ledger.verify(run)
        original = self._original(run)
        if is_file:
            side, info, kind = self._artifact(target, request, original)
            own_names, forgotten, sequence = list(info.class_names), list(info.forgotten), int(info.sequence)
        else:
            source = load_source(str(target), trust_code=self.ask.trust_code)
            side, kind = self._side(source), "run" if run else "model"
            own_names, forgotten, sequence = source.config.class_names, list(source.config.forgotten), source.sequence
            if forgotten and not run:
                self.notes.append(f"the history of the model: {target} has no ledger")
        names = self._names(own_names, request, original)
        erased = {i: names[i] for i in forgotten}
        forget, old, chosen = self._classes(names, erased, request, sequence)
        original, audited = self._reachable(original, chosen, forget)
        reference = self._reference(names)
        images = list_images(
            self.ask.data, names, {i: names[i] for i in [*forget, *old]}, list(self.ask.never_seen), self.ask.seed
        )
        self.notes += images.missing
        side_of = original[1] if original else None
        case = Case(
            self.ask, kind, run, side, side_of, reference, names, forget, old, audited, sequence, images, self.device
        )
        case.notes = self.notes
        return case

    def _side(self, source: Source) -> Side:
        assert source.folder is not None
        return Side(
            TorchSubject(source.model, self.device),
            self.devices.loader(_preprocessing(source.config)),
            source.folder,
            sha256(source.folder / WEIGHTS),
            source.config.forgotten,
            source.sequence,
        )

    def _artifact(
        self, path: Path, request: dict[str, Any], original: tuple[Source, Side] | None
    ) -> tuple[Side, Any, str]:
        config = original[0].config if original else None
        names = self.ask.class_names or request.get("names") or (original[0].names if original else None)
        foreign = {"class_names": list(names), "preprocess": _preprocessing(config)} if names and config else None
        try:
            predictor, info = self.devices.open(path, self.ask.device, foreign)
        except RequestError as error:
            if error.kind == "not_ours":
                error.hint = (
                    "Say how it is fed and what its classes are called: --original FOLDER (a model folder with the same "
                    "classes and preprocessing), --class-names FILE where the names differ, and --classes A,B, the classes that "
                    "it should not know."
                )
            raise
        load = self.devices.loader(info.preprocess.to_dict())
        kind = "engine" if path.suffix.lower() == ".engine" else "onnx"
        side = Side(ArtifactSubject(predictor), load, path, sha256(path), tuple(info.forgotten), int(info.sequence))
        return side, info, kind

    def _original(self, run: Path | None) -> tuple[Source, Side] | None:
        """--original, else the oldest model of the chain that is still there."""
        folder = self.ask.original
        if folder is None and run is not None:
            behind = [a for a in ancestors(run) if a.weights]
            folder = behind[-1].path if behind else None
        if folder is None:
            self.notes.append(
                "what the model could do before: the original model is not at hand; name it with --original FOLDER"
            )
            return None
        if not folder.is_dir():
            raise RequestError(f"There is no model folder {folder}.", "Check --original.", "no_model")
        source = load_source(str(folder), trust_code=self.ask.trust_code)
        side = self._side(source)
        if run is not None and self.ask.original is not None:
            self._compare_with_ledger(run, side)
        return source, side

    def _compare_with_ledger(self, run: Path, original: Side) -> None:
        """Note that a model given with --original is none that the run's chain started from, as far as hashes say."""
        bases = {entry["base"] for entry in ledger.history(run)}
        if original.sha256 not in bases and all(ancestor.path for ancestor in ancestors(run)):
            self.notes.append(
                f"whether {original.path} is the model that this run was made from: its weights have none of the hashes that "
                "the ledger names"
            )

    def _reference(self, names: list[str]) -> Side | None:
        folder = self.ask.reference
        if folder is None:
            if not self.ask.never_seen:
                self.notes.append(
                    "whether the features know more of the forgotten classes than those of a model that never saw them: "
                    "add --reference FOLDER (a model trained without them) or --never-seen A,B (classes of the data "
                    "folder that the model was never trained on)"
                )
            return None
        return self._side(open_reference(folder, len(names), self.ask.trust_code))

    def _names(self, own: list[str], request: dict[str, Any], original: tuple[Source, Side] | None) -> list[str]:
        """The names that the data's folders have: given, of the run, of the original, or the model's own."""
        given = list(self.ask.class_names) if self.ask.class_names is not None else None
        of_original = original[0].names if original and len(original[0].names) == len(own) else None
        names = given or request.get("names") or of_original or own
        if len(names) != len(own):
            raise RequestError(
                f"{len(names)} class names were given, the model has {len(own)}.",
                "Give one name per class, in the model's index order.",
                "class_count",
            )
        if original and len(original[0].names) != len(own):
            raise RequestError(
                f"The original {original[1].path} has {len(original[0].names)} classes, the model {len(own)}.",
                "Name the model that it was made from: --original FOLDER.",
                "bad_original",
            )
        return list(names)

    def _classes(
        self, names: list[str], erased: dict[int, str], request: dict[str, Any], sequence: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Forgotten now, forgotten before, and those to look at."""
        wanted = [c for c in (str(c).strip() for c in self.ask.classes) if c]
        if not erased:
            if not wanted and request.get("mode") == "sample":
                count = len(request.get("images") or [])
                raise RequestError(
                    f"This run forgot {count} single image(s) (sample mode) and kept their classes, so there is no forgotten "
                    "class to audit; its evidence is the membership attack, in metrics.json of the run under sample.",
                    "Read metrics.json there; to look at whole classes all the same, name them: --classes A,B.",
                    "sample_run",
                )
            if not wanted:
                raise RequestError(
                    "Nothing was forgotten from this model, as far as it says.",
                    "Say which classes it should not know: --classes A,B; or name a run folder.",
                    "nothing_forgotten",
                )
            chosen = resolve_classes(wanted, names, {})
            return chosen, [], chosen
        now = request.get("indices") if request.get("sequence") == sequence else None
        forget = sorted(int(i) for i in now) if now else sorted(erased)
        old = sorted(set(erased) - set(forget))
        return forget, old, [_erased(w, names, erased) for w in wanted] or sorted(erased)

    def _reachable(
        self, original: tuple[Source, Side] | None, chosen: list[int], forget: list[int]
    ) -> tuple[tuple[Source, Side] | None, list[int]]:
        """The original and the classes to look at: those that it still knows."""
        if original is None:
            return None, sorted(chosen)
        source, side = original
        gone = sorted(set(chosen) & set(side.erased))
        known = sorted(set(chosen) - set(gone))
        if not gone:
            return original, known
        lost = listed([source.erased.get(i, str(i)) for i in gone])
        if not known:
            self.notes.append(
                f"what the model could do before: in {side.path} the classes {lost} are forgotten already; "
                "name the first model with --original FOLDER"
            )
            return None, sorted(chosen)
        self.notes.append(
            f"the features of {lost}: the oldest model at hand, {side.path}, has forgotten them already; "
            "name the first model with --original FOLDER"
        )
        return original, known


def open_reference(folder: Path, classes: int, trust_code: bool = False) -> Source:
    """Open a model that was trained without some classes.

    Raises RequestError ``no_model``, or ``bad_reference`` where its head has another number of classes.
    """
    if not folder.is_dir():
        raise RequestError(f"There is no model folder {folder}.", "Check --reference.", "no_model")
    source = load_source(str(folder), trust_code=trust_code)
    if source.config.num_classes != classes:
        raise RequestError(
            f"The reference {folder} has {source.config.num_classes} classes, the model {classes}.",
            "Train it with the same class names in the same order, on images of the retained classes only.",
            "bad_reference",
        )
    return source


def run_of(target: Path) -> Path | None:
    """The run folder that a target is, or whose artifact it is; None for others.  Raises RequestError for neither."""
    if target.is_dir():
        is_run = (target / REQUEST).is_file() or (target / ledger.LEDGER).is_file()
        if not is_run:
            read_config(target)  # says what is missing
        return target if is_run else None
    folder = target.resolve().parent
    if folder.name == "artifacts" and (folder.parent / REQUEST).is_file():
        return target.parent.parent if target.parent.name == "artifacts" else folder.parent
    return None


def _preprocessing(config: ModelConfig | None) -> dict[str, Any]:
    raw = config.to_json() if config else {}
    return {k: raw[k] for k in PREPROCESSING if k in raw}


def _erased(word: str, names: list[str], erased: dict[int, str]) -> int:
    by_name = {f"forgotten-{i}": i for i in erased} | {name: i for i, name in erased.items()}
    index = by_name.get(word)
    if index is None and word.isascii() and word.isdigit() and int(word) in erased:
        index = int(word)
    if index is None:
        known = word in names or (word.isdigit() and int(word) < len(names))
        raise RequestError(
            f"Class '{word}' was not forgotten." if known else f"The model has no class {word!r}.",
            f"The forgotten classes are {listed(list(erased.values()), 10)}.",
            "not_forgotten" if known else "unknown_class",
        )
    return index
