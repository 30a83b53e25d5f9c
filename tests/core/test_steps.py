"""What is kept on the device between two readings."""

import torch

from gsforget.steps import READ_EVERY, StepLog
from gsforget.tasks.base import Losses

CPU = torch.device("cpu")


def losses(k: int) -> Losses:
    return Losses(*(torch.tensor(float(10 * k + part), requires_grad=True) for part in range(3)))


def test_steps_are_read_in_order_with_their_numbers():
    kept = StepLog(2, CPU, 3)
    for k in range(1, 6):
        kept.latest.copy_(torch.tensor([k / 2, 0, 1, k < 4]))
        kept.add(losses(k))
        if kept.full:
            assert k == 3
            first = kept.read(k)
    second = kept.read(5)
    assert [s.number for s in first + second] == [1, 2, 3, 4, 5]
    assert [(s.total, s.retain, s.forget) for s in first] == [(10, 11, 12), (20, 21, 22), (30, 31, 32)]
    assert second[0].norms == [2, 0]
    assert (first[-1].active, second[-1].active) == ([0, 1], [0])
    assert kept.read(5) == []


def test_events_tell_what_was_read_and_no_more():
    kept = StepLog(2, CPU, 3)
    for k in (1, 2):
        kept.latest.copy_(torch.tensor([k / 2, 0, 1, 0]))
        kept.add(losses(k))
        kept.place("select", k / 4)
    assert list(kept.events(1)) == []
    kept.read(2)
    kept.add(losses(3))
    kept.place("settle", None)
    told = list(kept.events(1))
    assert [(e["step"], e["stage"], e["fraction"]) for e in told] == [(1, "select", 0.25), (2, "select", 0.5)]
    assert (told[1]["retain_loss"], told[1]["active"], told[1]["target"]) == (21, 1, 1)
    kept.read(3)
    assert [(e["step"], e["stage"]) for e in kept.events(1)] == [(3, "settle")]


def test_what_is_kept_is_exact():
    kept, norms = StepLog(1, CPU), torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    assert kept.every == 1
    kept.latest.copy_(norms)
    found = torch.tensor(0.1)
    kept.add(Losses(found * torch.nan, found, found))
    (step,) = kept.read(7)
    assert step.norms == [1 / 3]
    assert step.retain == found.item()
    assert not step.finite


def test_a_gpu_is_read_every_few_steps():
    assert READ_EVERY > 1
    assert StepLog(1, torch.device("meta")).every == 1  # no GPU
