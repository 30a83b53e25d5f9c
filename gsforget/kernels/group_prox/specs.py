"""Every configuration of the proximal step that runs by itself, for compiling ahead of time."""

from __future__ import annotations

from gsforget.kernels.group_prox.fused import BLOCK, REGISTERS, WARPS
from gsforget.kernels.spec import Spec

BUFFERS = ("flat", "grad", "exp_avg", "exp_avg_sq")
POINTERS = {
    **dict.fromkeys(BUFFERS, "*fp32"),
    **dict.fromkeys(("offsets", "lengths"), "*i64"),
    "weights": "*fp32",
    "active": "*i1",
    "step": "*i64",
    **dict.fromkeys(("lr_at", "strength_at", "norms", "critical"), "*fp64"),
    "alive": "*i64",
    "slots": "*fp32",
    **dict.fromkeys(("counters", "finished"), "*i64"),
}
NUMBERS = {
    **dict.fromkeys(
        ("lr_by", "strength_by", "log_beta1", "rest1", "log_beta2", "beta2", "rest2", "eps"),
        "fp32",
    ),
    "store": "i32",
}


def specs(target: int) -> list[Spec]:
    """For a GPU generation, given as an integer such as 90: both metrics, one program per group or several, any table."""
    return [
        _spec(metric, shared, aligned)
        for metric in ("adam", "euclidean")
        for shared in (False, True)
        for aligned in (True, False)
    ]


def _spec(metric: str, shared: bool, aligned: bool) -> Spec:
    constants = {
        "EUCLIDEAN": metric == "euclidean",
        "SHARED": shared,
        "ALIGNED": aligned,
        "BLOCK": BLOCK,
        "WAIT": True,
    }
    return Spec(
        f"group_prox_{metric}_{'shared' if shared else 'single'}{'' if aligned else '_odd'}",
        "gsforget.kernels.group_prox.kernel",
        "proximal_adam_kernel",
        {**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")},
        constants,
        tuple(POINTERS) if aligned else tuple(p for p in POINTERS if p not in BUFFERS),
        {"num_warps": WARPS, "num_stages": 1, "maxnreg": REGISTERS, "launch_cooperative_grid": shared},
    )
