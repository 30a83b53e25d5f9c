"""Feed-forward networks found by structure: where activations flow from linear to linear through pointwise steps only.

A feed-forward network is recognised in the autograd graph of one forward pass, not by layer names.  A linear layer
`last` closes a feed-forward network when every path from its input back to other linear layers meets only steps that
keep positions apart (activation, product of gates, norm, dropout, depthwise convolution, reshaping), at least one of
these steps is an activation or a gate, and the layers it comes from (`first`) all read one and the same tensor, of the
width that `last` writes.  Attention fails the test (two activations are multiplied as matrices on the way), and so
does whatever lies across a residual sum (the layers behind it read different tensors).  This covers `fc1 - act - fc2`,
gated forms (SwiGLU with two or packed input layers), torchvision's and Hugging Face's spellings, and a user's own block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

# Autograd nodes that mix positions through a product of two activations, or reduce over them.
MIXING = (
    "Bmm",
    "Baddbmm",
    "MmBackward",
    "Addmm",
    "ScaledDotProduct",
    "Attention",
    "Softmax",
    "MeanBackward",
    "SumBackward",
    "LinearBackward",
)
# Nodes that do not make a feed-forward network by themselves: reshaping, sums, scales and norms.
PLAIN = (
    "View", "Reshape", "Transpose", "Permute", "TBackward", "Clone", "Alias", "Slice", "Select", "Split", "Unbind", "Expand",
    "Squeeze", "Unsqueeze", "ToCopy", "Cat", "AsStrided", "Identity", "AccumulateGrad", "Dropout", "Add", "Sub", "Div", "Norm",
)  # fmt: skip


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network: the module path that names it and the dotted names of its linear layers."""

    name: str
    linears: tuple[str, ...]


@dataclass
class _Call:
    """One call of one linear layer: the autograd nodes of its input and of its output."""

    name: str
    source: Any
    result: Any
    order: int


def find_feed_forward(model: nn.Module, example: Tensor) -> list[FeedForward]:
    """Find the feed-forward networks of a model, in the order in which they run.

    Args:
        model: any module that maps a batch of images to logits; its parameters are not changed.
        example: images, float [B, C, H, W], B >= 1.

    Returns:
        One entry per network, with linear layers in the order in which they run.

    Raises:
        RequestError: no feed-forward network was found, or the model does not run on the example.
    """
    calls, logits_node, kept = _record(model, example)
    by_result = {call.result: call for call in calls}
    widths = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found: dict[tuple[str, ...], int] = {}
    for call in calls:
        if call.source is None or call.result is logits_node:
            continue
        firsts = _trace(call.source, by_result)
        sources = {f.source for f in firsts}
        if len(sources) != 1 or None in sources or any(widths[f.name][0] != widths[call.name][1] for f in firsts):
            continue
        names = tuple(dict.fromkeys([f.name for f in sorted(firsts, key=lambda f: f.order)] + [call.name]))
        if len(names) > 1:
            found.setdefault(names, call.order)
    del kept
    if not found:
        raise RequestError(
            "No feed-forward network was found in the model: no linear layer is reached from another one through an activation.",
            "gsforget works on transformers whose feed-forward layers are torch.nn.Linear.",
            "no_feed_forward",
        )
    groups = sorted(found, key=lambda names: found[names])
    return [FeedForward(_common_path(names), names) for names in groups]


def _record(model: nn.Module, example: Tensor) -> tuple[list[_Call], Any, list[Any]]:
    """Run once with gradients on; note the autograd nodes around each linear layer."""
    calls: list[_Call] = []
    kept: list[Any] = []  # outputs stay alive so that node identities stay unique
    handles = []

    def hook(name: str):
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            kept.extend([inputs, output])
            calls.append(_Call(name, inputs[0].grad_fn, output.grad_fn, len(calls)))

        return note

    required = {n: p.requires_grad for n, p in model.named_parameters()}
    training = [(module, module.training) for module in model.modules()]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        model.eval()
        model.requires_grad_(True)
        with torch.enable_grad():
            output = model(example)
    except Exception as error:
        raise RequestError(
            f"The model does not run on images of shape {list(example.shape)} ({type(error).__name__}: {error}).",
            "Check --img-size and --model-kwargs.",
            "model_does_not_run",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for module, mode in training:
            module.training = mode
    return calls, as_logits(output).grad_fn, [kept, output]


def _trace(source: Any, by_result: dict[Any, _Call]) -> list[_Call]:
    """Linear calls that reach `source` through pointwise steps; empty where a path mixes positions or none activates."""
    firsts: dict[int, _Call] = {}
    activated = False
    stack, seen = [source], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in by_result:
            firsts[by_result[node].order] = by_result[node]
            continue
        kind = type(node).__name__
        if any(m in kind for m in MIXING):
            return []
        activated |= _activates(node, kind)
        stack.extend(parent for parent, _ in node.next_functions)
    return list(firsts.values()) if activated else []


def _activates(node: Any, kind: str) -> bool:
    """Whether a step is an activation, or a gate: a product of two activations (not of one with a parameter)."""
    if kind.startswith("Mul"):
        inputs = [parent for parent, _ in node.next_functions if parent is not None]
        return len(inputs) > 1 and not any("AccumulateGrad" in type(parent).__name__ for parent in inputs)
    return not any(m in kind for m in PLAIN)


def _common_path(names: tuple[str, ...]) -> str:
    parts = [n.split(".") for n in names]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common) or names[0]


def as_logits(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, or an object or dict that carries `logits`, or a tuple's first entry."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise RequestError(
        f"The model returns {type(output).__name__}, in which no logits were found.",
        "Wrap it so that it returns a tensor.",
        "no_logits",
    )
