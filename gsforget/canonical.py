"""JSON that has one spelling, and files of lines that are chained by their hashes.

The ground floor of the package, like `errors`: standard library only, and every room may import it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gsforget.errors import SafetyError

FIRST = "0" * 64  # `previous` of the first line of a chain


def canonical(value: dict[str, Any]) -> str:
    """JSON with sorted keys and no spaces: the same value always gives the same bytes (UTF-8)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def line_sha256(line: str) -> str:
    """SHA-256 of a line's UTF-8 bytes, without the newline."""
    return hashlib.sha256(line.encode()).hexdigest()


def read_lines(path: Path, hint: str) -> list[str]:
    """The lines of a chained file; none when the file is absent.

    Raises SafetyError ``broken_ledger``, with the hint, where a line is cut off or is not UTF-8.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SafetyError(f"{path} is not UTF-8 text.", hint, "broken_ledger") from error
    lines = text.split("\n")
    if lines.pop():
        raise SafetyError(f"{path}: line {len(lines) + 1} is cut off.", hint, "broken_ledger")
    return lines
