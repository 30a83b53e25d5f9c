"""The page: its frame, its sections in the order in which they are read, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from gsforget.folder import write_file
from gsforget.report import details, detections, faces, facts, pictures, tables, verdict
from gsforget.report.markup import Html, moment, plural, tag
from gsforget.report.pictures import Example
from gsforget.report.privacy import clean, mask_name

# Nothing may be loaded and no script may run, whatever a class name or a sentence of the audit holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    path: Path, audit: dict[str, Any], history: list[dict[str, Any]], examples: list[Example] | None = None
) -> None:
    """Write the evidence as one self-contained HTML page: no script, nothing loaded, readable offline and on paper.

    Erased classes appear as forgotten-N and paths without the folders above them, whatever the arguments hold.

    Args:
        path: of the page; its folder must exist.
        audit: the document of `gsforget audit`; absent or null parts are said to be not measured, with the reason.
        history: the requests behind the model, oldest first, see `read_history`; may be empty.
        examples: test images to show, with old and new answers; None shows no image of the data.

    Raises:
        RequestError: ``bad_image``: an example that cannot be read.
    """
    write_file(path, render(audit, history, examples))


def render(audit: dict[str, Any], history: list[dict[str, Any]], examples: Sequence[Example] | None = None) -> str:
    """The page as text; arguments as for `write_report`."""
    shown = [
        replace(e, before=mask_name(audit, e.before) or "", after=mask_name(audit, e.after) or "")
        for e in examples or []
    ]
    audit, history = clean(audit, history)
    title = f"Evidence of forgetting: {audit.get('subject') or 'model'}"
    sections = list(_sections(audit, history, shown))
    links = tag("ol", *(tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections))
    body = [
        tag("section", tag("h2", name, id=key), content, aria_labelledby=key, class_=f"part part-{key}")
        for key, name, content in sections
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(resources.files("gsforget.report").joinpath("style.css").read_text(encoding="utf-8"))),
    )
    top = tag("header", tag("h1", "Evidence of forgetting"), tag("p", _subtitle(audit), class_="subtitle"))
    contents = tag("nav", tag("h2", "On this page"), links, aria_label="Contents")
    foot = tag(
        "footer", tag("p", f"Written by gsforget {audit.get('gsforget') or ''}. The same facts are in audit.json.")
    )
    main = tag("main", body[0], contents, *body[1:])
    return f"<!doctype html>\n{tag('html', head, tag('body', top, main, foot), lang='en')}\n"


def _subtitle(audit: dict[str, Any]) -> str:
    kinds = {"run": "run folder", "model": "model folder", "onnx": "ONNX file", "engine": "TensorRT engine"}
    kind = kinds.get(str(audit.get("kind")), "model")
    behind = audit.get("sequence")
    chain = f", {plural(behind, 'request')} so far" if isinstance(behind, int) and behind else ""
    day = f" of {moment(audit['time'])[:10]}" if audit.get("time") else ""
    return (
        f"{kind[0].upper()}{kind[1:]} {audit.get('subject') or ''}{chain}; {audit.get('tier') or 'unnamed'} audit{day}"
    )


def _sections(
    audit: dict[str, Any], history: list[dict[str, Any]], shown: Sequence[Example]
) -> list[tuple[str, str, Html]]:
    """(anchor, title, content) in reading order."""
    if audit.get("task") == "face":
        return _of_faces(audit, history)
    if audit.get("task") == "detect":
        return _of_detectors(audit, history, shown)
    made = [
        ("verdict", "Verdict", verdict.section(audit, history)),
        ("before-and-after", "Before and after", tables.before_and_after(audit)),
        ("checks", "The checks", tables.checks(audit)),
        ("requests", "Requests, and where the model changed", details.requests(history)),
        ("features", "What the features show", details.feature_map(audit)),
        ("relearning", "How easily it is learned again", details.relearning(audit)),
        ("layers", "Likeness to the original, block by block", details.layers(audit)),
        ("interpolation", "On the way back to the original", details.interpolation(audit)),
        ("misattribution", "What it answers instead", details.misattribution(audit)),
        ("examples", "Example images", pictures.section(shown)),
        *_limits(audit, history),
        ("every-class", "Every class", tables.every_class(audit) if tables.is_long(audit) else Html()),
        ("glossary", "Glossary", facts.glossary()),
    ]
    left_out = {"examples": not shown, "every-class": not tables.is_long(audit)}
    return [section for section in made if not left_out.get(section[0])]


def _limits(audit: dict[str, Any], history: list[dict[str, Any]]) -> list[tuple[str, str, Html]]:
    """What every page says of its own limits."""
    return [
        ("not-tested", "What was not tested", facts.not_tested(audit)),
        ("threats", "Threat model and limits", facts.threat_model(audit)),
        ("provenance", "Hashes, versions, seeds and settings", facts.provenance(audit, history)),
    ]


def _of_faces(audit: dict[str, Any], history: list[dict[str, Any]]) -> list[tuple[str, str, Html]]:
    """Sections of a face model, whose answers are embeddings."""
    made = [
        ("verdict", "Verdict", verdict.section(audit, history)),
        ("verification", "Does the person still verify?", faces.verification(audit)),
        ("misattribution", "Whom a forgotten person is taken for", faces.mistaken(audit)),
        ("gallery", "Galleries and templates", faces.gallery()),
        ("checks", "The checks", tables.checks(audit)),
        ("before-and-after", "The training head, before and after", tables.before_and_after(audit)),
        ("requests", "Requests, and where the model changed", details.requests(history)),
        *_limits(audit, history),
        ("every-class", "Every person", tables.every_class(audit) if tables.is_long(audit) else Html()),
        ("glossary", "Glossary", facts.glossary()),
    ]
    return [section for section in made if section[0] != "every-class" or tables.is_long(audit)]


def _of_detectors(
    audit: dict[str, Any], history: list[dict[str, Any]], shown: Sequence[Example]
) -> list[tuple[str, str, Html]]:
    """Sections of a detector, whose answers are boxes."""
    made = [
        ("verdict", "Verdict", verdict.section(audit, history)),
        ("average-precision", "What is still found", detections.average_precision(audit)),
        ("every-query", "What the top of the list hides", detections.every_query(audit)),
        ("checks", "The checks", tables.checks(audit)),
        ("relearning", "How easily it is learned again", details.relearning(audit)),
        ("examples", "Boxes before and after", pictures.section(shown)),
        ("requests", "Requests, and where the model changed", details.requests(history)),
        *_limits(audit, history),
        ("glossary", "Glossary", facts.glossary()),
    ]
    return [section for section in made if section[0] != "examples" or shown]
