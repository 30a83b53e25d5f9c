"""Pictures of a run: the groups' norms while they are selected, and what the model says before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

BLUE, RED, GREY = "#2b6ca3", "#c23b22", "#9aa0a6"
SHOWN = 10  # predicted classes in the picture


def plot_run(
    path: Path,
    norms: Sequence[Sequence[float]],
    group_names: Sequence[str],
    active: Sequence[int],
    said_before: np.ndarray,
    said_after: np.ndarray,
    class_names: Sequence[str],
    forgotten: Sequence[int],
    what: str = "images of the forgotten classes (red)",
) -> None:
    """Write one PNG: group norms per step on the left, answers on the forgotten test images on the right.

    Args:
        norms: one row per training step, one column per group.
        active: groups that are not zero at the end.
        said_before, said_after: int64 [N], predicted class of each image on the right.
        what: these images are, for the title.
    """
    import warnings

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_norms(left, np.asarray(norms), group_names, set(active))
    _draw_answers(right, said_before, said_after, class_names, set(forgotten), what)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # class names in an alphabet that the font lacks
        figure.savefig(path, dpi=130)


def _draw_norms(axes, norms: np.ndarray, names: Sequence[str], active: set[int]) -> None:
    steps = np.arange(1, len(norms) + 1)
    ends = []
    for g, name in enumerate(names):
        alive = g in active
        axes.plot(steps, norms[:, g], color=BLUE if alive else GREY, lw=2 if alive else 1, zorder=3 if alive else 2)
        ends.append((norms[-1, g], name, alive))
    for value, name, _ in (e for e in ends if e[2]):
        axes.annotate(
            name, (steps[-1], value), xytext=(5, 0), textcoords="offset points", va="center", color=BLUE, fontsize=9
        )
    dead = sum(not e[2] for e in ends)
    axes.set_title(f"Group norms: {len(active)} of {len(names)} blocks change, {dead} are exactly zero", fontsize=10)
    axes.set_xlabel("training step")
    axes.set_ylabel("norm of the block's LoRA group")
    axes.set_xlim(0, len(norms) * 1.22)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_answers(
    axes, before: np.ndarray, after: np.ndarray, names: Sequence[str], forgotten: set[int], what: str
) -> None:
    counts = np.stack([np.bincount(said, minlength=len(names)) for said in (before, after)]) / max(1, len(before)) * 100
    order = np.argsort(-counts.max(0))[:SHOWN]
    order = order[counts.max(0)[order] > 0]
    rows = np.arange(len(order))
    axes.barh(rows - 0.2, counts[0, order], 0.38, color=GREY, label="before")
    axes.barh(rows + 0.2, counts[1, order], 0.38, color=BLUE, label="after")
    axes.set_yticks(rows, [names[i] for i in order], parse_math=False)
    for tick, index in zip(axes.get_yticklabels(), order):
        if index in forgotten:
            tick.set_color(RED)
    axes.invert_yaxis()
    axes.set_title(f"What the model says about {what}", fontsize=10)
    axes.set_xlabel("percent of these images")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
