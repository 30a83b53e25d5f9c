"""The audit of a detector: AP of model and original on the same scenes, judged by the gates of `forget`; boxes on request."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.audit.case import open_reference, run_of
from gsforget.audit.checks import Check, Limits, of_gate, unknown
from gsforget.audit.folder import FolderAudit
from gsforget.errors import RequestError
from gsforget.export.device.detections import Found, describe
from gsforget.folder import WEIGHTS, is_model_folder, sha256
from gsforget.lineage import annotations_of, read_request
from gsforget.predict import pick_device
from gsforget.request import Request, refuse
from gsforget.settings import Settings
from gsforget.source import Source, load_source
from gsforget.tasks.base import Seen
from gsforget.tasks.detect import features
from gsforget.tasks.detect.coco import SceneFolder
from gsforget.tasks.detect.evidence import NOT_TESTED as UNPROBED
from gsforget.tasks.detect.evidence import Figures, measured
from gsforget.tasks.detect.kind import DetectStudy, open_data
from gsforget.tasks.detect.losses import found_by

if TYPE_CHECKING:
    from gsforget.audit.case import Ask, Devices
    from gsforget.report.pictures import Example

BATCH = 8  # images that an exported file is shown at once
EXAMPLES = {"forget": 6, "retain": 3}  # images of a report that shows images
SHOWN = 0.3  # score of a box that is drawn
SAYS = {
    "forget_ap50": "AP50 of the kinds of this request: what COCO's evaluator finds of them, nothing masked",
    "old_ap50": "The same of kinds that earlier requests forgot",
    "retain_ap_drop": "AP that retained kinds have lost since the original, in points",
    "class_ap_drop": "The same of the retained kind that lost most",
}
NO_ORIGINAL = "the model before the forgetting is not at hand (--original FOLDER)"
NOTHING = "From this detector nothing was forgotten by gsforget.", "Say what it should not find: --classes A,B."
NOT_TESTED = (
    "membership of single images, probes on layers before the last, adversarial inputs, and what copies, caches and back-ups of "
    "model and images still hold"
)
LATER = {
    "quick": "what the queries still hold of the forgotten kinds (probes), and relearning: --tier standard, --tier full",
    "standard": "relearning with all weights: --tier full",
}
OF_RUN = "probes and relearning: an exported file gives no access to queries and weights; audit the run folder as well"
NO_OBJECTS = "training and test images do not both show objects of the forgotten kinds"


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a run or model folder of the task detect, or an exported file, judge it, and write audit.json and report.html.

    The annotations are those asked for, else those of the run, else in `annotations` under the data folder, see `coco`.

    Returns:
        The document as `gsforget audit` has it, erased kinds under their own names; `shown` hides them.

    Raises:
        RequestError: arguments or data do not fit.
    """
    start = time.perf_counter()
    assert ask.target is not None
    refuse(
        {"--never-seen": ask.never_seen},
        "{} is about folders of images, and a detector's kinds are annotated together.",
        "Compare with a detector trained without the forgotten kinds: --reference FOLDER.",
        "not_for_detection",
    )
    file = _open_file(ask, devices) if ask.target.is_file() else None
    subject = file.source if file else load_source(str(ask.target))
    run = run_of(ask.target)
    where = annotations_of(read_request(run) if run else {}, ask.data, ask.annotations)
    scenes = open_data(ask.data, subject.names, annotations=where)
    case = FolderAudit(ask, subject, NOTHING, start)
    reference = _reference(case)
    say("looking at the test images")
    load = devices.loader(subject.config.to_json())
    studies = [_study(s, scenes, load, ask) for s in case.sides]
    seen = [study.look() for study in studies[1 if file else 0 :]]
    if file:
        seen.insert(0, file.look(studies[0]))
    say("judging")
    study = studies[0]
    request = Request([], Settings(seed=ask.seed))
    figures = Figures(subject, request, study.family, study.tested, case.forget, case.retained, case.old, seen[-1])
    found = measured(figures, seen[0])
    compared = case.original is not None
    made, details = _checks(found.gates, compared), {"detection": found.sections["detection"]}
    if ask.tier != "quick" and file is None:
        of_features, more = _features(case, reference, study, scenes, load, say)
        made, details = [*made, *of_features], {**details, **more}
    later = OF_RUN if file else LATER.get(ask.tier)
    untested = [note for note in found.not_tested if note not in UNPROBED]
    document = case.document(
        made,
        task="detect",
        reference={"kind": "model", "path": str(ask.reference)} if reference else None,
        data={"root": str(scenes.root), "train_sha256": scenes.train.sha256, "test_sha256": scenes.test.sha256},
        classes=[_class(c, compared) for c in found.classes],
        details=details,
        not_tested=[*untested, *([later] if later else []), NOT_TESTED],
    )
    if reference and reference.folder:
        document["sha256"]["reference"] = sha256(reference.folder / WEIGHTS)
    after = found_by(seen[0], study.family)
    case.write(document, out, lambda: _examples(figures, after, ask.seed) if ask.with_images else None)
    return document


