"""Request files: one request or several in order, as YAML or JSON; every field is checked before anything else is done.

requests:
  - id: 2026-11-001
    date: 2026-11-24
    requester: pseudonym-17
    basis: "GDPR Art. 17"
    classes: [sandal, 7]
    max_retain_drop: 1.0
  - images: list.txt
"""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsforget.request import Request
from gsforget.requests.images import ImageList, read_image_list
from gsforget.requests.parse import HINT, bad, parse

WORDS = ("id", "date", "requester", "basis")
SETTINGS = {"rank": int, "epochs": float, "lr": float, "batch_size": int, "bnd": float, "prox": float}
SETTINGS |= {"target_groups": int, "seed": int}
GATES = ("max_forget_acc", "max_retain_drop", "max_class_drop", "max_probe_excess")
KEYS = (*WORDS, "classes", "images", "sample_mode", "retain", "shots", "method", *SETTINGS, *GATES)


@dataclass(frozen=True)
class Entry:
    """One request of a file.

    Attributes:
        where: how messages name it: file, number and id.
        label: number and id alone.
        classes: names or indices to forget; empty where `images` lists them.
        retain: names or indices that no request of the file may forget.
        origin: id, date, requester and basis, as text.
        settings, thresholds, options: what it changes of the command line's Settings, Thresholds and Request.
    """

    where: str
    label: str
    classes: list[str]
    images: ImageList | None
    retain: list[str]
    origin: dict[str, str]
    settings: dict[str, Any]
    thresholds: dict[str, Any]
    options: dict[str, Any]

    def request(self, base: Request) -> Request:
        """The request, with what the entry leaves open taken from `base`."""
        settings = self.settings
        for gate, divisor in (("max_forget_acc", 1), ("max_retain_drop", 2)):  # what training itself aims at
            if gate in self.thresholds:
                settings = {**settings, gate: self.thresholds[gate] / divisor}
        return replace(
            base,
            classes=self.classes,
            images=self.images,
            origin=self.origin,
            settings=replace(base.settings, **settings),
            thresholds=replace(base.thresholds, **self.thresholds),
            **self.options,
        )


def read_requests(path: Path) -> list[Entry]:
    """The requests of a file, in order.

    Raises RequestError ``bad_request_file`` naming file, entry and field, or ``bad_image_list``.
    """
    raw = parse(path)
    if isinstance(raw, dict) and "requests" in raw:
        others = sorted(str(key) for key in raw if key != "requests")
        if others:
            raise bad(
                str(path), f"beside 'requests' there is '{others[0]}'", "Put each field into the entry it belongs to."
            )
        raw = raw["requests"]
    entries = raw if isinstance(raw, list) else [raw]
    if not entries or entries == [None]:
        raise bad(str(path), "it holds no request", HINT)
    read = [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]
    first: dict[str, str] = {}
    for entry in read:
        name = entry.origin.get("id")
        if name in first:
            raise bad(entry.where, f"the id is that of {first[name]}", "Give each request an id of its own.")
        if name is not None:
            first[name] = entry.label
    return read


def _entry(path: Path, number: int, raw: Any) -> Entry:
    where = f"{path}, entry {number}"
    if not isinstance(raw, dict):
        raise bad(where, f"it is {_kind(raw)}, not a mapping of fields", HINT)
    unknown = [key for key in raw if key not in KEYS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]).lower().replace("-", "_"), KEYS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The fields are {', '.join(KEYS)}."
        raise bad(where, f"there is no field {unknown[0]!r}", hint)
    given = {key: value for key, value in raw.items() if value is not None}
    empty = [key for key, value in raw.items() if value is None]
    if empty:
        raise bad(where, f"{empty[0]} has no value", "Give it one, or remove the line.")
    origin = {key: _word(where, key, given[key]) for key in WORDS if key in given}
    label = f"entry {number}" + (f" ({origin['id']})" if "id" in origin else "")
    where = f"{path}, {label}"
    if ("classes" in given) == ("images" in given):
        both = "both classes and images are given" if "classes" in given else "neither classes nor images are given"
        raise bad(where, both, "Give one of them, such as classes: [sandal, 7].")
    single = given.get("sample_mode", False)
    if not isinstance(single, bool) or (single and "images" not in given):
        what = "sample_mode is given without images" if single is True else f"sample_mode is {_kind(single)}"
        raise bad(where, what, "Write sample_mode: true beside images, to forget single images of retained classes.")
    return Entry(
        where,
        label,
        _names(where, "classes", given["classes"]) if "classes" in given else [],
        _images(path, where, given["images"]) if "images" in given else None,
        _names(where, "retain", given["retain"]) if "retain" in given else [],
        origin,
        {key: _number(where, key, given[key], kind) for key, kind in SETTINGS.items() if key in given},
        {key: _number(where, key, given[key], float) for key in GATES if key in given},
        ({"shots": _number(where, "shots", given["shots"], int)} if "shots" in given else {})
        | {"sample_mode": single}
        | ({"method": _text(where, "method", given["method"])} if "method" in given else {}),
    )


def _word(where: str, key: str, value: Any) -> str:
    if key == "date":
        return _date(where, value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(where, key, value)


def _date(where: str, value: Any) -> str:
    try:
        return value.isoformat() if isinstance(value, datetime.date) else datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise bad(where, f"date is {_kind(value)}, not a day", "Write it as 2026-11-24.") from None


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise bad(where, f"{key} is {_kind(value)}, not text", f'Write it in quotes: {key}: "…".')
    return value.strip()


def _names(where: str, key: str, value: Any) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    wrong = [v for v in listed if isinstance(v, bool) or not isinstance(v, (str, int)) or not str(v).strip()]
    if wrong:
        hint = "Write the name in quotes, or give the class's index."
        raise bad(where, f"{key} holds {_kind(wrong[0])}, which is neither a name nor an index", hint)
    if not listed:
        raise bad(where, f"{key} is empty", "Name at least one class, or remove the line.")
    return [str(v).strip() for v in listed]


def _images(path: Path, where: str, value: Any) -> ImageList:
    folder = path.absolute().parent
    if isinstance(value, str) and value.strip():
        return replace(read_image_list(folder / value.strip()), where=f"{where}: {value.strip()}")
    lines = value if isinstance(value, list) else []
    if not lines or not all(isinstance(v, str) and v.strip() for v in lines):
        hint = "Name a file with one image per line, or list paths or SHA-256 in quotes."
        raise bad(where, "images is neither a file nor a list of paths", hint)
    return ImageList([v.strip() for v in lines], where, folder)


def _number(where: str, key: str, value: Any, kind: type) -> float:
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if not fits or isinstance(value, bool):
        hint = f"Write {key}: {1 if kind is int else 1.0}, without quotes."
        raise bad(where, f"{key} is {_kind(value)}, not a {'whole ' if kind is int else ''}number", hint)
    return value


def _kind(value: Any) -> str:
    """A value as a message names it."""
    kinds = {bool: "the truth value", int: "the number", float: "the number", str: "the text"}
    kind = kinds.get(type(value))
    if kind:
        return f"{kind} {str(value).lower() if isinstance(value, bool) else repr(value)[:60]}"
    named = {list: "a list", dict: "a mapping", type(None): "nothing", datetime.date: f"the date {value}"}
    return named.get(type(value), f"{value!r}"[:60])
