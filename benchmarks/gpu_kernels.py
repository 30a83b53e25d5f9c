"""Parts `tests`, `ffn`, `prox` and `memory` of `gpu.py`: each gives its cells as (key, function, arguments)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import ffn_ways
import torch
from ffn_ways import DEPTHS, TOKENS, WIDTHS, Problem, Step
from gpu_timing import Setting
from torch import Tensor

from gsforget.kernels.group_prox import proximal_adam_step
from gsforget.kernels.lora_ffn import Layer, dispatch, lora_ffn, naive_lora_ffn

Cell = tuple[str, Callable[..., dict], tuple]
RANKS, BATCHES = (8, 16), (1, 50)
FLOOR = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}  # added to twice the error of plain PyTorch
STAGES = tuple(dispatch.DEFAULT)


def sizes(setting: Setting) -> dict[str, tuple[int, int]]:
    return {"tiny": (32, 64)} if setting.tiny else WIDTHS


def tokens(setting: Setting) -> int:
    return 9 if setting.tiny else TOKENS


def proximal_adam(lengths: Tensor, weights: Tensor, metric: str = "adam"):
    from gsforget.kernels.group_prox import ProximalAdam  # needed by three parts only

    return ProximalAdam(lengths, weights, metric=metric)


# tests: the rule of the test suite, on the device itself


def tests(setting: Setting) -> Iterator[Cell]:
    types = ("float32",) if setting.tiny else ("float32", "float16", "bfloat16")
    shapes = (
        ((7, 32, 64, 4),)
        if setting.tiny
        else ((1, 64, 256, 8), (197, 384, 1536, 16), (1000, 200, 328, 5), (9850, 768, 3072, 16))
    )
    for dtype, shape in itertools.product(types, shapes):
        for way in dispatch.WAYS:
            yield f"ffn/{dtype}/{'x'.join(map(str, shape))}/{way}", check_ffn, (dtype, shape, way)
    for metric in ("adam", "euclidean"):
        yield f"prox/{metric}", check_prox, (metric,)


def check_ffn(setting: Setting, dtype: str, shape: tuple[int, int, int, int], way: str) -> dict:
    """All activations, gated or not: no further from float64 than twice plain PyTorch; the same bits a second time."""
    rows, k, n, rank = shape
    worst: dict[str, float] = {}
    passed = True
    for activation, gated in (("gelu", False), ("gelu_tanh", False), ("silu", False), ("silu", True)):
        label = activation + ("_gated" if gated else "")
        p = ffn_ways.make_problem(k, n, 1, rows, rank, getattr(torch, dtype), setting.device)
        firsts = (p.first, _other(p.first)) if gated else (p.first,)
        exact = _gradients(naive_lora_ffn, *_doubles(p, firsts), activation)
        plain = _gradients(naive_lora_ffn, p.x, firsts, p.last, p.dy, activation)
        with dispatch.forced(**dict.fromkeys(STAGES, way)):
            _poison(setting)
            got = _gradients(lora_ffn, p.x, firsts, p.last, p.dy, activation)
            _poison(setting)
            again = _gradients(lora_ffn, p.x, firsts, p.last, p.dy, activation)
        for g, q, t, second in zip(got, plain, exact, again, strict=True):
            error, limit = _error(g, t), 2 * _error(q, t) + FLOOR[dtype]
            passed &= error <= limit and torch.equal(g, second)
            worst[label] = max(error, worst.get(label, 0.0))
    return {"passed": bool(passed), "error": {name: float(f"{e:.1e}") for name, e in worst.items()}}


def _other(layer: Layer) -> Layer:
    """A second layer, with other numbers, for a gated network."""
    w, c, a, b = (None if t is None else t.detach().flip(0).clone() for t in layer)
    return Layer(w, c, a.requires_grad_(), b.requires_grad_())


def _doubles(p: Problem, firsts: tuple[Layer, ...]) -> tuple:
    def double(layer: Layer) -> Layer:
        w, c, a, b = (None if t is None else t.detach().double() for t in layer)
        return Layer(w, c, a.requires_grad_(), b.requires_grad_())

    return p.x.detach().double().requires_grad_(), tuple(map(double, firsts)), double(p.last), p.dy.double()


def _gradients(
    function, x: Tensor, firsts: tuple[Layer, ...], last: Layer, dy: Tensor, activation: str
) -> list[Tensor]:
    y = function(x, firsts, last, activation)
    factors = [t for layer in (*firsts, last) for t in (layer.a, layer.b)]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _poison(setting: Setting) -> None:
    """Leave NaN where the next call will find its memory."""
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        counts = [1 << 10] * 64 + [1 << 18] * 64 + [1 << 25] * 16  # blocks of all sizes that calls ask for
        held = [torch.full((count,), float("nan"), device="cuda") for count in counts]
        del held


def check_prox(setting: Setting, metric: str) -> dict:
    """Ten steps of all groups against plain PyTorch in float64, at strengths that some groups survive and others do not."""
    lengths = group_lengths(setting, next(iter(sizes(setting))))
    flat, grad, weights, active = buffers(setting, lengths)
    weights = weights * torch.logspace(-4, 1, len(weights), device=setting.device)
    plain, moments = flat.clone(), (torch.zeros_like(flat), torch.zeros_like(flat))
    optimiser = proximal_adam(lengths, weights, metric)
    for step in range(1, 11):
        got = optimiser.step(flat, grad, active, 1e-3, 1.0)
        wanted = proximal_adam_step(plain, grad, *moments, lengths, weights, active, step, 1e-3, 1.0, metric=metric)
    error, zeros = _error(flat, plain.double()), int((wanted.norms == 0).sum())
    passed = error < 1e-4 and torch.equal(got.norms == 0, wanted.norms == 0) and 0 < zeros < len(lengths)
    return {"passed": bool(passed), "error": float(f"{error:.1e}"), "zeros": zeros, "groups": len(lengths)}


# ffn


def ffn(setting: Setting) -> Iterator[Cell]:
    for name, batch, rank in itertools.product(sizes(setting), (1, 2) if setting.tiny else BATCHES, RANKS):
        yield f"{setting.type_name}/{name}/{batch}/{rank}", measure_ffn, (name, batch, rank)


def measure_ffn(setting: Setting, name: str, batch: int, rank: int) -> dict:
    k, n = sizes(setting)[name]
    p = ffn_ways.make_problem(k, n, batch, tokens(setting), rank, setting.dtype, setting.device)
    torch._dynamo.reset()
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "ours": ffn_ways.ours(p),
        "peft": ffn_ways.peft(p),
        "peft_compiled": ffn_ways.peft(p, "default"),
        "peft_max_autotune": ffn_ways.peft(p, "max-autotune"),
        "addmm": ffn_ways.ours(p, backend="torch"),
        "frozen": ffn_ways.frozen(p),
    }
    if setting.tiny:
        del ways["peft_compiled"], ways["peft_max_autotune"]
    ways |= {f"ours_{label}": _forced(ffn_ways.ours(p), choice) for label, choice in choices().items()}
    exact, exact_frozen = ffn_ways.truth(p), ffn_ways.truth_frozen(p)
    limit = 2 * ffn_ways.off(ffn_ways.plain(p)(), exact) + FLOOR[setting.type_name]
    errors = {w: ffn_ways.off(step(), exact_frozen if w == "frozen" else exact) for w, step in ways.items()}
    times = ffn_ways.interleaved(ways, setting.rounds, setting.clock, setting.warm)
    rows = {}
    for way, step in ways.items():
        rows[way] = {
            **ffn_ways.summary(times[way]),
            "agrees": errors[way] <= limit,
            "error": float(f"{errors[way]:.1e}"),
        }
        if "compiled" not in way and "autotune" not in way:
            rows[way] |= {"peak_bytes": setting.peak_bytes(step), "saved_bytes": ffn_ways.saved_bytes(step, p)}
    return {"ways": rows, "stages": stage_rows(setting, batch * tokens(setting), k, n, rows)}


def choices() -> dict[str, dict[str, str]]:
    """Every stage the other way than by default, all by default, all one way.  "slope" can be fused only where "up" is."""
    base = {**dispatch.DEFAULT, "up": "fused"}
    flipped = {s: {**base, s: "vendor" if base[s] == "fused" else "fused"} for s in STAGES}
    return {"base": base, **flipped, **{f"all_{way}": dict.fromkeys(STAGES, way) for way in dispatch.WAYS}}


def _forced(step: Step, choice: dict[str, str]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with dispatch.forced(**choice):
            return step()

    return run


def stage_rows(setting: Setting, m: int, k: int, n: int, rows: dict[str, dict]) -> list[dict]:
    """Milliseconds of the whole step with each stage one way and the other, with the shape that `dispatch` asks by."""
    base = choices()["base"]
    found = []
    for stage in STAGES:
        other = "vendor" if base[stage] == "fused" else "fused"
        shape = (n, k) if stage in ("up", "slope") else (k, n)
        ms = {base[stage]: rows["ours_base"]["ms"], other: rows[f"ours_{stage}"]["ms"]}
        found.append({"stage": stage, "dtype": setting.type_name, "m": m, "n": shape[0], "k": shape[1], **ms})
    return found


# prox


def prox(setting: Setting) -> Iterator[Cell]:
    for name in sizes(setting):
        yield f"{name}/16", measure_prox, (name,)


def group_lengths(setting: Setting, name: str) -> Tensor:
    k, n = sizes(setting)[name]
    groups, rank = (3, 1) if setting.tiny else (DEPTHS[name], 16)
    return torch.full((groups,), 2 * rank * (k + n), device=setting.device)


def buffers(setting: Setting, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors, gradient, weights and which groups are active."""
    rng = torch.Generator().manual_seed(0)
    count = int(lengths.sum())
    flat, grad = (0.02 * torch.randn(count, generator=rng).to(setting.device) for _ in range(2))
    active = torch.ones(len(lengths), dtype=torch.bool, device=setting.device)
    return flat, grad, lengths.double().sqrt(), active


