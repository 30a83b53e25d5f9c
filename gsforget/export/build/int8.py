"""int8 along a chain of erasures, in ONNX files that carry their weights as int8: W(n) = round((s W(n-1) + D) / s').

The scales of the activations are those of the chain's first int8 file and never change.  The weights' scales s stay as
well, all of them, where that cuts off next to nothing of the erasure: then an engine, whose code is laid out by scales, can be
patched too.  Else s' is just large enough where the erasure leads beyond the range of s.  (With s frozen, a quarter of an
erasure of the demo model was cut off: erasures concentrate on few blocks, and may be larger there than the weights.)

A change smaller than half a step rounds away, every time anew, because what was rounded off before is gone: how much of an
erasure is left is measured, and too little is refused.

A file may also keep float32 weights before a QuantizeLinear, as other tools write them.  Then the chain is that of float32,
W(n) = round_fp32(W(n-1) + D), with scales that stay or grow by the same rule; rounding does not add up, and what is left of
an erasure is measured behind QuantizeLinear.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import GateError, RequestError
from gsforget.export.build.chain import ChainInfo
from gsforget.export.build.locate import NotLocated
from gsforget.export.device.factors import narrow
from gsforget.export.device.metadata import METADATA_KEY, ArtifactInfo, read_sidecar

if TYPE_CHECKING:
    import onnx

    from gsforget.export.build.step import Step
    from gsforget.lora.grid import GridFactors

SUFFIX = "_quantized"  # that ONNX Runtime's quantisation adds to a weight's name
KEPT = 0.9  # the share of an erasure that rounding must leave
FROZEN = 0.997  # of what growing scales keep of an erasure, the share that scales must keep to stay as they are
# Adding a small change to weights that were rounded loses it; rounding the float32 weights anew does not, on average.
ANEW = (
    "To calibrate anew and send the file whole, type gsforget export --onnx --precision int8 and then gsforget export "
    "--patch --full --precision int8."
)


@dataclass(frozen=True)
class Int8Weight:
    """A weight that an ONNX file computes with at int8.

    Attributes:
        initializer, scales: the names of its values and of its scales there.
        transposed: whether the values lie there as [in, out].
        scale: float32 [1], or one for each output or input.
        axis: of [out, in] along which the scales go; None for one scale.
        exact: whether the file keeps it as float32, before a QuantizeLinear.
    """

    initializer: str
    scales: str
    transposed: bool
    scale: np.ndarray
    axis: int | None
    exact: bool = False

    def spread(self) -> np.ndarray:
        """The scales in float64, to be multiplied with a weight [out, in]."""
        return self.scale.astype(np.float64).reshape((-1, 1) if self.axis == 0 else (1, -1))

    @property
    def unit(self) -> np.ndarray | float:
        """What the values as they are stored are multiples of."""
        return 1.0 if self.exact else self.spread()

    def computed(self, values: np.ndarray) -> np.ndarray:
        """The weight that the file computes with, float64, from its values as they are stored."""
        spread = self.spread()
        return np.clip(np.rint(values / spread), -128, 127) * spread if self.exact else values * spread


def int8_weights(model: onnx.ModelProto) -> dict[str, Int8Weight]:
    """The matrices that a file computes with at int8, by the name of the parameter.

    Each is an initializer before a DequantizeLinear with float32 scales of its own and zero point 0, as ONNX Runtime's
    `quantize_static` writes it (with ``AddQDQPairToWeight``: float32, before a QuantizeLinear with the same scales), and
    its result goes into MatMul or Gemm, directly or by way of a Transpose.  Weights that are kept otherwise (blocks of
    scales, other zero points) are left out.
    """
    from onnx import TensorProto, numpy_helper

    stored = {i.name: i for i in model.graph.initializer}
    readers: dict[str, set[str]] = {}  # for each initializer, the first inputs of the nodes that read it
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.input[0])
    uses = Counter(name for node in model.graph.node for name in node.input)
    quantised = {n.output[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in stored}
    found: dict[str, Int8Weight] = {}
    unclear: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        before = quantised.get(node.input[0])
        weight = stored.get(node.input[0] if before is None else before.input[0])
        kind = TensorProto.INT8 if before is None else TensorProto.FLOAT
        if weight is None or weight.data_type != kind or len(weight.dims) != 2:
            continue
        name = weight.name.removesuffix(SUFFIX)
        attributes = {a.name: a.i for a in node.attribute}
        outside = weight.data_location == TensorProto.EXTERNAL
        scale = stored.get(node.input[1])
        zero = stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        transposed = _orientation(model, node.output[0])
        values = None if scale is None else numpy_helper.to_array(scale).reshape(-1)
        stored_axis = attributes.get("axis", 1) % 2
        own = {weight.name} if before is None else {weight.name, before.output[0]}
        if (
            outside
            or (before is not None and not _is_pair(before, node, zero, uses))
            or values is None
            or values.dtype != np.float32
            or not (np.isfinite(values) & (values > 0)).all()
            or values.size not in (1, weight.dims[stored_axis])
            or attributes.get("block_size", 0)
            or (zero is None and len(node.input) > 2 and node.input[2])
            or (zero is not None and numpy_helper.to_array(zero).any())
            or transposed is None
            or readers[node.input[1]] != own
        ):
            unclear.add(name)
            continue
        axis = None if values.size == 1 else stored_axis ^ transposed
        made = Int8Weight(weight.name, node.input[1], transposed, values, axis, before is not None)
        if name in found and not _alike(found[name], made):
            unclear.add(name)
        found[name] = made
    return {name: weight for name, weight in found.items() if name not in unclear}


def _is_pair(first: Any, second: Any, zero: Any, uses: Mapping[str, int]) -> bool:
    """Whether a QuantizeLinear and a DequantizeLinear are two halves, of int8, of a weight that nothing else reads."""
    from onnx import TensorProto

    axes = [{a.name: a.i for a in node.attribute} for node in (first, second)]
    return (
        list(first.input[1:]) == list(second.input[1:])
        and zero is not None
        and zero.data_type == TensorProto.INT8
        and axes[0] == axes[1]
        and uses[first.input[0]] == uses[first.output[0]] == 1
    )


def read_int8(model: onnx.ModelProto, weight: Int8Weight) -> np.ndarray:
    """The values as they are stored, [out, in]: int8, or float32 where the file keeps it ``exact``."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == weight.initializer))
    return values.T if weight.transposed else values


