"""HTML that is escaped unless it was built here, and numbers as people read them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

VOID = ("br", "img", "meta", "hr", "line", "path", "rect", "circle", "polyline")
NOT_MEASURED = "not measured"
DIGITS = {"%": 1, "points": 1, "ratio": 2, "auc": 2}


class Html(str):
    """Text that is markup already; every other string is escaped on its way into the page."""

    __slots__ = ()


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """``<name attributes>content</name>``.

    Content and attribute values are escaped (content of type `Html` is not); None is left out.  In attribute names a
    trailing ``_`` is dropped and other ``_`` become ``-``.
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{listed}>" if name in ("br", "img", "meta", "hr") else f"<{name}{listed}/>")
    return Html(f"<{name}{listed}>{join(content)}</{name}>")


def join(content: Iterable[object]) -> Html:
    """Pieces one after the other, escaped where they are not `Html`."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in content if c is not None))


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[int] = (),
    class_: str = "",
) -> Html:
    """A table with headers; the first cell of each row heads it.  ``numbers``: columns aligned to the right."""
    align = dict.fromkeys(numbers, "number")
    head = tag("tr", *(tag("th", c, scope="col", class_=align.get(i)) for i, c in enumerate(columns)))
    body = [
        tag(
            "tr",
            *(tag("td" if i else "th", c, scope=None if i else "row", class_=align.get(i)) for i, c in enumerate(row)),
        )
        for row in rows
    ]
    made = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=class_ or None)
    return scroll(made, caption, short=len(body) <= 14)


def scroll(content: Html, label: str, short: bool) -> Html:
    """A wide table in a frame of its own, which scrolls on small screens; a short one is not torn apart in print."""
    kind = "scroll short" if short else "scroll"
    return tag("div", content, class_=kind, role="region", aria_label=label, tabindex="0")


def number(value: Any, unit: str | None = None, digits: int | None = None) -> str:
    """A figure with its unit; ``–`` for None and for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    places = digits if digits is not None else DIGITS.get(unit or "", 2)
    text = f"{value:g}" if unit in ("steps", "rank") and digits is None else f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    text = text.replace("-", "−")
    return f"{text} {unit}" if unit in ("%", "points", "steps") else text


def measured(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plural(count: int, noun: str, more: str | None = None) -> str:
    """``1 class``, ``2 classes``."""
    return f"{count} {noun if count == 1 else more or noun + 's'}"


def listed(names: Sequence[str], shown: int = 6) -> str:
    """``a, b and c``; from the seventh on only counted."""
    if len(names) > shown:
        return f"{', '.join(names[:shown])} and {len(names) - shown} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def moment(time: Any) -> str:
    """``2026-01-31T12:00:00Z`` as ``2026-01-31 12:00:00``; ``–`` for None."""
    return str(time).replace("T", " ").removesuffix("Z") if time else "–"


def change(before: Any, after: Any) -> str:
    """The difference of two figures with its sign; ``–`` where one is not measured."""
    if not (measured(before) and measured(after)):
        return "–"
    change = round(after - before, 1) + 0.0
    return f"{'+' if change > 0 else '−' if change < 0 else '±'}{abs(change):.1f}"


VERDICTS = {"pass": ("✓", "pass"), "fail": ("✕", "fail"), "inconclusive": ("?", "inconclusive")}


def verdict(value: str | None, words: str | None = None) -> Html:
    """A verdict as sign, word and colour; None is "not measured"."""
    sign, word = VERDICTS.get(value or "", ("–", NOT_MEASURED))
    kind = value if value in VERDICTS else "none"
    return tag(
        "span", tag("span", sign, aria_hidden="true", class_="sign"), f" {words or word}", class_=f"verdict {kind}"
    )
