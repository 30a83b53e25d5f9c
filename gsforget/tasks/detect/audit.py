"""The audit of a detector: AP of model and original on the same scenes, judged by the gates of `forget`; boxes on request."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget import __version__
from gsforget.audit.audit import versions
from gsforget.audit.checks import Check, of_gate, overall, unknown
from gsforget.audit.publish import plain, shown
from gsforget.classes import resolve_classes
from gsforget.errors import RequestError
from gsforget.export.device.detections import Found, describe
from gsforget.folder import WEIGHTS, sha256, write_file
from gsforget.lineage import ancestors, read_request
from gsforget.predict import pick_device
from gsforget.request import Request
from gsforget.source import Source, load_source
from gsforget.tasks.detect.coco import SceneFolder
from gsforget.tasks.detect.evidence import Figures, measured
from gsforget.tasks.detect.kind import DetectStudy
from gsforget.tasks.detect.losses import found_by
from gsforget.tasks.detect.opening import open_detector
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
NOT_TESTED = (
    "attacks with the weights: relearning, probes on queries and inner layers, adversarial inputs, and what copies, caches and "
    "back-ups of model and images still hold"
)


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a run or model folder of the task detect, judge it, and write audit.json and report.html.

    The annotations are those of the run, else in `annotations` under the data folder, see `coco`.

    Returns:
        The document as `gsforget audit` has it, erased kinds under their own names; `shown` hides them.

    Raises:
        RequestError: arguments or data do not fit.
    """
    del devices
    start = time.perf_counter()
    assert ask.target is not None
    where = read_request(ask.target).get("annotations")
    subject, scenes, load = open_detector(ask.target, ask.data, where)
    forget, old = _asked(ask, subject)
    original = _original(ask)
    say("looking at the test images")
    studies = [_study(s, scenes, load, ask) for s in (subject, *([original] if original else []))]
    seen = [study.look() for study in studies]
    say("judging")
    study = studies[0]
    retained = [k for k in range(len(subject.names)) if k not in (*forget, *old)]
    request = Request([], Settings(seed=ask.seed))
    figures = Figures(subject, request, study.family, study.tested, forget, retained, old, seen[-1])
    found = measured(figures, seen[0])
    made = _checks(found.gates, original is not None)
    document = {
        "gsforget": __version__,
        "task": "detect",
        "tier": ask.tier,
        "kind": "run" if read_request(ask.target) else "model",
        "subject": str(ask.target),
        "original": str(original.folder) if original else None,
        "reference": None,
        "sha256": {
            "model": sha256(ask.target / WEIGHTS),
            "original": sha256(original.folder / WEIGHTS) if original and original.folder else None,
            "reference": None,
        },
        "sequence": subject.sequence,
        "data": {"root": str(scenes.root), "train_sha256": scenes.train.sha256, "test_sha256": scenes.test.sha256},
        "seed": ask.seed,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "device": str(pick_device(ask.device)),
        "classes": [_class(c, original is not None) for c in found.classes],
        "audited": [*forget, *old],
        "checks": [c.to_json() for c in made],
        "details": {"detection": found.sections["detection"]},
        "not_tested": [*found.not_tested, NOT_TESTED],
        "verdict": overall(made),
        "seconds": round(time.perf_counter() - start, 2),
    }
    drawn = _examples(figures, found_by(seen[0], study.family), ask.seed) if ask.with_images else None
    _write(ask.target, out, document, drawn)
    return document


def _study(source: Source, scenes: SceneFolder, load: Any, ask: Ask) -> DetectStudy:
    """The model on its test scenes; which kinds a request would name plays no part in looking."""
    free = next(name for k, name in enumerate(source.names) if k not in source.erased)
    request = Request([free], Settings(seed=ask.seed), device=ask.device, skip_corrupt=ask.skip_corrupt, shots=1)
    device = pick_device(ask.device)
    study = DetectStudy(source, scenes, request, load, device)
    source.model.to(device).eval()
    return study


def _original(ask: Ask) -> Source | None:
    """The model before the forgetting: the one named, else the oldest of the chain whose weights are there."""
    assert ask.target is not None
    there = [a.path for a in ancestors(ask.target) if a.weights and a.path is not None]
    folder = ask.original or (there[-1] if there else None)
    return load_source(str(folder), trust_code=ask.trust_code) if folder else None


def _asked(ask: Ask, subject: Source) -> tuple[list[int], list[int]]:
    """Indices of the newest request and of earlier ones; for a model that is no run, those under --classes."""
    erased = sorted(subject.erased)
    named = resolve_classes(list(ask.classes), subject.names, {}) if ask.classes else []
    forget = named or [int(k) for k in (read_request(ask.target) if ask.target else {}).get("indices", [])]
    if not forget:
        raise RequestError(
            "From this detector nothing was forgotten by gsforget.",
            "Say what it should not find: --classes A,B.",
            "nothing_forgotten",
        )
    return forget, [k for k in erased if k not in forget]


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


def _write(run: Path, out: Path | None, document: dict[str, Any], examples: list[Example] | None) -> None:
    """audit.json and report.html in the run, or in `out`; nothing for a model folder that is no run."""
    from gsforget.report import read_history, write_report

    folder = out or (run / "audit" if document["kind"] == "run" else None)
    document["artifacts"] = {}
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    document["artifacts"] = {"audit": str(folder / "audit.json"), "report": str(folder / "report.html")}
    history = read_history(run) if document["kind"] == "run" else []
    write_report(folder / "report.html", plain(document), history, examples)
    text = json.dumps(shown(document), indent=2, ensure_ascii=False, allow_nan=False)
    write_file(folder / "audit.json", text + "\n")
