"""A bf16 ONNX file computed where no kernels for bf16 exist, as ONNX Runtime has none on a CPU.

Every operator computes in float32 on the file's own bf16 weights, and each of its results is rounded to bf16 before the
next one reads it.  Hardware rounds at the same places; it may add up in another order in between.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from gsforget.export.device.runtime import OnnxPredictor

MEASURED_ON = "onnxruntime in float32, every result rounded to bf16: it has no bf16 kernels on a CPU"
COPIES = frozenset({"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Transpose"})


def open_emulated(path: Path, scratch: Path) -> OnnxPredictor:
    """Load a bf16 ONNX file for inference on the CPU, its operators emulated; ``scratch`` is a folder to work in."""
    from gsforget.export.device.runtime import OnnxPredictor

    with tempfile.TemporaryDirectory(prefix=".gsforget-", dir=scratch) as folder:
        emulated = Path(folder) / path.name
        write_emulated(path, emulated)
        return OnnxPredictor(emulated, "cpu")


def write_emulated(source: Path, path: Path) -> None:
    """Write the float32 file that computes what a bf16 ONNX file does; its metadata stays as it is."""
    import onnx
    import onnx_ir as ir

    typed = onnx.shape_inference.infer_shapes(onnx.load(source), strict_mode=True, data_prop=True)
    model = ir.serde.deserialize_model(typed)
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in list(graph):
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                single = ir.tensor(attribute.value.numpy().astype("float32"))
                node.attributes[key] = ir.AttrTensor(key, single)
        if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                output.dtype = ir.DataType.FLOAT
                if node.op_type not in COPIES:
                    _round(graph, node, output)
    ir.save(model, path)


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Let all readers of a node's output read it rounded to bf16."""
    import onnx_ir as ir

    users = list(output.uses())
    value = output
    for to, end in ((ir.DataType.BFLOAT16, "rounded"), (ir.DataType.FLOAT, "widened")):
        result = ir.Value(name=f"{output.name}_{end}", shape=output.shape, type=ir.TensorType(to))
        cast = ir.node("Cast", [value], {"to": to}, outputs=[result], name=f"{output.name}_{end}")
        graph.insert_after(node, cast)
        node, value = cast, result
    for user, position in users:
        user.replace_input_with(position, value)
