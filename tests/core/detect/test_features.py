"""Probes on queries: the query on each object, and a verdict that sees what a masked head hides."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gsforget.audit.checks import Limits
from gsforget.errors import RequestError
from gsforget.tasks.base import Seen
from gsforget.tasks.detect.coco import Scene
from gsforget.tasks.detect.families import FAMILIES
from gsforget.tasks.detect.features import Looked, Objects, Probed, choose, objects_of, standard

KINDS, WIDTH = 6, 12


def scene(boxes, kinds, crowd=None, name="x.png"):
    crowd = np.zeros(len(kinds), bool) if crowd is None else np.array(crowd)
    return Scene(Path(name), (40, 20), np.array(boxes, np.float32), np.array(kinds), crowd, (40, 20))


def test_an_object_is_read_where_a_box_covers_it_best():
    centred = torch.tensor(
        [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.75, 0.5, 0.4, 1.0]]
    )  # left half, right, right
    seen = Seen(
        torch.zeros(2, 3, 4), more={"boxes": centred.repeat(2, 1, 1), "queries": torch.arange(6.0).view(2, 3, 1)}
    )
    scenes = [
        scene([[20, 0, 20, 20], [0, 0, 20, 20], [0, 0, 40, 20]], [3, 1, 2], [False, False, True]),
        scene([[22, 0, 16, 20]], [0]),
    ]
    found = objects_of(seen, scenes)
    np.testing.assert_array_equal(found.kinds, [3, 1, 0])  # the crowd is left out
    np.testing.assert_array_equal(found.features[:, 0], [1, 0, 5])
    empty = objects_of(seen, [scene(np.zeros((0, 4)), []), scene(np.zeros((0, 4)), [])])
    assert empty.features.shape == (0, 1)


def test_scenes_are_chosen_until_each_kind_is_there_often_enough():
    scenes = [scene([[0, 0, 5, 5]] * 2, [n % 3, 3], name=f"{n}.png") for n in range(90)]
    chosen = choose(scenes, [0, 1], 5, 0)
    counts = np.bincount(np.concatenate([s.kinds for s in chosen]), minlength=4)
    assert counts[:3].tolist() == [5, 5, 0]
    assert [s.path for s in choose(scenes, [0, 1], 5, 0)] == [s.path for s in chosen]
    assert [s.path for s in choose(scenes, [0, 1], 5, 1)] != [s.path for s in chosen]
    assert len(choose(scenes, [2], 500, 0)) == 30


def detector(centres, seed=0, head=None):
    """Objects around a centre for each kind, 60 to train a probe and 40 to test it with; the test ones of kinds 0 and 1."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(KINDS), 60)
    train = Objects((centres[kinds] + rng.normal(0, 0.5, (len(kinds), WIDTH))).astype(np.float32), kinds)
    asked = np.repeat([0, 1], 40)
    test = Objects((centres[asked] + rng.normal(0, 0.5, (len(asked), WIDTH))).astype(np.float32), asked)
    return Probed(torch.nn.Identity(), train, test, centres if head is None else head, np.zeros(KINDS))


@pytest.fixture
def sides():
    """Original, and a detector that never saw kinds 0 and 1: both lie on one heap."""
    centres = np.eye(KINDS, WIDTH) * 4
    blind = centres.copy()
    blind[:2] = 0
    return {"original": detector(centres), "reference": detector(blind, 1)}, centres, blind


def looked():
    return Looked(FAMILIES["rt_detr"], [0, 1], [2, 3, 4, 5], [], [], np.load, torch.device("cpu"), 8)


def test_a_masked_head_fails_and_what_never_saw_the_kinds_passes(sides):
    others, centres, blind = sides
    masked = centres.copy()
    masked[:2] = 0
    for subject, verdict in ((detector(centres, 2, masked), "fail"), (detector(blind, 2), "pass")):
        checks, details = standard({"subject": subject, **others}, looked(), Limits())
        assert {c.name for c in checks} == {"prototype_attack", "five_shot", "linear_probe_excess"}
        assert {c.verdict for c in checks} == {verdict}, checks
        assert details["linear_probe"]["original"] > 95
        curve = details["relearning"]["head"]
        assert curve["original"][0] > 95
        assert (curve["subject"][-1] > 95) == (verdict == "fail")


def test_without_a_reference_nothing_is_judged(sides):
    others, _, _ = sides
    checks, details = standard({"subject": others["original"], "original": None, "reference": None}, looked(), Limits())
    assert {c.verdict for c in checks} == {"inconclusive"}
    assert details["linear_probe"]["reference"] is None


def test_never_seen_folders_are_of_classifiers(detector_of, squares, tmp_path):
    import gsforget

    model = detector_of(["red", "green", "blue", "white"])
    with pytest.raises(RequestError, match="--never-seen is about folders") as caught:
        gsforget.audit_model(model, squares, classes=["red"], never_seen=["white"], out=tmp_path)
    assert caught.value.kind == "not_for_detection"
