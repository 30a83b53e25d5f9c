"""The proximal Adam step as one launch, in Triton's interpreter, against the float64 truth."""

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gsforget.errors import RequestError
from gsforget.kernels.ahead import precompiled
from gsforget.kernels.group_prox import ProximalAdam, proximal_adam_step
from gsforget.kernels.group_prox.fused import BLOCK, fitting
from gsforget.kernels.group_prox.naive import group_sum

torch.set_num_threads(1)


class Run:
    """Buffers of a few groups, of which some are inactive, and gradients for some steps."""

    def __init__(self, seed: int, lengths: list[int], steps: int = 3):
        rng = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        self.weights = 0.5 + torch.rand(len(lengths), generator=rng, dtype=torch.float64)
        self.active = torch.rand(len(lengths), generator=rng) > 0.2
        self.flat = torch.randn(sum(lengths), generator=rng)
        scales = torch.repeat_interleave(10 ** torch.randn(len(lengths), generator=rng), self.lengths)
        self.grads = [torch.randn(sum(lengths), generator=rng) * scales for _ in range(steps)]

    def truth(self, lr, strength, metric, dtype=torch.float64):
        flat, m, v = self.flat.to(dtype), *torch.zeros(2, len(self.flat), dtype=dtype)
        for k, grad in enumerate(self.grads, 1):
            result = proximal_adam_step(
                flat, grad.to(dtype), m, v, self.lengths, self.weights, self.active, k, lr, strength, metric=metric
            )
        return flat, m, v, result

    def fused(self, lr, strength, metric, programs):
        flat = self.flat.clone()
        adam = ProximalAdam(self.lengths, self.weights, metric=metric, backend="interpret", programs=programs)
        for grad in self.grads:
            result = adam.step(flat, grad, self.active, lr, strength)
        return flat, adam.exp_avg, adam.exp_avg_sq, result

    def deadly(self, lr, metric) -> float:
        """A strength between the critical ones of the last step's groups, so that some die and some live."""
        critical = self.truth(lr, 0.0, metric)[3].critical[self.active]
        return critical.median().item() if len(critical) else 1.0


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    metric=st.sampled_from(["adam", "euclidean"]),
    programs=st.integers(1, 3),
    level=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(
    seed=5931, lengths=[1], metric="euclidean", programs=3, level=1.0
)  # rounding leaves next to nothing, or nothing
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes here
def test_equals_the_truth(seed, lengths, metric, programs, level):
    run = Run(seed, lengths, steps=2)
    strength = level * run.deadly(1e-2, metric)
    want, got = run.truth(1e-2, strength, metric), run.fused(1e-2, strength, metric, programs)
    critical = run.truth(1e-2, 0.0, metric)[3].critical
    close = (critical - strength).abs() <= 1e-4 * critical  # rounding decides there whether a group is dead
    keep = ~torch.repeat_interleave(close, run.lengths)
    for a, b in zip(got[:3], want[:3]):
        torch.testing.assert_close(a[keep].double(), b[keep], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got[3].norms[~close], want[3].norms[~close], rtol=2e-5, atol=1e-6)
    alive = group_sum(got[0].double().abs(), run.lengths) > 0
    assert torch.equal(alive[~close], (group_sum(want[0].abs(), run.lengths) > 0)[~close])
    # A norm over the rate: what a factor is off by rounding counts a hundred times there.
    torch.testing.assert_close(got[3].critical, want[3].critical, rtol=1e-3, atol=1e-6 / 1e-2)
    assert got[3].alive == (got[3].norms != 0).sum()


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
def test_no_further_from_the_truth_than_twice_plain_float32(metric):
    """Plain float32: torch.optim.Adam's own step, then the prox in float32."""
    run = Run(5, [300, 170, 260], steps=1)
    run.active[:] = True
    strength = 0.4 * run.deadly(1e-2, metric)
    truth = run.truth(1e-2, strength, metric)[0]
    plain = float32_step(run, 1e-2, strength, metric)
    got = run.fused(1e-2, strength, metric, 3)[0]
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-7


