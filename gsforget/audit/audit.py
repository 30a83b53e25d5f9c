"""One audit from case to document: the tiers, what they need, and what they say when they cannot have it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget import __version__
from gsforget.audit import checks, outputs
from gsforget.audit.case import Case
from gsforget.audit.checks import Check, Limits
from gsforget.audit.images import PER_CLASS
from gsforget.audit.measure import Evidence, measure
from gsforget.data import Split, content_sha256, listed, manifest_sha256
from gsforget.folder import WEIGHTS, sha256
from gsforget.metrics import of_classes

if TYPE_CHECKING:
    from gsforget.audit.measure import View

Say = Callable[[str], None]
LATER = {
    "quick": "a fresh linear probe, CKA per block, relearning and the way back to the original: --tier standard, --tier full",
    "standard": "relearning with all weights, and whether training on retained images alone brings the classes back: --tier full",
}
NO_WEIGHTS = (
    "relearning with all weights, CKA and the way back to the original: they need weights; audit the run folder as well"
)
NEVER = (
    "attacks with shadow models (LiRA, U-LiRA), reconstruction of images from the weights, adversarial inputs, and what other "
    "copies, caches and back-ups of model and images still hold"
)


def audit(case: Case, say: Say = lambda _text: None) -> tuple[dict[str, Any], Evidence]:
    """Measure a case and judge it.

    Args:
        say: told, in a few words, what is being done.

    Returns:
        The document of audit.json, and all answers behind it.

    Raises:
        RequestError: images or models that do not fit, such as a reference that knows the forgotten classes.
    """
    start = time.perf_counter()
    limits = Limits(max_probe_excess=case.ask.max_probe_excess)
    say("hashing the images")
    data, notes = describe_data(case)
    e = measure(case, say)
    say("judging")
    views = e.views()
    made, details = _quick(e, views, limits)
    if case.ask.tier != "quick":
        more, extra = _standard(e, views, limits, say)
        made, details = [*made, *more], {**details, **extra}
    if case.ask.tier == "full" and case.side.subject.module is not None:
        from gsforget.audit.deep import full_checks

        more, curves = full_checks(e, limits, say)
        made = [*made, *more]
        details["relearning"] = {**details.get("relearning", {}), **curves}
    return _document(e, made, details, data, [*case.notes, *e.notes, *notes], time.perf_counter() - start), e


def _quick(e: Evidence, views: dict[str, View | None], limits: Limits) -> tuple[list[Check], dict[str, Any]]:
    member, details = outputs.membership_check(e)
    made = [
        *outputs.accuracy_checks(e, limits),
        *outputs.attack_checks(e, views, _why_no_features(e)),
        member,
    ]
    found = {"membership": details, **outputs.answer_details(e), **outputs.feature_details(e, views)}
    if _weights(e):
        from gsforget.audit.deep import changed

        found["changed"] = changed(e)
    return made, found


def _standard(
    e: Evidence, views: dict[str, View | None], limits: Limits, say: Say
) -> tuple[list[Check], dict[str, Any]]:
    from gsforget.audit import deep

    details: dict[str, Any] = {}
    if views["subject"] is None:
        made = [checks.unknown("linear_probe_excess", "ratio", _why_no_features(e), limits.max_probe_excess)]
    else:
        say("training linear probes")
        found = outputs.attacks(views, outputs.linear_probe, e)
        assert found["subject"] is not None
        made = [checks.probe(found["subject"], found["original"], found["reference"], limits)]
        details["linear_probe"] = outputs.named(found)
        say("relearning: head")
        details["relearning"] = {"head": deep.curves_json(deep.head_curves(views, e.case.ask.seed))}
    if _weights(e):
        say("comparing blocks with the original")
        details["cka"] = deep.block_similarity(e)
        say("walking from the original to the model")
        details["interpolation"] = deep.interpolation(e)
    return made, details


def _weights(e: Evidence) -> bool:
    """Whether both models' weights are at hand and comparable."""
    if e.original is None or e.subject.side.subject.module is None:
        return False
    from gsforget.audit.deep import same_architecture

    return same_architecture(e)


def _why_no_features(e: Evidence) -> str:
    return (
        e.subject.side.subject.why_no_features
        or "the forgotten classes lack training or test images, and an attack needs both"
    )


