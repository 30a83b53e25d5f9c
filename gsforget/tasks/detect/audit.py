"""The audit of a detector: AP of model and original on the same scenes, judged by the gates of `forget`; boxes on request."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.audit.checks import Check, of_gate, unknown
from gsforget.audit.folder import FolderAudit
from gsforget.export.device.detections import Found, describe
from gsforget.lineage import annotations_of, read_request
from gsforget.predict import pick_device
from gsforget.request import Request
from gsforget.source import Source, load_source
from gsforget.tasks.detect.coco import SceneFolder
from gsforget.tasks.detect.evidence import Figures, measured
from gsforget.tasks.detect.kind import DetectStudy, open_data
from gsforget.tasks.detect.losses import found_by
from gsforget.training import Settings

if TYPE_CHECKING:
    from gsforget.audit.case import Ask, Devices
    from gsforget.report.pictures import Example

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
    "attacks with the weights: relearning, probes on queries and inner layers, adversarial inputs, and what copies, caches and "
    "back-ups of model and images still hold"
)


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a run or model folder of the task detect, judge it, and write audit.json and report.html.

    The annotations are those asked for, else those of the run, else in `annotations` under the data folder, see `coco`.

    Returns:
        The document as `gsforget audit` has it, erased kinds under their own names; `shown` hides them.

    Raises:
        RequestError: arguments or data do not fit.
    """
    start = time.perf_counter()
    assert ask.target is not None
    subject = load_source(str(ask.target))
    where = annotations_of(read_request(ask.target), ask.data, ask.annotations)
    scenes = open_data(ask.data, subject.names, annotations=where)
    case = FolderAudit(ask, subject, NOTHING, start)
    say("looking at the test images")
    load = devices.loader(subject.config.to_json())
    studies = [_study(s, scenes, load, ask) for s in case.sides]
    seen = [study.look() for study in studies]
    say("judging")
    study = studies[0]
    request = Request([], Settings(seed=ask.seed))
    figures = Figures(subject, request, study.family, study.tested, case.forget, case.retained, case.old, seen[-1])
    found = measured(figures, seen[0])
    compared = case.original is not None
    made = _checks(found.gates, compared)
    document = case.document(
        made,
        task="detect",
        reference=None,
        data={"root": str(scenes.root), "train_sha256": scenes.train.sha256, "test_sha256": scenes.test.sha256},
        classes=[_class(c, compared) for c in found.classes],
        details={"detection": found.sections["detection"]},
        not_tested=[*found.not_tested, NOT_TESTED],
    )
    after = found_by(seen[0], study.family)
    case.write(document, out, lambda: _examples(figures, after, ask.seed) if ask.with_images else None)
    return document


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
