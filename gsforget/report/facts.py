"""What was not tested, who could still do what, where every figure comes from, and what the words mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gsforget.report.markup import Html, listed, moment, number, plural, table, tag

THREATS = (
    (
        "asks questions",
        "Sends images and reads answers (a user of the product, an interface on the network).",
        ("answers", "membership"),
        "Adversarial images made to bring an answer back; a very large number of questions.",
    ),
    (
        "reads features",
        "Gets the numbers behind the answers, as a search index or a face gallery does.",
        ("features",),
        "Every possible attack on features: the checks are the common ones, not all.",
    ),
    (
        "holds the weights",
        "Has the model file and a few images of the forgotten classes, and trains on.",
        ("recovery", "features"),
        "Long training with much data: that can teach any model any class, forgotten or new.",
    ),
    (
        "holds old files",
        "Has the original model, an earlier run, its factors, a patch or a backup.",
        (),
        "Nothing protects against this but removing those files: gsforget purge names the ones it can reach.",
    ),
)
LIMITS = (
    "This is approximate erasure: the weights were changed until tests no longer found the classes. It is not a proof of "
    "deletion, and it is not the same as a model that was trained again without the data.",
    "A model that never saw a class can still tell it apart to some degree, because it learned to see. “Gone” therefore means "
    "“no better than never seen”, not “zero”.",
    "Early blocks that were not changed are bit for bit those of the original. They hold general vision, and whatever the "
    "original model held there.",
    "If the original was pre-trained on other data, what that data taught is not covered by any figure here.",
)
ALSO = (
    "the images themselves, in the training data, in caches and in copies of the data set;",
    "galleries, search indexes and enrolment templates with features of these classes or people;",
    "backups and snapshots of the data and of the models;",
    "older checkpoints, the original model, earlier runs (gsforget purge --chain), and patches already sent;",
    "exported files of the un-erased model on devices: see which model each device runs.",
)
GLOSSARY = (
    ("Class", "One of the things, or people, that the model can name."),
    (
        "Retained, forgotten",
        "A retained class should be recognised as before; a forgotten one no longer. Its name is replaced "
        "by forgotten-N here; the number is its place in the model.",
    ),
    (
        "Features",
        "The numbers that a model computes from an image just before it answers. Two images that look alike to the "
        "model have similar features.",
    ),
    ("Original", "The model before the forgetting."),
    (
        "Never seen",
        "A model trained without these classes, or classes that the model was never shown: the yardstick for “gone”.",
    ),
    (
        "Probe, probe excess",
        "A small new classifier trained on the features, to see what they still hold. Excess 0: no more than "
        "in features that never saw the class; 1: as much as in the original.",
    ),
    (
        "Prototype attack",
        "Five images of a class are averaged into a new entry in the last layer, without any training.",
    ),
    ("Relearning", "Training the model on the forgotten classes again and counting the steps until it knows them."),
    (
        "Membership inference",
        "Guessing from the answers whether an image was used in training. AUC 0.5 is guessing, 1 is certainty.",
    ),
    ("95 % interval", "With so many test images, the true figure lies in this range in 95 of 100 such measurements."),
    ("Inconclusive", "The data or the comparison does not allow a yes or a no."),
)


FILES = {
    "model": "The model",
    "artifact": "The audited file",
    "original": "The original model",
    "reference": "The model that never saw the classes",
}
ORIGIN = {"id": "Request id", "date": "Date of the request", "basis": "Basis of the request"}


def not_tested(audit: dict[str, Any]) -> Html:
    """The audit's own list, in full."""
    missing = audit.get("not_tested") or []
    if not missing:
        return tag(
            "p",
            "Everything that this tier can measure was measured. What no test can show stands under the threat model.",
        )
    return tag("ul", *(tag("li", sentence) for sentence in missing))


