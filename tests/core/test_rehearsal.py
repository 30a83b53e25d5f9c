"""Rehearsed relearning: where the weights go, that they come back, and what the gradient is."""

import pytest
import torch
from torch import nn

from gsforget.rehearsal import DISTANCE, Rehearsal, rms, soft_sign, weights_from


def test_the_defence_sees_weights_moved_down_the_attack_and_they_come_back():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    kept, seen = weight.clone(), []
    goal, factor = torch.randn(3, 4), torch.ones((), requires_grad=True)

    def defence():
        seen.append(weight.detach().clone())
        return factor * weight.sum()

    Rehearsal([weight], 0).run(lambda: ((weight - goal) ** 2).sum(), defence)
    assert torch.equal(weight, kept)
    assert not weight.requires_grad
    gone = seen[0] - kept
    assert torch.equal(gone.sign(), (goal - kept).sign())
    assert 0.1 * DISTANCE <= (rms(gone) / rms(kept)).item() <= 1.8 * DISTANCE
    torch.testing.assert_close(factor.grad, seen[0].sum())  # the gradient at the moved weights, on the factors alone
    assert weight.grad is None


def test_distances_differ_from_step_to_step_and_repeat_with_the_seed():
    def distances(seed):
        weight = nn.Parameter(torch.ones(5), requires_grad=False)
        rehearsal, gone = Rehearsal([weight], seed), []
        factor = torch.ones((), requires_grad=True)
        for _ in range(3):
            rehearsal.run(
                lambda: weight.sum(),
                lambda: (gone.append((1 - weight.detach()).mean().item()), factor * weight.sum())[1],
            )
        return gone

    first = distances(0)
    assert len(set(first)) == 3
    assert first == distances(0) != distances(1)


def test_weights_come_back_after_a_failure():
    weight = nn.Parameter(torch.ones(2), requires_grad=False)

    def broken():
        raise RuntimeError("no defence")

    with pytest.raises(RuntimeError, match="no defence"):
        Rehearsal([weight], 0).run(lambda: (weight**2).sum(), broken)
    assert torch.equal(weight, torch.ones(2))
    assert not weight.requires_grad


def test_an_attack_without_a_gradient_moves_nothing():
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    seen, factor = [], torch.ones((), requires_grad=True)
    Rehearsal([weight], 0).run(
        lambda: (weight * 0).sum(), lambda: (seen.append(weight.detach().clone()), factor * weight.sum())[1]
    )
    assert torch.equal(seen[0], torch.ones(2))


def test_what_runs_from_the_first_changed_layer_on_is_moved():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    found = weights_from(model, "2", torch.zeros(1, 2))
    assert {id(p) for p in found} == {id(p) for m in model[2:] for p in m.parameters()}


def test_a_gradient_near_zero_decides_little():
    moved = soft_sign(torch.tensor([10.0, -10.0, 1e-9, 0.0]))
    assert moved[0] > 0.9
    assert moved[1] < -0.9
    assert moved[2].abs() < 1e-6
    assert moved[3] == 0
    assert not soft_sign(torch.zeros(3)).any()
