"""The proximal Adam step as one Triton launch.

One idea: groups are few and long, so each one is shared by several programs that all stay on the device (a cooperative
launch) and meet at barriers of their own.  Everything is recomputed from the old moments in every pass, which the L2
cache holds, and only the last pass writes.  Between passes programs exchange a few sums through slots that all of them
add in the same order: no result depends on who came first.  Where a group has one program, nobody waits for anybody:
then the launch is a plain one, and there may be more groups than the device holds at once.
"""

import triton
import triton.language as tl

NEWTON = tl.constexpr(6)  # passes of Newton's method; 5 were the most that random groups needed
PHASES = tl.constexpr(NEWTON.value + 2)  # barriers of one launch: the first sums, Newton's, the norm
WIDTH = tl.constexpr(32)  # programs per group at most: each has a slot
VECTOR = tl.constexpr(4)  # float32 numbers in the widest load
COUNTED = tl.constexpr(128)  # norms that are looked at together when living groups are counted


@triton.jit
def _arrive(counter, count):
    """Tell the group's other programs that what this one has stored may be read."""
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(counter, count, sem="acq_rel")


@triton.jit
def _meet(counter, target, WAIT: tl.constexpr):
    """Arrive, then wait until the counter has come to the target."""
    _arrive(counter, 1)
    if WAIT:
        seen = tl.atomic_add(counter, 0, sem="acquire")
        while seen < target:
            seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _from_all(at, programs):
    """What the programs of a group have stored in one slot each, 0 beyond them: float32 [WIDTH], past the L1 cache."""
    who = tl.arange(0, WIDTH)
    return tl.load(at + who * 2, mask=who < programs, other=0.0, cache_modifier=".cg")


@triton.jit
def _point(
    flat, grad, exp_avg, exp_avg_sq, i, inside, rest1, beta2, rest2, eps, lr, bias1, bias2, EUCLIDEAN: tl.constexpr
):
    """New moments, Adam's candidate z and the metric d of some elements, float32."""
    g = tl.load(grad + i, mask=inside, other=0.0)
    m = tl.load(exp_avg + i, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0.0)
    m += (g - m) * rest1
    v = v * beta2 + rest2 * g * g
    denominator = tl.sqrt(v / bias2) + eps
    z = tl.load(flat + i, mask=inside, other=0.0) - lr * (m / bias1) / denominator
    if EUCLIDEAN:
        d = 1.0 / lr + 0.0 * denominator
    else:
        d = denominator / lr
    return m, v, z, d


@triton.jit
def _conclude(norms, critical, step, alive, finished, norm, at_zero, done, store):
    """Write what the step says of this group; whoever comes last counts the groups that are not zero.

    finished: int64 [1], grows by the number of groups in each launch, so that nobody has to set it back.
    """
    group, groups = tl.program_id(0), tl.num_programs(0)
    tl.store(norms + group, norm)
    tl.store(critical + group, at_zero)
    if store != 0:
        tl.store(step + group, done + 1)
    tl.debug_barrier()  # the norm is stored
    before = tl.atomic_add(finished, 1, sem="acq_rel")
    if before % groups == groups - 1:
        tl.debug_barrier()
        count = 0
        for first in range(0, groups, COUNTED):
            each = first + tl.arange(0, COUNTED)
            found = tl.load(norms + each, mask=each < groups, other=0.0, cache_modifier=".cg")
            count += tl.sum((found != 0.0).to(tl.int32))  # NaN is not zero, and stays visible
        tl.store(alive, count)


