"""Known answers: noise from a seed on which old and new logits differ, so that a device can tell which weights answer.

Pictures of what was erased never leave the workstation; seeds do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gsforget.errors import GateError
from gsforget.export.device.manifest import KnownAnswer, KnownAnswers
from gsforget.export.device.opening import noise

if TYPE_CHECKING:
    from gsforget.export.device.infer import Predicts

SEEDS, TESTS = 64, 2
BATCH = 1  # what every engine takes
ROUND = 8  # seeds looked at before counting what was found
ENOUGH = 16  # seeds after which a narrower tolerance is taken rather than more seeds
APART = 4.0  # tolerances
# Shares of the largest logit: the tolerance that other runtimes and GPUs are given where old and new lie far enough apart,
# and the narrowest one, some ten times what rounding changed in vision transformers on a CPU.  At fp32 a GPU may multiply
# in TF32, which keeps as many digits as fp16.
SHARES = {"fp32": (2e-3, 1e-4), "fp16": (1e-2, 2e-3), "bf16": (5e-2, 1e-2), "int8": (1e-2, 2e-3)}
NOISE = 3.0  # the tolerance is at least so many times what rounding changes in this model
LEAST = 1e-5  # logits


@dataclass(frozen=True)
class _Seen:
    seed: int
    new: np.ndarray
    distance: float
    changed: bool


def find_answers(
    old: Predicts, new: Predicts, exact: Predicts, shape: tuple[int, int, int], precision: str
) -> KnownAnswers:
    """Seeds on which old and new logits lie at least four tolerances apart, with the new logits.

    Those on which another class comes first are taken before others.

    Args:
        old, new: the artifact before and after the erasure, at the deployed precision.
        exact: the new weights in float32 arithmetic; how far it lies from ``new`` is what rounding changes.
        shape: of an image, [C, H, W].

    Raises:
        GateError: kind ``no_known_answers``, where no seed tells old and new apart.
    """
    seen: list[_Seen] = []
    wide = narrow = 0.0
    for start in range(0, SEEDS, ROUND):
        for seed in range(start, start + ROUND):
            images = noise(seed, BATCH, shape)
            was, now = old.predict(images), new.predict(images)
            if seed < TESTS:
                limits = _tolerances(now, exact.predict(images), precision)
                wide, narrow = max(wide, limits[0]), max(narrow, limits[1])
            seen.append(_Seen(seed, now, float(np.abs(was - now).max()), bool((was.argmax(1) != now.argmax(1)).any())))
        far, near = ([s for s in seen if s.distance >= APART * limit] for limit in (wide, narrow))
        if sum(s.changed for s in far) >= TESTS or (len(seen) >= ENOUGH and len(near) >= TESTS):
            break
    if not near:
        raise GateError(
            f"On none of {SEEDS} seeds do the answers before and after the erasure differ by {APART * narrow:.2g} in a "
            f"logit (at most by {max(s.distance for s in seen):.2g}), so that a device could not tell which weights "
            f"answer at {precision}. Nothing was published.",
            "Type a higher --precision, or send the whole model: gsforget export --patch --full.",
            "no_known_answers",
        )
    best = sorted(far or near, key=lambda s: (s.changed, s.distance), reverse=True)[:TESTS]
    tolerance = _short(min(wide, min(s.distance for s in best) / APART))
    return KnownAnswers(tolerance, tuple(_answer(s, tolerance) for s in sorted(best, key=lambda s: s.seed)))


def only_new(new: Predicts, exact: Predicts, shape: tuple[int, int, int], precision: str) -> KnownAnswers:
    """Answers of a model that a device installs whole, without one before it to be told apart from (distance 0)."""
    images = [noise(seed, BATCH, shape) for seed in range(TESTS)]
    logits = [new.predict(batch) for batch in images]
    limits = [_tolerances(now, exact.predict(b), precision)[0] for now, b in zip(logits, images, strict=True)]
    tolerance = _short(max(limits))
    tests = tuple(_answer(_Seen(seed, now, 0.0, False), tolerance) for seed, now in enumerate(logits))
    return KnownAnswers(tolerance, tests)


def _tolerances(logits: np.ndarray, exact: np.ndarray, precision: str) -> tuple[float, float]:
    """The usual tolerance, and the narrowest that a device can be expected to keep."""
    least = max(NOISE * float(np.abs(logits - exact).max()), LEAST)
    wide, narrow = (share * float(np.abs(logits).max()) for share in SHARES[precision])
    return max(wide, least), max(narrow, least)


def _answer(seen: _Seen, tolerance: float) -> KnownAnswer:
    """The logits with as many decimals as a hundredth of the tolerance needs: most of a manifest is made of them."""
    decimals = math.ceil(-math.log10(tolerance / 100))
    rows = tuple(tuple(round(float(v), decimals) for v in row) for row in seen.new)
    return KnownAnswer(seen.seed, BATCH, rows, _short(seen.distance))


def _short(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
