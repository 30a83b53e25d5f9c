"""Text of a request file, YAML or JSON, as plain data; a field that is given twice, which both would let pass, is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsforget.errors import RequestError

LARGEST = 1 << 20  # bytes; a list of images goes into a file of its own
HINT = "For example: requests: [{id: 2026-11-001, classes: [sandal, 7]}, {classes: [sneaker]}]."


def bad(where: str, what: str, hint: str) -> RequestError:
    """RequestError ``bad_request_file``: where, and what is wrong there."""
    return RequestError(f"{where}: {what}.", hint, "bad_request_file")


def parse(path: Path) -> Any:
    """The content of a file: JSON where its name ends so, else YAML.  Raises RequestError ``bad_request_file``."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise bad(f"The request file {path}", f"it cannot be read ({error.strerror})", "Check --request.") from error
    if len(raw) > LARGEST:
        raise bad(
            str(path), "it is larger than 1 MiB", "Put lists of images into files of their own: images: list.txt."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise bad(str(path), "it is not UTF-8 text", "Save it as UTF-8.") from None
    if path.suffix.lower() == ".json":
        return _parse_json(path, text)
    return _parse_yaml(path, text)


def _parse_json(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise bad(str(path), f"{key!r} is given twice in one entry", "Remove one of them.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise bad(str(path), f"it is not valid JSON ({error})", HINT) from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        _refuse_repeated(path, yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "Write classes with commas, quotes or colons in their names in quotes."
        raise bad(str(path), f"it is not valid YAML{line} ({reason})", hint) from error


def _refuse_repeated(path: Path, top: Any) -> None:
    import yaml

    todo, seen = [top], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            double = next((key for key in keys if keys.count(key) > 1), None)
            if double is not None:
                line = node.start_mark.line + 1
                raise bad(
                    str(path),
                    f"{double!r} is given twice in the entry that starts in line {line}",
                    "Remove one of them.",
                )
            todo += [value for _, value in node.value]