def next_scale(values: np.ndarray, weight: Int8Weight, product: np.ndarray) -> np.ndarray:
    """The scales after a step of the chain, float32: those before it, larger where the new weights would be cut off.

    What a file that keeps its weights ``exact`` cuts off already is left to it.
    """

    def largest(array: np.ndarray) -> np.ndarray:
        exact = np.abs(array)
        return exact.max(keepdims=True).reshape(1) if weight.axis is None else exact.max(1 - weight.axis)

    before = values * weight.unit
    needed = largest(before + product)
    enough = np.rint(needed / weight.scale) <= 127
    if weight.exact:
        enough |= needed <= largest(before)
    return np.where(enough, weight.scale, (needed / 127).astype(np.float32))


def next_weight(values: np.ndarray, before: np.ndarray, after: np.ndarray, product: np.ndarray) -> np.ndarray:
    """One step of the chain: int8 [out, in], the scales before and after as ``spread`` gives them, the exact product.

    The smallest value is -127, as symmetric quantisation has it; -128 only where the weight holds one already.
    """
    exact = (values * before + product) / after
    return np.clip(np.rint(exact), min(int(values.min()), -127), 127).astype(np.int8)


@dataclass(frozen=True)
class _Next:
    """A weight after a step of the chain, its values as they are stored, and how much of the erasure is left in it."""

    weight: Int8Weight
    values: np.ndarray
    left: float

    @classmethod
    def of(cls, before: Int8Weight, values: np.ndarray, product: np.ndarray, scale: np.ndarray) -> _Next:
        weight = dataclasses.replace(before, scale=scale)
        if before.exact:
            after = narrow(values.astype(np.float64) + product, "float32")
        else:
            after = next_weight(values, before.spread(), weight.spread(), product)
        return cls(weight, after, float(((weight.computed(after) - before.computed(values)) * product).sum()))


