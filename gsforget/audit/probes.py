"""What a model's features still know about the forgotten classes: attacks without and with training.

A head can be masked in a second; the features behind it then still separate the forgotten classes.  All functions are
pure and take penultimate features, float [N, d] (see `gsforget.features`), so one forward pass per model serves them
all.  A good backbone separates classes that it never saw as well, so the figures mean something only next to those of a
model that never saw the classes: `probe_excess`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

SHOTS, DRAWS = 5, 10
ALPHAS = (0.5, 1.0)  # share of the shots in a replaced row: the paper's, and all
PROBE_LIMIT = 50  # training images per class that a linear probe sees
PROBE_C = (0.1, 1.0, 10.0)  # inverse strengths of its penalty, chosen on held-out training images
PROBE_STEPS, PROBE_TOLERANCE = 200, 1e-5  # of L-BFGS; the fits that are chosen had converged on 100 classes
NO_ROOM, SMALL_ROOM, SMALL_EXCESS = 4.0, 8.0, 2.0  # points; see `excess_verdict`

Verdict = Literal["pass", "fail", "inconclusive"]


def class_means(features: ArrayLike, labels: ArrayLike, classes: Sequence[int]) -> Array:
    """Mean feature of each class, float64 [C, d], in the order of ``classes``.

    Raises ValueError where a class has no images.
    """
    values, truth = _pair(features, labels)
    return np.stack([_mean(values, truth, k) for k in classes])


def neighbours(forgotten: ArrayLike, retained: ArrayLike, k: int) -> NDArray[np.int64]:
    """Rows of ``retained`` (means [R, d]) nearest to each row of ``forgotten`` (means [F, d]) by cosine.

    Returns int64 [F, min(k, R)], nearest first.
    """
    similarity = unit(np.asarray(forgotten, np.float64)) @ unit(np.asarray(retained, np.float64)).T
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k].astype(np.int64)


def nearest_class_mean(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    tested: Sequence[int],
) -> float:
    """Percent of the test images of ``tested`` classes whose nearest class mean, by cosine, is their own class's.

    All classes of the training features compete.  Cosines are taken relative to the mean of the class means: a large
    part common to all features would otherwise hide what tells classes apart, from this attack and from no other.
    Raises ValueError where a tested class has no training image, or none of them has a test image.
    """
    train, truth = _pair(train_features, train_labels)
    test, answer = _tested(test_features, test_labels, tested)
    classes = _competing(truth, tested)
    return _accuracy(class_means(train, truth, classes.tolist()), classes, test, answer)


def five_shot(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    forgotten: Sequence[int],
    shots: int = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Nearest class mean by an attacker who holds few images of the forgotten classes; percent of their test images.

    Means of forgotten classes come from ``shots`` images each (fewer where there are fewer), all others from all their
    images; every class competes, by cosine as in `nearest_class_mean`.  The figure is the mean over ``draws`` seeded
    choices of the shots.  Raises ValueError as `nearest_class_mean`.
    """
    train, truth = _pair(train_features, train_labels)
    test, answer = _tested(test_features, test_labels, forgotten)
    classes = _competing(truth, forgotten)
    means = class_means(train, truth, classes.tolist())
    place = np.searchsorted(classes, list(forgotten))
    figures = []
    for rows in _draws(truth, forgotten, shots, draws, seed):
        means[place] = class_means(train[rows], truth[rows], forgotten)
        figures.append(_accuracy(means, classes, test, answer))
    return float(np.mean(figures))


def prototype_attack(
    weight: ArrayLike,
    bias: ArrayLike | None,
    shot_features: ArrayLike,
    shot_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    forgotten: Sequence[int],
    alpha: float | Sequence[float] = ALPHAS,
    retained_features: ArrayLike | None = None,
    shots: int = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
    in_use: Sequence[int] | None = None,
) -> float:
    """Percent of the forgotten classes' test images named again once their rows of the head are replaced; no training.

    The prototypical relearning attack of arXiv 2506.01318: row c becomes alpha * s * u + (1 - alpha) * w_c, u being the
    direction of the mean of ``shots`` features of class c.  What that leaves open is settled in the attacker's favour:
    the best of several alpha counts (the paper's 0.5 fails on a row that was trained against its class); s is the median
    length of the other rows; means are taken relative to the mean retained feature, where given (all features share a
    large part that tells no classes apart); the bias of row c is such that at this mean feature it scores as the other
    rows do (their median), so that a bias of -inf protects nothing, and no class wins by a bias alone.  Weights that
    are not finite count as zero.

    Args:
        weight, bias: the head, [K, d] and [K] or None.
        alpha: one share of the shots, 0 to 1, or several, of which the best on average counts.
        shot_features, shot_labels: [M, d], int [M], training images of the forgotten classes.
        retained_features: [R, d], any images of retained classes; None takes the origin in place of their mean.
        shots, draws, seed: as in `five_shot`.
        in_use: classes whose rows say what a usual row is, such as the retained ones: rows that a model never trained
            are far shorter, and a new row measured by them would never win.  None: all but the forgotten.

    Raises:
        ValueError: a forgotten class has no shot, or no test image is left.
    """
    head = _head(weight, bias)
    pool, truth = _pair(shot_features, shot_labels)
    test, answer = _tested(test_features, test_labels, forgotten)
    centre = np.zeros(head[0].shape[1]) if retained_features is None else _finite(retained_features).mean(axis=0)
    mixtures = [alpha] if isinstance(alpha, (int, float)) else list(alpha)
    figures = []
    for rows in _draws(truth, forgotten, shots, draws, seed):
        means = class_means(pool[rows], truth[rows], forgotten)
        for share in mixtures:
            new, new_offset = _replaced(*head, means, forgotten, centre, share, in_use)
            named = (test @ new.T + new_offset).argmax(axis=1)
            figures.append(100 * (named == answer).mean())
    return float(np.reshape(figures, (-1, len(mixtures))).mean(axis=0).max())


