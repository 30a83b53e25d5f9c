"""A float32 ONNX graph turned into a half-precision one that is strongly typed, with its float32 input and logits kept.

Weights keep their names and are stored as float16 or bfloat16; operators that lose accuracy or overflow in half precision are
computed in float32 between two casts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gsforget.errors import RequestError

if TYPE_CHECKING:
    import onnx_ir as ir

# Sums over many elements, exponentials and quotients: what normalisation and softmax are made of.
SENSITIVE = frozenset(
    {
        *(
            "LayerNormalization",
            "RMSNormalization",
            "BatchNormalization",
            "InstanceNormalization",
            "GroupNormalization",
        ),
        *("LpNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"),
        *("Pow", "Sqrt", "Reciprocal", "Div", "Exp", "Log"),
    }
)


TYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}  # as ONNX calls them


def to_half(model: ir.Model, keep: set[str], precision: str = "fp16") -> None:
    """Rewrite a graph in place.

    Args:
        model: float32, without functions.
        precision: ``fp16`` or ``bf16``.
        keep: initializers whose values the caller sets afterwards; the values of all others are rounded here: beyond
            the range of half precision to its largest number, below its smallest to that, so that no constant turns
            into zero or infinity.

    Raises:
        RequestError: the model holds control flow.
    """
    import onnx_ir as ir

    graph, half = model.graph, ir.DataType[TYPES[precision]]
    for node in graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise RequestError(
                f"The model branches or loops inside its graph (operator {node.op_type}), which {precision} export does not "
                "cover.",
                "Type --precision fp32.",
                "no_half",
            )
    casts = _Casts(graph, model.opset_imports.get("", 20), half)
    nodes = list(graph)
    _halve_constants(graph, nodes, keep, half)
    for value in [v for n in nodes for v in n.outputs if v.dtype == ir.DataType.FLOAT]:
        value.dtype = half
    for node in nodes:
        casts.fit(node)
    for value in graph.inputs:
        casts.after_input(value)
    for i, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.outputs[i] = casts.before_output(value)


class _Casts:
    """Puts casts where an operator's type differs from that of its neighbours."""

    def __init__(self, graph: ir.Graph, opset: int, half: ir.DataType):
        self.graph, self.opset, self.half = graph, opset, half
        self._single: dict[ir.Value, ir.Value] = {}

    def fit(self, node: ir.Node) -> None:
        """Give a node float32 where it needs that; its outputs are half precision for everyone else."""
        import onnx_ir as ir

        inputs, outputs = self._needs_single(node)
        for i, value in enumerate(node.inputs):
            if value is not None and i in inputs and value.dtype == self.half:
                node.replace_input_with(i, self._to_single(value, node))
        for i, value in enumerate(node.outputs):
            if i in outputs and value.dtype == self.half:
                value.dtype = ir.DataType.FLOAT
                half = _cast(value, self.half)
                self.graph.insert_after(node, half)
                self._redirect(value, half)

    def after_input(self, value: ir.Value) -> None:
        import onnx_ir as ir

        users = [(user, i) for user, i in value.uses() if i not in self._needs_single(user)[0]]
        if value.dtype == ir.DataType.FLOAT and users:
            half = _cast(value, self.half)
            self.graph.insert_before(self.graph[0], half)
            for user, i in users:
                user.replace_input_with(i, half.outputs[0])

    def before_output(self, value: ir.Value) -> ir.Value:
        """The graph output as float32, under the name that it had."""
        import onnx_ir as ir

        name, value.name = value.name, f"{value.name}_half"
        single = _cast(value, ir.DataType.FLOAT)
        self.graph.append(single)
        single.outputs[0].name = name
        return single.outputs[0]

    def _redirect(self, value: ir.Value, cast: ir.Node) -> None:
        """Let everyone but the cast itself read the cast's output instead of ``value``; the graph's outputs as well."""
        for user, position in list(value.uses()):
            if user is not cast:
                user.replace_input_with(position, cast.outputs[0])
        for i, output in enumerate(self.graph.outputs):
            if output is value:
                name, value.name = value.name, f"{value.name}_single"
                self.graph.outputs[i] = cast.outputs[0]
                cast.outputs[0].name = name

    def _to_single(self, value: ir.Value, user: ir.Node) -> ir.Value:
        import onnx_ir as ir

        if value not in self._single:
            cast = _cast(value, ir.DataType.FLOAT)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(user, cast)
            else:
                self.graph.insert_after(producer, cast)
            self._single[value] = cast.outputs[0]
        return self._single[value]

    def _needs_single(self, node: ir.Node) -> tuple[set[int], set[int]]:
        """Positions of inputs and outputs that must be float32: all of a sensitive operator, else what ONNX demands."""
        import onnx

        everything = set(range(len(node.inputs))), set(range(len(node.outputs)))
        if node.op_type in SENSITIVE:
            return everything
        if node.op_type == "Cast" or not onnx.defs.has(node.op_type, self.opset, node.domain):
            return set(), set()
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        half = f"tensor({self.half.name.lower()})"
        return (
            {i for i in everything[0] if half not in _formal(schema.inputs, i).types},
            {i for i in everything[1] if half not in _formal(schema.outputs, i).types},
        )


def _formal(declared: list, position: int):
    """The declared parameter at a position; the last one repeats where it is variadic."""
    return declared[min(position, len(declared) - 1)]


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    import onnx_ir as ir

    short = "single" if to == ir.DataType.FLOAT else "half"
    output = ir.Value(name=f"{value.name}_to_{short}", shape=value.shape, type=ir.TensorType(to))
    return ir.node("Cast", [value], {"to": to}, outputs=[output], name=f"cast_{value.name}_to_{short}")


def _halve_constants(graph: ir.Graph, nodes: list[ir.Node], keep: set[str], half: ir.DataType) -> None:
    import onnx_ir as ir

    for name, value in graph.initializers.items():
        if value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            if name not in keep and value.const_value is not None:
                value.const_value = ir.tensor(round_constant(value.const_value.numpy(), half), name=name)
            value.dtype = half
    for node in nodes:
        for key, attribute in list(node.attributes.items()):
            if key == "to" and attribute.value == ir.DataType.FLOAT:
                node.attributes[key] = ir.AttrInt64("to", half)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
                node.attributes[key] = ir.AttrTensor(key, ir.tensor(round_constant(attribute.value.numpy(), half)))


def round_constant(values: np.ndarray, to: ir.DataType) -> np.ndarray:
    """Half precision, nearest; finite values stay finite and values other than zero stay other than zero."""
    import ml_dtypes

    kind = to.numpy()
    limit, least = ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).smallest_subnormal
    finite = np.where(np.isfinite(values), np.clip(values, -np.float64(limit), np.float64(limit)), values)
    half = finite.astype(kind)
    return np.where((half == 0) & (values != 0), np.copysign(np.float64(least), values).astype(kind), half)
