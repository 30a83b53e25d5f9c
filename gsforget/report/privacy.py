"""What leaves the workstation in a report: erased classes as forgotten-N, paths without the folders above them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROSE = ("says", "not_tested", "note", "reason", "hint", "message", "warnings")
NAMES = ("name", "class", "person", "taken_for")
PATHS = ("subject", "original")
PLACES = (("data", "root"), ("reference", "path"))
# An absolute path of POSIX or Windows, not preceded by something that makes it part of a word or an address.
ABSOLUTE = re.compile(r"(?<![\w.:/\\…])(?:/|~/|[A-Za-z]:[\\/])(?:[^\s/\\:;,'\"<>()]+[/\\])+([^\s/\\:;,'\"<>()]*)")


def shorten(text: str) -> str:
    """Absolute paths in a text as ``…/last``, or relative to the working folder where they lie in it."""
    here = f"{Path.cwd().as_posix()}/"
    if here != "//":
        text = text.replace(here, "")
    return ABSOLUTE.sub(lambda match: f"…/{_last(match[0])}", text)


def shorten_path(path: str | None) -> str | None:
    """One path, which may hold spaces: relative to the working folder where it lies in it, else only its last part."""
    if not path:
        return None
    here = Path.cwd()
    given = Path(path)
    if given.is_absolute() and given.is_relative_to(here):
        return str(given.relative_to(here))
    absolute = given.is_absolute() or re.match(r"[A-Za-z]:[\\/]|~|\\\\", path) or ".." in given.parts
    return f"…/{_last(path)}" if absolute else path


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def clean(audit: dict[str, Any], history: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Copies in which no erased class has its name, and no path says where on the machine something lies."""
    audit, history = copy.deepcopy(audit), copy.deepcopy(history)
    erased = _rename(audit)
    for key in PATHS:
        if audit.get(key):
            audit[key] = shorten_path(str(audit[key]))
    for key, inner in PLACES:
        place = audit.get(key)
        if isinstance(place, dict) and place.get(inner):
            place[inner] = shorten_path(str(place[inner]))
    mask = _masker(erased)
    audit = {k: v if k in (*PATHS, "data", "reference") else _walk(v, k, mask, erased) for k, v in audit.items()}
    return audit, [_walk(request, "", mask, erased) for request in history]


def mask_names(audit: dict[str, Any]) -> dict[str, Any]:
    """A copy of an audit in which no erased class has its name; paths stay as they are."""
    audit = copy.deepcopy(audit)
    erased = _rename(audit)
    mask = _masker(erased)
    kept = (*PATHS, "data", "reference", "artifacts")
    return {k: v if k in kept else _walk(v, k, mask, erased, short=False) for k, v in audit.items()}


def _rename(audit: dict[str, Any]) -> dict[str, str]:
    """Name the erased classes of an audit anew, in place; returns the new names by the old ones."""
    erased: dict[str, str] = {}
    for entry in audit.get("classes") or []:
        if entry.get("role") in ("forget", "old"):
            alias = f"forgotten-{entry.get('index')}"
            erased[str(entry.get("name"))] = alias
            entry["name"] = alias
    return erased


def mask_name(audit: dict[str, Any], name: str | None) -> str | None:
    """A class name as the report may show it, by the audit as it was before `clean`."""
    for entry in audit.get("classes") or []:
        if entry.get("name") == name and entry.get("role") in ("forget", "old"):
            return f"forgotten-{entry.get('index')}"
    return name


def _masker(erased: dict[str, str]) -> Callable[[str], str]:
    erased = {name: alias for name, alias in erased.items() if name and name != alias}
    if not erased:
        return lambda text: text
    longest = sorted(erased, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")
    return lambda text: pattern.sub(lambda match: erased[match[0]], text)


def _walk(value: Any, key: str, mask: Callable[[str], str], erased: dict[str, str], short: bool = True) -> Any:
    if isinstance(value, dict):
        return {k: _walk(v, str(k), mask, erased, short) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(v, key, mask, erased, short) for v in value]
    if not isinstance(value, str):
        return value
    if key in NAMES or key == "classes":
        return erased.get(value, value)
    masked = mask(value) if key in PROSE else value
    return shorten(masked) if short else masked