def threat_model(audit: dict[str, Any]) -> Html:
    """Who can do what, which checks speak to it, and what approximate erasure cannot promise."""
    from gsforget.report.verdict import strands

    found = strands(audit)
    rows = []
    for who, what, names, beyond in THREATS:
        count = sum(len(found[n].checks) for n in names)
        covered = f"{plural(count, 'check')} above" if count else "no check in this audit"
        rows.append([f"Somebody who {who}", what, covered, beyond])
    columns = ("Who", "What they can do", "Tested by", "Not covered")
    return tag(
        "div",
        table("Who could try to bring a forgotten class back", columns, rows),
        tag("h3", "What this cannot promise"),
        tag("ul", *(tag("li", sentence) for sentence in LIMITS)),
        tag("h3", "What else has to be deleted"),
        tag("ul", *(tag("li", sentence) for sentence in ALSO)),
    )


def provenance(audit: dict[str, Any], history: Sequence[dict[str, Any]]) -> Html:
    """Files, hashes, data, versions, seeds and thresholds."""
    data = audit.get("data") or {}
    facts = [
        ("When (UTC)", moment(audit.get("time"))),
        ("Audited", f"{audit.get('subject') or '–'} ({audit.get('kind') or '–'})"),
        ("Original", audit.get("original")),
        ("Never seen", _reference(audit.get("reference"))),
        ("Tier", audit.get("tier")),
        ("Erasures in this model", audit.get("sequence")),
        ("Device", audit.get("device")),
        ("Time taken", f"{number(audit.get('seconds'), digits=1)} s" if audit.get("seconds") is not None else None),
        ("Seed of the audit", audit.get("seed")),
        ("gsforget", audit.get("gsforget")),
        *((f"Version of {k}", v) for k, v in (audit.get("versions") or {}).items()),
        ("Data folder", data.get("root")),
    ]
    rows = [[k, "–" if v is None else v] for k, v in facts]
    made = [table("The audit", ("What", "Value"), rows)]
    hashes = [[FILES.get(k, k), _code(v)] for k, v in (audit.get("sha256") or {}).items() if v]
    hashes += [
        [f"Data list: {w}", _code(data[k])]
        for k, w in (("train_sha256", "train"), ("test_sha256", "test"))
        if data.get(k)
    ]
    if hashes:
        made.append(table("SHA-256: two files with the same hash are the same file", ("File", "SHA-256"), hashes))
    made += [_of_request(r) for r in history]
    return tag("div", *made)


def _reference(reference: Any) -> str | None:
    """What stood for never seen: a model, or classes as a model saw them."""
    if not isinstance(reference, dict):
        return None
    if reference.get("kind") == "classes":
        return (
            f"the classes {listed(reference.get('classes') or [])}, as {reference.get('path') or 'a model'} sees them"
        )
    return f"{reference.get('path') or 'a model'}, trained without the classes"


def _of_request(request: dict[str, Any]) -> Html:
    rows: list[list[object]] = [[title, value] for title, value in _origin(request)]
    rows.append(["Seed", "–" if request.get("seed") is None else request["seed"]])
    rows.append(["Device", request.get("device") or "–"])
    for title, key in (("Threshold", "thresholds"), ("Chosen", "chosen"), ("Version of", "versions")):
        rows += [[f"{title} {_words(k)}", _plain(v)] for k, v in (request.get(key) or {}).items() if v is not None]
    for gate in request.get("gates") or []:
        held = "held" if gate.get("passed") else "breached"
        rows.append(
            [
                f"Gate {_words(gate.get('name', ''))}",
                f"{number(gate.get('value'))}, limit {_plain(gate.get('threshold'))}: {held}",
            ]
        )
    rows += [[f"SHA-256 of {k}", _code(v)] for k, v in (request.get("sha256") or {}).items() if v]
    rows += [[f"SHA-256 of data list {k}", _code(v)] for k, v in (request.get("data_sha256") or {}).items() if v]
    title = f"Request {request.get('sequence')}"
    return tag("details", tag("summary", f"{title}: settings and hashes"), table(title, ("What", "Value"), rows))


def _origin(request: dict[str, Any]) -> list[tuple[str, object]]:
    origin = request.get("origin") or {}
    return [(title, origin[key]) for key, title in ORIGIN.items() if origin.get(key)]


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(k)} {_plain(v)}" for k, v in value.items())
    return (", ".join(map(_plain, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def _code(value: Any) -> Html:
    return tag("code", value)


def glossary() -> Html:
    """What the words on this page mean."""
    return tag("dl", *(part for word, meaning in GLOSSARY for part in (tag("dt", word), tag("dd", meaning))))