def measure_prox(setting: Setting, name: str) -> dict:
    """One step of all groups.  Strength and rate are on the device for ours, as a CUDA graph needs them."""
    lengths = group_lengths(setting, name)
    flat, grad, weights, active = buffers(setting, lengths)
    lr, strength = 1e-3, 1e-3
    lr_there, strength_there = (torch.tensor(v, dtype=torch.float64, device=setting.device) for v in (lr, strength))
    ways: dict[str, Callable[[], object]] = {}
    for label, metric in (("ours", "adam"), ("ours_euclidean", "euclidean")):
        optimiser = proximal_adam(lengths, weights, metric)
        ways[label] = functools.partial(optimiser.step, flat.clone(), grad, active, lr_there, strength_there)
    moments = torch.zeros_like(flat), torch.zeros_like(flat)
    ways["eager"] = functools.partial(
        proximal_adam_step, flat.clone(), grad, *moments, lengths, weights, active, 100, lr, strength
    )
    for kind in ("foreach", "fused"):
        ways[f"{kind}_adam_euclidean"] = euclidean(
            flat, grad, lengths.tolist(), kind, lr, (lr * strength * weights).float()
        )
    times = ffn_ways.interleaved(ways, setting.rounds, setting.clock, setting.warm)
    rows = {w: {**ffn_ways.summary(times[w]), "launches": setting.launches(step)} for w, step in ways.items()}
    return {"groups": len(lengths), "factors": len(flat), "ways": rows}


