"""Single images: targets have exactly the losses of held-out images, and the gate judges memory and its reversal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsforget.audit.membership import auc
from gsforget.errors import RequestError
from gsforget.gates import evaluate_gates, retention_gates
from gsforget.samples import Answers, auc_noise, copies_in_test, judge, set_aside
from gsforget.tasks.base import Seen
from gsforget.tasks.classify.samples import SingleImages, held_out_levels, soften, true_loss


@given(st.integers(0, 1000), st.floats(0.001, 8))
def test_softened_answers_have_the_loss_asked_for_and_keep_their_confusions(seed, loss):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(4, (5,), generator=generator)
    after = soften(before, labels, torch.full((5,), loss, dtype=torch.float64))
    assert torch.allclose(after.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(true_loss(after, labels), torch.full((5,), loss, dtype=torch.float64))
    for old, new, k in zip(before, after, labels):
        others = torch.arange(4) != k
        assert torch.allclose(new[others] / new[others].sum(), old[others] / old[others].sum())


def test_an_answer_without_doubt_shares_its_doubt_equally():
    after = soften(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([math.log(2)]))
    assert torch.allclose(after, torch.tensor([[0.5, 0.25, 0.25]]))


def test_levels_are_those_of_held_out_images_rank_by_rank():
    losses, labels = torch.tensor([0.3, 0.1, 0.2, 9.0]), torch.tensor([0, 0, 0, 1])
    held, held_labels = torch.tensor([7.0, 5.0, 6.0, 2.0, 4.0]), torch.tensor([0, 0, 0, 1, 1])
    assert held_out_levels(losses, labels, held, held_labels).tolist() == [7.0, 5.0, 6.0, 3.0]
    # two images between the ranks of four
    four = torch.tensor([0.0, 1.0, 2.0, 3.0])
    levels = held_out_levels(torch.tensor([0.0, 0.1]), torch.zeros(2).long(), four, torch.zeros(4).long())
    assert levels.tolist() == [0.5, 2.5]


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30))
def test_images_at_their_levels_are_not_told_apart(seed, count, held_count):
    generator = torch.Generator().manual_seed(seed)
    own, held = torch.rand(count, generator=generator) / 9, torch.rand(held_count, generator=generator)
    levels = held_out_levels(own, torch.zeros(count).long(), held, torch.zeros(held_count).long())
    assert auc(levels.numpy(), held.numpy()) == pytest.approx(0.5, abs=0.5 / held_count + 0.5 / count)
    assert torch.equal(levels.argsort(stable=True), own.argsort(stable=True)) or levels.unique().numel() < count


def objective(forget):
    torch.manual_seed(0)
    before, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 2])
    held, held_labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    task = SingleImages(held, held_labels, erased=(3,))
    return task.objective(Seen(before, torch.empty(0)), labels, forget, torch.arange(6)), before, labels


def test_other_images_keep_their_answers_and_erased_classes_stay_out():
    forget = torch.tensor([True, True, False, True, False, False])
    made, before, _ = objective(forget)
    masked = before.clone()
    masked[:, 3] = -torch.inf
    assert torch.allclose(made.targets[~forget], masked.softmax(1)[~forget])
    assert (made.targets[:, 3] == 0).all()
    assert torch.allclose(made.targets.sum(1), torch.ones(6))


def test_the_loss_is_least_at_the_targets():
    made, _, _ = objective(torch.tensor([True, True, False, True, False, False]))
    outputs = made.targets.clamp_min(1e-9).log().requires_grad_(True)
    losses = made.losses(Seen(outputs, torch.empty(0)), torch.arange(6))
    losses.total.backward()
    assert outputs.grad.abs().max() < 1e-6
    assert losses.total.item() == pytest.approx(losses.retain.item() + losses.forget.item())


@given(st.lists(st.integers(0, 3), min_size=20, max_size=60).map(np.array), st.integers(0, 99))
def test_half_is_set_aside_of_the_classes_concerned(labels, seed):
    classes = [k for k in (0, 2) if (labels == k).sum() >= 2]
    aside, measured = set_aside(labels, classes, list("abcd"), seed)
    assert sorted([*aside, *measured]) == list(range(len(labels)))
    for k in range(4):
        assert (labels[aside] == k).sum() == ((labels == k).sum() // 2 if k in classes else 0)


def test_one_test_image_is_too_few():
    with pytest.raises(RequestError, match="'b' has 1") as caught:
        set_aside(np.array([0, 0, 1]), [0, 1], ["a", "b"], 0)
    assert "test/b" in caught.value.hint


def test_chance_is_the_variance_of_mann_and_whitney():
    one = np.array([0])
    assert auc_noise(one, one) == pytest.approx(1.959964 * 0.5)  # a single pair: 0 or 1
    many = np.zeros(50, int)
    assert auc_noise(many, many) == pytest.approx(1.959964 * math.sqrt(101 / (12 * 2500)))
    rng = np.random.default_rng(0)
    labels, held = np.repeat([0, 1], [8, 4]), np.repeat([0, 1], [10, 20])
    pairs = [8 * 10, 4 * 20]
    found = [
        sum(n * auc(rng.normal(size=m), rng.normal(size=h)) for n, (m, h) in zip(pairs, ((8, 10), (4, 20)))) / 160
        for _ in range(2000)
    ]
    assert auc_noise(labels, held) == pytest.approx(1.959964 * np.std(found), rel=0.06)


def answers(listed, held):
    """Logits of two classes with the given confidence in class 0."""
    columns = [torch.tensor(np.stack([v, np.zeros_like(v)], 1)) for v in (np.asarray(listed), np.asarray(held))]
    return Answers(*columns)


def result(before, after, count=100):
    """A result whose AUC is about `before` and `after`."""
    rng = np.random.default_rng(1)
    held = np.sort(rng.random(count))
    labels = np.zeros(count, int)

    def shifted(share):  # this share of the listed images lies above all held-out ones, or below
        high = np.full(count, 2.0 if share > 0 else -1.0)
        return np.where(np.arange(count) % 10 < round(10 * abs(share)), high, held)

    both = [answers(shifted(2 * (wanted - 0.5)), held) for wanted in (before, after)]
    return judge(labels, labels, *both, 100, ["x"] * count)


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [
        (0.9, 0.5, True),
        (0.9, 0.55, True),  # within the noise of 0.08
        (0.9, 0.65, True),  # less than half is left
        (0.9, 0.75, False),
        (0.9, 0.9, False),
        (0.9, 0.3, False),  # pushed away: as recognisable as before
        (0.3, 0.3, False),
    ],
)
def test_the_gate_takes_memory_and_its_reversal(before, after, passed):
    found = result(before, after)
    gate = found.gate()
    assert gate.name == "membership"
    assert gate.passed is passed, (found.before.auc, found.after.auc, gate)
    assert gate.value == pytest.approx(abs(found.after.auc - 0.5))


def test_no_memory_to_begin_with_is_said():
    assert "shows little" in result(0.5, 0.5).warnings()[0]
    assert result(0.9, 0.5).warnings() == []


def test_copies_among_test_images_are_counted(tmp_path):
    paths = [tmp_path / "a" / "1.png", tmp_path / "b" / "2.png"]
    assert copies_in_test(paths, ["x", "y"], {"z"}) == []
    assert "1 of the listed images" in copies_in_test(paths, ["x", "y"], {"y"})[0]


def test_retention_gates_are_the_others():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], 30)
    before, after = rng.random(120) < 0.9, rng.random(120) < 0.8
    assert evaluate_gates(before, after, labels, [0], [1, 2], [3])[1:] == retention_gates(
        before, after, labels, [1, 2], [3]
    )
