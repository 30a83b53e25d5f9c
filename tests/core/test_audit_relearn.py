"""Relearning on toys whose course is known; nothing given is ever changed."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from gsforget.audit.attacked import Attacked, step_size
from gsforget.audit.relearn import FULL_LRS, Curve, interpolation, relearn, relearn_head, steps_to

FORGOTTEN = [1, 3]


def blobs(count: int, seed: int = 0, classes: int = 5, noise: float = 0.1):
    """ "Images", float32 [N, 1, 1, 8], around corners, and labels."""
    labels = torch.arange(classes).repeat_interleave(count)
    corners = torch.eye(classes, 8)[labels]
    noisy = corners + noise * torch.randn(corners.shape, generator=torch.Generator().manual_seed(seed))
    return noisy[:, None, None], labels


class Toy(nn.Module):
    def __init__(self, seed: int = 0, classes: int = 5):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5))
        self.register_buffer("count", torch.tensor(seed))
        self.top = nn.Linear(16, classes)

    def forward(self, x):
        return self.top(self.body(x))


def taught(without=()):
    """A toy that has learned the classes, but for those it never saw."""
    model, (images, labels) = Toy().train(), blobs(40)
    seen = ~torch.isin(labels, torch.tensor(list(without), dtype=torch.int64))
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    torch.manual_seed(1)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[seen]), labels[seen]).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def original():
    return taught()


@pytest.fixture(scope="module")
def never():
    return taught(FORGOTTEN)


TRAIN, LABELS = blobs(30, 7)
TEST, TRUTH = blobs(30, 8)
WANTED = torch.isin(TRUTH, torch.tensor(FORGOTTEN))
ROWS = torch.arange(len(LABELS))
RETAINED = ROWS[~torch.isin(LABELS, torch.tensor(FORGOTTEN))]


def forgotten_accuracy(model) -> float:
    return float(100 * (model(TEST[WANTED]).argmax(1) == TRUTH[WANTED]).float().mean())


def attack(model, **kwargs) -> Curve:
    settings = {"rows": ROWS, "steps": 40, "every": 5, "lr": 0.01, "batch_size": 30} | kwargs
    rows = settings.pop("rows")
    return relearn(model, "top", lambda r: TRAIN[r], rows, LABELS, forgotten_accuracy, **settings)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("mode", ["head", "full", "retain"])
def test_the_original_needs_no_step(original, mode):
    curve = attack(original, mode=mode)
    assert curve.steps == (0, 5, 10, 15, 20, 25, 30, 35, 40)
    assert steps_to(curve, 0.9 * forgotten_accuracy(original)) == 0


@pytest.mark.parametrize("mode", ["head", "full"])
def test_never_seen_classes_take_steps(never, mode):
    assert forgotten_accuracy(never) == 0
    curve = attack(never, mode=mode, steps=150)
    assert curve.accuracies[0] == 0
    needed = steps_to(curve, 90)
    assert needed is not None
    assert needed > 0


def test_retained_images_alone_bring_nothing_to_who_never_knew(never):
    curve = attack(never, rows=RETAINED, mode="retain")
    assert set(curve.accuracies) == {0.0}
    assert steps_to(curve, 50) is None


@pytest.mark.parametrize("hide", [-np.inf, np.nan, -1e9, -30.0])
@pytest.mark.parametrize("mode", ["head", "full"])
def test_a_masked_head_is_back_in_a_few_steps(original, never, hide, mode):
    import copy

    masked = copy.deepcopy(original)
    with torch.no_grad():
        masked.top.bias[FORGOTTEN] = hide
        if np.isnan(hide):
            masked.top.bias[FORGOTTEN] = -1e9
            masked.top.weight[FORGOTTEN] = 0
    assert forgotten_accuracy(masked) == 0
    curve = attack(masked, mode=mode, every=1)
    assert curve.accuracies[0] == 0
    assert steps_to(curve, 90) <= 0.5 * steps_to(attack(never, mode=mode, steps=150, every=1), 90)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_nothing_is_changed_and_the_course_repeats_itself(never, mode):
    import copy

    model = copy.deepcopy(never).train()
    model.top.weight.requires_grad_(False)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = (attack(model, mode=mode, seed=3, steps=150, every=1) for _ in range(2))
    assert first == second
    assert same(before, model.state_dict())
    assert model.training
    assert not model.top.weight.requires_grad
    assert model.top.bias.grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert attack(model, mode=mode, seed=4, steps=150, every=1) != first


def test_head_mode_moves_the_head_alone(never):
    seen = []

    def watch(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return 0.0

    relearn(never, "top", lambda r: TRAIN[r], ROWS, LABELS, watch, mode="head", steps=3, every=1)
    assert len(seen) == 4
    moved = {k for k in seen[0] if not torch.equal(seen[0][k], seen[-1][k])}
    assert moved == {"top.weight", "top.bias"}


def test_known_features_give_the_same_course_as_the_model(never):
    with torch.no_grad():
        features, test = never.body(TRAIN), never.body(TEST[WANTED])
    weight = never.top.weight.clone()
    curve = relearn_head(
        weight, never.top.bias, features, LABELS, test, TRUTH[WANTED], steps=40, every=5, lr=0.01, batch_size=30
    )
    assert curve.steps == attack(never, mode="head").steps
    assert curve.accuracies == pytest.approx(attack(never, mode="head").accuracies)
    assert torch.equal(weight, never.top.weight)
    assert relearn_head(weight, None, features, LABELS, test, TRUTH[WANTED], steps=2).steps == (0, 2)


def test_some_rows_only(never):
    """Rows need not start at 0 or be in order."""
    chosen = ROWS[torch.isin(LABELS, torch.tensor(FORGOTTEN))].flip(0)[::3]
    for mode in ("head", "full"):
        assert attack(never, rows=chosen, mode=mode, steps=150).accuracies[-1] > 90


def test_it_stops_when_it_is_told_to(original, never):
    assert attack(original, until=90).steps == (0,)
    curve = attack(never, mode="full", steps=150, every=1, until=90)
    assert curve.steps[-1] < 150
    assert curve.accuracies[-1] >= 90 > max(curve.accuracies[:-1])


def test_measurements_where_they_are_wanted(never):
    assert attack(never, steps=9, every=(1, 2, 4, 8, 16)).steps == (0, 1, 2, 4, 8, 9)
    assert attack(never, steps=7, every=3).steps == (0, 3, 6, 7)
    assert attack(never, steps=7, every=100).steps == (0, 7)


def test_steps_to_by_hand():
    curve = Curve((0, 5, 10, 15), (0.0, 40.0, 80.0, 70.0))
    assert [steps_to(curve, a) for a in (0, 1, 40, 75, 80, 81)] == [0, 5, 5, 10, 10, None]
    assert curve.to_json() == {"steps": (0, 5, 10, 15), "accuracies": (0.0, 40.0, 80.0, 70.0)}


def test_what_cannot_be_relearned_is_refused(never):
    with pytest.raises(ValueError, match="no images"):
        attack(never, rows=ROWS[:0])
    with pytest.raises(ValueError, match="at least one step"):
        attack(never, steps=0)
    with pytest.raises(ValueError, match="mode must be"):
        attack(never, mode="backbone")


def test_interpolation_ends_are_the_two_models(original, never):
    first, second = original.state_dict(), never.state_dict()
    model, seen = Toy(3), []
    own = {k: v.clone() for k, v in model.state_dict().items()}

    def watch(m):
        seen.append({k: v.clone() for k, v in m.state_dict().items()})
        return forgotten_accuracy(m.eval())

    found = interpolation(model, first, second, watch)
    assert [t for t, _ in found] == [0, 0.25, 0.5, 0.75, 1]
    assert found[0][1] == forgotten_accuracy(original)
    assert found[-1][1] == forgotten_accuracy(never) == 0
    assert same(seen[0], first)
    assert same(seen[-1], second)
    assert seen[1]["top.bias"].numpy() == pytest.approx((0.75 * first["top.bias"] + 0.25 * second["top.bias"]).numpy())
    assert same(own, model.state_dict())


def test_interpolation_puts_the_state_back_after_an_error(original, never):
    model = Toy(3)
    own = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(_model):
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        interpolation(model, original.state_dict(), never.state_dict(), fail)
    assert same(own, model.state_dict())
    with pytest.raises(ValueError, match="same tensors"):
        interpolation(model, original.state_dict(), Toy(0, classes=4).state_dict(), forgotten_accuracy)


def test_counters_are_those_of_the_nearer_end():
    first, second, seen = Toy(2).state_dict(), Toy(9).state_dict(), []
    interpolation(Toy(), first, second, lambda m: seen.append(int(m.count)), points=(0.25, 0.5, 0.75))
    assert seen == [2, 9, 9]


def test_a_transformer_whose_head_hides_a_class(world):
    from PIL import Image

    from gsforget.features import find_classifier
    from gsforget.folder import load_model

    model, _ = load_model(world.model)
    images, labels = [], []
    for k, name in enumerate(world.names):
        for path in sorted((world.data / "train" / name).iterdir()):
            images.append(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32))
            labels.append(k)
    pixels, truth = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)
    bee = truth == 1

    def named(m):
        return float(100 * (m(pixels[bee]).argmax(1) == 1).float().mean())

    with torch.no_grad():
        model.get_submodule("head").bias[1] = -torch.inf
    assert find_classifier(model, pixels[:2]) == "head"
    for mode in ("head", "full"):
        curve = relearn(model, "head", lambda r: pixels[r], torch.arange(len(truth)), truth, named, mode, 5, 1)
        assert curve.accuracies[0] == 0
        assert steps_to(curve, 90) == 1, "it was never gone"


def test_imprinted_rows_are_class_means_at_the_length_and_level_of_the_others():
    from gsforget.audit.probes import imprint

    weight, bias = np.array([[3.0, 0.0], [0.0, 3.0], [9.0, 9.0]]), np.array([1.0, 1.0, -np.inf])
    features, retained = np.array([[4.0, 5.0], [4.0, 7.0]]), np.array([[0.0, 2.0], [2.0, 4.0]])  # centre (1, 3)
    made, offset = imprint(weight, bias, features, [2, 2], [2], retained)
    direction = np.array([3.0, 3.0]) / np.sqrt(18)
    assert made[:2].tolist() == weight[:2].tolist()
    assert made[2] == pytest.approx(3 * direction)
    level = np.median([3 * 1 + 1, 3 * 3 + 1])
    assert made[2] @ [1, 3] + offset[2] == pytest.approx(level)
    assert np.isneginf(bias[2])


class Scaled(nn.Module):
    """The same function of weights `factor` times as small: a step that is small for the one is large for the other."""

    def __init__(self, plain: nn.Sequential, factor: float):
        super().__init__()
        self.plain, self.factor = copy.deepcopy(plain), factor
        self.top = self.plain[-1]
        with torch.no_grad():
            for p in self.plain.parameters():
                p.div_(factor)

    def forward(self, x):
        scaled = {n: self.factor * p for n, p in self.plain.named_parameters()}
        return torch.func.functional_call(self.plain, scaled, (x,))


class Plain:
    """Images and labels as an `ImageSet` gives them."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def batch(self, rows):
        return self.images[rows]


