"""Options that several commands share, and how their comma-separated values are read."""

from __future__ import annotations

import csv
import math
import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from gsforget.errors import RequestError


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto takes a GPU where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document to stdout.")]
AnnotationsOption = Annotated[
    str | None,
    typer.Option(
        "--annotations",
        help="Of detectors: folder of COCO's JSON files, or TRAIN.json,TEST.json; default: annotations in the data folder.",
    ),
]
TrustCodeOption = Annotated[
    bool,
    typer.Option("--trust-code", help="Run the Python factory that config.json names; it can do anything you can."),
]

WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_list(text: str | None, option: str = "--classes") -> list[str]:
    """``a,b`` to ``["a", "b"]``: blanks around names and empty names are dropped; no text gives no names.

    A name that contains a comma is put in double quotes, as in a CSV file: ``'"salt, fine",pepper'``.
    Raises RequestError (kind ``bad_list``) for an unclosed quote or a line break.
    """
    try:
        rows = list(csv.reader([text or ""], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise RequestError(
            f"{option} {text!r} is not a comma-separated list ({error}).",
            f"Put names with commas in double quotes: {option} '\"salt, fine\",pepper'.",
            "bad_list",
        ) from error
    return [name.strip() for row in rows for name in row if name.strip()]


def parse_floats(text: str | None, option: str = "--mean") -> tuple[float, ...] | None:
    """``0.5,0.5,0.5`` to a tuple of finite numbers; no text gives None.  Raises RequestError (kind ``bad_number``)."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise RequestError(
            f"{option} {text!r} is not a comma-separated list of numbers.",
            f"For example {option} 0.5,0.5,0.5.",
            "bad_number",
        )
    return numbers


def parse_kwargs(text: str | None, option: str = "--model-kwargs") -> dict[str, Any]:
    """``img_size=28,patch_size=7`` to a dict; no text gives an empty one.

    Values are int, float, true or false, none, text, or tuples of these in parentheses: ``embed_dim=96,depths=(2,2)``.
    A value in quotes stays text.  Raises RequestError (kind ``bad_model_kwargs``).
    """
    values: dict[str, Any] = {}
    for part in _split(text or "", option):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise _bad_kwargs(option, f"{part.strip()!r} is not name=value")
        if name in values:
            raise _bad_kwargs(option, f"{name} is given twice")
        values[name] = _value(value, option)
    return values


def _value(text: str, option: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.startswith("(") and text.endswith(")"):
        return tuple(_value(part.strip(), option) for part in _split(text[1:-1], option))
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    if not text or set(text) & set("()'\""):
        raise _bad_kwargs(option, f"{text!r} is no value")
    return text


def _split(text: str, option: str) -> list[str]:
    """Split at commas that lie outside parentheses and quotes; a last empty part is dropped, as in ``(7,)``."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += {"(": 1, ")": -1}.get(char, 0)
        if depth < 0:
            break
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    if depth or quote:
        raise _bad_kwargs(option, f"a parenthesis or quote in {text!r} has no partner")
    return parts if parts[-1].strip() else parts[:-1]


def _bad_kwargs(option: str, reason: str) -> RequestError:
    return RequestError(
        f"{option} cannot be read: {reason}.",
        f"For example {option} 'img_size=28,window_size=(7,7)'.",
        "bad_model_kwargs",
    )
