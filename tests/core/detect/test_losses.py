"""What the losses of a request to a detector ask for, and what they leave alone."""

import dataclasses

import pytest
import torch

from gsforget.tasks.base import Seen
from gsforget.tasks.detect.boxes import centred, giou
from gsforget.tasks.detect.coco import open_scenes
from gsforget.tasks.detect.families import FAMILIES
from gsforget.tasks.detect.losses import Detection, Targets
from gsforget.tasks.detect.models import load_detector, reader

KINDS = ["red", "green", "blue", "white"]


@pytest.fixture(scope="module", params=["rt_detr", "detr"])
def world(request, detectors, squares):
    """An objective that forgets kind 0, over 24 images, and what the detector makes of them."""
    import numpy as np

    model, config = load_detector(detectors[request.param])
    scenes = open_scenes(squares, None, KINDS).train.scenes[:24]
    from gsforget.export.device.preprocess import Preprocess

    load = Preprocess.from_dict(config.to_json()).load
    images = torch.from_numpy(np.stack([load(s.path) for s in scenes]))
    targets = Targets(
        [torch.from_numpy(s.kinds) for s in scenes], [torch.from_numpy(centred(s.boxes, s.frame)) for s in scenes]
    )
    family = FAMILIES[request.param]
    task = Detection(model, family, (0,), (), targets, scenes, method="gs-lora")
    with torch.no_grad():
        before = reader(model, family)(images)
    forget = torch.tensor([bool((s.kinds == 0).any()) for s in scenes])
    objective = task.objective(before, torch.zeros(24), forget, torch.arange(24))
    return task, objective, before, forget


def as_leaves(seen):
    leaves = [t.clone().requires_grad_() for t in seen.tensors]
    return seen.with_tensors(leaves)


def test_at_the_start_answers_and_boxes_are_where_they_should_be(world):
    task, objective, before, _ = world
    if task.family.scoring == "sigmoid":
        taught, _ = objective._taught(before.outputs, before)
        assert taught.item() == pytest.approx(0, abs=1e-3)
    assert objective._boxes(before.more["boxes"], before.more["boxes"], torch.ones(24, 6)).item() == pytest.approx(
        0, abs=1e-4
    )


def test_an_image_that_holds_both_serves_both(world):
    """Its forgotten objects are in the forgotten part, its retained ones in the retained part, none in both."""
    task, _, _, forget = world
    mixed = [r for r in torch.nonzero(forget).flatten().tolist() if (task.targets.kinds[r] != 0).any()]
    assert mixed
    for row in mixed:
        gone = task.targets.of([row], torch.tensor([0]), torch.device("cpu"))[0]
        kept = task.targets.of([row], torch.tensor([1, 2, 3]), torch.device("cpu"))[0]
        assert (gone["class_labels"] == 0).all()
        assert (kept["class_labels"] != 0).all()
        assert len(gone["boxes"]) + len(kept["boxes"]) == len(task.targets.kinds[row])


def test_steps_down_the_losses_take_the_forgotten_kind_down_and_keep_the_boxes(world):
    task, objective, before, forget = world
    rows = torch.arange(24)
    seen = as_leaves(before)
    boxes = seen.more["boxes"].detach().clone()
    rates = [{"params": [seen.outputs]}, {"params": list(seen.more.values()), "lr": 1e-3}]
    optimiser = torch.optim.Adam(rates, 0.05)
    for _ in range(120):
        losses = objective.losses(seen, rows)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
    logits = seen.outputs.detach()
    if task.family.scoring == "sigmoid":
        assert (logits[forget][..., 0] - before.outputs[forget][..., 0]).mean() < -0.2
        change = (logits[..., 1:].sigmoid() - before.outputs[..., 1:].sigmoid()).abs()
        assert change.mean() < 0.1
    else:
        assert logits.softmax(-1)[..., 0].mean() < 0.5 * before.outputs.softmax(-1)[..., 0].mean()
    assert (seen.more["boxes"].detach() - boxes).abs().mean() < 0.2


def test_the_ascent_is_bounded_and_on_the_classification_alone(world):
    """Where the forgotten kind is far below the bound, nothing pushes its logits further; boxes stay in the loss."""
    _, objective, before, forget = world
    rows = torch.nonzero(forget).flatten()[:4]
    low = before.rows(rows)
    logits = low.outputs.clone()
    logits[..., 0] = -30.0
    seen = as_leaves(Seen(logits, more=low.more))
    losses = objective.losses(seen, rows)
    losses.forget.backward()
    assert seen.outputs.grad[..., 0].abs().max() < 1e-6
    assert seen.more["boxes"].grad.abs().sum() > 0


def test_queries_that_a_model_chooses_are_compared_with_those_of_the_same_anchor(world):
    task, objective, before, _ = world
    if task.family.anchors is None:
        pytest.skip("learned queries keep their places")
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = before.with_tensors([t[:, order] for t in before.tensors])
    rows = torch.arange(24)
    torch.testing.assert_close(
        objective.losses(shuffled, rows).total, objective.losses(before, rows).total, rtol=1e-4, atol=1e-4
    )


def test_gs_lora_plus_plus_pushes_queries_from_the_heads_row(world):
    task, _, before, forget = world
    both = dataclasses.replace(task, method="gs-lora++").objective(before, torch.zeros(24), forget, torch.arange(24))
    found = both._probabilities(before.outputs)
    # Random weights are sure of nothing: one query on the forgotten kind is made up.
    made = before.outputs.clone()
    made[0, 0] = -9.0
    made[0, 0, 0] = 9.0
    sure = Seen(made, more=before.more)
    seen = as_leaves(before)
    _, push = both._prototypes(seen, sure)
    push.backward()
    gradient = seen.more["queries"].grad
    assert gradient[0, 0].abs().sum() > 0
    assert found.shape[-1] == 4
    away = seen.more["queries"].detach()[0, 0] - 0.1 * gradient[0, 0]
    toward = both.prototypes[0].softmax(-1)

    def divergence(query):
        return (toward * (toward.log() - query.log_softmax(-1))).sum()

    assert divergence(away) > divergence(seen.more["queries"].detach()[0, 0])


def test_giou_of_known_boxes():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
    others = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]])
    assert giou(boxes, others).tolist() == pytest.approx([1.0, -(0.64 - 0.08) / 0.64], abs=1e-5)
