"""Losses of forgetting people, against closed forms."""

import pytest
import torch
from torch.nn.functional import normalize

from gsforget.tasks.base import Seen
from gsforget.tasks.face.losses import (
    CONCENTRATION,
    FORGET_WEIGHT,
    NAMED_MARGIN,
    NAMED_WEIGHT,
    PUSH_WEIGHT,
    RETAIN_WEIGHT,
    SCATTER_WEIGHT,
    STRANGER_WEIGHT,
    FaceForgetting,
    prototypes,
    together,
    verified_at,
    without_direction,
)

torch.set_num_threads(1)


def embedded(count=60, width=8, people=4, seed=0):
    torch.manual_seed(seed)
    labels = torch.arange(count) % people
    rows = normalize(torch.randn(people, width))
    z = normalize(2 * rows[labels] + 0.5 * torch.randn(count, width))
    return z, labels, rows


def objective(method="gs-lora"):
    z, labels, rows = embedded()
    forget = labels == 0
    task = FaceForgetting((0,), (), method)
    return task.objective(Seen(z @ rows.T, z), labels, forget, torch.arange(len(z))), z, labels, rows


def test_prototypes_are_means_at_length_one():
    z, labels, _ = embedded()
    found = prototypes(z, labels, 5)
    torch.testing.assert_close(found[2], normalize(z[labels == 2].mean(0), dim=0))
    assert not found[4].any()


def test_targets_have_nothing_of_the_person_in_common():
    made, z, labels, _ = objective()
    mine = made.targets[labels == 0]
    assert (mine @ made.directions[0]).abs().max() < 1e-5
    torch.testing.assert_close(mine.norm(dim=1), torch.ones(len(mine)))
    together = mine @ mine.T
    before = z[labels == 0] @ z[labels == 0].T
    off = ~torch.eye(len(mine), dtype=torch.bool)
    assert together[off].mean() < 0.05 < 0.5 < before[off].mean()


def test_a_person_with_one_image_gets_a_target_at_right_angles():
    z = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(5)))
    rest = without_direction(z, z)
    assert (rest * z).sum(1).abs().max() < 1e-5
    assert torch.equal(rest, without_direction(z, z))  # and the same one each time


def test_nothing_is_lost_where_it_should_be():
    made, z, labels, rows = objective()
    ideal = torch.where((labels == 0)[:, None], made.targets, z)
    everything = torch.arange(len(z))
    at_ideal = made.losses(Seen(ideal @ rows.T, ideal), everything)
    at_first = made.losses(Seen(z @ rows.T, z), everything)
    assert at_ideal.retain.item() == pytest.approx(0, abs=1e-4)
    assert at_ideal.forget < 0.2 * at_first.forget
    away = 1 - (z * made.targets).sum(1)[labels == 0]
    cosines = (z @ rows.T)[labels == 0]
    near = (cosines.amax(1) - made.stranger).relu()
    named = (cosines[:, 0] - cosines[:, 1:].amax(1) + NAMED_MARGIN).relu()
    wanted = CONCENTRATION * (FORGET_WEIGHT * away + STRANGER_WEIGHT * near + NAMED_WEIGHT * named).mean()
    assert at_first.forget.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_head_must_name_somebody_else_by_a_margin_and_no_more():
    """The own row's cosine costs only until it lies the margin below the best other row's; nothing else changes here."""
    made, _, labels, _ = objective()
    mine, best = torch.nonzero(labels == 0).flatten()[:1], 0.3

    def loss(own):
        cosines = torch.tensor([[own, best, 0.1, -0.5]])
        return made.losses(Seen(cosines, made.targets[mine]), mine).forget.item()

    clear = loss(best - NAMED_MARGIN)
    assert loss(-1.0) == pytest.approx(clear, abs=1e-6)
    more = loss(best - 0.5 * NAMED_MARGIN) - clear
    assert more == pytest.approx(CONCENTRATION * NAMED_WEIGHT * 0.5 * NAMED_MARGIN, rel=1e-4)