def imprint(
    weight: ArrayLike,
    bias: ArrayLike | None,
    features: ArrayLike,
    labels: ArrayLike,
    forgotten: Sequence[int],
    retained_features: ArrayLike | None = None,
    in_use: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """The head with the forgotten classes' rows replaced by their class means, as in `prototype_attack` with alpha 1.

    Args:
        weight, bias: the head, [K, d] and [K] or None.
        features, labels: [M, d], int [M], images of the forgotten classes, at least one each.
        retained_features: [R, d], any images of retained classes.
        in_use: as in `prototype_attack`.

    Returns:
        Weight [K, d] and bias [K], float64.
    """
    head = _head(weight, bias)
    centre = np.zeros(head[0].shape[1]) if retained_features is None else _finite(retained_features).mean(axis=0)
    return _replaced(*head, class_means(features, labels, forgotten), forgotten, centre, 1.0, in_use)


def linear_probe(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    tested: Sequence[int],
    seed: int = 0,
    limit: int = PROBE_LIMIT,
) -> float:
    """Percent of the test images of ``tested`` classes that a fresh logistic regression on the features names.

    All classes of the training features compete, with at most ``limit`` seeded images each, weighted equally per class;
    features are standardised.  The penalty is the best of `PROBE_C` on a fifth of the training images, held out where a
    class has at least 2: by the log-loss on the tested classes, which the attacker wants, plus that on all, which is
    known better (accuracy on a fifth is so noisy that it costs points).  The fit is then repeated on all of them.

    Raises ValueError as `nearest_class_mean`, and with fewer than two classes to train on.
    """
    train, truth = _pair(train_features, train_labels)
    test, answer = _tested(test_features, test_labels, tested)
    if len(_competing(truth, tested)) < 2:
        raise ValueError("a probe needs training images of at least two classes")
    rng = np.random.default_rng(seed)
    chosen = _rows_per_class(truth, rng, lambda count: min(count, limit))
    train, truth = train[chosen], truth[chosen]
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread <= 1e-6 * spread.max(initial=0.0)] = np.inf  # constant features say nothing
    train, test = ((values - mean) / spread for values in (train, test))
    fit = _best_probe(train, truth, tested, rng)
    return float(100 * (fit.predict(test.astype(np.float32)) == answer).mean())


def probe_excess(subject: float, never_seen: float, original: float) -> float | None:
    """(subject - never seen) / (original - never seen), all in percent: 0 = like never seen, 1 = nothing was forgotten.

    None where the original is no better than the model that never saw the classes.
    """
    room = original - never_seen
    return (subject - never_seen) / room if room > 0 else None


def excess_verdict(subject: float, never_seen: float, original: float, threshold: float = 0.25) -> Verdict:
    """Judge a probe: by the excess, where there is room to tell original and never-seen model apart.

    With less than 4 points between them it is inconclusive; with less than 8 the subject may be 2 points above the
    never-seen model; with more, `probe_excess` may be ``threshold``.
    """
    room = original - never_seen
    if room < NO_ROOM:
        return "inconclusive"
    if room < SMALL_ROOM:
        return "pass" if subject <= never_seen + SMALL_EXCESS else "fail"
    return "pass" if (subject - never_seen) / room <= threshold else "fail"


