"""The LoRA feed-forward network as one differentiable function, whatever runs it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gsforget.errors import RequestError
from gsforget.kernels.backend import choose
from gsforget.kernels.lora_ffn.naive import ACTIVATIONS, Layer, naive_lora_ffn

PATHS = {"torch": "torch_path", "triton": "triton_path", "interpret": "triton_path"}
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_RANK = 64  # of the kernels; beyond it plain PyTorch runs


def lora_ffn(
    x: Tensor, firsts: Sequence[Layer] | Layer, last: Layer, activation: str = "gelu", backend: str | None = None
) -> Tensor:
    """y = last(act(first(x))), or last(act(first_0(x)) * first_1(x)), each layer with its LoRA pair; see `naive`.

    Args:
        x: [..., K], of any strides.
        firsts: one layer, or two for a gated network, with weights [N, K].
        last: a layer with weight [K', N].
        activation: one of ``gelu``, ``gelu_tanh``, ``silu``, ``quick_gelu``, ``relu``.
        backend: see `gsforget.kernels.backend.choose`.

    Returns:
        [..., K'], in x's type, or autocast's.  Gradients reach x and the pairs; where a weight or a bias wants one,
        plain PyTorch runs.  Double backward is not supported by the fused paths.

    Raises:
        RequestError: kind ``kernel_input`` for shapes, devices or types that do not fit each other.
    """
    if not x.ndim or not x.is_floating_point():
        raise _unfit(f"the input is {x.dtype} {list(x.shape)}", "Give floating-point numbers [..., features].")
    layers = [Layer(*firsts)] if isinstance(firsts, Layer) else [Layer(*f) for f in firsts]
    layers.append(Layer(*last))
    x, layers = _as_autocast(x, layers)
    _check(x, layers, activation)
    path = _path(x, layers, backend)
    if path is None:
        return naive_lora_ffn(x, tuple(layers[:-1]), layers[-1], activation)
    flat = [tensor for layer in layers for tensor in layer]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            y = _compiled(rows, flat, activation, path)[0]
        else:
            y = _LoRAFFN.apply(rows, activation, path, *flat)
    return y.view(*x.shape[:-1], y.shape[-1])


def _path(x: Tensor, layers: list[Layer], backend: str | None) -> str | None:
    """Name of the module that computes; None where only plain PyTorch gives the right answer."""
    if any(t is not None and t.requires_grad for layer in layers for t in (layer.weight, layer.bias)) or not x.numel():
        return None
    path = PATHS[_backend(x.device, backend)]
    if path == "triton_path" and (x.dtype not in KERNEL_DTYPES or any(len(la.a) > LARGEST_RANK for la in layers)):
        return "torch_path"
    return path


@torch.compiler.assume_constant_result  # torch.compile shall not look at how a backend is found
def _backend(device: torch.device, asked: str | None) -> str:
    return choose(device, asked)


def _implementation(path: str) -> Any:
    return importlib.import_module(f"gsforget.kernels.lora_ffn.{path}")


def _layers(flat: Sequence[Any]) -> tuple[tuple[Layer, ...], Layer]:
    layers = [Layer(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
    return tuple(layers[:-1]), layers[-1]


class _LoRAFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, path: str, *flat: Any) -> Tensor:
        firsts, last = _layers(flat)
        keep = any(ctx.needs_input_grad)
        y, saved, complete = _implementation(path).forward(x, firsts, last, activation, keep)
        if keep:
            ctx.save_for_backward(x, *flat, *saved)
            ctx.activation, ctx.path, ctx.count, ctx.complete = activation, path, len(flat), complete
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        firsts, last = _layers(rest[: ctx.count])
        with torch.autocast(dy.device.type, enabled=False):
            dx, pairs = _implementation(ctx.path).backward(
                dy, x, rest[ctx.count :], firsts, last, ctx.activation, ctx.needs_input_grad[0], ctx.complete
            )
        return dx, None, None, *[g for da, db in pairs for g in (None, None, da, db)]


# The same for torch.compile, which must not look inside: registered operations with shapes that it can work out.


@torch.library.custom_op("gsforget::lora_ffn", mutates_args=())
def _compiled(x: Tensor, flat: Sequence[Tensor | None], activation: str, path: str) -> list[Tensor]:
    y, saved, _ = _implementation(path).forward(x, *_layers(flat), activation, True)
    return [y, *saved]


@torch.library.custom_op("gsforget::lora_ffn_backward", mutates_args=())
def _compiled_backward(
    dy: Tensor, x: Tensor, saved: Sequence[Tensor], flat: Sequence[Tensor | None], activation: str, path: str,
    need_dx: bool,
) -> list[Tensor]:  # fmt: skip
    # What the forward chose is no tensor, so that it cannot travel here: it is looked up a second time.
    complete = _implementation(path).fused_up(x, _layers(flat)[0])
    dx, pairs = _implementation(path).backward(dy, x, list(saved), *_layers(flat), activation, need_dx, complete)
    return [x.new_empty(0) if dx is None else dx, *[g for pair in pairs for g in pair]]


@_compiled.register_fake
def _(x: Tensor, flat: Sequence[Tensor | None], activation: str, path: str) -> list[Tensor]:
    from gsforget.kernels.lora_ffn.tiles import padded
    from gsforget.kernels.lora_ffn.torch_path import keeps_hidden

    firsts, last = _layers(flat)
    width = padded if path == "triton_path" else int
    rows = x.shape[0]
    z = [x.new_empty((rows, layer.weight.shape[0])) for layer in firsts]
    s = [x.new_empty((rows, width(layer.a.shape[0]))) for layer in (*firsts, last)]
    h = [torch.empty_like(z[0])] if path == "torch_path" and keeps_hidden(x) else []
    return [x.new_empty((rows, last.weight.shape[0])), *z, *s, *h]


@_compiled_backward.register_fake
def _(dy, x, saved, flat, activation, path, need_dx) -> list[Tensor]:
    firsts, last = _layers(flat)
    pairs = [(torch.empty_like(la.a), torch.empty_like(la.b)) for la in (*firsts, last)]
    return [x.new_empty(x.shape if need_dx else 0), *[g for pair in pairs for g in pair]]


def _remember(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    x, flat, ctx.activation, ctx.path = inputs
    ctx.given = [t is not None for t in flat]
    ctx.save_for_backward(x, *[t for t in flat if t is not None], *output[1:])


def _pull_back(ctx: Any, gradients: list[Tensor | None]) -> Any:
    x, *rest = ctx.saved_tensors
    kept = iter(rest)
    flat = [next(kept) if given else None for given in ctx.given]
    dy, need_dx = gradients[0], ctx.needs_input_grad[0]
    dx, *pairs = _compiled_backward(dy, x, list(kept), flat, ctx.activation, ctx.path, need_dx)
    two = iter(pairs)
    return dx if need_dx else None, [next(two) if i % 4 > 1 else None for i in range(len(flat))], None, None


_compiled.register_autograd(_pull_back, setup_context=_remember)


def _as_autocast(x: Tensor, layers: list[Layer]) -> tuple[Tensor, list[Layer]]:
    """Everything in the type in which autocast computes linear layers; the pairs in x's type where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, [layer._replace(a=layer.a.to(x.dtype), b=layer.b.to(x.dtype)) for layer in layers]
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    return x.to(dtype), [Layer(*(t if t is None else t.to(dtype) for t in layer)) for layer in layers]  # type: ignore[arg-type]


def _check(x: Tensor, layers: list[Layer], activation: str) -> None:
    """Say in one sentence what does not fit; a kernel would read past the end."""
    if activation not in ACTIVATIONS:
        raise _unfit(f"there is no activation named {activation}", f"Give one of {', '.join(ACTIVATIONS)}.")
    if not 2 <= len(layers) <= 3:
        raise _unfit(f"{len(layers) - 1} first layers were given", "Give one, or two for a gated network.")
    *firsts, last = layers
    for name, layer, fan_in in [*((f"first layer {i}", f, x.shape[-1]) for i, f in enumerate(firsts)),
                                ("the last layer", last, len(firsts[0].weight))]:  # fmt: skip
        w, c, a, b = layer
        if w.ndim != 2 or w.shape[1] != fan_in:
            raise _unfit(f"{name} has a weight {list(w.shape)} and reads {fan_in} features", "Give a weight [out, in].")
        if c is not None and c.shape != w.shape[:1]:
            raise _unfit(f"{name} has a bias {list(c.shape)} beside a weight {list(w.shape)}", "Give a bias [out].")
        if a.ndim != 2 or b.ndim != 2 or a.shape != (b.shape[1], w.shape[1]) or len(b) != len(w):
            raise _unfit(
                f"{name} has factors {list(a.shape)} and {list(b.shape)} beside a weight {list(w.shape)}",
                "Give a [rank, in] and b [out, rank].",
            )
        if not 1 <= len(a) <= min(w.shape):
            raise _unfit(f"{name} has rank {len(a)} beside a weight {list(w.shape)}", "Give 1 to the smaller side.")
        given = [t for t in layer if t is not None]
        if any(t.device != x.device for t in given):
            raise _unfit(f"{name} is not wholly on {x.device}, where the input is", f"Move it: layer.to('{x.device}').")
        if any(t.dtype != x.dtype for t in given):
            raise _unfit(f"{name} is not {x.dtype} like the input", f"Convert one: x.to({w.dtype}).")
    if len({f.weight.shape for f in firsts}) > 1:
        raise _unfit("the two first layers differ in shape", "Gate and value are as wide as each other.")


def _unfit(what: str, hint: str) -> RequestError:
    return RequestError(f"The LoRA feed-forward network does not fit: {what}.", hint, "kernel_input")
