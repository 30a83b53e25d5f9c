"""Losses on a device that cannot be asked for anything: torch's meta device holds no values, and refuses to give any."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from gsforget.tasks.base import Seen
from gsforget.tasks.classify import Classification, default_bound
from gsforget.tasks.classify.samples import SingleImagesObjective
from gsforget.tasks.face.losses import FaceForgetting
from gsforget.there import places

CLASSES, COUNT, WIDTH = 4, 96, 6


def moved(thing):
    """The same with its tensors on the meta device, but for the copies that it keeps on the host, whose names begin so: _."""
    if isinstance(thing, torch.Tensor):
        return thing.to("meta")
    if isinstance(thing, list):
        return [moved(each) for each in thing]
    if type(thing).__module__.startswith("gsforget.") and hasattr(thing, "__dict__"):
        other = copy.copy(thing)
        for name, value in vars(thing).items():
            other.__dict__[name] = value if name.startswith("_") else moved(value)
        return other
    return thing


def objective(kind: str):
    """Of one request on random images: class 1 is to be forgotten, class 2 was, and came back."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % CLASSES
    before = Seen(torch.randn(COUNT, CLASSES, generator=rng), torch.randn(COUNT, WIDTH, generator=rng))
    forget, rows = (labels == 1) | (labels == 2), torch.arange(COUNT)
    if kind == "images":
        return SingleImagesObjective(before.outputs.softmax(1), forget, labels, labels == labels)
    if kind.startswith("face "):
        people = Seen(*(normalize(t) for t in (before.outputs, before.features)))
        return FaceForgetting((1,), (2,), kind.split()[1]).objective(people, labels, forget, rows[labels != 2])
    task = Classification(CLASSES, (1,), (2,), default_bound(CLASSES), kind)
    return task.objective(before, labels, forget, rows[labels != 2])


def seen(device: str, rows: torch.Tensor) -> Seen:
    rng = torch.Generator().manual_seed(1)
    outputs, features = (torch.randn(COUNT, d, generator=rng)[rows] for d in (CLASSES, WIDTH))
    return Seen(outputs.to(device).requires_grad_(), features.to(device).requires_grad_())


@pytest.mark.parametrize("kind", ["gs-lora", "gs-lora++", "images", "face gs-lora", "face gs-lora++"])
@pytest.mark.parametrize(
    "batch", [range(40), range(0, COUNT, 4), range(1, COUNT, 4)], ids=["mixed", "retained", "gone"]
)
def test_losses_and_their_gradients_ask_the_device_for_nothing(kind, batch):
    rows, made = torch.tensor(batch), objective(kind)
    here = made.losses(seen("cpu", rows), rows)  # which also lets it copy to the host what it will know there
    assert here.total.isfinite()
    mine = seen("meta", rows)
    losses = moved(made).losses(mine, rows)
    losses.total.backward()
    assert mine.outputs.grad.shape == mine.outputs.shape
    if made.duel is not None:
        duel = moved(made).duel
        (duel.attack(mine, rows) + duel.defence(mine, rows)).backward()


def test_a_selection_by_flags_does_ask():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(3, device="meta")[torch.zeros(3, dtype=torch.bool, device="meta")]


def test_places_are_where_flags_are_set():
    flags = torch.tensor([False, True, True])
    assert places(flags, torch.device("cpu")).tolist() == [1, 2]
    assert len(places(flags[:1], torch.device("cpu"))) == 0
