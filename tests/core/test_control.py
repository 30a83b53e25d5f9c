"""The numbers that nobody tunes: how the penalty is steered, and how validation decides on stages and depth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsforget import control
from gsforget.control import (
    After,
    StageControl,
    StrengthControl,
    Watch,
    default_lr,
    default_target,
    settle_steps,
    stage_limit,
)
from gsforget.kernels.group_prox import ProxStep


def step(norms, critical) -> ProxStep:
    """A step that leaves these norms of groups that are all active."""
    there = torch.as_tensor(norms, dtype=torch.float64)
    return ProxStep(there, torch.as_tensor(critical, dtype=torch.float64), (there != 0).sum())


def steer(strength=1.0, target=1, groups=3, **options) -> StrengthControl:
    return StrengthControl(strength, target, torch.zeros(groups, dtype=torch.int64), **options)


def test_strength_grows_and_falls():
    steering, alive = steer(), torch.ones(3, dtype=torch.bool)
    far = torch.full((3,), 1e9, dtype=torch.float64)
    steering.after_step(step([1, 1, 1], far), alive)
    assert steering.strength.item() == pytest.approx(control.GROWTH)
    steering.after_step(step([0, 0, 1], far), alive)
    assert steering.strength.item() == pytest.approx(control.GROWTH * control.DECAY)
    held = steer()
    held.after_step(step([0, 0, 1], [0.2, 0.1, 9.0]), alive)
    assert held.strength.item() == pytest.approx(control.HOLD * 0.2)  # no more than holds the zero groups
    fixed = steer(fixed=True)
    fixed.after_step(step([1, 1, 1], far * 0 + 1e-9), alive)
    fixed.bound(far * 0 + 1e-9)
    assert fixed.strength == 1


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_strength_never_removes_the_groups_asked_for(critical, target):
    steering = steer(1e9, target, len(critical))
    steering.bound(torch.tensor(critical, dtype=torch.float64))
    assert sum(c > steering.strength for c in critical) >= min(target, len(critical))


def test_a_group_is_dead_after_its_patience():
    steering, alive = steer(), torch.tensor([True, True, False])
    far = torch.full((3,), 1e9, dtype=torch.float64)
    first, none = step([0, 1, 0], far), step([1, 1, 0], far)
    for _ in range(control.PATIENCE - 1):
        assert not steering.after_step(first, alive).any()
    steering.after_step(none, alive)  # it lives again: the count starts anew
    for _ in range(control.PATIENCE - 1):
        assert not steering.after_step(first, alive).any()
    assert steering.after_step(first, alive).tolist() == [True, False, False]


class OnTheHost:
    """The control as it reads with numbers, step by step."""

    def __init__(self, strength, target, groups):
        self.strength, self.target, self.over, self.zero_for = strength, target, control.GONE * strength, [0] * groups

    def after_step(self, norms, critical, active):
        zero = [a and n == 0 for n, a in zip(norms, active)]
        left = [c - self.strength for c in critical]
        self.zero_for = [k + 1 if z else 0 for k, z in zip(self.zero_for, zero)]
        alive = sum(a and not z for a, z in zip(active, zero))
        holds = control.HOLD * max(c if z else 0.0 for c, z in zip(critical, zero))
        if alive > self.target:
            self.strength *= control.GROWTH
        else:
            self.strength = min(control.DECAY * self.strength, holds or float("inf"))
        keep = sorted(left)[-min(self.target, len(left))]
        if keep > 0:
            self.strength = min(self.strength, 0.9 * keep)
        if alive <= self.target and self.strength < self.over:
            self.strength = 0.0
        return [k >= control.PATIENCE for k in self.zero_for]


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_the_device_steers_as_numbers_on_the_host_would_bit_for_bit(seed, groups, target):
    rng = torch.Generator().manual_seed(seed)
    here, there = OnTheHost(0.3, target, groups), steer(0.3, target, groups)
    places = [t.data_ptr() for t in there.state]
    zero = torch.rand(groups, generator=rng) < 0.5
    for k in range(30):
        zero ^= torch.rand(groups, generator=rng) < 0.04
        active = torch.rand(groups, generator=rng) < 0.9
        critical = 10 ** torch.randn(groups, generator=rng, dtype=torch.float64) * 0.97**k * active
        norms = torch.rand(groups, generator=rng, dtype=torch.float64) * (~zero & active)
        told = there.after_step(ProxStep(norms, critical, (norms != 0).sum()), active)
        assert told.tolist() == here.after_step(norms.tolist(), critical.tolist(), active.tolist())
        assert there.strength.item() == here.strength
    assert [t.data_ptr() for t in there.state] == places  # a captured graph goes on writing there


def watched(forget=0.0, bound=-1.0, retain=98.0, returned=(), most=1.0, leak=None, worst=None) -> Watch:
    return Watch(1, forget, retain, 98.0, bound, most, [0], None, list(returned), leak, worst)


def decide(*watches, deepens=True, limit=control.STAGES):
    """What is decided after each stage, and the control at the end."""
    stages = StageControl(1.0, 0.5, deepens, limit, max_class=10.0)
    return [stages.after(w) for w in watches], stages


def test_stages_end_when_validation_is_satisfied_and_there_is_no_depth():
    found, stages = decide(watched(forget=9), watched(), deepens=False)
    assert found == [After.GO_ON, After.STOP]
    assert (stages.good, stages.done) == (watched(), 2)


def test_more_stages_than_one_may_be_a_must():
    stages = StageControl(1.0, 0.5, False, least=2)
    assert [stages.after(watched(retain=r)) for r in (98.0, 98.5)] == [After.GO_ON, After.STOP]
    assert (stages.good, stages.done) == (watched(retain=98.5), 2)
    assert StageControl(1.0, 0.5, False, limit=1, least=2).after(watched()) is After.STOP


LOSSY = 98.0 - 1.01 * control.NOISE


def test_a_first_stage_that_loses_has_tries_to_win_it_back_and_goes_no_deeper_without():
    lossy = [watched(bound=0.4, retain=LOSSY - part) for part in (0.2, 0.0, 0.1)]
    found, stages = decide(*lossy)
    assert found == [After.GO_ON] * control.RETRIES + [After.GO_BACK]
    assert (stages.good, stages.depth) == (lossy[1], control.DEPTHS[0])  # the best of them
    found, stages = decide(lossy[0], lossy[1])
    assert stages.after(watched(bound=0.4, retain=LOSSY + 0.005)) is After.STOP  # the last is the best
    found, stages = decide(lossy[0], watched())
    assert found == [After.GO_ON, After.GO_ON]
    assert (stages.good, stages.depth) == (watched(), control.DEPTHS[1])
    assert decide(lossy[0], deepens=False)[0] == [After.STOP]
    assert decide(lossy[0], limit=1)[0] == [After.STOP]


def test_stages_go_deeper_while_nothing_is_lost():
    found, stages = decide(*[watched()] * len(control.DEPTHS), limit=9)
    assert found == [After.GO_ON] * (len(control.DEPTHS) - 1) + [After.STOP]
    assert stages.good_depth == control.DEPTHS[-1]


def test_depth_that_takes_nothing_from_the_features_is_undone():
    found, stages = decide(*(watched(leak=leak) for leak in (60, 55, 54.5, 54.5)))
    assert found == [After.GO_ON] * 3 + [After.GO_BACK]
    assert (stages.good, stages.good_depth) == (watched(leak=55), control.DEPTHS[1])
    found, stages = decide(*(watched(leak=leak) for leak in (60, 59.5, 50, 49.5)))
    assert found == [After.GO_ON] * 4  # the third won, so that the count starts anew
    assert stages.good_depth == control.DEPTHS[2]


def test_too_few_images_to_see_a_loss_go_no_deeper():
    blurred = watched(bound=-9.0, most=control.BLUR + 1)
    found, stages = decide(blurred, blurred)
    assert found == [After.GO_ON, After.STOP]
    assert stages.good_depth == stages.depth == control.DEPTHS[0]
    assert decide(blurred, limit=1)[0] == [After.STOP]
    assert decide(watched(bound=-9.0, most=control.BLUR))[0] == [After.GO_ON]


def test_a_deeper_stage_has_tries_to_win_back_what_it_lost():
    good, lossy = watched(), watched(retain=LOSSY)
    found, stages = decide(good, lossy, lossy, good, lossy, lossy, limit=9)
    assert found == [After.GO_ON] * 6
    assert (stages.good_depth, stages.depth) == control.DEPTHS[1:3]
    assert stages.after(lossy) is After.GO_BACK
    assert stages.good_depth == control.DEPTHS[1]


def test_a_depth_that_costs_one_class_is_not_free():
    lossy = watched(worst=10.1, leak=40)
    found, stages = decide(watched(worst=10.0, leak=60), lossy, watched(worst=-2.0, leak=40), lossy, limit=9)
    assert found == [After.GO_ON] * 4
    assert (stages.good_depth, stages.depth) == control.DEPTHS[1:3]


def test_earlier_classes_are_taken_along_from_where_the_request_got():
    stages = decide(*(watched(leak=leak) for leak in (60, 55, 54.5, 54.5)))[1]
    assert stages.good.leak == 55
    start = watched(leak=70)  # with earlier classes among those that the probe may name
    along = stages.along(start)
    assert (along.good, along.good_depth, along.depth) == (start, 0, control.DEPTHS[0])
    assert along.after(watched(leak=69.5)) is After.GO_ON  # wins nothing: deeper, once
    assert along.after(watched(leak=65)) is After.GO_ON
    assert (along.good, along.good_depth) == (watched(leak=65), control.DEPTHS[1])
    assert along.after(watched(leak=50, retain=LOSSY)) is After.GO_ON
    assert along.after(watched(leak=50, retain=LOSSY)) is After.GO_BACK  # the fourth stage is the last
    assert along.done == control.ALONG
    assert stages.done == 4


def test_earlier_classes_that_tell_no_more_than_the_request_s_own_are_enough():
    along = decide(watched(leak=60), watched(leak=59.5), watched(leak=59.5))[1].along(watched(leak=70))
    assert along.goal == 60
    assert along.after(watched(leak=60, retain=LOSSY)) is After.GO_ON  # not at a loss
    assert along.after(watched(leak=60)) is After.STOP
    assert along.good == watched(leak=60)


def test_a_stage_that_takes_earlier_classes_along_must_be_seen_to_cost_nothing():
    """Where the request itself would count one that satisfies its bounds, or that too few images judge."""
    for watch in (watched(bound=0.4, retain=LOSSY), watched(bound=-9.0, most=control.BLUR + 1)):
        along = decide(watched(leak=60), watched(leak=59.5), watched(leak=59.5))[1].along(watched(leak=70))
        assert [along.after(watch) for _ in range(3)] == [After.GO_ON] * 2 + [After.GO_BACK]
        assert along.good_depth == 0


@pytest.mark.parametrize(("own", "first"), [(1.0, 1.0), (4.0, 1.0), (8.0, 2.0), (32.0, 8.0)])
def test_earlier_classes_begin_shallower(own, first):
    assert StageControl(1.0, 0.5, True, good_depth=own).along(watched()).depth == first


def test_where_one_class_has_not_been_watched_nothing_hangs_on_it():
    assert watched().lossless(1.0, max_class=0.0)
    assert not watched(worst=0.1).lossless(1.0, max_class=0.0)


def test_the_last_stage_allowed_is_undone_where_it_lost():
    assert decide(watched(), watched(retain=LOSSY), limit=2)[0][-1] is After.GO_BACK
    assert decide(watched(), watched(), limit=2)[0][-1] is After.STOP
    assert decide(watched(forget=9), watched(forget=9), limit=2)[0][-1] is After.STOP


def test_a_class_that_is_back_satisfies_nothing():
    found, stages = decide(watched(returned=[3]), watched())
    assert found == [After.GO_ON, After.GO_ON]
    assert stages.good_depth == control.DEPTHS[0]


def test_stages_that_win_nothing_end():
    assert decide(watched(bound=2.0, retain=90.0), watched(bound=2.0, retain=90.1))[0] == [After.GO_ON, After.STOP]
    assert decide(watched(bound=2.0, retain=90.0), watched(bound=2.0, retain=91.0))[0] == [After.GO_ON, After.GO_ON]


def test_small_rules():
    assert [default_target(n) for n in (1, 3, 4, 12, 24)] == [1, 1, 2, 4, 8]
    assert [default_lr(n) for n in (24, 96, 384, 768)] == pytest.approx([5e-3, 5e-3, 1.25e-3, 6.25e-4])
    assert [stage_limit(n) for n in (1, 120, 180, 300, 5000)] == [6, 6, 4, 2, 1]
    assert [settle_steps(n) for n in (1, 30, 60, 100, 10**6)] == [120, 120, 180, 300, 300]
    watch = Watch(1, 0.0, 97.0, 98.0, 0.4, 1.6, [0])
    assert watch.satisfied(1, 0.5)  # down by a point, of which chance may explain 0.6
    assert not Watch(1, 0.0, 95.0, 98.0, 0.6, 5.4, [0]).satisfied(1, 0.5)
    assert not Watch(1, 2.0, 98.0, 98.0, 0.0, 0.0, [0]).satisfied(1, 0.5)
    assert Watch(1, 0.0, None, None, None, None, [0]).satisfied(1, 0.5)
    assert Watch(1, None, 98.0, 98.0, 0.0, 0.0, [0]).satisfied(1, 0.5)
    assert not Watch(1, 0.0, 98.0, 98.0, 0.0, 0.0, [0], 20.0, [3]).satisfied(1, 0.5)
    back = Watch(2, 0.0, 98.0, 98.0, 0.0, 0.0, [0], 20.0, [3])
    assert watch.stuck(watch, 1)
    assert not back.stuck(watch, 1)
    assert not watch.stuck(back, 1)
    assert not Watch(2, 0.0, 97.0 + control.STUCK, 98.0, 0.0, 0.0, [0]).stuck(watch, 1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 9)])
def test_the_spectral_norm_is_the_largest_singular_value(shape):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(matrix)[0].item()
    assert control.square_of_spectral_norm(matrix).sqrt().item() == pytest.approx(wanted, rel=1e-12)
    assert control.square_of_spectral_norm(0 * matrix).item() == 0


def test_what_counts_as_free_is_the_tasks_to_say():
    """Points of AP weigh more than points of accuracy."""
    lost = watched(bound=0.4, retain=97.4)
    for noise, goes_deeper in ((control.NOISE, True), (0.5, False)):
        stages = StageControl(1.0, 1.0, True, noise=noise)
        stages.after(lost)
        assert (stages.depth > control.DEPTHS[0]) == goes_deeper