@dataclass(frozen=True)
class _File:
    """An exported detector; `source`: the model whose test images it is shown, under the file's own config."""

    predictor: Any
    source: Source

    def look(self, study: DetectStudy) -> Seen:
        """What the file makes of the test images, as `DetectStudy.look`."""
        pieces = []
        for rows in torch.arange(len(study.test)).split(BATCH):
            given = self.predictor.outputs(study.test.batch(rows).numpy())
            boxes = torch.from_numpy(given["query_boxes"])
            pieces.append(Seen(torch.from_numpy(given["logits"]), more={"boxes": boxes}))
        return Seen.joined(pieces)


def _open_file(ask: Ask, devices: Devices) -> _File:
    """The file, and the folder that stands for it: its run, else the model under --original.

    Raises RequestError ``no_original`` where there is neither, ``bad_original`` where images are read in another way.
    """
    assert ask.target is not None
    predictor, info = devices.open(ask.target, ask.device, None)
    folder = run_of(ask.target) or ask.original
    if folder is None or not is_model_folder(folder):
        raise RequestError(
            f"{ask.target} does not lie among the artifacts of its run, so that nothing says what its kinds were called.",
            "Add --original FOLDER, the detector before the forgetting.",
            "no_original",
        )
    source = load_source(str(folder))
    if not hasattr(predictor, "outputs") or info.preprocess.to_dict() != _preprocessing(source, info):
        raise RequestError(
            f"{ask.target} reads images in another way than the detector in {folder}.",
            "Name the detector that the file was made from: --original FOLDER.",
            "bad_original",
        )
    erased = {k: source.names[k] for k in info.forgotten}
    config = replace(source.config, forgotten=tuple(info.forgotten), sequence=info.sequence)
    return _File(predictor, replace(source, config=config, erased=erased))


def _preprocessing(source: Source, info: Any) -> dict[str, Any]:
    return type(info.preprocess).from_dict(source.config.to_json()).to_dict()


def _reference(case: FolderAudit) -> Source | None:
    """The detector under --reference.  Raises RequestError ``bad_reference`` where it is of another kind than the subject."""
    if case.ask.reference is None:
        return None
    source = open_reference(case.ask.reference, len(case.subject.names))
    if source.config.architecture != case.subject.config.architecture:
        raise RequestError(
            f"The reference {case.ask.reference} holds {source.config.architecture}, and the model is "
            f"{case.subject.config.architecture}.",
            "Give a detector of the same type, trained without the forgotten kinds.",
            "bad_reference",
        )
    return source


