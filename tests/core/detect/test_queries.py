"""The objects of a request by the queries on them: the audit's objects, and opponents that look at forgotten ones alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.export.device.detections import to_corners
from gsforget.tasks.base import Seen
from gsforget.tasks.detect.ap import overlaps
from gsforget.tasks.detect.boxes import centred, iou
from gsforget.tasks.detect.coco import Scene
from gsforget.tasks.detect.features import objects_of
from gsforget.tasks.detect.losses import targets_of
from gsforget.tasks.detect.queries import ObjectQueries

FRAME, KINDS, QUERIES, WIDTH = (40, 20), 4, 5, 6


def scenes_of(rng, counts):
    """Random objects on images, so many on each."""
    found = []
    for n, count in enumerate(counts):
        sizes = rng.uniform(3, 15, (count, 2))
        corners = rng.uniform(0, 1, (count, 2)) * (np.array(FRAME) - sizes)
        boxes = np.concatenate([corners, sizes], 1).astype(np.float32)
        kinds = rng.integers(0, KINDS, count)
        found.append(Scene(Path(f"{n}.png"), FRAME, boxes, kinds, np.zeros(count, bool), FRAME))
    return found


def seen_of(rng, count, width=WIDTH):
    boxes = rng.uniform(0.1, 0.5, (count, QUERIES, 4)) + np.array([0.2, 0.2, 0, 0])
    queries = rng.normal(size=(count, QUERIES, width))
    more = {"boxes": boxes, "queries": queries}
    return Seen(torch.zeros(count, QUERIES, KINDS), more={k: torch.from_numpy(v).float() for k, v in more.items()})


def objects(scenes, seen, gone=(1,), train=None):
    targets = targets_of(scenes)
    train = torch.arange(len(scenes)) if train is None else train
    return ObjectQueries(targets.kinds, targets.boxes, seen, train, torch.tensor(gone))


def test_iou_is_that_of_the_evaluator():
    rng = np.random.default_rng(0)
    scenes, seen = scenes_of(rng, [4]), seen_of(rng, 1)
    mine = iou(torch.from_numpy(centred(scenes[0].boxes, FRAME))[:, None], seen.more["boxes"])
    edges = to_corners(seen.more["boxes"][0].numpy()) * np.array([*FRAME, *FRAME])
    said = np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], 1)
    theirs = overlaps(said, scenes[0].boxes.astype(np.float64), np.zeros(4, bool))
    np.testing.assert_allclose(mine.numpy(), theirs.T, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any), st.integers(0, 10**6))
def test_objects_are_those_of_the_audit_in_whatever_order_the_images_come(counts, seed):
    rng = np.random.default_rng(seed)
    scenes, seen = scenes_of(rng, counts), seen_of(rng, len(counts))
    mine = objects(scenes, seen)
    rows = torch.from_numpy(rng.permutation(len(counts))[: 1 + seed % len(counts)])
    asked = mine.on(rows)
    theirs = objects_of(seen.rows(rows), [scenes[r] for r in rows.tolist()])
    np.testing.assert_array_equal(mine.labels[asked].numpy(), theirs.kinds)
    if len(asked):
        found = mine.features(seen.rows(rows), rows, asked)
        np.testing.assert_array_equal(found.numpy(), theirs.features)


def clusters(spread):
    """200 images with one object each, the features of its query around a centre of its kind."""
    rng = np.random.default_rng(1)
    scenes, seen = scenes_of(rng, [1] * 200), seen_of(rng, 200)
    kinds = torch.tensor([int(s.kinds[0]) for s in scenes])
    centres = 4 * torch.eye(KINDS, WIDTH)
    seen.more["queries"][:] = centres[kinds][:, None] + spread * seen.more["queries"]
    return scenes, seen, kinds


def test_opponents_look_at_forgotten_objects_alone():
    scenes, seen, kinds = clusters(0.5)
    mine, rows = objects(scenes, seen), torch.arange(0, 200, 3)
    assert mine.opposed
    seen.more["queries"].requires_grad_()
    mine.loss(seen.rows(rows), rows).backward()
    pulled = seen.more["queries"].grad.abs().sum((1, 2)) > 0
    assert pulled[rows].tolist() == (kinds[rows] == 1).tolist()
    assert not pulled[torch.isin(torch.arange(200), rows, invert=True)].any()


def test_a_step_down_the_loss_leaves_the_probe_less():
    scenes, seen, _ = clusters(0.5)
    mine, rows = objects(scenes, seen), torch.arange(200)
    named = mine.named(seen, rows)
    assert len(named) == int(mine.gone.sum())
    assert named.float().mean() > 0.95
    queries = seen.more["queries"].clone().requires_grad_()
    optimiser = torch.optim.Adam([queries], 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        mine.loss(Seen(seen.outputs, more={**seen.more, "queries": queries}), rows).backward()
        optimiser.step()
    after = Seen(seen.outputs, more={**seen.more, "queries": queries.detach()})
    assert mine.named(after, rows).float().mean() < 0.4


def test_only_training_images_teach_the_opponents():
    scenes, seen, _ = clusters(0.5)
    mine = objects(scenes, seen, train=torch.arange(120))
    assert mine.separability.among_all.rows.tolist() == list(range(120))


def test_too_few_objects_oppose_nothing_and_cost_nothing():
    rng = np.random.default_rng(2)
    scenes, seen = scenes_of(rng, [1, 0, 1]), seen_of(rng, 3)
    mine = objects(scenes, seen)
    assert not mine.opposed
    assert mine.loss(seen, torch.arange(3)).item() == 0
    assert mine.loss(seen.rows(torch.tensor([1])), torch.tensor([1])).item() == pytest.approx(0)
