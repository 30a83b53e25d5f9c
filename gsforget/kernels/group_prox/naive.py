"""Adam with an exact group-lasso proximal step, in plain PyTorch: the truth beside the fused kernel.

After Adam's candidate z the step solves, for each group with strength s = strength * weight,

    x = argmin_x  1/2 (x - z)^T D (x - z) + s ||x||_2 ,   D = diag((sqrt(v_hat) + eps) / lr)   (metric "adam")

that is, the proximal operator in the metric in which Adam takes its step (Yun et al., NeurIPS 2021, eq. 5, for
element-wise penalties; Deleu and Bengio, arXiv 2102.03869, for groups), or with D = 1 / lr (metric "euclidean").
A group is exactly zero if and only if ||D z|| <= s.  Otherwise x_i = z_i theta / (theta + s / d_i) with theta = ||x||
the root of sum_i z_i^2 / (theta + s / d_i)^2 = 1, found by Newton's method on 1 - 1/sqrt(g), which climbs
monotonically from theta_0 = (||D z|| - s) / max(d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON_STEPS = 12


@dataclass(frozen=True)
class ProxStep:
    """What one step returns, per group, without synchronising.

    Attributes:
        norms: float64 [G], norms of the groups after the step; 0 for inactive ones.
        critical: float64 [G], the strength at which each group would have become zero in this step; 0 likewise.
        alive: int64 [], how many groups are active and not zero after the step.
    """

    norms: Tensor
    critical: Tensor
    alive: Tensor


def group_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each group's piece of a flat buffer: [n], int64 [G] -> [G]; deterministic."""
    return _reduce(values, "sum", lengths)


def prox_group_lasso(z: Tensor, d: Tensor, strengths: Tensor, lengths: Tensor) -> Tensor:
    """argmin_x 1/2 sum d (x - z)^2 + sum_g s_g ||x_g||, groups contiguous in the buffer.

    Args:
        z: float64 [n], the point.
        d: float64 [n], positive metric.
        strengths: float64 [G], s_g >= 0.
        lengths: int64 [G], sums to n.

    Returns:
        float64 [n]; groups with ||d z|| <= s_g are exactly zero.
    """
    dz = group_sum((d * z) ** 2, lengths).sqrt()
    alive = ~(dz <= strengths)  # NaN stays alive, and is seen
    largest = _reduce(d, "max", lengths)
    theta = ((dz - strengths) / largest).clamp_min(0)
    theta = torch.where(alive, theta, torch.ones_like(theta))
    shift = _spread(strengths, lengths, z) / d
    for _ in range(NEWTON_STEPS):
        denominator = _spread(theta, lengths, z) + shift
        ratio = (z / denominator) ** 2
        g2, g3 = group_sum(ratio, lengths), group_sum(ratio / denominator, lengths)
        theta = torch.where(alive, theta + g2 / g3 * (g2.sqrt() - 1), theta)
    wide = _spread(theta, lengths, z)
    return torch.where(_spread(alive, lengths, z), z * (wide / (wide + shift)), torch.zeros_like(z))


def proximal_adam_step(
    flat: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lengths: Tensor,
    weights: Tensor,
    active: Tensor,
    step: int,
    lr: float | Tensor,
    strength: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    metric: str = "adam",
) -> ProxStep:
    """One step in place on `flat`, `exp_avg`, `exp_avg_sq` (all float32 [n]).

    Args:
        lengths, weights, active: group table: int64 [G], float64 [G], bool [G]; inactive groups stay as they are (zero).
        step: 1 for the first step.
        lr, strength: numbers, or float64 scalars on the device.  Strength multiplies each group's weight; 0 gives plain
            Adam (Kingma and Ba, 2015, algorithm 1).
        metric: "adam" or "euclidean".
    """
    live = _spread(active, lengths, flat)
    grad = torch.where(live, grad, torch.zeros_like(grad))
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq.double() / (1 - betas[1] ** step)).sqrt() + eps
    z = flat.double() - lr * (exp_avg.double() / (1 - betas[0] ** step)) / denominator
    d = denominator / lr if metric == "adam" else torch.ones_like(denominator) / lr
    critical = group_sum((d * z) ** 2, lengths).sqrt() / weights
    if isinstance(strength, Tensor) and strength.is_cuda:  # which must not be asked
        z = torch.where(strength > 0, prox_group_lasso(z, d, strength * weights, lengths), z)
    elif strength > 0:
        z = prox_group_lasso(z, d, strength * weights, lengths)
    flat.copy_(torch.where(live, z, flat.double()))
    norms, none = group_sum(flat.double() ** 2, lengths).sqrt(), torch.zeros_like(critical)
    norms = torch.where(active, norms, none)
    return ProxStep(norms, torch.where(active, critical, none), (norms != 0).sum())


def _spread(per_group: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    """Repeat each group's value over its piece of a buffer `like`: [G] -> [n]; its size is not asked of the device."""
    return torch.repeat_interleave(per_group, lengths, output_size=len(like))


def _reduce(values: Tensor, how: str, lengths: Tensor) -> Tensor:
    """On a GPU the table is not checked, which would wait for the device; `ProximalAdam` has checked it once."""
    return torch.segment_reduce(values, how, lengths=lengths, axis=0, unsafe=values.is_cuda)