@triton.jit
def proximal_adam_kernel(
    flat, grad, exp_avg, exp_avg_sq, offsets, lengths, weights, active, step, lr_at, strength_at,
    norms, critical, alive, slots, counters, finished,
    lr_by, strength_by, log_beta1, rest1, log_beta2, beta2, rest2, eps, store,
    EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Program (g, c) does its share of group g; see `naive.proximal_adam_step` for what is computed.

    slots: float32 [PHASES, G, WIDTH, 2]; counters: int64 [G], grows by PHASES * programs in each launch; without use
        where a group has one program (SHARED false).
    step: int64 [G], steps done so far; lr_at, strength_at: scalars on the device, times lr_by and strength_by.
    norms, critical: float64 [G]; alive: int64 [1].
    store: 0 leaves everything but slots as it was.  WAIT: not in the interpreter, see `fused`.
    ALIGNED: all groups start and end at multiples of VECTOR, so that a thread loads and stores four numbers at once.
    """
    group, chunk = tl.program_id(0), tl.program_id(1)
    groups, programs = tl.num_programs(0), tl.num_programs(1)
    counter = counters + group
    if tl.load(active + group) == 0:
        if SHARED:
            tl.atomic_add(counter, PHASES, sem="relaxed")
        if chunk == programs - 1:  # the last one to read `step` where programs run in order
            _conclude(norms, critical, step, alive, finished, 0.0, 0.0, tl.load(step + group), store)
    else:
        done = tl.load(step + group)
        base = done * 0
        if SHARED:
            base = tl.atomic_add(counter, 0, sem="relaxed") // (PHASES * programs) * (PHASES * programs)
        t = (done + 1).to(tl.float64)
        bias1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
        bias2 = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
        lr, weight = tl.load(lr_at).to(tl.float32) * lr_by, tl.load(weights + group)
        s = tl.load(strength_at).to(tl.float32) * strength_by * weight
        length, start = tl.load(lengths + group), tl.load(offsets + group)
        share = tl.cdiv(tl.cdiv(length, programs), BLOCK) * BLOCK
        low = chunk * share
        high = min(low + share, length)
        if ALIGNED:
            start, high = tl.multiple_of(start, VECTOR), tl.multiple_of(high, VECTOR)
        each = tl.arange(0, BLOCK)
        at = slots + group * (WIDTH * 2)
        stride = groups * (WIDTH * 2)

        squares, widest = 0.0, 0.0
        for i in range(low, high, BLOCK):
            here, inside = start + i + each, i + each < high
            _, _, z, d = _point(
                flat, grad, exp_avg, exp_avg_sq, here, inside, rest1, beta2, rest2, eps, lr, bias1, bias2, EUCLIDEAN
            )
            squares += tl.sum(tl.where(inside, d * z * d * z, 0.0))
            widest = max(widest, tl.max(tl.where(inside, d, 0.0)))
        if SHARED:
            tl.store(at + chunk * 2, squares)
            tl.store(at + chunk * 2 + 1, widest)
            _meet(counter, base + programs, WAIT)
            squares = tl.sum(_from_all(at, programs))
            widest = tl.max(_from_all(at + 1, programs))
        pull = tl.sqrt(squares)
        dead = pull <= s  # false for NaN, which stays visible
        theta = tl.where(dead, 1.0, (pull - s) / widest)

        if dead | (s == 0.0) | EUCLIDEAN:  # the same for all programs of a group
            if SHARED:
                _arrive(counter, NEWTON)
        else:
            for k in range(1, NEWTON + 1):
                g2, g3 = 0.0, 0.0
                for i in range(low, high, BLOCK):
                    here, inside = start + i + each, i + each < high
                    _, _, z, d = _point(
                        flat, grad, exp_avg, exp_avg_sq, here, inside,
                        rest1, beta2, rest2, eps, lr, bias1, bias2, EUCLIDEAN,
                    )  # fmt: skip
                    below = theta + s / d
                    ratio = tl.where(inside, z / below, 0.0)
                    g2 += tl.sum(ratio * ratio)
                    g3 += tl.sum(ratio * ratio / below)
                if SHARED:
                    tl.store(at + k * stride + chunk * 2, g2)
                    tl.store(at + k * stride + chunk * 2 + 1, g3)
                    _meet(counter, base + (k + 1) * programs, WAIT)
                    g2 = tl.sum(_from_all(at + k * stride, programs))
                    g3 = tl.sum(_from_all(at + k * stride + 1, programs))
                theta += g2 / g3 * (tl.sqrt(g2) - 1.0)

        squares = 0.0
        for i in range(low, high, BLOCK):
            here, inside = start + i + each, i + each < high
            m, v, z, d = _point(
                flat, grad, exp_avg, exp_avg_sq, here, inside, rest1, beta2, rest2, eps, lr, bias1, bias2, EUCLIDEAN
            )
            x = tl.where(dead, 0.0, tl.where(s == 0.0, z, z * (theta / (theta + s / d))))
            squares += tl.sum(tl.where(inside, x * x, 0.0))
            if store != 0:
                tl.store(exp_avg + here, m, mask=inside)
                tl.store(exp_avg_sq + here, v, mask=inside)
                tl.store(flat + here, x, mask=inside)
        if SHARED:
            tl.store(at + (PHASES - 1) * stride + chunk * 2, squares)
        if chunk == programs - 1:  # the last one to read `step` where programs run in order
            if SHARED:
                _meet(counter, base + PHASES * programs, WAIT)
                squares = tl.sum(_from_all(at + (PHASES - 1) * stride, programs))
            _conclude(norms, critical, step, alive, finished, tl.sqrt(squares), pull / weight, done, store)
        elif SHARED:
            _arrive(counter, 1)
