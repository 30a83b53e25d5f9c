"""Every configuration of the proximal step that runs by itself, for compiling ahead of time."""

from __future__ import annotations

from gsforget.kernels.group_prox.fused import BLOCK, WARPS
from gsforget.kernels.spec import Spec

POINTERS = {
    **dict.fromkeys(("flat", "grad", "exp_avg", "exp_avg_sq"), "*fp32"),
    **dict.fromkeys(("offsets", "lengths"), "*i64"),
    "weights": "*fp32",
    "active": "*i1",
    "step": "*i64",
    **dict.fromkeys(("lr_at", "strength_at", "norms", "critical", "slots"), "*fp32"),
    "counters": "*i64",
}
NUMBERS = {
    **dict.fromkeys(("log_beta1", "rest1", "log_beta2", "beta2", "rest2", "eps"), "fp32"),
    "store": "i32",
}


def specs(target: int) -> list[Spec]:
    """For a GPU generation, given as an integer such as 90: both metrics, and 1 to 32 programs per group."""
    return [_spec(metric, programs) for metric in ("adam", "euclidean") for programs in (1, 4, 8, 11, 16, 32)]


def _spec(metric: str, programs: int) -> Spec:
    constants = {
        "EUCLIDEAN": metric == "euclidean",
        "PROGRAMS": programs,
        "WIDTH": max(2, 1 << (programs - 1).bit_length()),
        "BLOCK": BLOCK,
        "WAIT": True,
    }
    return Spec(
        f"group_prox_{metric}_c{programs}",
        "gsforget.kernels.group_prox.kernel",
        "proximal_adam_kernel",
        {**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")},
        constants,
        tuple(POINTERS),
        {"num_warps": WARPS, "num_stages": 1, "launch_cooperative_grid": True},
    )