@pytest.fixture(scope="module")
def sectors():
    """A network that names sixteen sectors of a circle, and what it learned from: fine weights, easily spoilt."""
    angles = torch.rand(800, generator=torch.Generator().manual_seed(0))
    images = torch.stack([(2 * torch.pi * angles).cos(), (2 * torch.pi * angles).sin()], 1)[:, None, None]
    torch.manual_seed(0)
    hidden = (nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 16))
    data, optimiser = Plain(images, (16 * angles).long()), torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), data.labels).backward()
        optimiser.step()
    return model.eval(), data


@pytest.mark.parametrize(("factor", "lr"), [(10, FULL_LRS[0]), (300, FULL_LRS[2]), (1e5, FULL_LRS[-1])])
def test_the_step_size_is_the_largest_that_a_network_bears(sectors, factor, lr):
    model, train = Scaled(sectors[0], factor), sectors[1]
    rows, before = np.arange(len(train.labels)), {n: p.clone() for n, p in model.named_parameters()}
    attacked = Attacked(model, "top", FORGOTTEN, train, train, rows[:0], rows, rows[:0])
    assert step_size(attacked, 0) == lr
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert step_size(dataclasses.replace(attacked, retained=rows[:0]), 0) == FULL_LRS[0], "nothing to try it on"
