"""Bad teaching on a case small enough to reckon by hand."""

import copy
from dataclasses import replace

import torch

from gsforget.baselines.bad_teacher import BadTeacherSettings, bad_teacher
from gsforget.baselines.training import draw_anew

PLAIN = {"lr": 0.1, "batch_size": 6, "optimiser": "momentum", "momentum": 0.0}


def kl(target, logits):
    p, q = torch.softmax(target, 1), torch.softmax(logits, 1)
    return (p * (p / q).log()).sum(1)


def test_it_moves_towards_the_random_teacher_on_forgotten_images_and_stays_on_retained_ones(by_hand, stepped):
    settings = BadTeacherSettings(share=1.0, epochs=3, **PLAIN)
    result = bad_teacher(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=3), settings)
    x, before = by_hand.images.pixels, by_hand.model(by_hand.images.pixels).detach()
    bad = copy.deepcopy(by_hand.model)
    draw_anew(bad, by_hand.request.seed)
    taught = torch.cat([before[:4], bad(x[4:]).detach()])
    expected = stepped(*[lambda m: kl(taught, m(x)).mean()] * 3)
    for name, value in expected.items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_a_share_of_the_retained_images_is_drawn_once(by_hand):
    """Poison all but the drawn images: the run must not see them."""
    settings = BadTeacherSettings(share=0.5, epochs=2, **PLAIN)
    seen = []

    class Spy:
        labels = by_hand.images.labels

        def batch(self, rows):
            seen.append(set(rows.tolist()))
            return by_hand.images.batch(rows)

    bad_teacher(by_hand.model, Spy(), by_hand.forget, replace(by_hand.request, epochs=2), settings)
    retained = set().union(*seen[1:]) - {4, 5}  # the first look finds the classifier
    assert len(retained) == 2


def test_enough_steps_make_forgotten_images_as_uncertain_as_the_teacher_is(by_hand):
    settings = BadTeacherSettings(share=1.0, epochs=300, batch_size=6, lr=0.02)
    result = bad_teacher(by_hand.model, by_hand.images, by_hand.forget, replace(by_hand.request, epochs=300), settings)
    after = copy.deepcopy(by_hand.model)
    after.load_state_dict(result.state_dict)
    bad = copy.deepcopy(by_hand.model)
    draw_anew(bad, by_hand.request.seed)
    with torch.no_grad():
        x = by_hand.images.pixels[4:]
        assert kl(bad(x), after(x)).mean() < 0.25 * kl(bad(x), by_hand.model(x)).mean()
        assert (after(by_hand.images.pixels[:4]).argmax(1) == by_hand.images.labels[:4]).all()