def _not_tested(e: Evidence) -> list[str]:
    """What this tier, on what was at hand, could not look at."""
    case, subject = e.case, e.subject.side.subject
    said = []
    if subject.module is None:
        if case.ask.tier == "quick" and not subject.why_no_features:
            said.append("a fresh linear probe: --tier standard")
        said.append(NO_WEIGHTS)
    elif case.ask.tier in LATER:
        said.append(LATER[case.ask.tier])
    if subject.why_no_features:
        hint = "; export it with gsforget export --onnx --with-features" if case.kind == "onnx" else ""
        said.append(f"the features: {subject.why_no_features}, so probes and five-shot attacks were left out{hint}")
    if subject.module is not None and case.ask.tier != "quick" and e.original is not None and not _weights(e):
        said.append("CKA, interpolation and changed blocks: original and model do not have the same tensors")
    if case.ask.never_seen and e.never_seen is not None:
        which = "the original" if e.base is e.original else "the audited model"
        said.append(
            f"a model trained without the forgotten classes: {listed(list(case.ask.never_seen))} stand for classes never seen, "
            f"as {which} sees them; whether they are as hard to tell apart as the forgotten ones is not known"
        )
    return [*said, NEVER]


def describe_data(case: Case) -> tuple[dict[str, Any], list[str]]:
    """The data's hashes, and sentences on images that stand on both sides."""
    images = case.images
    notes: list[str] = []
    hashes = {"train": content_sha256(images.all_train.paths), "test": content_sha256(images.test.paths)}
    splits = {"train": images.all_train, "test": images.test}
    gone = [*case.forget, *case.old]
    both = sorted(_of(splits, hashes, gone) & _of(splits, hashes, case.retained))
    if both:
        notes.append(
            f"{len(both)} image(s) lie both under a forgotten and under a retained class, byte for byte: no model can forget and "
            "keep them, and they count on both sides of every figure"
        )
    leaked = set(hashes["train"]) & {h for h, k in zip(hashes["test"], images.test.labels) if k in gone}
    if leaked:
        notes.append(
            f"{len(leaked)} test image(s) of forgotten classes are training images as well: what is measured on them is not new"
        )
    return {
        "root": str(images.root),
        "train_sha256": manifest_sha256(images.all_train, hashes["train"]) if len(images.all_train) else None,
        "test_sha256": manifest_sha256(images.test, hashes["test"]) if len(images.test) else None,
        "per_class": PER_CLASS,
    }, notes


def _of(splits: dict[str, Split], hashes: dict[str, list[str]], classes: Sequence[int]) -> set[str]:
    return {
        h
        for name, split in splits.items()
        for h, wanted in zip(hashes[name], of_classes(split.labels, classes), strict=True)
        if wanted
    }


def _document(
    e: Evidence, made: list[Check], details: dict[str, Any], data: dict[str, Any], notes: list[str], seconds: float
) -> dict[str, Any]:
    case = e.case
    of_run = case.run / WEIGHTS if case.run else None
    hashes: dict[str, Any] = {}
    if case.kind in ("onnx", "engine"):
        hashes["artifact"] = case.side.sha256
        hashes["model"] = sha256(of_run) if of_run and of_run.is_file() else None
    else:
        hashes["model"] = case.side.sha256
    for name, side in (("original", case.original), ("reference", case.reference)):
        hashes[name] = side.sha256 if side else None
    details["images"] = {
        "per_class": PER_CLASS,
        "train": len(e.subject.train.labels),
        "test": len(e.subject.test.labels),
        "says": f"Features are taken from at most {PER_CLASS} images per class and split, chosen by the seed; accuracies on the "
        "test images from all of them.",
    }
    return {
        "gsforget": __version__,
        "tier": case.ask.tier,
        "kind": case.kind,
        "subject": str(case.side.path),
        "original": str(case.original.path) if case.original else None,
        "reference": _reference(case),
        "sha256": hashes,
        "sequence": case.sequence,
        "data": data,
        "seed": case.ask.seed,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(seconds, 2),
        "versions": versions(),
        "device": str(case.device),
        "classes": outputs.class_rows(e),
        "audited": case.audited,
        "checks": [c.to_json() for c in made],
        "details": details,
        "not_tested": [*notes, *_not_tested(e)],
        "verdict": checks.overall(made),
    }


def _reference(case: Case) -> dict[str, Any] | None:
    if case.reference:
        return {"kind": "model", "path": str(case.reference.path)}
    if case.ask.never_seen:
        seen_by = case.original or case.side
        return {"kind": "classes", "classes": list(case.ask.never_seen), "path": str(seen_by.path)}
    return None


def versions() -> dict[str, str]:
    """Of Python and the libraries that compute."""
    from importlib import metadata

    found = {"python": platform.python_version(), "numpy": np.__version__}
    for tool in ("torch", "timm", "scikit-learn"):
        found[tool] = metadata.version(tool)
    return found
