"""Triton kernels of the LoRA feed-forward network.

One idea: a rank-r term costs no pass over memory of its own.  It is added where the tile of the product is in registers
anyway, and the skinny gradients are taken where the tiles of dZ and h are in registers anyway.  Sums over rows go to
float32 slots, one per slab of rows, which the launcher adds in a fixed order: no atomics, so a second call gives the
same bits.  S = x A^T has `RANK` columns (a power of two from 16 on), of which those beyond the true rank are zero.
"""

import triton
import triton.language as tl


@triton.jit
def _activation(z, ACT: tl.constexpr):
    """act(z) and act'(z), float32."""
    if ACT == "gelu":
        phi = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        h = z * phi
        g = phi + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACT == "gelu_tanh":
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        h = z * s
        g = s + h * (1.0 - s) * (1.5957691216057308 + 0.21406747692182353 * z * z)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        h = z * s
        g = s + h * (1.0 - s)
    elif ACT == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * z))
        h = z * s
        g = s + 1.702 * h * (1.0 - s)
    else:  # relu; a NaN stays one
        h = tl.where(z <= 0.0, 0.0, z)
        g = tl.where(z <= 0.0, 0.0, tl.where(z > 0.0, 1.0, z))
    return h, g


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in float32.  UPCAST: for the interpreter, which multiplies bfloat16 wrongly."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product_kernel(
    x, w, s, b, bias, z, out,
    M, N, K, R, stride_xm, stride_wn, stride_wk, stride_bn, stride_br, stride_zm, stride_om,
    ACT: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr, STORE_Z: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """p = x w^T + s b^T + bias, then out = p ("none"), act(p) ("act", and z = p), or p act'(z) ("grad", z read)."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.program_id(0)
    first = tile // (ROWS * tiles_n) * ROWS  # ROWS rows of tiles share their columns in the L2 cache
    rows = min(tiles_m - first, ROWS)
    tile_m, tile_n = first + tile % (ROWS * tiles_n) % rows, tile % (ROWS * tiles_n) // rows
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    k, r = tl.arange(0, BK), tl.arange(0, RANK)
    in_m, in_n = m < M, n < N
    s_tile = tl.load(s + m[:, None] * RANK + r[None, :], mask=in_m[:, None], other=0.0)
    b_tile = tl.load(
        b + r[:, None] * stride_br + n[None, :] * stride_bn, mask=(r[:, None] < R) & in_n[None, :], other=0.0
    )
    acc = _dot(s_tile, b_tile, tl.zeros((BM, BN), tl.float32), UPCAST)
    x_at = x + m[:, None] * stride_xm + k[None, :]
    w_at = w + n[None, :] * stride_wn + k[:, None] * stride_wk
    for start in range(0, K, BK):
        in_k = start + k < K
        x_tile = tl.load(x_at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = _dot(x_tile, w_tile, acc, UPCAST)
        x_at += BK
        w_at += BK * stride_wk
    if BIAS:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    inside = in_m[:, None] & in_n[None, :]
    z_at = z + m[:, None] * stride_zm + n[None, :]
    if EPILOGUE == "act":
        if STORE_Z:
            tl.store(z_at, acc, mask=inside)
        acc, _ = _activation(acc, ACT)
    elif EPILOGUE == "grad":
        _, g = _activation(tl.load(z_at, mask=inside, other=0.0).to(tl.float32), ACT)
        acc *= g
    tl.store(out + m[:, None] * stride_om + n[None, :], acc, mask=inside)


@triton.jit
def _adapted_tile(z, s, b, m, n, M, N, R, stride_z, RANK: tl.constexpr, LORA: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of z, float32, with the pair's term added where it is not in there yet (LORA)."""
    inside = (m[:, None] < M) & (n[None, :] < N)
    tile = tl.load(z + m[:, None] * stride_z + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if LORA:
        r = tl.arange(0, RANK)
        s_tile = tl.load(s + m[:, None] * RANK + r[None, :], mask=m[:, None] < M, other=0.0)
        b_tile = tl.load(b + n[None, :] * R + r[:, None], mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)
        tile = _dot(s_tile, b_tile, tile, UPCAST)
    return tile


@triton.jit
def activate_kernel(
    z0, z1, s0, s1, b0, b1, h,
    M, N, R0, R1, stride_z0, stride_z1, stride_h,
    ACT: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RANK0: tl.constexpr, RANK1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h = act(z0 + s0 b0^T), times z1 + s1 b1^T in a gated network; z0 and z1 are products without the pairs' terms."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    a, _ = _activation(_adapted_tile(z0, s0, b0, m, n, M, N, R0, stride_z0, RANK0, True, UPCAST), ACT)
    if GATED:
        a *= _adapted_tile(z1, s1, b1, m, n, M, N, R1, stride_z1, RANK1, True, UPCAST)
    tl.store(h + m[:, None] * stride_h + n[None, :], a, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def gradient_kernel(
    dh, z0, z1, s0, s1, b0, b1, ds, a, dz0, dz1, ds0, ds1, db0, db1, da,
    M, N, R0, R1, R, stride_dh, stride_z0, stride_z1, stride_dz0, stride_dz1, columns,
    ACT: tl.constexpr, GATED: tl.constexpr, DONE: tl.constexpr, LORA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    RANK0: tl.constexpr, RANK1: tl.constexpr, RANK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From dh = dy W to all that needs the hidden layer, in one pass over it.

    Per tile: dH = dh + ds a, h and dz from z; then dz is stored, and the tile's parts of ds_i = dz_i b_i, of
    db_i = dz_i^T s_i and of da^T = h^T ds.  Program (i, j) owns BM rows and `columns` columns; ds_i goes to slot j
    of [splits, M, RANK], db_i and da to slot i of [slabs, N, RANK].

    DONE: dh holds dz already (one first layer; from `product_kernel`), and is read only.
    LORA: z holds products without the pairs' terms.
    """
    slab, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = slab * BM + tl.arange(0, BM)
    in_m = m < M
    r0, r1, r = tl.arange(0, RANK0), tl.arange(0, RANK1), tl.arange(0, RANK)
    ds_tile = tl.load(ds + m[:, None] * RANK + r[None, :], mask=in_m[:, None], other=0.0)
    s0_tile = tl.load(s0 + m[:, None] * RANK0 + r0[None, :], mask=in_m[:, None], other=0.0)
    ds0_acc = tl.zeros((BM, RANK0), tl.float32)
    ds1_acc = tl.zeros((BM, RANK1), tl.float32)
    for start in range(0, columns, BN):
        n = split * columns + start + tl.arange(0, BN)
        in_n = n < N
        inside = in_m[:, None] & in_n[None, :]
        d = tl.load(dh + m[:, None] * stride_dh + n[None, :], mask=inside, other=0.0)
        kind = d.dtype
        zeta0 = _adapted_tile(z0, s0, b0, m, n, M, N, R0, stride_z0, RANK0, LORA, UPCAST)
        act, slope = _activation(zeta0, ACT)
        if DONE:
            dzeta0 = d
        else:
            a_tile = tl.load(a + r[:, None] * N + n[None, :], mask=(r[:, None] < R) & in_n[None, :], other=0.0)
            d = _dot(ds_tile, a_tile, d.to(tl.float32), UPCAST)
            if GATED:
                zeta1 = _adapted_tile(z1, s1, b1, m, n, M, N, R1, stride_z1, RANK1, LORA, UPCAST)
                dzeta0 = (d * slope * zeta1).to(kind)
                dzeta1 = (d * act).to(kind)
                act *= zeta1
                tl.store(dz1 + m[:, None] * stride_dz1 + n[None, :], dzeta1, mask=inside)
                s1_tile = tl.load(s1 + m[:, None] * RANK1 + r1[None, :], mask=in_m[:, None], other=0.0)
                b1_tile = tl.load(
                    b1 + n[:, None] * R1 + r1[None, :], mask=in_n[:, None] & (r1[None, :] < R1), other=0.0
                )
                ds1_acc = _dot(dzeta1, b1_tile, ds1_acc, UPCAST)
                part = _dot(tl.trans(dzeta1), s1_tile, tl.zeros((BN, RANK1), tl.float32), UPCAST)
                tl.store(db1 + (slab * N + n)[:, None] * RANK1 + r1[None, :], part, mask=in_n[:, None])
            else:
                dzeta0 = (d * slope).to(kind)
            tl.store(dz0 + m[:, None] * stride_dz0 + n[None, :], dzeta0, mask=inside)
        b0_tile = tl.load(b0 + n[:, None] * R0 + r0[None, :], mask=in_n[:, None] & (r0[None, :] < R0), other=0.0)
        ds0_acc = _dot(dzeta0, b0_tile, ds0_acc, UPCAST)
        part = _dot(tl.trans(dzeta0), s0_tile, tl.zeros((BN, RANK0), tl.float32), UPCAST)
        tl.store(db0 + (slab * N + n)[:, None] * RANK0 + r0[None, :], part, mask=in_n[:, None])
        part = _dot(tl.trans(act.to(kind)), ds_tile, tl.zeros((BN, RANK), tl.float32), UPCAST)
        tl.store(da + (slab * N + n)[:, None] * RANK + r[None, :], part, mask=in_n[:, None])
    tl.store(ds0 + (split * M + m)[:, None] * RANK0 + r0[None, :], ds0_acc, mask=in_m[:, None])
    if GATED:
        tl.store(ds1 + (split * M + m)[:, None] * RANK1 + r1[None, :], ds1_acc, mask=in_m[:, None])


@triton.jit
def skinny_kernel(
    x, p, q, xp, xq,
    M, N, R, stride_xm, stride_pn, stride_pr, columns,
    WITH_P: tl.constexpr, WITH_Q: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, RANK_P: tl.constexpr, RANK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x p (p [N, R]) and x^T q (q [M, RANK_Q]) in one pass over x [M, N].

    Program (i, j) owns BM rows and `columns` columns; x p goes to slot j of [splits, M, RANK_P], x^T q to slot i of
    [slabs, N, RANK_Q], float32.
    """
    slab, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = slab * BM + tl.arange(0, BM)
    in_m = m < M
    rp, rq = tl.arange(0, RANK_P), tl.arange(0, RANK_Q)
    acc = tl.zeros((BM, RANK_P), tl.float32)
    if WITH_Q:
        q_tile = tl.load(q + m[:, None] * RANK_Q + rq[None, :], mask=in_m[:, None], other=0.0)
    for start in range(0, columns, BN):
        n = split * columns + start + tl.arange(0, BN)
        in_n = n < N
        tile = tl.load(x + m[:, None] * stride_xm + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)
        if WITH_P:
            p_tile = tl.load(
                p + n[:, None] * stride_pn + rp[None, :] * stride_pr, mask=in_n[:, None] & (rp[None, :] < R), other=0.0
            )
            acc = _dot(tile, p_tile, acc, UPCAST)
        if WITH_Q:
            part = _dot(tl.trans(tile), q_tile, tl.zeros((BN, RANK_Q), tl.float32), UPCAST)
            tl.store(xq + (slab * N + n)[:, None] * RANK_Q + rq[None, :], part, mask=in_n[:, None])
    if WITH_P:
        tl.store(xp + (split * M + m)[:, None] * RANK_P + rp[None, :], acc, mask=in_m[:, None])
