"""Every configuration of the LoRA-FFN kernels that runs by itself, for compiling ahead of time and for counting registers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from gsforget.kernels.lora_ffn.tiles import ROWS, Tile, gradient_tile, pass_tile, product_tile
from gsforget.kernels.spec import Spec

MODULE = "gsforget.kernels.lora_ffn.kernels"
TYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu")
RANKS = (16, 32, 64)


def specs(target: int) -> list[Spec]:
    """All of a GPU generation, given as an integer such as 90.  bfloat16 needs 80."""
    types = [t for t in TYPES if t != "bf16" or target >= 80]
    found: list[Spec] = []
    for dtype, rank in itertools.product(types, RANKS):
        found += _products(target, dtype, rank)
        found += _slabs(target, dtype, rank)
        found += _skinny(target, dtype, rank)
    return found


def _products(target: int, dtype: str, rank: int) -> Iterator[Spec]:
    t = product_tile(target, TYPES[dtype], rank)
    pointers = dict.fromkeys(("x", "w", "s", "b", "bias", "z", "out"), f"*{dtype}")
    strides = ("stride_xm", "stride_wn", "stride_wk", "stride_bn", "stride_br", "stride_zm", "stride_om")
    integers = dict.fromkeys(("M", "N", "K", "R", *strides), "i32")
    ways = [(act, "act", True, True) for act in ACTIVATIONS] + [(act, "grad", False, False) for act in ACTIVATIONS]
    for act, epilogue, bias, keep in [*ways, ("relu", "none", True, False), ("relu", "none", False, False)]:
        forward = epilogue != "grad" and bias  # w is [N, K] transposed there, [K, N] in the backward
        constants = {
            "ACT": act, "EPILOGUE": epilogue, "BIAS": bias, "STORE_Z": keep, "BM": t.m, "BN": t.n, "BK": t.k,
            "RANK": rank, "ROWS": ROWS, "UPCAST": False, ("stride_wk" if forward else "stride_wn"): 1,
            ("stride_br" if forward else "stride_bn"): 1,
        }  # fmt: skip
        yield Spec(
            f"lora_ffn_product_{epilogue}_{act}_{'bias_' if bias else ''}{dtype}_r{rank}",
            MODULE,
            "product_kernel",
            _signature("product_kernel", {**pointers, **integers}, constants),
            constants,
            tuple(
                k for k in (*pointers, "N", "K", *strides) if k not in constants and k not in ("stride_bn", "stride_br")
            ),
            _options(t),
        )


def _slabs(target: int, dtype: str, rank: int) -> Iterator[Spec]:
    for act, gated in itertools.product(ACTIVATIONS, (False, True)):
        t = pass_tile(target, TYPES[dtype], rank)
        kind = f"{'gated_' if gated else ''}{act}_{dtype}_r{rank}"
        pointers = dict.fromkeys(("z0", "z1", "s0", "s1", "b0", "b1", "h"), f"*{dtype}")
        integers = dict.fromkeys(("M", "N", "R0", "R1", "stride_z0", "stride_z1", "stride_h"), "i32")
        constants = {"ACT": act, "GATED": gated, **_tile(t, rank)}
        aligned = (*pointers, "N", "stride_z0", "stride_z1", "stride_h")
        signature = _signature("activate_kernel", {**pointers, **integers}, constants)
        yield Spec(f"lora_ffn_activate_{kind}", MODULE, "activate_kernel", signature, constants, aligned, _options(t))
        t = gradient_tile(target, TYPES[dtype], rank, gated)
        pointers = dict.fromkeys(
            ("dh", "z0", "z1", "s0", "s1", "b0", "b1", "ds", "a", "dz0", "dz1"), f"*{dtype}"
        ) | dict.fromkeys(("ds0", "ds1", "db0", "db1", "da"), "*fp32")
        strides = ("stride_dh", "stride_z0", "stride_z1", "stride_dz0", "stride_dz1")
        integers = dict.fromkeys(("M", "N", "R0", "R1", "R", *strides, "columns"), "i32")
        for done, lora in [(False, False), (True, False), (False, True)] if not gated else [(False, True)]:
            constants = {"ACT": act, "GATED": gated, "DONE": done, "LORA": lora, "RANK": rank, **_tile(t, rank)}
            before = "after_slope" if done else "after_vendor" if lora else "after_fused"
            name = f"lora_ffn_gradient_{before}_{kind}"
            signature = _signature("gradient_kernel", {**pointers, **integers}, constants)
            aligned = (*pointers, "N", *strides, "columns")
            yield Spec(name, MODULE, "gradient_kernel", signature, constants, aligned, _options(t))


def _skinny(target: int, dtype: str, rank: int) -> Iterator[Spec]:
    t = pass_tile(target, TYPES[dtype], rank)
    types = {"x": f"*{dtype}", "p": f"*{dtype}", "q": f"*{dtype}", "xp": "*fp32", "xq": "*fp32"}
    integers = dict.fromkeys(("M", "N", "R", "stride_xm", "stride_pn", "stride_pr", "columns"), "i32")
    for name, with_p, with_q in (("p", True, False), ("q", False, True), ("pq", True, True)):
        constants = {
            "WITH_P": with_p, "WITH_Q": with_q, "BM": t.m, "BN": t.n,
            "RANK_P": rank if with_p else 16, "RANK_Q": rank if with_q else 16, "UPCAST": False,
        }  # fmt: skip
        if with_p:
            constants["stride_pr" if with_q else "stride_pn"] = 1  # [N, R] as b lies; [R, N] transposed as a lies
        yield Spec(
            f"lora_ffn_skinny_{name}_{dtype}_r{rank}",
            MODULE,
            "skinny_kernel",
            _signature("skinny_kernel", {**types, **integers}, constants),
            constants,
            (*types, "N", "stride_xm", "columns"),
            _options(t),
        )


ORDER = {
    "product_kernel": "x w s b bias z out M N K R stride_xm stride_wn stride_wk stride_bn stride_br stride_zm stride_om "
    "ACT EPILOGUE BIAS STORE_Z BM BN BK RANK ROWS UPCAST",
    "activate_kernel": "z0 z1 s0 s1 b0 b1 h M N R0 R1 stride_z0 stride_z1 stride_h ACT GATED BM BN RANK0 RANK1 UPCAST",
    "gradient_kernel": "dh z0 z1 s0 s1 b0 b1 ds a dz0 dz1 ds0 ds1 db0 db1 da M N R0 R1 R stride_dh stride_z0 stride_z1 "
    "stride_dz0 stride_dz1 columns ACT GATED DONE LORA BM BN RANK0 RANK1 RANK UPCAST",
    "skinny_kernel": "x p q xp xq M N R stride_xm stride_pn stride_pr columns WITH_P WITH_Q BM BN RANK_P RANK_Q UPCAST",
}  # without importing triton: the arguments of each kernel in order


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _tile(tile: Tile, rank: int) -> dict[str, object]:
    return {"BM": tile.m, "BN": tile.n, "UPCAST": False, "RANK0": rank, "RANK1": rank}


def _signature(kernel: str, types: Mapping[str, str], constants: Mapping[str, object]) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types[name] for name in ORDER[kernel].split()}