def after_erasure(old: bytes, delta: Mapping[str, GridFactors], info: ArtifactInfo) -> tuple[bytes, float]:
    """The int8 file after an erasure, from the one before it: other int8 weights, their scales, and other metadata.

    Args:
        old: the bytes of the file before.
        delta: the erasure's factors, by the name of the parameter.
        info: what the new file says of itself.

    Returns:
        The new file's bytes, and which share of the erasure is left in it: the change of the dequantised weights,
        projected on the exact one; 1 is all of it.

    Raises NotLocated where a weight that changes is not carried as int8.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(old)
    known = int8_weights(model)
    stored = {i.name: i for i in model.graph.initializer}
    frozen, grown = [], []
    whole = 0.0
    for name, factors in delta.items():
        product = factors.product().numpy()
        if name not in known or tuple(read_int8(model, known[name]).shape) != product.shape:
            raise NotLocated(f"it does not carry {name} as int8")
        weight = known[name]
        values = read_int8(model, weight)
        frozen.append(_Next.of(weight, values, product, weight.scale))
        grown.append(_Next.of(weight, values, product, next_scale(values, weight, product)))
        whole += float((product * product).sum())
    most = sum(one.left for one in grown)
    chosen = frozen if sum(one.left for one in frozen) >= FROZEN * most else grown
    for one in chosen:
        weight = one.weight
        for field in ("int32_data", "float_data"):
            stored[weight.initializer].ClearField(field)
        lies = one.values.T if weight.transposed else one.values
        stored[weight.initializer].raw_data = np.ascontiguousarray(lies).tobytes()
        scales = stored[weight.scales]
        if not np.array_equal(numpy_helper.to_array(scales).reshape(-1), weight.scale):
            scales.CopyFrom(numpy_helper.from_array(weight.scale.reshape(tuple(scales.dims)), weight.scales))
    left = sum(one.left for one in chosen)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(info.to_json(), sort_keys=True)
    return model.SerializeToString(), left / whole if whole else 0.0


def first_in_chain(position: int, precision: str = "int8") -> ChainInfo:
    """The chain of a file that was calibrated after so many erasures."""
    reason = f"{precision} was calibrated at erasure {position}" if position else ""
    return ChainInfo(position, position, not position, reason)


def write_next(step: Step, info: ArtifactInfo, path: Path) -> tuple[float, ChainInfo]:
    """Write the int8 file after an erasure; returns the share of the erasure that is left, and the chain.

    Raises RequestError ``not_int8`` where the file before does not carry what changes as int8, GateError as
    ``check_kept`` does.
    """
    before = step.before.onnx
    assert before is not None  # see `Export.follow`
    try:
        content, kept = after_erasure(before.read_bytes(), step.delta, info)
    except NotLocated as error:
        raise RequestError(f"{before} cannot be followed: {error}.", ANEW, "not_int8") from error
    check_kept(kept, path.name)
    path.write_bytes(content)
    stated = (read_sidecar(before) or {}).get("chain")
    behind = ChainInfo(**stated) if stated else first_in_chain(info.sequence - 1)
    return round(kept, 4), dataclasses.replace(behind, position=info.sequence)


def check_kept(share: float, where: str) -> None:
    """Raise GateError (kind ``rounded_away``) where too little of an erasure is left at int8."""
    if not share >= KEPT:
        raise GateError(
            f"Of the erasure, {100 * share:.0f} % are left in {where} (at least {100 * KEPT:.0f} % are needed): too much of "
            "the change is smaller than half a step of int8. Nothing was published.",
            f"Type --precision fp16. {ANEW}",
            "rounded_away",
        )


def _orientation(model: onnx.ModelProto, value: str, turned: bool = False) -> bool | None:
    """Whether what DequantizeLinear gives is [in, out]; None where it is used in another way, or in two."""
    found: set[bool] = set()
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name != value:
                continue
            attributes = {a.name: a for a in node.attribute}
            if node.op_type == "MatMul" and i == 1:
                found.add(not turned)
            elif node.op_type == "Gemm" and i == 1:
                turns = "transB" in attributes and bool(attributes["transB"].i)
                found.add(turns == turned)
            elif node.op_type == "Transpose" and not turned and list(attributes["perm"].ints) == [1, 0]:
                beyond = _orientation(model, node.output[0], True)
                if beyond is None:
                    return None
                found.add(beyond)
            else:
                return None
    return found.pop() if len(found) == 1 else None


def _alike(one: Int8Weight, other: Int8Weight) -> bool:
    fields = ("initializer", "scales", "transposed", "axis", "exact")
    return all(getattr(one, f) == getattr(other, f) for f in fields) and np.array_equal(one.scale, other.scale)