def float32_step(run: Run, lr, strength, metric):
    parameter = run.flat.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=lr)
    parameter.grad = run.grads[0]
    adam.step()
    z, v = parameter.detach(), adam.state[parameter]["exp_avg_sq"]
    d = ((v / (1 - 0.999)).sqrt() + 1e-8) / lr if metric == "adam" else torch.full_like(v, 1 / lr)
    pieces = []
    for zg, dg, weight in zip(*(t.split(run.lengths.tolist()) for t in (z, d)), run.weights.float()):
        s = strength * weight
        pull = (dg * zg).norm()
        theta = (pull - s) / dg.max()
        for _ in range(12):
            below = theta + s / dg
            g2, g3 = ((zg / below) ** 2).sum(), ((zg / below) ** 2 / below).sum()
            theta = theta + g2 / g3 * (g2.sqrt() - 1)
        pieces.append(zg * (theta / (theta + s / dg)) if pull > s else torch.zeros_like(zg))
    return torch.cat(pieces)


def test_a_second_run_gives_the_same_bits_and_every_output_is_written(monkeypatch):
    real = torch.Tensor.new_empty

    def poisoned(*a, **k):
        new = real(*a, **k)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    run = Run(6, [130, 40, 90], steps=1)
    once, again = (run.fused(1e-2, run.deadly(1e-2, "adam"), "adam", 3) for _ in range(2))
    for a, b in zip(once[:3], again[:3]):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    assert torch.isfinite(once[3].norms).all()
    assert torch.isfinite(once[3].critical).all()


def test_a_nan_stays_visible_and_does_not_reach_other_groups():
    run = Run(7, [50, 60], steps=1)
    run.active[:] = True
    run.grads[0][3] = torch.nan
    flat, _, _, result = run.fused(1e-2, 0.1, "adam", 2)
    assert flat[:50].isnan().any()
    assert result.norms[0].isnan()
    assert torch.isfinite(flat[50:]).all()


def test_inactive_groups_are_not_touched():
    run = Run(8, [70, 40, 20])
    run.active = torch.tensor([True, False, True])
    flat, m, v, result = run.fused(1e-2, 0.0, "adam", 2)
    assert torch.equal(flat[70:110], run.flat[70:110])
    assert not m[70:110].any()
    assert not v[70:110].any()
    assert result.norms[1] == result.critical[1] == 0
    assert result.alive == 2


def test_strength_and_step_size_may_lie_on_the_device():
    run = Run(9, [70, 40], steps=1)
    by_number = run.fused(3e-3, 0.2, "adam", 2)[0]
    there = [torch.tensor(value, dtype=torch.float64) for value in (3e-3, 0.2)]
    by_tensor = run.fused(*there, "adam", 2)[0]
    assert torch.equal(by_number, by_tensor)
    plain = [proximal_adam(run, "torch")(*given) for given in ((3e-3, 0.2), there)]
    assert torch.equal(*plain)


def proximal_adam(run: Run, backend: str):
    def once(lr, strength):
        flat, adam = run.flat.clone(), ProximalAdam(run.lengths, run.weights, backend=backend)
        adam.step(flat, run.grads[0], run.active, lr, strength)
        return flat

    return once


