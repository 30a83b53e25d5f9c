"""A stranger's JSON, read field by field: every field of its type and within bounds, and no other field there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

LARGEST = 2**53  # beyond it, JSON's numbers are not integers everywhere
TIME = "%Y-%m-%dT%H:%M:%SZ"


class BadField(Exception):
    """A field that is wrong, in words; whoever knows the file makes a refusal of it."""


def record(raw: Any, where: str, keys: str) -> Mapping[str, Any]:
    """An object with exactly the fields that ``keys`` lists, between spaces; this and all below raise ``BadField``."""
    wanted = keys.split()
    if not isinstance(raw, dict) or set(raw) != set(wanted):
        found = sorted(map(str, set(raw) ^ set(wanted))) if isinstance(raw, dict) else []
        raise BadField(f"{where} does not hold exactly the fields that it must ({', '.join(found) or 'not an object'})")
    return raw


def items(raw: Any, where: str, length: int | None = None) -> list[Any]:
    if not isinstance(raw, list) or length not in (None, len(raw)):
        raise BadField(f"{where} is not a list{'' if length is None else f' of {length}'}")
    return raw


def integer(raw: Any, where: str, low: int = 0, high: int = LARGEST) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not low <= raw <= high:
        raise BadField(f"{where} is not an integer from {low} to {high}")
    return raw


def number(raw: Any, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or abs(raw) > 1e38 or not math.isfinite(raw):
        raise BadField(f"{where} is not a finite number")
    return float(raw)


def text(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not raw or len(raw) > 1000:
        raise BadField(f"{where} is not a text")
    return raw


def hexadecimal(raw: Any, where: str, digits: int) -> str:
    if not isinstance(raw, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", raw):
        raise BadField(f"{where} is not {digits} hexadecimal digits")
    return raw


def choice(raw: Any, where: str, known: Iterable[str]) -> str:
    if not isinstance(raw, str) or raw not in tuple(known):
        raise BadField(f"{where} is none of {', '.join(known)}")
    return raw


def moment(raw: Any, where: str) -> datetime:
    try:
        if not isinstance(raw, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", raw):
            raise ValueError
        return datetime.strptime(raw, TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise BadField(f"{where} is not a time such as 2026-11-25T00:00:00Z") from error
