"""The picture of a bench: H at each request, and what H is worth, drawn over what a probe still finds in the features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsforget.bench.table import Row, rows

OURS = ("gs-lora++", "gs-lora")


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a figure, PNG or SVG by the path's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows(content) if any(row.h)]
    probed = [row for row in shown if row.worst.get("linear_probe_excess") and row.h[-1]]
    figure = Figure(figsize=(11, 4.6 + 0.1 * max(0, len(shown) - 10)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if probed else 1, squeeze=False)[0]
    _lines(axes[0], shown, len(content["setting"]["requests"]))
    if probed:
        _plane(axes[1], probed)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"{content['setting']['protocol']}, medians over seeds", fontsize=11)
    figure.savefig(path, dpi=130)


def _style(row: Row, place: int) -> dict[str, Any]:
    if row.method in OURS:
        return {"color": "black" if row.method == OURS[0] else "dimgrey", "linewidth": 2.4, "zorder": 5}
    from matplotlib import colormaps

    dashed = {"linestyle": ":" if row.control else "-" if place % 2 else "--"}
    return {"color": colormaps["tab20"](place % 20), "linewidth": 1.1, **dashed}


def _lines(axis: Any, shown: list[Row], count: int) -> None:
    for place, row in enumerate(shown):
        known = [(n + 1, h) for n, h in enumerate(row.h) if h]
        style = _style(row, place)
        x, y = [n for n, _ in known], [h.median for _, h in known]
        mark = "o" if row.verdict == "pass" else "x"
        axis.plot(
            x, y, marker=mark, markersize=5, label=f"{row.method}{' ✗' if row.verdict == 'fail' else ''}", **style
        )
        if len(known) > 1:
            axis.fill_between(x, [h.low for _, h in known], [h.high for _, h in known], color=style["color"], alpha=0.1)
    axis.set_xticks(range(1, count + 1))
    axis.set_xlabel("request")
    axis.set_ylabel("H (higher is better)")
    axis.set_title("✗ and crosses: fails the audit", fontsize=9)


def _plane(axis: Any, probed: list[Row]) -> None:
    from gsforget.bench.measure import LIMITS

    for place, row in enumerate(probed):
        excess, h = row.worst["linear_probe_excess"], row.h[-1]
        assert excess is not None
        assert h is not None
        color = _style(row, place)["color"]
        axis.errorbar(
            excess.median,
            h.median,
            xerr=[[excess.median - excess.low], [excess.high - excess.median]],
            yerr=[[h.median - h.low], [h.high - h.median]],
            fmt="o" if row.verdict == "pass" else "x",
            color=color,
            markersize=7,
            elinewidth=0.8,
        )
        axis.annotate(row.method, (excess.median, h.median), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.axvspan(LIMITS.max_probe_excess, max(1.05, axis.get_xlim()[1]), color="tab:red", alpha=0.07)
    axis.set_xlabel("probe excess, worst request (0: as if never seen, 1: nothing forgotten)")
    axis.set_ylabel("H at the last request")
    axis.set_title("what a fresh probe on the features still finds", fontsize=9)