def euclidean(
    flat: Tensor, grad: Tensor, lengths: list[int], kind: str, lr: float, thresholds: Tensor
) -> Callable[[], object]:
    """torch.optim.Adam on one tensor per group, then x <- x max(0, 1 - threshold / ||x||) of each."""
    groups = [piece.clone().requires_grad_() for piece in flat.split(lengths)]
    for group, piece in zip(groups, grad.split(lengths)):
        group.grad = piece.clone()
    optimiser = torch.optim.Adam(groups, lr=lr, **{kind: True})

    def step() -> None:
        optimiser.step()
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(groups))
            torch._foreach_mul_(groups, list((1 - thresholds / norms).clamp_min(0).nan_to_num(0).unbind()))

    return step


# memory


def memory(setting: Setting) -> Iterator[Cell]:
    for name, depth in itertools.product(sizes(setting), (1, 2) if setting.tiny else (1, 12)):
        yield f"{setting.type_name}/{name}/{depth}", measure_memory, (name, depth)


def measure_memory(setting: Setting, name: str, depth: int) -> dict:
    """Peak and kept memory of some networks in a row, forward and backward; rank 16, 50 images."""
    k, n = sizes(setting)[name]
    p = ffn_ways.make_problem(k, n, 2 if setting.tiny else 50, tokens(setting), 16, setting.dtype, setting.device)
    found = {}
    for way, make in {"ours": ffn_ways.ours, "peft": ffn_ways.peft, "frozen": ffn_ways.frozen}.items():
        step = make(p).stacked(depth)
        found[way] = {"peak_bytes": setting.peak_bytes(step), "saved_bytes": ffn_ways.saved_bytes(step, p)}
    ratio = {k: round(found["ours"][k] / v, 3) for k, v in found["peft"].items() if v}
    return {"memory": found, "ours_by_peft": ratio}
