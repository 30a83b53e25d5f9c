"""Views of images, and images of several sources in a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget.views import Given, Joined, Views, moved, random_moves


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, height=8, width=8):
    return Given(torch.randn(count, channels, height, width, generator=rng(9)), torch.arange(count) % 4)


IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]])


def test_no_move_changes_nothing_and_half_a_width_moves_by_half():
    x = pictures().pixels
    assert torch.allclose(moved(x, IDENTITY.expand(6, 2, 3)), x, atol=1e-6)
    aside = IDENTITY.clone()
    aside[0, 2] = 1  # half of the width, which runs from -1 to 1
    found = moved(x, aside.expand(6, 2, 3))
    assert torch.allclose(found[..., :4], x[..., 4:], atol=1e-5)
    assert torch.allclose(found[..., 4:], x[..., 7:].expand(6, 3, 8, 4), atol=1e-5)  # the edge, repeated


def test_a_quarter_turn_is_a_quarter_turn():
    x = pictures().pixels
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0]])
    assert torch.allclose(moved(x, turn.expand(6, 2, 3)), torch.rot90(x, 1, (2, 3)), atol=1e-5)


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_moves_stay_within_their_ranges(count, strength, seed):
    moves = random_moves(count, rng(seed), strength)
    size = torch.linalg.det(moves[:, :, :2]).sqrt()
    assert (size.log().abs() <= 0.2 * strength + 1e-5).all()
    angle = torch.atan2(moves[:, 1, 0], moves[:, 0, 0])
    assert (torch.rad2deg(angle).abs() <= 12 * strength + 1e-4).all()
    assert (moves[:, :, 2].abs() <= 0.2 * strength + 1e-6).all()


def test_an_index_always_gives_the_same_view_and_its_image_s_label():
    images = pictures()
    views = Views(images, torch.tensor([5, 2, 2]), rng())
    assert views.labels.tolist() == [1, 2, 2]
    whole = views.batch(torch.tensor([0, 1, 2]))
    assert torch.equal(views.batch(torch.tensor([2, 0])), whole[[2, 0]])
    assert not torch.allclose(whole[1], whole[2])  # two views of one image
    assert not torch.allclose(whole[0], images.pixels[5])
    still = Views(images, torch.tensor([5]), rng(), strength=0.0)
    assert torch.allclose(still.batch(torch.tensor([0]))[0], images.pixels[5], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_views_keep_the_shape(shape):
    images = pictures(4, *shape)
    assert Views(images, torch.arange(4), rng()).batch(torch.tensor([3, 1])).shape == (2, *shape)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=40, deadline=None)
def test_joined_is_one_after_the_other(sizes, data):
    sources = [Given(torch.full((n, 1, 2, 2), float(k)) + torch.arange(n).view(-1, 1, 1, 1) / 10, torch.full((n,), k))
               for k, n in enumerate(sizes)]  # fmt: skip
    whole = torch.cat([s.pixels for s in sources])
    joined = Joined(sources)
    assert joined.labels.tolist() == [k for k, n in enumerate(sizes) for _ in range(n)]
    rows = data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), max_size=9)) if len(whole) else []
    at = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(joined.batch(at), whole[at])
