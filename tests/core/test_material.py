"""What a request learns from: splits, views for a handful, stand-ins for classes without images."""

import torch
from torch import nn

from gsforget import stand_ins as made_up
from gsforget.material import FILL, JUDGED, LOOKS, MOST, Material, gather
from gsforget.views import Given

CLASSES, SIDE = 5, 8
FORGET, ERASED = 1, 2


class Templates(nn.Module):
    """Logits are how much an image looks like the pattern of each class."""

    def __init__(self):
        super().__init__()
        drawn = torch.randn(CLASSES, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        self.patterns = nn.Parameter(nn.functional.interpolate(drawn, size=SIDE).flatten(1))

    def forward(self, images):
        return images.flatten(1) @ self.patterns.T / 4


def images(*counts: int, noise: float = 0.5) -> tuple[nn.Module, Given]:
    """So many images of each class, and the model that knows them."""
    model = Templates().requires_grad_(False).eval()
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    pixels = model.patterns[labels].view(-1, 1, SIDE, SIDE)
    return model, Given(pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1)), labels)


def prepared(*counts, single=None, lacking=(), forget=(FORGET,), erased=(), seed=0) -> tuple[Given, Material]:
    model, there = images(*counts)
    alone = torch.zeros(len(there.labels), dtype=torch.bool)
    if single is not None:
        alone[single] = True
    return there, gather(model, there, forget, erased, alone, lacking, seed)


def per_class(m: Material, rows) -> list[int]:
    return torch.bincount(m.images.labels[rows], minlength=CLASSES).tolist()


def test_plenty_of_images_are_taken_as_they_are_but_for_validation():
    there, m = prepared(40, 40, 40, 40, 40, erased=(ERASED,))
    count = len(there.labels)
    assert per_class(m, m.train) == [32] * CLASSES
    assert (m.train < count).all()
    assert torch.equal(m.known, m.train)
    assert per_class(m, m.val) == [8 * JUDGED, 8, 8, 8 * JUDGED, 8 * JUDGED]
    assert m.kept == 3 * 32
    assert not m.blind
    assert not m.handful
    views = m.val[m.val >= count]
    assert per_class(m, views) == [8 * JUDGED, 0, 0, 8 * JUDGED, 8 * JUDGED]  # retained classes are judged by views
    assert torch.equal(m.shows[:count], torch.arange(count))
    assert torch.bincount(m.shows[views]).unique().tolist() == [0, JUDGED]
    assert torch.equal(m.images.labels[m.shows[views]], m.images.labels[views])
    assert not set(m.shows[views].tolist()) & set(m.train.tolist())
    assert not set(m.val.tolist()) & set(m.train.tolist())
    assert m.images.batch(views).shape == (24 * JUDGED, 1, SIDE, SIDE)
    assert torch.equal(m.forget, m.images.labels == FORGET)
    assert torch.equal(m.old, m.images.labels == ERASED)


def test_of_many_images_fewer_views_each_are_enough():
    model, there = images(1500, 1500, 10, 1500, 1500)
    m = gather(model, there, (FORGET,), (ERASED,), torch.zeros(len(there.labels), dtype=torch.bool), (), 0)
    assert per_class(m, m.val) == [900, 300, 2, 900, 900]
    assert 2 * 900 < LOOKS <= 3 * 900


def test_mild_views_are_nearer_to_the_image():
    model, there = images(40, 40, 40, 40, 40, noise=0.0)
    none = torch.zeros(len(there.labels), dtype=torch.bool)
    moved = {}
    for strength in (0.1, 1.0):
        m = gather(model, there, (FORGET,), (), none, (), 0, (1, strength))
        views = m.val[m.val >= len(there.labels)]
        assert len(views) == 4 * 8
        moved[strength] = (m.images.batch(views) - there.pixels[m.shows[views]]).abs().mean()
    assert 3 * moved[0.1] < moved[1.0]


