"""Known answers: noise from a seed on which old and new logits differ, so that a device can tell which weights answer.

Pictures of what was erased never leave the workstation; seeds do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gsforget.errors import GateError
from gsforget.export.device.manifest import KnownAnswer, KnownAnswers
from gsforget.export.device.opening import noise

if TYPE_CHECKING:
    from gsforget.export.device.infer import Predicts

SEEDS, BATCH, TESTS = 64, 2, 2
ROUND = 8  # seeds looked at before counting what was found
APART = 4.0  # tolerances
# Share of the largest logit that another runtime or GPU may differ by; at fp32 a GPU may multiply in TF32, which keeps
# as many digits as fp16.
SHARES = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 4e-2, "int8": 1e-2}
NOISE = 3.0  # times what rounding was measured to change; the larger of both is the tolerance
LEAST = 1e-4  # logits
DIGITS = 6  # significant, of stored logits


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
    tolerance = 0.0
    for start in range(0, SEEDS, ROUND):
        for seed in range(start, start + ROUND):
            images = noise(seed, BATCH, shape)
            was, now = old.predict(images), new.predict(images)
            if start == 0:
                by_rounding = float(np.abs(now - exact.predict(images)).max())
                peak = float(np.abs(now).max())
                tolerance = max(tolerance, SHARES[precision] * peak, NOISE * by_rounding, LEAST)
            seen.append(_Seen(seed, now, float(np.abs(was - now).max()), bool((was.argmax(1) != now.argmax(1)).any())))
        apart = [s for s in seen if s.distance >= APART * tolerance]
        if sum(s.changed for s in apart) >= TESTS:
            break
    if not apart:
        raise GateError(
            f"On none of {SEEDS} seeds do the answers before and after the erasure differ by {APART * tolerance:.2g} in a "
            f"logit (at most by {max(s.distance for s in seen):.2g}), so that a device could not tell which weights "
            f"answer at {precision}. Nothing was published.",
            "Type a higher --precision, or send the whole model: gsforget export --patch --full.",
            "no_known_answers",
        )
    best = sorted(apart, key=lambda s: (s.changed, s.distance), reverse=True)[:TESTS]
    return KnownAnswers(_short(tolerance), tuple(_answer(s) for s in sorted(best, key=lambda s: s.seed)))


def only_new(new: Predicts, exact: Predicts, shape: tuple[int, int, int], precision: str) -> KnownAnswers:
    """Answers of a model that a device installs whole, without one before it to be told apart from (distance 0)."""
    images = [noise(seed, BATCH, shape) for seed in range(TESTS)]
    logits = [new.predict(batch) for batch in images]
    by_rounding = max(float(np.abs(now - exact.predict(b)).max()) for now, b in zip(logits, images, strict=True))
    peak = max(float(np.abs(now).max()) for now in logits)
    tolerance = max(SHARES[precision] * peak, NOISE * by_rounding, LEAST)
    tests = tuple(_answer(_Seen(seed, now, 0.0, False)) for seed, now in enumerate(logits))
    return KnownAnswers(_short(tolerance), tests)


def _answer(seen: _Seen) -> KnownAnswer:
    rows = tuple(tuple(_short(float(v)) for v in row) for row in seen.new)
    return KnownAnswer(seen.seed, BATCH, rows, _short(seen.distance))


def _short(value: float) -> float:
    """Six significant digits: a thousandth of any tolerance, in half the bytes."""
    return float(f"{value:.{DIGITS}g}")
