"""Open-set figures against cases that can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget import RequestError
from gsforget.tasks.face import verification as v
from gsforget.tasks.face.evidence import FaceFigures, People, open_set


def at_angles(*degrees):
    """Embeddings in the plane."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def test_pairs_of_two_people():
    genuine, owners, impostors = v.pairs(at_angles(0, 60, 90, 90), np.array([3, 3, 7, 7]))
    assert genuine == pytest.approx([0.5, 1.0])
    assert owners.tolist() == [3, 7]
    assert sorted(impostors) == pytest.approx(sorted([0, 0, np.cos(np.pi / 6), np.cos(np.pi / 6)]))


def test_threshold_lets_exactly_the_asked_share_pass():
    impostors = np.arange(1000) / 1000
    at = v.threshold(impostors, 0.01)
    assert (at.cosine, at.far, at.impostors) == (0.989, 0.01, 1000)


def test_with_few_impostors_one_of_them_passes():
    at = v.threshold(np.array([0.1, 0.5, 0.3]), 1e-3)
    assert at.cosine == 0.3
    assert at.far == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="impostors"):
        v.threshold(np.array([]))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=200), st.sampled_from([1e-3, 0.01, 0.1, 0.5]))
@settings(max_examples=100, deadline=None)
def test_never_more_impostors_pass_than_asked_or_one(scores, far):
    at = v.threshold(np.array(scores), far)
    assert at.far * len(scores) <= max(1, far * len(scores)) + 1e-6


def test_accept_rate_counts_pairs_above_the_threshold():
    at = v.Threshold(0.5, 1e-3, 1e-3, 1000)
    found = v.accept_rate(np.array([0.4, 0.5, 0.6, 0.9]), np.array([0, 0, 1, 1]), at)
    assert (found.right, found.count, found.percent) == (2, 4, 50.0)
    assert (found.low, found.high) == (0.0, 100.0)  # two people, one never and one always
    assert v.accept_rate(np.array([0.4, 0.6]), np.array([1, 1]), at).low is None  # one person says nothing of others


