"""ONNX in which every parameter keeps its `state_dict` name and its exact bytes, so that a patch can find it again.

While the graph is simplified, parameters are graph inputs instead of initializers: what has no value cannot be folded,
transposed, or merged with an equal tensor.  Afterwards they become initializers again, and the file is read back and
compared with the state dict.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsforget.errors import GsforgetError, RequestError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from torch import Tensor, nn

    from gsforget.export.device.metadata import ArtifactInfo

OPSET = 20  # the first with Gelu as one operator
EXTERNAL_FROM = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB


def export_onnx(
    model: nn.Module,
    state: dict[str, Tensor],
    info: ArtifactInfo,
    path: Path,
    opset: int = OPSET,
    external_from: int | None = None,
) -> list[str]:
    """Write a model as ONNX with a dynamic batch dimension.

    Args:
        model: in eval mode on the CPU, float32; returns logits (or an embedding), or an object that carries them; with
            ``more_names`` in `info` a tuple of all outputs.
        state: what the initializers must hold: the model's state dict, at the precision of ``info`` (``fp32``, ``fp16``
            or ``bf16``; at half precision the graph computes in it, input and logits stay float32).
        info: goes into the file's metadata; names the input and the outputs and gives the image size.  With a
            ``features_name``, what the classifier reads is a second output.
        path: file to write.  It must not be read by others meanwhile: publish it by renaming.  With more than
            ``external_from`` bytes of weights (default: `EXTERNAL_FROM`), they lie beside it in one `.data` file.

    Returns:
        Names of parameters that the model never uses; they are absent from the file.

    Raises:
        RequestError: the model cannot be traced, cannot be had at this precision, or has no classifier to take
            features from (kind ``no_classifier``).
        GsforgetError: a parameter did not arrive unchanged (a fault of ours).
    """
    import onnx
    import onnx_ir as ir

    from gsforget.export.build.chain import ROUNDED
    from gsforget.export.device.metadata import METADATA_KEY

    graph_model = _trace(model, info, opset)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _simplify(graph_model, state.keys())
    _forget_traces(graph_model)
    if info.precision in ROUNDED:
        from gsforget.export.build.half import to_half

        to_half(graph_model, set(state), info.precision)
    elif info.precision != "fp32":
        raise RequestError(
            f"ONNX cannot be written at {info.precision}.", "Type --precision fp32, fp16 or bf16.", "bad_precision"
        )
    arrays = {name: _array(tensor) for name, tensor in state.items()}
    _set_weights(graph_model, arrays)
    graph_model.metadata_props[METADATA_KEY] = json.dumps(info.to_json(), sort_keys=True)
    graph_model.producer_name, graph_model.producer_version = "gsforget", None
    external = sum(a.nbytes for a in arrays.values()) > (EXTERNAL_FROM if external_from is None else external_from)
    ir.save(graph_model, path, external_data=_data_name(path, arrays) if external else None)
    onnx.checker.check_model(str(path), full_check=True)
    return verify_names(path, arrays, parameters, _aliases(model))


def data_files(path: Path) -> list[Path]:
    """The external data files that an ONNX file refers to, in its own folder."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graph = onnx.load(path, load_external_data=False).graph
    names = {ExternalDataInfo(t).location for t in graph.initializer if uses_external_data(t)}
    return [path.with_name(name) for name in sorted(names)]


def verify_names(
    path: Path, arrays: dict[str, np.ndarray], parameters: set[str], aliases: dict[str, set[str]] | None = None
) -> list[str]:
    """Compare an ONNX file with a state dict: each parameter present exactly once, under its name, byte for byte.

    Args:
        arrays: the state dict; parameters: those of its names that must be there.
        aliases: names that share one tensor; one of them suffices.

    Returns:
        Parameters that are absent because no node computes with them (an unused part of the model).

    Raises:
        GsforgetError: kind ``weights_differ``, naming the tensor.
    """
    import numpy as np
    import onnx

    graph = onnx.load(path).graph
    found: dict[str, Any] = {}
    for tensor in graph.initializer:
        if tensor.name in found:
            raise _differs(tensor.name, "is there twice")
        found[tensor.name] = tensor
    for name, array in arrays.items():
        if name not in found:
            continue
        stored = onnx.numpy_helper.to_array(found[name])
        same = stored.dtype == array.dtype and stored.shape == array.shape
        if not same or np.ascontiguousarray(stored).tobytes() != array.tobytes():
            raise _differs(name, "has other values than the model")
    absent = {n for n in parameters if n not in found and not (aliases or {}).get(n, set()) & found.keys()}
    return sorted(absent)