def _features(
    case: FolderAudit, reference: Source | None, study: DetectStudy, scenes: SceneFolder, load: Any, say: Any
) -> tuple[list[Check], dict[str, Any]]:
    """Probes on the queries, and relearning at the full tier."""
    gone = [*case.forget, *case.old]
    splits = [[replace(s, frame=study.frame_of(s.size)) for s in split.scenes] for split in (scenes.train, scenes.test)]
    tested = [k for k in gone if all(any((s.kinds[~s.crowd] == k).any() for s in split) for split in splits)]
    if not tested:
        names = ("prototype_attack", "five_shot")
        limit = case.ask.max_probe_excess
        return [
            *(unknown(name, "%", NO_OBJECTS) for name in names),
            unknown("linear_probe_excess", "ratio", NO_OBJECTS, limit),
        ], {}
    seed = case.ask.seed
    at = features.Looked(
        study.family,
        tested,
        case.retained,
        features.choose(splits[0], [*tested, *case.retained], features.PER_KIND, seed),
        features.choose(splits[1], tested, max(features.PER_KIND, features.MOST // len(tested)), seed)[: features.MOST],
        load,
        study.device,
        study.batch,
        seed,
        case.ask.skip_corrupt,
    )
    sources = dict(zip(features.SIDES, (case.subject, case.original, reference)))
    sides: dict[str, features.Probed | None] = {}
    for name, source in sources.items():
        if source is not None:
            say(f"probing the queries: {name}")
        sides[name] = features.probed(source.model.to(study.device).eval(), at) if source is not None else None
    limits = Limits(max_probe_excess=case.ask.max_probe_excess)
    made, details = features.standard(sides, at, limits)
    if case.ask.tier == "full":
        say("relearning with all weights")
        check, curves = features.full(sides, at, limits)
        made.append(check)
        details["relearning"] |= curves
    return made, details


def _study(source: Source, scenes: SceneFolder, load: Any, ask: Ask) -> DetectStudy:
    """The model on its test scenes; which kinds a request would name plays no part in looking."""
    free = next(name for k, name in enumerate(source.names) if k not in source.erased)
    request = Request([free], Settings(seed=ask.seed), device=ask.device, skip_corrupt=ask.skip_corrupt, shots=1)
    device = pick_device(ask.device)
    study = DetectStudy(source, scenes, request, load, device)
    source.model.to(device).eval()
    return study


def _checks(gates: Any, compared: bool) -> list[Check]:
    made = []
    for gate in gates:
        if gate.name.endswith("drop") and not compared:
            made.append(unknown(gate.name, "points", NO_ORIGINAL, gate.threshold))
        else:
            made.append(of_gate(gate, "points" if gate.name.endswith("drop") else "%", SAYS[gate.name]))
    return made


def _class(entry: dict[str, Any], compared: bool) -> dict[str, Any]:
    return {**entry, "before": entry["before"] if compared else None, "after": entry["after"]}


def _examples(f: Figures, after: Found, seed: int) -> list[Example]:
    """A few seeded test images, with the boxes of the original and of the model; erased kinds are called forgotten-N."""
    from gsforget.export.device.detect import draw_boxes
    from gsforget.report.pictures import Example

    gone = {*f.forget, *f.old}
    names = [f"forgotten-{k}" if k in gone else name for k, name in enumerate(f.source.names)]
    holds = np.array([bool(np.isin(s.kinds, sorted(gone)).any()) for s in f.scenes])
    rng = np.random.default_rng(seed)
    made = []
    for role, rows in (("forget", np.flatnonzero(holds)), ("retain", np.flatnonzero(~holds))):
        for n in np.sort(rng.permutation(rows)[: EXAMPLES[role]]):
            scene, pictures, counts = f.scenes[n], [], []
            for found in (f.found_before, after):
                listed = describe(found, int(n), (round(scene.frame[0]), round(scene.frame[1])), names, SHOWN)
                target = io.BytesIO()
                draw_boxes(scene.path, listed, names).save(target, "PNG")
                pictures.append(target.getvalue())
                counts.append(f"{len(listed)} found")
            made.append(Example(pictures[0], role, counts[0], None, counts[1], None, pictures[1]))
    return made