def test_difference_of_equal_groups_is_zero_and_of_distinct_ones_is_not():
    ones, zeros, ids = np.ones(40), np.zeros(40), np.arange(40) // 4
    assert v.difference(ones, ids, ones, ids) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert v.difference(ones, ids, zeros, ids) == {"value": 1.0, "low": 1.0, "high": 1.0}
    rng = np.random.default_rng(0)
    first, second = rng.random(400), rng.random(400)
    found = v.difference(first, np.arange(400) // 10, second, np.arange(400) // 10)
    assert found["low"] < found["value"] < found["high"]
    assert found["low"] < 0.05
    assert found["high"] > -0.05


def test_templates_and_halves():
    made, people = v.templates(at_angles(0, 90, 180), np.array([5, 5, 2]))
    assert people.tolist() == [2, 5]
    np.testing.assert_allclose(made, at_angles(180, 45), atol=1e-12)
    assert v.halves(np.array([1, 2, 1, 2, 2])).tolist() == [True, True, False, True, False]
    assert v.halves(np.array([1])).tolist() == [True]


def test_rank_one_and_whom_strangers_are_taken_for():
    gallery, people = at_angles(0, 90), np.array([4, 9])
    probes = at_angles(10, 80, 10, 200)
    assert v.rank_one(probes[:3], np.array([4, 9, 9]), gallery, people).tolist() == [True, True, False]
    said = v.mistaken_for(probes, gallery, people, v.Threshold(0.9, 0, 0, 1))
    assert said.tolist() == [4, 9, 4, -1]
    found = v.mistaken(said, np.array([0, 0, 0, 1]))
    assert [(m.person, m.other, m.most, m.count) for m in found] == [(0, 4, 2, 3), (1, -1, 0, 1)]
    assert v.worst(found).person == 0
    low, high = v.worst(found).interval
    assert 0 < low < 100 * 2 / 3 < high < 100


def world(spread, seed=0):
    """Five retained people, two forgotten and two never seen in 16 dimensions; `spread` of each group's images."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((9, 16)) * 3
    groups = {"retain": [0, 1, 2, 3, 4], "forget": [5, 6], "old": [], "never_seen": [7, 8]}
    scale = {k: spread[g] for g, people in groups.items() for k in people}
    ids = np.repeat(np.arange(9), 12)
    images = np.stack([centres[k] * (scale[k] < 9) + scale[k] * rng.standard_normal(16) for k in ids])
    return People(images / np.linalg.norm(images, axis=1, keepdims=True), ids, groups)


TIGHT = {"retain": 0.3, "forget": 0.3, "never_seen": 3.0}


def test_forgotten_people_who_scatter_pass_and_who_still_verify_do_not():
    before = open_set(world(TIGHT))
    assert before.tar["retain"].percent == 100
    assert before.rank_one["forget"].percent == 100
    names = [str(k) for k in range(9)]
    gone = FaceFigures(before, open_set(world({**TIGHT, "forget": 9.0})), names)
    there = FaceFigures(before, open_set(world(TIGHT)), names)
    passed = [{g.name: g.passed for g in f.gates(1.0)} for f in (gone, there)]
    assert passed[0] == {"retain_tar_drop": True, "forget_tar": True, "misattribution": True}
    assert passed[1]["forget_tar"] is False
    assert there.excess()["value"] > 10


def test_retained_people_who_no_longer_verify_breach():
    figures = FaceFigures(open_set(world(TIGHT)), open_set(world({**TIGHT, "retain": 4.0})), [])
    gate = next(g for g in figures.gates(1.0) if g.name == "retain_tar_drop")
    assert not gate.passed
    assert gate.value > 10


def test_whoever_enrols_new_people_later_is_told_that_they_verify_worse():
    tight, loose = ({**TIGHT, "never_seen": spread} for spread in (0.3, 6.0))
    worse = FaceFigures(open_set(world(tight)), open_set(world(loose)), list("abcdefghi"))
    (said,) = worse.warnings(1.0)
    assert "100.0 % of their pairs before" in said
    assert worse.to_json()["never_seen_tar_drop"]["low"] > 1
    assert FaceFigures(open_set(world(tight)), open_set(world(tight)), []).warnings(1.0) == []
    assert FaceFigures(open_set(world(loose)), open_set(world(tight)), []).warnings(1.0) == []


def test_a_forgotten_person_taken_for_one_retained_person_breaches():
    after = world({**TIGHT, "forget": 9.0})
    moved = after.embeddings.copy()
    moved[after.identities == 5] = moved[after.identities == 0]
    figures = FaceFigures(
        open_set(world(TIGHT)), open_set(People(moved, after.identities, after.groups)), list("abcdefghi")
    )
    gate = next(g for g in figures.gates(1.0) if g.name == "misattribution")
    assert not gate.passed
    assert gate.class_index == 5
    section = figures.to_json()["misattribution"]["forget"]["after"]
    assert (section["person"], section["taken_for"], section["percent"]) == ("f", "a", 100.0)


def test_without_never_seen_people_nothing_is_compared():
    people = world(TIGHT)
    alone = People(people.embeddings, people.identities, {**people.groups, "never_seen": []})
    figures = FaceFigures(open_set(alone), open_set(alone), list("abcdefg"))
    assert [g.name for g in figures.gates(1.0)] == ["retain_tar_drop"]
    assert any("--never-seen" in said for said in figures.not_tested())
    assert figures.warnings(1.0) == []
    assert figures.to_json()["never_seen"]["after"] == {"tar": None, "rank_one": None, "cosine": None}


def test_people_forgotten_earlier_are_judged_too():
    """Those who verify again breach `old_tar`, and count among those who may be taken for somebody else."""
    names = [str(k) for k in range(9)]
    people = world({**TIGHT, "forget": 9.0})
    groups = {**people.groups, "forget": [5], "old": [6]}
    again = people.embeddings.copy()
    again[people.identities == 6] = world(TIGHT).embeddings[people.identities == 6]
    before = open_set(People(world(TIGHT).embeddings, people.identities, groups))
    gone, back = (
        FaceFigures(before, open_set(People(e, people.identities, groups)), names) for e in (people.embeddings, again)
    )
    passed = [{g.name: g.passed for g in f.gates(1.0)} for f in (gone, back)]
    assert passed[0]["old_tar"]
    assert not passed[1]["old_tar"]
    assert passed[1]["forget_tar"]
    moved = people.embeddings.copy()
    moved[people.identities == 6] = moved[people.identities == 0]
    taken = FaceFigures(before, open_set(People(moved, people.identities, groups)), names)
    gate = next(g for g in taken.gates(1.0) if g.name == "misattribution")
    assert (gate.passed, gate.class_index) == (False, 6)


def test_one_retained_person_tells_nothing():
    people = world(TIGHT)
    with pytest.raises(RequestError, match="two retained people") as caught:
        open_set(People(people.embeddings, people.identities, {**people.groups, "retain": [2]}))
    assert caught.value.kind == "few_people"


def test_what_one_image_cannot_show_is_said():
    people = world(TIGHT)
    kept = np.ones(len(people.identities), bool)
    for k in (5, 6):
        kept[np.flatnonzero(people.identities == k)[1:]] = False
    groups = {**people.groups, "forget": [5], "old": [6]}
    alone = open_set(People(people.embeddings[kept], people.identities[kept], groups))
    said = FaceFigures(alone, alone, []).not_tested()
    assert any("the earlier forgotten people: nobody of them has two test images" in text for text in said)
    assert any("the forgotten people: nobody of them has two test images" in text for text in said)
    assert not any("--never-seen" in text for text in said)
