"""AP is that of COCO's evaluators, and its bounds come from images drawn anew."""

from pathlib import Path

import numpy as np
import pytest

from gsforget.export.device.detections import Found
from gsforget.tasks.detect import evaluate
from gsforget.tasks.detect.ap import bootstrap, match
from gsforget.tasks.detect.coco import Scene

SIZE = 96


def random_answers(images=60, kinds=3, queries=10):
    """Scenes with crowds, and detections near objects and elsewhere, with many equal scores."""
    rng = np.random.default_rng(0)
    scenes, scores, named, boxes = [], [], [], []
    for _ in range(images):
        count = int(rng.integers(0, 6))
        objects = np.concatenate([rng.uniform(0, 60, (count, 2)), rng.uniform(8, 36, (count, 2))], 1).astype(np.float32)
        is_of, crowd = rng.integers(0, kinds, count), rng.random(count) < 0.15
        scenes.append(Scene(Path("x.png"), (SIZE, SIZE), objects, is_of, crowd, (SIZE, SIZE)))
        said = np.concatenate([rng.uniform(0, 60, (queries, 2)), rng.uniform(8, 36, (queries, 2))], 1)
        kind, score = rng.integers(0, kinds, queries), rng.random(queries).round(1)
        said[:count] = objects + rng.normal(0, 2, (count, 4))
        kind[:count] = np.where(rng.random(count) < 0.8, is_of, kind[:count])
        order = np.argsort(-score, kind="stable")
        corners = np.concatenate([said[:, :2], said[:, :2] + said[:, 2:].clip(1)], 1) / SIZE
        scores.append(score[order]), named.append(kind[order]), boxes.append(corners[order])
    return scenes, Found(np.array(scores, np.float32), np.array(named), np.array(boxes, np.float32))


@pytest.mark.parametrize("package", ["faster_coco_eval", "pycocotools"])
def test_own_ap_is_that_of_a_coco_evaluator(package, monkeypatch):
    pytest.importorskip(package)
    if package == "pycocotools":
        monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    scenes, found = random_answers()
    theirs = evaluate.coco_ap(found, scenes, [0, 1, 2])
    for kind in range(3):
        ours = 100 * match(found, scenes, kind).ap()
        assert ours.mean() == pytest.approx(theirs[kind][0], abs=1e-6)
        assert ours[0] == pytest.approx(theirs[kind][1], abs=1e-6)
    assert 5 < theirs[0][1] < 80


def test_perfect_detections_have_ap_1_and_no_spread():
    scenes, _ = random_answers(20)
    most = max(len(s.kinds) for s in scenes)
    scores, kinds, boxes = (
        np.zeros((20, most, *tail), t) for tail, t in (((), np.float32), ((), int), ((4,), np.float32))
    )
    for n, s in enumerate(scenes):
        here = len(s.kinds)
        scores[n, :here], kinds[n, :here], kinds[n, here:] = 1, s.kinds, -1
        boxes[n, :here] = np.concatenate([s.boxes[:, :2], s.boxes[:, :2] + s.boxes[:, 2:]], 1) / SIZE
    matches = [match(Found(scores, kinds, boxes), scenes, k) for k in range(3)]
    assert all(m.ap() == pytest.approx(1) for m in matches)
    drawn = bootstrap(matches, 0, 20)
    assert drawn.shape == (20, 3, 10)
    assert np.nanmin(drawn) == pytest.approx(1)


def test_an_image_that_counts_twice_is_an_image_that_is_there_twice():
    scenes, found = random_answers(20)
    times = np.ones(20, np.int64)
    times[3], times[5] = 2, 0
    rows = [*range(20), 3]
    rows.remove(5)
    again = Found(found.scores[rows], found.kinds[rows], found.boxes[rows])
    copied = match(again, [scenes[r] for r in rows], 1).ap()
    assert match(found, scenes, 1).ap(times) == pytest.approx(copied, abs=2e-2)  # equal scores may change their order


def test_a_kind_without_objects_has_no_ap():
    scenes, found = random_answers(5)
    assert np.isnan(match(found, scenes, 7).ap()).all()
    assert np.isnan(evaluate.coco_ap(found, scenes, [0, 7])[7]).all()