@pytest.mark.parametrize("programs", [1, 2])
def test_any_table_of_groups_takes_the_same_step(programs):
    """Groups that end at multiples of four numbers are read four at a time, others one by one; nobody sees which."""
    run = Run(13, [72, 20], steps=1)
    cut = torch.ones(92, dtype=torch.bool)
    cut[[71, 91]] = False
    odd = Run(13, [71, 19], steps=0)
    odd.weights, odd.active, odd.flat = run.weights, run.active, run.flat[cut]
    for grad in (run.flat, *run.grads):
        grad[~cut] = 0  # so that the shorter groups have the same norms
    odd.flat, odd.grads = run.flat[cut], [grad[cut] for grad in run.grads]
    even, other = (r.fused(1e-2, 0.1, "adam", programs) for r in (run, odd))
    torch.testing.assert_close(even[0][cut], other[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(even[3].norms, other[3].norms, rtol=2e-5, atol=1e-6)
    assert even[3].alive == other[3].alive


def test_one_launch_and_nothing_around_it(monkeypatch):
    """On a GPU a step is the kernel alone: what PyTorch does beside it is counted, and is memory and views only."""
    run, launches = Run(14, [64, 36], steps=1), []
    monkeypatch.setattr(precompiled, "launch", lambda kernel, grid, *args, **options: launches.append((grid, options)))
    adam = ProximalAdam(run.lengths, run.weights, backend="interpret", programs=1)
    adam.backend = "triton"
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        adam.step(run.flat, run.grads[0], run.active, 1e-2, 0.1)
    assert set(called) <= {"new_empty", "empty", "view"}
    ((grid, options),) = launches
    assert grid == (2, 1)
    assert (options["launch_cooperative_grid"], options["SHARED"], options["ALIGNED"]) == (False, False, True)


def test_more_groups_than_the_device_holds_at_once_wait_for_nothing():
    long = [122_880] * 12
    assert fitting(long, None, 132) == 11
    assert fitting(long, 32, 132) == 11  # asked for or not: all programs have to be there
    assert fitting(long, None, 12) == fitting(long, None, 11) == fitting([BLOCK] * 12, None, 132) == 1
    assert fitting([10**7], None, 132) == fitting([10**7], 64, None) == 32
    for groups in range(1, 300):
        for there in (1, 16, 20, 132):
            programs = fitting([10**6] * groups, None, there)
            assert programs == 1 or programs * groups <= there


def test_counters_come_out_even_after_every_launch():
    run = Run(10, [150, 40, 90])
    adam = ProximalAdam(run.lengths, run.weights, backend="interpret", programs=3)
    for k, (grad, strength) in enumerate(zip(run.grads, (0.0, 1e9, 0.1)), 1):  # no Newton, all dead, Newton
        before = adam._counters.clone()
        adam.step(run.flat, grad, run.active, 1e-2, strength)
        grown = adam._counters - before
        assert (grown == 9 * 8 * 3).all()  # nine launches of eight phases with three programs
        assert adam.state[2].tolist() == [k] * 3


def test_the_torch_backend_is_the_plain_step_bit_for_bit():
    run = Run(11, [30, 50])
    flat = run.flat.clone()
    adam = ProximalAdam(run.lengths, run.weights, backend="torch")
    for grad in run.grads:
        adam.step(flat, grad, run.active, 1e-2, 0.1)
    want = run.flat.clone()
    m, v = torch.zeros(2, 80)
    for k, grad in enumerate(run.grads, 1):
        proximal_adam_step(want, grad, m, v, run.lengths, run.weights, run.active, k, 1e-2, 0.1)
    assert torch.equal(flat, want)


def test_what_does_not_fit_is_said():
    run = Run(12, [30, 50])
    with pytest.raises(RequestError, match="without factors"):
        ProximalAdam(torch.tensor([3, 0]), run.weights)
    with pytest.raises(RequestError, match="no metric named manhattan"):
        ProximalAdam(run.lengths, run.weights, metric="manhattan")
    adam = ProximalAdam(run.lengths, run.weights)
    with pytest.raises(RequestError, match="80 factors"):
        adam.step(run.flat[:70], run.grads[0], run.active, 1e-2)
    for table in (
        (run.lengths.int(), run.weights),
        (run.lengths, run.weights[:1]),
        (run.lengths, run.weights.to("meta")),
    ):
        with pytest.raises(RequestError, match="table of groups"):
            ProximalAdam(*table)
    for active in (run.active[:1], run.active.long(), run.active.to("meta")):
        with pytest.raises(RequestError, match="2 groups"):
            adam.step(run.flat, run.grads[0], active, 1e-2)
    strided = torch.stack([run.grads[0]] * 2, 1)[:, 0]
    with pytest.raises(RequestError, match="not float32 and contiguous"):
        adam.step(run.flat, strided, run.active, 1e-2)
