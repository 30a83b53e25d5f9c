"""Probes on features whose answer is known: corners of a simplex, noise, and a head that hides what is there."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsforget.audit.probes import (
    class_means,
    excess_verdict,
    five_shot,
    linear_probe,
    nearest_class_mean,
    neighbours,
    probe_excess,
    prototype_attack,
    unit,
)
from gsforget.errors import RequestError

FORGOTTEN = [1, 4]


def blobs(count: int, seed: int = 0, classes: int = 6, d: int = 12, noise: float = 0.05, offset: float = 0.0):
    """``count`` features of each class around a corner of its own, and the labels."""
    labels = np.repeat(np.arange(classes), count)
    return np.eye(classes, d)[labels] + offset + noise * np.random.default_rng(seed).normal(
        size=(len(labels), d)
    ), labels


def noise(count: int, seed: int = 0, classes: int = 6, d: int = 12):
    """Features that know nothing of the class."""
    return np.random.default_rng(seed).normal(size=(classes * count, d)), np.repeat(np.arange(classes), count)


def masked_head(classes: int = 6, d: int = 12):
    """A head that is right on `blobs`, and the same with the forgotten rows masked: (weight, bias), (weight, bias)."""
    weight, bias = np.eye(classes, d) * 4, np.zeros(classes)
    masked = bias.copy()
    masked[FORGOTTEN] = -np.inf
    return (weight, bias), (weight, masked)


def test_class_means_by_hand():
    means = class_means([[0, 2], [4, 0], [2, 2]], [7, 3, 7], [3, 7])
    assert means.tolist() == [[4, 0], [1, 2]]
    with pytest.raises(ValueError, match="class 5 has no images"):
        class_means([[0.0]], [1], [5])


def test_neighbours_by_hand():
    retained = [[1, 0], [0, 2], [-3, 0]]
    assert neighbours([[5, 1], [-1, 0.5]], retained, 2).tolist() == [[0, 1], [2, 1]]
    assert neighbours([[5, 1]], retained, 9).shape == (1, 3)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_separable_features_give_everything_away(offset):
    arguments = (*blobs(8, 0, offset=offset), *blobs(5, 1, offset=offset), FORGOTTEN)
    assert nearest_class_mean(*arguments) == 100
    assert five_shot(*arguments) == 100
    assert linear_probe(*arguments) == 100


def test_features_without_knowledge_give_chance():
    train, labels = noise(50, 0)
    test, answer = noise(500, 1)
    for figure in (
        nearest_class_mean(train, labels, test, answer, range(6)),
        five_shot(train, labels, test, answer, range(6)),
        linear_probe(train, labels, test, answer, range(6)),
    ):
        assert figure == pytest.approx(100 / 6, abs=3)


def test_nearest_class_mean_by_hand():
    # Means (1, 0) and (0, 1): their centre is (1/2, 1/2), so the nearer is told by the sign of x - y.
    train, labels = [[1, 0], [1, 0], [0, 1]], [0, 0, 1]
    test, answer = [[3, 1], [1, 3], [2, 1], [0, 5]], [0, 0, 0, 1]
    assert nearest_class_mean(train, labels, test, answer, [0]) == pytest.approx(200 / 3)
    assert nearest_class_mean(train, labels, test, answer, [1]) == 100
    assert nearest_class_mean(train, labels, test, answer, [0, 1]) == 75


@given(st.integers(1, 5), st.floats(0.01, 100), st.integers(0, 99))
def test_attacks_do_not_notice_scale_and_rotation(count, scale, seed):
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(12, 12)))
    (train, labels), (test, answer) = blobs(count, seed, noise=0.3), blobs(3, seed + 1, noise=0.3)
    plain = (train, labels, test, answer, FORGOTTEN)
    turned = (scale * train @ rotation, labels, scale * test @ rotation, answer, FORGOTTEN)
    assert nearest_class_mean(*turned) == pytest.approx(nearest_class_mean(*plain))
    assert five_shot(*turned, draws=2) == pytest.approx(five_shot(*plain, draws=2))


def test_five_shot_uses_few_images_of_forgotten_classes_only():
    train, labels = blobs(5)
    test, answer = blobs(5, 1)
    many, of_many = blobs(40, 2)
    kept = ~np.isin(of_many, FORGOTTEN)
    few = np.isin(labels, FORGOTTEN)
    features, truth = np.concatenate([many[kept], train[few]]), np.concatenate([of_many[kept], labels[few]])
    # With no more images than shots there is nothing to draw, and the figure is that of the class means.
    expected = nearest_class_mean(features, truth, test, answer, FORGOTTEN)
    assert five_shot(features, truth, test, answer, FORGOTTEN, seed=3) == expected
    hard, of_hard = blobs(40, 3, noise=0.6)
    test, answer = blobs(40, 4, noise=0.6)
    figures = [five_shot(hard, of_hard, test, answer, FORGOTTEN, seed=s) for s in (0, 0, 1)]
    assert figures[0] == figures[1] != figures[2]
    assert figures[0] < nearest_class_mean(hard, of_hard, test, answer, FORGOTTEN)
    one, all_shots = (five_shot(hard, of_hard, test, answer, FORGOTTEN, shots=n) for n in (1, 40))
    assert one < figures[0]
    assert all_shots == pytest.approx(nearest_class_mean(hard, of_hard, test, answer, FORGOTTEN))


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("mask", ["-inf bias", "zero rows", "nan rows", "low bias"])
def test_a_masked_head_is_seen_through(mask, offset):
    (weight, bias), (_, masked) = masked_head()
    hidden, low = weight.copy(), bias.copy()
    if mask == "low bias":
        low[FORGOTTEN] = -1e4
    elif mask == "-inf bias":
        low = masked
    else:
        hidden[FORGOTTEN] = 0.0 if mask == "zero rows" else np.nan
        low[FORGOTTEN] = -1.0
    (train, labels), (test, answer) = blobs(20, 0, offset=offset), blobs(20, 1, offset=offset)
    forgotten = np.isin(answer, FORGOTTEN)
    said = (np.nan_to_num(test @ hidden.T, nan=-1e9) + low).argmax(axis=1)
    assert not (said == answer)[forgotten].any(), "to all appearance, the classes are gone"
    shots = np.isin(labels, FORGOTTEN)
    attack = (train[shots], labels[shots], test, answer, FORGOTTEN)
    original = prototype_attack(weight, bias, *attack, retained_features=train[~shots])
    assert original == 100
    assert prototype_attack(hidden, low, *attack, retained_features=train[~shots]) == original


def test_prototype_attack_by_hand():
    # Rows (2, 0) and (0, 2), both retained; class 2 is attacked with one shot (0, 0, 5): s = 2, u = (0, 0, 1).
    weight = [[2, 0, 0], [0, 2, 0], [9, 9, 0]]
    shot, of_shot = [[0, 0, 5.0]], [2]
    test, answer = [[1, 0, 1.5], [1, 0, 0.5], [0, 0, 1]], [2, 2, 2]
    # alpha = 1: scores 2, 0, 2 * x_3: right for the first (3 > 2) and third; the second has 1 < 2.
    assert prototype_attack(weight, None, shot, of_shot, test, answer, [2], alpha=1) == pytest.approx(200 / 3)
    # alpha = 0: the row as it is, (9, 9, 0), wins wherever x_1 or x_2 does.
    assert prototype_attack(weight, None, shot, of_shot, test, answer, [2], alpha=0) == pytest.approx(200 / 3)
    # alpha = 0.5: (4.5, 4.5, 1) is right for all three; of several the best counts.
    assert prototype_attack(weight, None, shot, of_shot, test, answer, [2], alpha=0.5) == 100
    assert prototype_attack(weight, None, shot, of_shot, test, answer, [2], alpha=(0, 1, 0.5)) == 100


def test_rows_that_were_never_trained_do_not_set_the_measure():
    # Classes 0 and 1 are retained, 3 and 4 were never trained and have short rows, which are the majority.
    weight = [[2, 0, 0], [0, 2, 0], [0, 0, 0], [1e-3, 0, 0], [0, 1e-3, 0], [0, 1e-3, 0]]
    attack = (weight, None, [[0, 0, 5.0]], [2], [[1, 0, 1.5], [0, 0.2, 1]], [2, 2], [2])
    assert prototype_attack(*attack, alpha=1) == 0  # a row of length 1e-3 wins nothing
    assert prototype_attack(*attack, alpha=1, in_use=[0, 1]) == 100


def test_no_class_wins_by_its_bias_alone():
    (weight, bias), _ = masked_head()
    train, labels = blobs(200, 0)
    test, answer = noise(200, 1)  # images that know nothing: named as any class about as often
    shots = np.isin(labels, FORGOTTEN)
    figure = prototype_attack(
        weight, bias + 50, train[shots], labels[shots], test, answer, FORGOTTEN, retained_features=train[~shots]
    )
    assert figure == pytest.approx(100 / 6, abs=8)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_probes_work_with_very_few_images(count):
    arguments = (*blobs(count, d=6), *blobs(5, 1, d=6), FORGOTTEN)
    assert linear_probe(*arguments) == 100
    assert five_shot(*arguments) == 100


def test_few_forgotten_among_many_retained_images_still_count():
    train, labels = blobs(50, 0, noise=0.35)
    few = np.concatenate([np.flatnonzero(labels == k)[: 4 if k in FORGOTTEN else 50] for k in range(6)])
    test, answer = blobs(50, 1, noise=0.35)
    assert linear_probe(train[few], labels[few], test, answer, FORGOTTEN) > 60


def test_linear_probe_is_deterministic_and_limited():
    train, labels = blobs(60, 0, noise=0.5)
    test, answer = blobs(40, 1, noise=0.5)
    first, second = (linear_probe(train, labels, test, answer, FORGOTTEN, seed=1, limit=20) for _ in range(2))
    assert first == second
    order = np.random.default_rng(0).permutation(len(labels))
    everything = linear_probe(train, labels, test, answer, FORGOTTEN, limit=60)
    shuffled = linear_probe(train[order], labels[order], test, answer, FORGOTTEN, limit=60)
    assert shuffled == pytest.approx(everything, abs=2.5), "the order of images does not matter but for the hold-out"


def test_linear_probe_finds_what_is_small_and_ignores_constants():
    (train, labels), (test, answer) = blobs(20, 0), blobs(20, 1)
    small = np.r_[np.full(6, 1e-3), np.full(6, 1e3)]  # the corners live in the first six directions
    train, test = train * small, test * small
    padded = [np.hstack([values, np.full((len(values), 2), 7.0)]) for values in (train, test)]
    assert linear_probe(padded[0], labels, padded[1], answer, FORGOTTEN) == 100


def test_linear_probe_beats_class_means_where_directions_differ_in_spread():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    features = np.stack([rng.normal(size=400) * 50, (2 * labels - 1) + 0.1 * rng.normal(size=400)], axis=1)
    train, test = slice(0, None, 2), slice(1, None, 2)
    arguments = (features[train], labels[train], features[test], labels[test], [0, 1])
    assert linear_probe(*arguments) == 100
    assert nearest_class_mean(*arguments) < 90


def test_only_tested_classes_are_counted():
    train, labels = blobs(10)
    test, answer = blobs(10, 1)
    wrong = test.copy()
    wrong[~np.isin(answer, FORGOTTEN)] *= -1  # all retained test images are spoilt
    for probe in (nearest_class_mean, five_shot, linear_probe):
        assert probe(train, labels, wrong, answer, FORGOTTEN) == 100


@pytest.mark.parametrize("probe", [nearest_class_mean, five_shot, linear_probe])
def test_what_cannot_be_probed_is_refused(probe):
    train, labels = blobs(3)
    with pytest.raises(ValueError, match="class 9 has no training images"):
        probe(train, labels, train, np.full_like(labels, 9), [9])
    with pytest.raises(ValueError, match="no test images"):
        probe(train, labels, train[labels == 0], labels[labels == 0], [1])
    with pytest.raises(ValueError, match=r"\[N, d\] and \[N\]"):
        probe(train, labels[:-1], train, labels, [1])
    with pytest.raises(ValueError, match=r"must be \[N, d\]"):
        probe(train[:, 0], labels, train, labels, [1])
    broken = train.copy()
    broken[0, 0] = np.nan
    with pytest.raises(RequestError) as error:
        probe(broken, labels, train, labels, [1])
    assert error.value.kind == "nan_features"


def test_other_refusals():
    train, labels = blobs(3)
    with pytest.raises(ValueError, match="two classes"):
        linear_probe(train[labels == 1], labels[labels == 1], train, labels, [1])
    with pytest.raises(ValueError, match="at least 1"):
        five_shot(train, labels, train, labels, [1], shots=0)
    with pytest.raises(ValueError, match=r"\[K, d\] and \[K\]"):
        prototype_attack(np.eye(6, 12), np.zeros(5), train, labels, train, labels, [1])


def test_excess_by_hand():
    assert probe_excess(80, 77, 89) == 0.25
    assert probe_excess(77, 77, 89) == 0
    assert probe_excess(89, 77, 89) == 1
    assert probe_excess(71, 77, 89) == -0.5
    assert probe_excess(80, 80, 80) is None
    assert probe_excess(80, 90, 80) is None


@pytest.mark.parametrize(
    ("subject", "never", "original", "verdict"),
    [
        (80, 77, 89, "pass"),  # exactly 0.25
        (80.1, 77, 89, "fail"),
        (60, 77, 89, "pass"),
        (79, 77, 84.9, "pass"),  # little room: 2 points
        (79.1, 77, 84.9, "fail"),
        (79, 77, 85, "pass"),  # 8 points of room: the ratio, 0.25
        (79.1, 77, 85, "fail"),
        (77, 77, 81, "pass"),
        (77, 77, 80.9, "inconclusive"),
        (99, 77, 70, "inconclusive"),
    ],
)
def test_excess_verdicts(subject, never, original, verdict):
    assert excess_verdict(subject, never, original) == verdict


def test_excess_threshold_is_the_callers():
    assert excess_verdict(83, 77, 89, threshold=0.5) == "pass"
    assert excess_verdict(83, 77, 89, threshold=0.4) == "fail"


def test_unit_rows():
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0, 0]]
    assert math.isclose(float(np.linalg.norm(unit(np.array([[1.0, 1.0]])))), 1.0)
