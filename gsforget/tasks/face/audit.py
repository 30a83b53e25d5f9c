"""The audit of an embedding model: open-set figures of model and original, next to people whom neither saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.audit.checks import UNCOMPARED, Check, of_gate, unknown
from gsforget.audit.folder import FolderAudit
from gsforget.data import ImageFolder, Split, manifest_sha256
from gsforget.gates import evaluate_gates
from gsforget.images import ImageSet
from gsforget.metrics import per_class
from gsforget.predict import pick_device
from gsforget.request import refuse
from gsforget.source import Source, load_source
from gsforget.tasks.face.data import open_data, stranger_images, strangers
from gsforget.tasks.face.evidence import FACES, GALLERY, FaceFigures, OpenSet, People, open_set

if TYPE_CHECKING:
    from gsforget.audit.case import Ask, Devices

BATCH = 256
NOBODY = "From this model nobody was forgotten by gsforget.", "Say whom it should not know: --classes A,B."
NOT_TESTED = (
    "attacks with the weights: relearning, probes on inner layers, reconstruction of faces, adversarial inputs, and what "
    "copies, caches and back-ups of model and images still hold"
)


def audit(ask: Ask, devices: Devices, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a run or model folder of the task face, judge it, and write audit.json and report.html.

    Returns:
        The document as `gsforget audit` has it, erased people under their own names; `shown` hides them.

    Raises:
        RequestError: arguments or data do not fit; ``face_reference``; ``faces_need_a_folder`` for an exported file.
    """
    assert ask.target is not None
    refuse(
        {"--reference": ask.reference},
        "{} is about classifiers and detectors; people are compared with people whom the model never saw.",
        "Leave out {}; give --never-seen A,B.",
        "face_reference",
    )
    case = FolderAudit(ask, load_source(str(ask.target), trust_code=ask.trust_code), NOBODY)
    subject, forget, old, retained = case.subject, case.forget, case.old, case.retained
    data = open_data(ask.data, subject.names, list(subject.erased.values()), ask.never_seen, ask.annotations)
    strange = strangers(data, subject.names, ask.never_seen)
    say("embedding the test images")
    sides = [_embedded(s, data, strange, ask, devices) for s in case.sides]
    names = [*subject.names, *strange]
    new = list(range(len(subject.names), len(names)))
    groups = {"forget": forget, "retain": retained, "old": old, "never_seen": new}
    say("comparing pairs")
    found = [open_set(People(e, ids, groups)) for e, ids, _ in sides]
    figures = FaceFigures(found[-1], found[0], names)
    made = _checks(figures, sides, groups, case.original is not None)
    document = case.document(
        made,
        task="face",
        reference={"kind": "classes", "classes": strange, "path": str(ask.target)} if new else None,
        data={
            "root": str(data.root),
            "train_sha256": None,
            "test_sha256": manifest_sha256(data.test, data.test_sha256),
        },
        classes=_classes(sides, subject.names, groups),
        details={"face": figures.to_json()},
        not_tested=[FACES, *figures.not_tested()[1:], GALLERY, NOT_TESTED],
    )
    case.write(document, out)
    return document


def _embedded(
    source: Source, data: ImageFolder, strange: list[str], ask: Ask, devices: Devices
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [N, d] of the test images and of never-seen people, whose they are, and whom the head names."""
    load = devices.loader(source.config.to_json())
    new = stranger_images(data, strange, len(source.names))
    both = Split([*data.test.paths, *new.paths], np.concatenate([data.test.labels, new.labels]))
    images = ImageSet(both, load, ask.skip_corrupt)
    images.check()
    device = pick_device(ask.device)
    model: Any = source.model.to(device).eval()
    with torch.inference_mode():
        pieces = [model(images.batch(rows).to(device)).float() for rows in torch.arange(len(images)).split(BATCH)]
        embeddings = torch.cat(pieces)
        said = model.loss.cosines(embeddings).argmax(1).cpu().numpy()
    return embeddings.cpu().numpy(), images.labels.numpy(), said


def _checks(figures: FaceFigures, sides: list[Any], groups: dict[str, list[int]], compared: bool) -> list[Check]:
    """Answers of the head, then the figures of the embeddings."""
    made = []
    known = [np.isin(ids, [*groups["forget"], *groups["old"], *groups["retain"]]) for _, ids, _ in sides]
    right = [(said == ids)[k] for (_, ids, said), k in zip(sides, known, strict=True)]
    labels = sides[0][1][known[0]]
    for gate in evaluate_gates(right[-1], right[0], labels, groups["forget"], groups["retain"], groups["old"]):
        if gate.name == "forget_acc" or gate.name == "old_acc" or compared:
            unit, before = "%" if gate.name.endswith("acc") else "points", None
            if compared and unit == "%":
                group = groups["forget" if gate.name == "forget_acc" else "old"]
                before = 100 * float(right[-1][np.isin(labels, group)].mean())
            made.append(of_gate(gate, unit, SAYS[gate.name], before))
    for gate in figures.gates(1.0):
        if gate.name != "retain_tar_drop" or compared:
            before, after, never = (_tar(side, group) for side, group in _figures(figures, gate.name))
            said = SAYS[gate.name].format(after=after, before=before, never=never)
            made.append(of_gate(gate, "points", said, None, None))
    if not groups["never_seen"]:
        made.append(unknown("forget_tar", "points", UNCOMPARED))
    return made


SAYS = {
    "forget_acc": "Of forgotten people's images, so many are named rightly by the head that the training used",
    "old_acc": "The same for people forgotten earlier",
    "retain_drop": "Retained people's images that the head named rightly before and does not now",
    "class_drop": "The same for the retained person who lost most",
    "old_tar": "The same for people forgotten earlier: {after:.1f} % of pairs (before: {before:.1f} %), and {never:.1f} %",
    "forget_tar": "Two images of a forgotten person verify in {after:.1f} % of pairs (before: {before:.1f} %), of a "
    "never-seen person in {never:.1f} %; the figure is the difference",
    "retain_tar_drop": "Pairs of retained people that verified before and do not now: {before:.1f} % before, {after:.1f} % after",
    "misattribution": "How much oftener the worst forgotten person is taken for one retained person than the worst "
    "never-seen one; the bound compares their 95 % intervals",
}


def _figures(figures: FaceFigures, gate: str) -> list[tuple[OpenSet, str]]:
    group = {"retain_tar_drop": "retain", "old_tar": "old"}.get(gate, "forget")
    return [(figures.before, group), (figures.after, group), (figures.after, "never_seen")]


def _tar(side: OpenSet, group: str) -> float:
    rate = side.tar[group]
    return rate.percent or 0.0 if rate else float("nan")


def _classes(sides: list[Any], names: list[str], groups: dict[str, list[int]]) -> list[dict[str, Any]]:
    role = {k: group for group in ("retain", "forget", "old") for k in groups[group]}
    counted = []
    for _, ids, said in sides:
        mine = ids < len(names)
        counted.append(per_class(said[mine] == ids[mine], ids[mine], len(names)))
    after, before = counted[0], counted[1] if len(counted) > 1 else None
    return [
        {
            "index": k,
            "name": names[k],
            "role": role[k],
            "before": before[k].to_json() if before and before[k].count else None,
            "after": after[k].to_json() if after[k].count else None,
        }
        for k in range(len(names))
    ]