def unit(vectors: Array) -> Array:
    """Rows at length 1, [N, d]; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _best_probe(train: Array, truth: NDArray[Any], tested: Sequence[int], rng: np.random.Generator) -> Any:
    held = _rows_per_class(truth, rng, lambda count: max(1, count // 5) if count > 1 else 0)
    strength = PROBE_C[len(PROBE_C) // 2]
    if len(held):
        fit_on = np.setdiff1d(np.arange(len(truth)), held)
        wanted = np.isin(truth[held], np.asarray(list(tested)))
        least = np.inf
        for c in PROBE_C:
            loss = _log_loss(_fit(train[fit_on], truth[fit_on], c), train[held], truth[held])
            score = loss.mean() + (loss[wanted].mean() if wanted.any() else 0.0)
            if score >= least:  # the loss falls and then rises with the strength
                break
            least, strength = score, c
    return _fit(train, truth, strength)


def _log_loss(probe: Any, features: Array, truth: NDArray[Any]) -> Array:
    probabilities = probe.predict_proba(features.astype(np.float32))
    own = probabilities[np.arange(len(truth)), np.searchsorted(probe.classes_, truth)]
    return -np.log(np.maximum(own, 1e-12))


def _fit(train: Array, truth: NDArray[Any], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, class_weight="balanced", max_iter=PROBE_STEPS, tol=PROBE_TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # see PROBE_STEPS
        return probe.fit(train.astype(np.float32), truth)


def _rows_per_class(truth: NDArray[Any], rng: np.random.Generator, count: Any) -> NDArray[np.int64]:
    """Seeded choice of count(n) of each class's n rows, in ascending order."""
    rows = [rng.permutation(np.flatnonzero(truth == k)) for k in np.unique(truth)]
    return np.sort(np.concatenate([r[: count(len(r))] for r in rows])).astype(np.int64)


def _draws(truth: NDArray[Any], classes: Sequence[int], shots: int, draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows of ``shots`` images of each class, several times; once where there are no more images than shots."""
    if shots < 1 or draws < 1:
        raise ValueError(f"shots and draws must be at least 1, got {shots} and {draws}")
    of_class = [np.flatnonzero(truth == k) for k in classes]
    if all(len(rows) <= shots for rows in of_class):
        draws = 1
    rng = np.random.default_rng(seed)
    return [np.concatenate([rng.permutation(rows)[:shots] for rows in of_class]) for _ in range(draws)]


def _accuracy(means: Array, classes: NDArray[Any], test: Array, answer: NDArray[Any]) -> float:
    centre = means.mean(axis=0)
    named = classes[(unit(test - centre) @ unit(means - centre).T).argmax(axis=1)]
    return float(100 * (named == answer).mean())


def _mean(values: Array, truth: NDArray[Any], k: int) -> Array:
    where = truth == k
    if not where.any():
        raise ValueError(f"class {k} has no images to take a mean of")
    return values[where].mean(axis=0)


def _competing(truth: NDArray[Any], tested: Sequence[int]) -> NDArray[Any]:
    classes = np.unique(truth)
    missing = sorted(set(tested) - set(classes.tolist()))
    if missing:
        raise ValueError(f"class {missing[0]} has no training images to attack it with")
    return classes


def _tested(features: ArrayLike, labels: ArrayLike, tested: Sequence[int]) -> tuple[Array, NDArray[Any]]:
    values, truth = _pair(features, labels)
    where = np.isin(truth, np.asarray(list(tested), dtype=np.int64))
    if not where.any():
        raise ValueError("there are no test images of the tested classes")
    return values[where], truth[where]


def _pair(features: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[Any]]:
    values, truth = _finite(features), np.asarray(labels)
    if truth.shape != values.shape[:1]:
        raise ValueError(f"features {values.shape} and labels {truth.shape} must be [N, d] and [N]")
    return values, truth


def _finite(features: ArrayLike) -> Array:
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"features must be [N, d], got {values.shape}")
    broken = len(values) - int(np.isfinite(values).all(axis=1).sum())
    if broken:
        raise RequestError(
            f"The model's features are not finite for {broken} of {len(values)} images.",
            "Check the checkpoint and the precision it runs at.",
            "nan_features",
        )
    return values


def _replaced(
    weight: Array,
    bias: Array,
    means: Array,
    forgotten: Sequence[int],
    centre: Array,
    share: float,
    in_use: Sequence[int] | None,
) -> tuple[Array, Array]:
    """Head with new rows for the forgotten classes; see `prototype_attack` for their length and bias."""
    where = np.asarray(list(forgotten), dtype=np.int64)
    others = np.setdiff1d(np.arange(len(weight)) if in_use is None else np.asarray(list(in_use), np.int64), where)
    length = np.median(np.linalg.norm(weight[others if len(others) else where], axis=1))
    level = np.median(weight[others] @ centre + bias[others]) if len(others) else 0.0
    new, new_bias = weight.copy(), bias.copy()
    new[where] = share * length * unit(means - centre) + (1 - share) * weight[where]
    new_bias[where] = level - new[where] @ centre
    return new, new_bias


def _head(weight: ArrayLike, bias: ArrayLike | None) -> tuple[Array, Array]:
    head = np.asarray(weight, dtype=np.float64)
    offset = np.zeros(len(head)) if bias is None else np.asarray(bias, dtype=np.float64)
    if head.ndim != 2 or offset.shape != head.shape[:1]:
        raise ValueError(f"weight {head.shape} and bias {offset.shape} must be [K, d] and [K]")
    return np.where(np.isfinite(head), head, 0.0), np.nan_to_num(offset, neginf=-1e9, posinf=1e9)