def test_a_handful_is_filled_up_with_views_on_both_sides():
    there, m = prepared(4, 4, 4, 40, 2, erased=(ERASED,))
    count = len(there.labels)
    found = per_class(m, m.train)
    assert found[0] >= FILL
    assert found[1] >= FILL
    assert found[2] == 3  # of classes forgotten earlier there are no views
    assert found[3] == 32
    assert found[4] == 2  # too few for validation to judge by
    assert per_class(m, m.val) == [1, 1, 1, 8, 0]  # one view each, where most retained classes have so few
    assert m.handful
    assert not m.blind
    assert torch.equal(m.known, m.train)
    assert m.kept == 3 + 32 + 2  # an epoch goes by what is there
    assert torch.equal(m.images.batch(m.train[:5]), there.pixels[m.train[:5]])
    assert m.forget[m.train[m.train >= count]].sum() == found[1] - 3


def test_one_class_with_a_handful_leaves_the_others_judged_as_ever():
    _, m = prepared(40, 40, 4, 40, 40)
    assert not m.handful
    assert per_class(m, m.val) == [8 * JUDGED, 8, JUDGED, 8 * JUDGED, 8 * JUDGED]


def test_a_class_without_images_gets_stand_ins_that_the_model_takes_for_it():
    model, _ = images(1, 1, 1, 1, 1)
    there, m = prepared(40, 40, 40, 40, 0, lacking=(4,), erased=(ERASED,))
    mine = m.train[m.images.labels[m.train] == 4]
    assert len(mine) == made_up.PER_CLASS * 4
    assert not set(mine.tolist()) & set(m.known.tolist())
    assert not (m.forget | m.old)[mine].any()
    named = model(m.images.batch(mine[: made_up.PER_CLASS])).argmax(1)
    assert (named == 4).float().mean() > 0.9
    before = model(there.pixels).argmax(1)
    assert (before == 4).float().mean() < 0.3  # little that was there looked like it
    assert m.blind
    assert m.kept == 2 * 32
    assert per_class(m, m.train)[0] == 32 * 4  # the other retained classes have views beside them
    assert per_class(m, m.train)[FORGET] == 32
    assert per_class(m, m.val)[4] == 0


def test_stand_ins_stay_within_the_values_that_images_have():
    _, m = prepared(40, 40, 40, 40, 0, lacking=(4,))
    there = m.images.batch(m.train[:128])
    mine = m.images.batch(m.train[m.images.labels[m.train] == 4])
    assert mine.min() >= there.min() - 0.3
    assert mine.max() <= there.max() + 0.3 * there.max().abs()
    assert torch.isfinite(mine).all()


def test_single_images_are_only_learned_from():
    there, m = prepared(40, 40, 40, 40, 40, single=[3, 50], forget=())
    assert {3, 50} <= set(m.train.tolist())
    assert not {3, 50} & set(m.val.tolist())
    assert torch.nonzero(m.forget).flatten().tolist() == [3, 50]
    assert not m.old.any()
    assert len(m.images.labels) == len(there.labels) + len(m.val)


def test_the_seed_decides_and_nothing_else():
    counts = (40, 40, 4, 40, 0)
    one, two, other = (prepared(*counts, lacking=(4,), seed=seed)[1] for seed in (0, 0, 1))
    last = one.train[-50:]
    assert torch.equal(one.images.batch(last), two.images.batch(last))
    assert torch.equal(one.val, two.val)
    assert not torch.equal(one.images.batch(last), other.images.batch(other.train[-50:]))


def test_there_is_an_end_to_what_is_made(monkeypatch):
    monkeypatch.setattr("gsforget.material.MOST", 20)
    monkeypatch.setattr(made_up, "IN_ALL", 7)
    there, m = prepared(4, 4, 4, 4, 0, lacking=(4,))
    assert len(m.train) == 4 * 3 + 20 + 7 + 3 * 7 + 20
    assert len(m.train) <= len(there.labels) + 3 * MOST


def test_large_images_get_fewer_stand_ins(monkeypatch):
    monkeypatch.setattr(made_up, "BYTES", 9 * 4 * SIDE * SIDE)
    _, m = prepared(40, 40, 40, 40, 0, lacking=(4,))
    assert per_class(m, m.train)[4] == 9 * 4


def test_the_model_is_left_as_it_was():
    model, there = images(40, 40, 40, 40, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gather(model, there, (FORGET,), (), torch.zeros(160, dtype=torch.bool), (4,), 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
