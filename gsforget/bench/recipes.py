"""The published protocols by name, with the folder layout of their data and the figures to beat.

The figures are H of each request as printed in the papers: GS-LoRA and GS-LoRA++ in arXiv 2501.09705, tables 2 to 5 of
its first version, FG-OrIU in arXiv 2601.13578, tables 2 to 4.  Where a table gives no H, there is none here.  Those of
COCO are what the authors plotted for arXiv 2403.11530, on AP.  The data sets are not part of this project; a recipe says
what to download and how it is to be laid out.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from gsforget.errors import RequestError


@dataclass(frozen=True)
class Recipe:
    """One published setting.

    Attributes:
        layout: how the data lies on disk, see `layouts`.
        protocol, shots, missing: see `protocols`.
        published: figure by method, one per request.
        figure: what these are.
        settings: of the published loops where they differ from their defaults.
        order_seed: of a detector's kinds, see `detectors`.
        earlier: AP that kinds forgotten earlier are left with, by method, one figure per request.
    """

    name: str
    layout: str
    protocol: str
    shots: int | None = None
    missing: int = 0
    published: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    figure: str = "H"
    settings: dict[str, Any] = field(default_factory=dict)
    order_seed: int | None = None
    earlier: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """What a model is that is given by name and checkpoint; a detector is given as a folder."""
        return "face" if self.layout in FACES else "detect" if self.layout == DETECTION else "classify"


FACES = ("casia-webface", "ms-celeb")
DETECTION = "coco"
OURS, FIRST, RIVAL = "GS-LoRA++", "GS-LoRA", "FG-OrIU"
FACE = {"bnd": 105.0, "push": 0.01, "betas": (0.2, 0.25, 0.25, 0.2)}
FACE_SINGLE = {"bnd": 110.0, "push": 0.005, "betas": (0.05,), "alpha": 0.01}
FACE_SHOTS = {"bnd": 105.0, "bnd_pro": 50.0, "push": 0.015, "betas": (0.3, 0.4, 0.28, 0.2), "batch_size": 4}
FACE_MISSING = {"bnd": 105.0, "push": 3e-4, "betas": (0.14, 0.14, 0.2, 0.15), "alpha": 0.015}

RECIPES = (
    Recipe(
        "casia100-5",
        "casia-webface",
        "100-5",
        published={FIRST: (71.02,), OURS: (71.12,), RIVAL: (71.78,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-10",
        "casia-webface",
        "100-10",
        published={FIRST: (71.76,), OURS: (72.04,), RIVAL: (72.52,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-50",
        "casia-webface",
        "100-50",
        published={FIRST: (71.29,), OURS: (71.56,), RIVAL: (74.18,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-90",
        "casia-webface",
        "100-90",
        published={FIRST: (73.71,), OURS: (72.85,), RIVAL: (75.49,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-5-4-shot",
        "casia-webface",
        "100-5",
        4,
        published={FIRST: (66.94,), OURS: (69.17,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-10-4-shot",
        "casia-webface",
        "100-10",
        4,
        published={FIRST: (63.61,), OURS: (69.47,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-50-4-shot",
        "casia-webface",
        "100-50",
        4,
        published={FIRST: (4.72,), OURS: (70.61,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-90-4-shot",
        "casia-webface",
        "100-90",
        4,
        published={FIRST: (26.82,), OURS: (60.86,)},
        settings=FACE_SINGLE,
    ),
    Recipe(
        "casia100-sequence",
        "casia-webface",
        "40-20",
        published={
            FIRST: (74.40, 73.59, 74.36, 73.76),
            OURS: (73.97, 73.48, 74.20, 75.23),
            RIVAL: (74.45, 74.64, 75.49, 77.71),
        },
        settings=FACE,
    ),
    Recipe(
        "casia100-sequence-4-shot",
        "casia-webface",
        "40-20",
        4,
        published={FIRST: (66.02, 63.85, 67.25, 71.32), OURS: (71.24, 65.73, 68.03, 72.10)},
        settings=FACE_SHOTS,
    ),
    Recipe(
        "casia100-sequence-missing",
        "casia-webface",
        "40-20",
        missing=5,
        published={FIRST: (72.13, 72.37, 71.30, 63.80), OURS: (71.15, 71.33, 72.02, 68.07)},
        settings=FACE_MISSING,
    ),
    Recipe(
        "imagenet100-sequence",
        "imagenet100",
        "40-20",
        published={
            FIRST: (86.13, 87.33, 87.84, 86.30),
            OURS: (86.63, 87.22, 87.48, 87.00),
            RIVAL: (87.01, 88.45, 88.90, 89.15),
        },
    ),
    Recipe(
        "ms-celeb100-sequence",
        "ms-celeb",
        "40-20",
        published={OURS: (None, 99.45, None, 99.29)},
        figure="retained accuracy",
        settings=FACE,
    ),
    Recipe(
        "cub100-sequence",
        "cub-200",
        "40-20",
        published={OURS: (66.99, 68.79, 68.76, 70.23)},
        figure="retained accuracy",
    ),
    Recipe(
        "omnibenchmark100-sequence",
        "omnibenchmark",
        "40-20",
        published={OURS: (58.89, 55.53, None, None)},
        figure="retained accuracy",
    ),
    Recipe(
        "coco-sequence",
        "coco",
        "20-10",
        published={
            FIRST: (42.2, 40.8, 39.2, 42.0, 45.1, 40.4, 41.6),
            "MAS with rehearsal": (32.2, 32.7, 32.5, 32.9, 30.1, 29.7, 31.2),
            "EWC with rehearsal": (32.4, 31.6, 31.4, 33.7, 31.8, 26.6, 26.9),
            "L2 with rehearsal": (27.7, 23.6, 24.3, 21.6, 27.9, 20.5, 22.3),
        },
        figure="H on AP",
        order_seed=123,
        earlier={
            FIRST: (None, 5.77, 4.19, 6.94, 5.21, 3.33, 3.12),
            "MAS with rehearsal": (None, 12.7, 12.3, 12.8, 16.0, 13.9, 11.3),
            "EWC with rehearsal": (None, 17.9, 15.6, 13.3, 18.4, 17.5, 15.3),
            "L2 with rehearsal": (None, 28.4, 25.9, 25.5, 23.6, 25.1, 20.1),
        },
    ),
    Recipe("coco-sequence-32-shot", "coco", "20-10", 32, figure="H on AP", order_seed=123),
)


def find_recipe(name: str) -> Recipe:
    """Raises RequestError ``unknown_protocol`` with the nearest names."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    near = difflib.get_close_matches(name, [r.name for r in RECIPES], n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See gsforget bench --list."
    raise RequestError(f"There is no recipe called {name}.", hint, "unknown_protocol")
