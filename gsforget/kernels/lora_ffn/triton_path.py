"""The LoRA feed-forward network on Triton kernels, beside vendor products where those are faster.

Forward: S = x A^T (skinny), then either one product with the pair, the bias and the activation in its epilogue
("fused"), or the vendor's product followed by one pass that adds the pair and activates ("vendor").  Backward: one pass
over dy gives dS and dB of the last layer, one pass over the hidden layer gives dZ and everything skinny, and what
remains are two products.  Which way each product goes is looked up in `dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsforget.kernels.ahead.precompiled import launch
from gsforget.kernels.lora_ffn import dispatch, kernels
from gsforget.kernels.lora_ffn.naive import Layer
from gsforget.kernels.lora_ffn.tiles import ROWS, gradient_tile, padded, pass_tile, product_tile
from gsforget.kernels.lora_ffn.torch_path import Pair

WAVES = 2  # programs per multiprocessor that a pass over a slab aims at
PROCESSORS = 132  # multiprocessors, where the device cannot be asked


def forward(
    x: Tensor, firsts: tuple[Layer, ...], last: Layer, activation: str, keep: bool
) -> tuple[Tensor, list[Tensor], bool]:
    """x [M, K] -> y [M, K'], and z_i, S_i of each first layer, S of the last for the backward.  See `torch_path`.

    Last comes what the backward must know of the choice made here: whether z holds its pair's term already.
    """
    s = [_skinny_p(x, layer.a.t()) for layer in firsts]
    complete = fused_up(x, firsts)
    if complete:
        layer = firsts[0]
        z = x.new_empty((len(x), len(layer.weight))) if keep else x.new_empty((1, 1))
        h = _product(x, layer.weight.t(), s[0], layer.b.t(), layer.bias, z, activation, "act", keep)
        zs = [z]
    else:
        zs = [torch.nn.functional.linear(x, layer.weight, layer.bias) for layer in firsts]
        h = _activate(zs, s, firsts, activation)
    s_last = _skinny_p(h, last.a.t())
    y = _with_pair(h, last.weight.t(), s_last, last.b.t(), last.bias, "down")
    return y, [*zs, *s, s_last], complete


def backward(
    dy: Tensor, x: Tensor, saved: list[Tensor], firsts: tuple[Layer, ...], last: Layer, activation: str, need_dx: bool,
    complete: bool,
) -> tuple[Tensor | None, list[Pair]]:  # fmt: skip
    """dy [M, K'] -> dx [M, K] or None, and (dA, dB) of each first layer and of the last.  See `torch_path`."""
    count = len(firsts)
    z, s, s_last = saved[:count], saved[count : 2 * count], saved[2 * count]
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    ds, db = _skinny(dy, last.b, s_last)
    rank = last.a.shape[0]
    if complete and dispatch.choose("slope", x, dy.shape[0], z[0].shape[1], dy.shape[1]) == "fused":
        dh, done = _product(dy, last.weight, ds, last.a, None, z[0], activation, "grad", False), True
    else:
        dh, done = dy @ last.weight, False
    dz, dsi, dbi, da = _gradients(dh, z, s, firsts, ds, last.a, activation, done, not complete)
    dx: Tensor | None = None
    pairs = []
    for i, layer in enumerate(firsts):
        r = layer.a.shape[0]
        pairs.append((_skinny_q(x, dsi[i])[:, :r].t().contiguous(), dbi[i][:, :r].contiguous()))
        if need_dx and dx is None:
            dx = _with_pair(dz[i], layer.weight, dsi[i], layer.a, None, "back")
        elif dx is not None:
            dx.addmm_(dz[i], layer.weight).addmm_(dsi[i][:, :r], layer.a)
    pairs.append((da[:, :rank].t().contiguous(), db[:, :rank].contiguous()))
    return dx, pairs


def fused_up(x: Tensor, firsts: tuple[Layer, ...]) -> bool:
    """Whether the first product takes the activation into its epilogue."""
    n, k = firsts[0].weight.shape
    return len(firsts) == 1 and dispatch.choose("up", x, len(x), n, k) == "fused"


def _with_pair(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, stage: str) -> Tensor:
    """x w + s b + bias of x [M, K], w [K, N], s [M, RANK], b [R, N], by the kernel or by the vendor's products."""
    if dispatch.choose(stage, x, len(x), w.shape[1], w.shape[0]) == "fused":
        return _product(x, w, s, b, bias, None, "relu", "none", False)
    base = x @ w if bias is None else torch.addmm(bias, x, w)
    return base.addmm_(s[:, : len(b)], b)


def _product(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, z: Tensor | None, act: str, epilogue: str, keep: bool
) -> Tensor:  # fmt: skip
    """`product_kernel` on x [M, K], w [K, N], s [M, RANK], b [R, N]."""
    out = x.new_empty((len(x), w.shape[1]))
    z = out if z is None else z
    t = product_tile(dispatch.target(x.device), x.element_size(), s.shape[1])
    grid = (_tiles(len(x), t.m) * _tiles(w.shape[1], t.n),)
    launch(
        kernels.product_kernel, grid,
        x, w, s, b, out if bias is None else bias, z, out,
        *out.shape, x.shape[1], len(b),
        x.stride(0), w.stride(1), w.stride(0), b.stride(1), b.stride(0), z.stride(0), out.stride(0),
        ACT=act, EPILOGUE=epilogue, BIAS=bias is not None, STORE_Z=keep,
        BM=t.m, BN=t.n, BK=t.k, RANK=s.shape[1], ROWS=ROWS, UPCAST=_upcast(x), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def _activate(z: list[Tensor], s: list[Tensor], firsts: tuple[Layer, ...], activation: str) -> Tensor:
    h = torch.empty_like(z[0])
    b = [layer.b.contiguous() for layer in firsts]
    t = pass_tile(dispatch.target(h.device), h.element_size(), max(si.shape[1] for si in s))
    launch(
        kernels.activate_kernel, (_tiles(len(h), t.m), _tiles(h.shape[1], t.n)),
        z[0], z[-1], s[0], s[-1], b[0], b[-1], h,
        *h.shape, b[0].shape[1], b[-1].shape[1], z[0].stride(0), z[-1].stride(0), h.stride(0),
        ACT=activation, GATED=len(z) == 2, BM=t.m, BN=t.n,
        RANK0=s[0].shape[1], RANK1=s[-1].shape[1], UPCAST=_upcast(h), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return h


def _gradients(
    dh: Tensor, z: list[Tensor], s: list[Tensor], firsts: tuple[Layer, ...], ds: Tensor, a: Tensor,
    activation: str, done: bool, lora: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """`gradient_kernel`: dz_i (the first one in place of dh), ds_i, db_i, and da^T [N, RANK]."""
    (rows, n), gated = dh.shape, len(z) == 2
    b = [layer.b.contiguous() for layer in firsts]
    ranks = [si.shape[1] for si in s]
    t = gradient_tile(dispatch.target(dh.device), dh.element_size(), max([*ranks, ds.shape[1]]), gated)
    slabs, splits, columns = _split(rows, n, t.m, t.n, dh.device)
    dz = [dh] + ([torch.empty_like(dh)] if gated else [])
    parts_ds = [dh.new_empty((splits, rows, r), dtype=torch.float32) for r in ranks]
    parts_db = [dh.new_empty((slabs, n, r), dtype=torch.float32) for r in ranks]
    parts_da = dh.new_empty((slabs, n, ds.shape[1]), dtype=torch.float32)
    a = a.contiguous()
    launch(
        kernels.gradient_kernel, (slabs, splits),
        dh, z[0], z[-1], s[0], s[-1], b[0], b[-1], ds, a,
        dz[0], dz[-1], parts_ds[0], parts_ds[-1], parts_db[0], parts_db[-1], parts_da,
        rows, n, b[0].shape[1], b[-1].shape[1], len(a),
        dh.stride(0), z[0].stride(0), z[-1].stride(0), dz[0].stride(0), dz[-1].stride(0), columns,
        ACT=activation, GATED=gated, DONE=done, LORA=lora, BM=t.m, BN=t.n,
        RANK0=ranks[0], RANK1=ranks[-1], RANK=ds.shape[1], UPCAST=_upcast(dh), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    kind = dh.dtype
    return dz, [_sum(p, kind) for p in parts_ds], [_sum(p, kind) for p in parts_db], _sum(parts_da, kind)


def _skinny(x: Tensor, p: Tensor | None, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """x p [M, RANK] and x^T q [N, RANK] of x [M, N], p [N, R] and q [M, RANK], in one pass; empty where not asked for."""
    rows, n = x.shape
    rank_p, rank_q = padded(p.shape[1]) if p is not None else 16, q.shape[1] if q is not None else 16
    t = pass_tile(dispatch.target(x.device), x.element_size(), max(rank_p, rank_q))
    slabs, splits, columns = _split(rows, n, t.m, t.n, x.device)
    xp = x.new_empty((splits, rows, rank_p) if p is not None else (1,), dtype=torch.float32)
    xq = x.new_empty((slabs, n, rank_q) if q is not None else (1,), dtype=torch.float32)
    launch(
        kernels.skinny_kernel, (slabs, splits),
        x, x if p is None else p, x if q is None else q, xp, xq,
        rows, n, 0 if p is None else p.shape[1], x.stride(0),
        0 if p is None else p.stride(0), 0 if p is None else p.stride(1), columns,
        WITH_P=p is not None, WITH_Q=q is not None, BM=t.m, BN=t.n, RANK_P=rank_p, RANK_Q=rank_q, UPCAST=_upcast(x),
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return _sum(xp, x.dtype), _sum(xq, x.dtype)


def _skinny_p(x: Tensor, p: Tensor) -> Tensor:
    return _skinny(x, p, None)[0]


def _skinny_q(x: Tensor, q: Tensor) -> Tensor:
    return _skinny(x, None, q)[1]


def _split(rows: int, n: int, bm: int, bn: int, device: torch.device) -> tuple[int, int, int]:
    """Slabs of rows, splits of the columns, and columns per split, so that a pass fills the device."""
    slabs = _tiles(rows, bm)
    wanted = max(1, WAVES * _processors(device) // slabs)
    columns = _tiles(_tiles(n, wanted), bn) * bn
    return slabs, _tiles(n, columns), columns


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the slots in a fixed order, in float32."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _upcast(x: Tensor) -> bool:
    """The interpreter multiplies bfloat16 wrongly."""
    return x.device.type != "cuda" and x.dtype == torch.bfloat16
