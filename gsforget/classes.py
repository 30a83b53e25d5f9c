"""Class requests: what a person typed, as class indices of the model; unknown and impossible requests are refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gsforget.errors import RequestError


def resolve_classes(wanted: list[str], class_names: list[str], forgotten: Mapping[int, str]) -> list[int]:
    """Class indices of a request, sorted, without duplicates: an exact name first, else a 0-based index.

    Args:
        wanted: names or indices as typed; empty entries are skipped.
        class_names: the model's names in index order (an erased class is named ``forgotten-<index>``).
        forgotten: classes erased before: index to old name (or ``forgotten-<index>`` where it is not known).

    Raises:
        RequestError: ``no_class``, ``unknown_class``, ``already_forgotten`` or ``all_classes``.
    """
    asked = [w.strip() for w in wanted if w.strip()]
    if not asked:
        raise RequestError(
            "No class to forget was given.",
            f"For example: --classes {_quoted(_remaining(class_names, forgotten)[:1])}.",
            "no_class",
        )
    chosen = sorted({resolve_class(word, class_names, forgotten) for word in asked})
    check_remaining(chosen, class_names, forgotten)
    return chosen


def check_remaining(chosen: Sequence[int], class_names: list[str], forgotten: Mapping[int, str]) -> None:
    """Refuse to forget all classes that remain: RequestError ``all_classes``; arguments as for `resolve_classes`."""
    if len(chosen) >= len(class_names) - len(forgotten):
        raise RequestError(
            f"The request names all {len(chosen)} remaining classes; nothing would be retained.",
            "Keep at least one class, or delete the model instead.",
            "all_classes",
        )


def resolve_class(word: str, class_names: list[str], forgotten: Mapping[int, str]) -> int:
    """Index of one class by its exact name, else by a 0-based index; raises as `resolve_classes` does."""
    old = {name: index for index, name in forgotten.items()} | {f"forgotten-{index}": index for index in forgotten}
    if word in class_names:
        index = class_names.index(word)
    elif word in old:
        index = old[word]
    elif word.isascii() and word.isdigit() and int(word) < len(class_names):
        index = int(word)
    else:
        raise _unknown(word, class_names, forgotten)
    if index in forgotten:
        raise RequestError(
            f"Class '{forgotten[index]}' (index {index}, now forgotten-{index}) was already forgotten.",
            "Remove it from the request; gsforget history lists what was erased.",
            "already_forgotten",
        )
    return index


def _unknown(word: str, class_names: list[str], forgotten: Mapping[int, str]) -> RequestError:
    remaining = _remaining(class_names, forgotten)
    lowered = {name.lower(): name for name in reversed(remaining)}
    near = [lowered[n] for n in difflib.get_close_matches(word.lower(), list(lowered), n=3, cutoff=0.5)]
    if word.lstrip("-").isdigit():
        hint = f"Indices run from 0 to {len(class_names) - 1}."
    elif near:
        hint = f"Did you mean {_quoted(near)}?"
    elif any("," in name for name in remaining):
        hint = "Names that hold a comma go into a file, one per line: --classes-file FILE; or give the index."
    else:
        hint = f"The classes are {_quoted(remaining[:10])}{' …' if len(remaining) > 10 else ''}."
    return RequestError(f"The model has no class {word!r}.", hint, "unknown_class")


def _remaining(class_names: list[str], forgotten: Mapping[int, str]) -> list[str]:
    return [name for i, name in enumerate(class_names) if i not in forgotten]


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names)


def read_names(path: Path) -> list[str]:
    """Names from a file (`--class-names`, `--classes-file`): one per line, or a JSON list; order is kept.

    Raises RequestError ``bad_names_file`` when the file is missing, unreadable or empty.
    """
    hint = "Write one class name per line, or a JSON list of names."
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise RequestError(f"The names file {path} {reason}.", hint, "bad_names_file") from error
    if text.lstrip().startswith("["):
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"The names file {path} is not a valid JSON list ({error}).", hint, "bad_names_file"
            ) from error
        if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in raw):
            raise RequestError(
                f"The names file {path} holds entries that are neither names nor indices.", hint, "bad_names_file"
            )
        names = [str(name).strip() for name in raw]
    else:
        names = [line.strip() for line in text.splitlines()]
    names = [name for name in names if name]
    if not names:
        raise RequestError(f"The names file {path} is empty.", hint, "bad_names_file")
    return names