def _trace(model: nn.Module, info: ArtifactInfo, opset: int) -> ir.Model:
    import torch

    # A batch of 1 would be taken for a constant.
    example = torch.zeros(2, *info.preprocess.input_size)
    classifier = None
    if info.features_name:
        from gsforget.features import find_classifier

        classifier = find_classifier(model, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Outputs.around(model, classifier, bool(info.more_names)),
                (example,),
                dynamo=True,
                input_names=[info.input_name],
                output_names=[
                    info.output_name,
                    *info.more_names,
                    *([info.features_name] if info.features_name else []),
                ],
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise RequestError(
            f"The model cannot be exported: torch.export stops at {first.strip()[:300]}",
            "The forward pass must not branch on values or on the batch size.",
            "not_exportable",
        ) from error
    traced = program.model
    for name in [n for n in traced.graph.initializers if n.startswith(_Outputs.PREFIX)]:
        value = traced.graph.initializers.pop(name)
        value.name = value.const_value.name = name.removeprefix(_Outputs.PREFIX)
        traced.graph.initializers.add(value)
    return traced


class _Outputs:
    """A module that returns just the logits of another one, its features where they are asked for, or all that it returns.

    The names of the other one then carry a known prefix.
    """

    PREFIX = "wrapped_classifier."

    @staticmethod
    def around(model: nn.Module, classifier: str | None = None, several: bool = False) -> nn.Module:
        from torch import nn

        from gsforget.features import FeatureTap
        from gsforget.lora.blocks import as_logits

        class Outputs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wrapped_classifier = model

            def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
                if several:
                    return tuple(self.wrapped_classifier(images))
                if classifier is None:
                    return as_logits(self.wrapped_classifier(images))
                with FeatureTap(self.wrapped_classifier, classifier) as tap:
                    logits = as_logits(self.wrapped_classifier(images))
                return logits, tap.features

        return Outputs().eval()


def _simplify(model: ir.Model, names: Any) -> None:
    """Simplify the graph without looking into, merging or dropping any tensor called by one of ``names``."""
    from onnxscript.optimizer import optimize_ir

    graph = model.graph
    parked = {name: graph.initializers[name] for name in names if name in graph.initializers}
    values = {name: value.const_value for name, value in parked.items()}
    for name, value in parked.items():
        graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about each operator that it leaves as it is
    try:
        optimize_ir(model)
    finally:
        log.setLevel(level)
    _register_constants(graph)
    for name, value in parked.items():
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = values[name]
            graph.initializers.add(value)


def _register_constants(graph: ir.Graph) -> None:
    """Make constants that a rewrite has put into nodes, and not into the graph, initializers of their own."""
    known = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is None or value in known or value.producer() is not None or value.const_value is None:
                continue
            stem, n = value.name or "constant", 1
            while value.name is None or value.name in graph.initializers:  # the rewrite gives one name to several
                n += 1
                value.name = f"{stem}_{n}"
            graph.initializers.add(value)
            known.add(value)


def _forget_traces(model: ir.Model) -> None:
    """Remove source lines and paths of this machine, which the tracer leaves on nodes and values."""
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _set_weights(model: ir.Model, arrays: dict[str, np.ndarray]) -> None:
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name in arrays:
            value.const_value = ir.tensor(arrays[name], name=name)
            value.dtype = value.const_value.dtype


def _array(tensor: Tensor) -> np.ndarray:
    import ml_dtypes
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def _aliases(model: nn.Module) -> dict[str, set[str]]:
    """For each parameter name, all names of the same parameter (tied weights have several)."""
    by_id: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), set()).add(name)
    return {name: names for names in by_id.values() for name in names}


def _data_name(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Named by content: replacing an export never changes the data of the one before it."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].reshape(-1).view("uint8").data)
    return f"{path.stem}-{digest.hexdigest()[:12]}.data"


def _differs(name: str, what: str) -> GsforgetError:
    return GsforgetError(
        f"The exported ONNX file is not faithful: tensor {name} {what}.", "Please report this.", "weights_differ"
    )