def test_retained_images_are_held_by_their_cosine():
    made, z, labels, rows = objective()
    kept = torch.nonzero(labels == 1).flatten()
    moved = normalize(z[kept] + 0.3 * torch.randn(len(kept), 8, generator=torch.Generator().manual_seed(3)))
    got = made.losses(Seen(moved @ rows.T, moved), kept)
    assert got.forget.item() == 0
    wanted = RETAIN_WEIGHT * CONCENTRATION * (1 - (moved * z[kept]).sum(1)).mean()
    assert got.total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_gs_lora_pp_pushes_off_the_prototype_and_probes():
    plain, z, labels, rows = objective()
    deep, *_ = objective("gs-lora++")
    assert not plain.deepens
    assert plain.duel is None
    assert deep.deepens
    assert deep.duel is not None
    mine = torch.nonzero(labels == 0).flatten()
    seen = Seen(z[mine] @ rows.T, z[mine])
    pairs = torch.combinations(torch.arange(len(mine)))
    cosines = (z[mine][pairs[:, 0]] * z[mine][pairs[:, 1]]).sum(1)
    at = deep.verified
    near = PUSH_WEIGHT * (z[mine] @ deep.directions[0] - at).relu().mean()
    near += SCATTER_WEIGHT * (cosines - at).relu().mean()
    more = deep.losses(seen, mine, 0.0).forget - plain.losses(seen, mine, 0.0).forget
    assert more.item() == pytest.approx(CONCENTRATION * near.item(), rel=1e-4)
    assert deep.losses(seen, mine, 4.0).forget > deep.losses(seen, mine, 1.0).forget
    assert deep.named(seen, mine).float().mean() > 0.9


def test_people_forgotten_earlier_are_nobodys_neighbours():
    z, labels, rows = embedded()
    task = FaceForgetting((0,), (1,))
    made = task.objective(Seen(z @ rows.T, z), labels, labels == 0, torch.arange(len(z)))
    others = (z @ rows.T).clone()
    others[torch.arange(len(z)), labels] = -1
    wanted = others[labels >= 2][:, 2:].amax(1).quantile(0.99)
    assert made.stranger == pytest.approx(wanted.item(), rel=1e-5)


def test_who_was_forgotten_earlier_and_came_back_is_moved_off_again():
    """Their images join the batches; the probes, which never learned them, have nothing to say about them."""
    z, labels, rows = embedded()
    task = FaceForgetting((0,), (1,), "gs-lora++")
    made = task.objective(Seen(z @ rows.T, z), labels, labels <= 1, torch.nonzero(labels != 1).flatten())
    now, back = (torch.nonzero(labels == k).flatten() for k in (0, 1))
    alone, both = (made.losses(Seen(z[r] @ rows.T, z[r]), r) for r in (now, torch.cat([now, back])))
    assert torch.isfinite(both.forget)
    moved = made.losses(Seen(z[back] @ rows.T, z[back]), back).forget
    assert moved > 0
    assert both.forget != alone.forget


def test_only_images_of_one_person_are_pushed_off_each_other():
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -1]])
    assert together(z, torch.tensor([0, 0, 1, 1]), 0.2).item() == pytest.approx(0.4)  # pairs of cosine 1 and -1
    assert together(z, torch.tensor([0, 1, 2, 0]), 0.2).item() == 0  # far apart: no reward
    assert together(z, torch.arange(4), 0.2).item() == 0  # no pair at all


def test_the_cosine_that_counts_as_verified():
    z, labels, _ = embedded()
    cosines = (z @ z.T)[(labels[:, None] != labels[None]).triu(1)]
    assert verified_at(z, labels) == pytest.approx(max(0, cosines.max().item()))
    assert verified_at(z, torch.zeros_like(labels)) == 0  # one person alone
