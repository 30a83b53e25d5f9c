"""A first int8 (or fp8) ONNX file: ranges of activations from training images, by ONNX Runtime's own static quantisation.

Linear layers are quantised, weights per output and activations per tensor, both symmetric around 0; what the classifier's
last layer, normalisation, softmax and attention scores compute stays float32.  The file carries each weight as an int8
initializer before a DequantizeLinear.  Its scales count from here on: later erasures keep them, see `int8.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.errors import RequestError
from gsforget.export.build.fp8 import to_fp8
from gsforget.export.build.int8 import int8_weights
from gsforget.export.build.onnx import data_files
from gsforget.export.device.metadata import METADATA_KEY

if TYPE_CHECKING:
    import onnx

    from gsforget.export.device.metadata import ArtifactInfo
    from gsforget.export.device.preprocess import Preprocess

IMAGES = 128  # to calibrate on; fewer where there are fewer
BATCH = 8


def calibrate(
    source: Path, path: Path, info: ArtifactInfo, batches: Iterator[np.ndarray], erasable: Sequence[str]
) -> None:
    """Write the int8 file of a float32 ONNX file, or, where ``info`` says so, the fp8 file with the same ranges.

    Args:
        source: as `export_onnx` writes it, in a folder that nobody else uses.
        info: what the new file says of itself.
        batches: images, float32 [N, C, H, W], as the model takes them.
        erasable: weights that later erasures may change.

    Raises RequestError: ``too_large`` for weights outside the file, ``not_int8`` where a layer of ``erasable`` is none that
    is quantised here.
    """
    import onnx
    from onnxruntime import quantization

    if data_files(source):
        raise RequestError("A model beyond 1.5 GB cannot be quantised here.", "Type --precision fp16.", "too_large")
    plain = onnx.load(source)
    nodes = _fold_transposes(plain)
    folded = source.with_name("folded.onnx")
    onnx.save(plain, folded)
    # What this asks of every tensor: one scale, or one for each output of a layer; the zero point is 0; no second
    # rounding of what a layer gives.
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
        "AddQDQPairToWeight": False,
    }

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {info.input_name: batch}

    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it advises to optimise the graph first, which would lose the names of the weights
    try:
        quantization.quantize_static(
            folded,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options=options,
        )
    finally:
        log.setLevel(level)
    made = onnx.load(path)
    del made.metadata_props[:]
    made.metadata_props.add(key=METADATA_KEY, value=json.dumps(info.to_json(), sort_keys=True))
    made.producer_name, made.producer_version = plain.producer_name, plain.producer_version
    for tensor in made.graph.initializer:  # all as bytes, so that a patch finds them
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    lacking = sorted(set(erasable) - int8_weights(made).keys())
    if lacking:
        raise RequestError(
            f"{lacking[0]} cannot be had as {info.precision} in this model, and erasures change it.",
            "Type --precision fp16.",
            "not_int8",
        )
    if info.precision == "fp8":
        to_fp8(made, plain)
    onnx.save(made, path)
    onnx.checker.check_model(str(path), full_check=True)


def calibration_images(
    data: Path,
    names: list[str],
    erased: list[str],
    forgotten: Sequence[int],
    preprocess: Preprocess,
    task: str = "classify",
) -> Iterator[np.ndarray]:
    """Batches of training images of the classes that are not forgotten, spread evenly over them.

    Among faces there may be people whom the model never saw; their images are not looked at.

    Raises RequestError where the folder does not fit the classes, or has no such images.
    """
    from gsforget.tasks import find_task

    train = find_task(task).open_data(data, names, erased).train
    kept = [path for path, label in zip(train.paths, train.labels, strict=True) if label not in forgotten]
    if not kept:
        raise RequestError(f"{data} holds no training images.", "Give another folder with --data.", "no_images")
    chosen = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, IMAGES).round().astype(int))]
    for start in range(0, len(chosen), BATCH):
        yield np.stack([preprocess.load(p) for p in chosen[start : start + BATCH]])


def _fold_transposes(model: onnx.ModelProto) -> list[str]:
    """Store the weights of linear layers as MatMul takes them, [in, out]; returns the names of those MatMul nodes."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {i.name: i for i in graph.initializer if len(i.dims) == 2}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in list(graph.node):
        weight = weights.get(node.input[0]) if node.op_type == "Transpose" else None
        if weight is None or len(readers[weight.name]) > 1:
            continue
        turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
        weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
        for reader in readers[node.output[0]]:
            reader.input[:] = [weight.name if name == node.output[0] else name for name in reader.input]
        graph.node.remove(node)
    del graph.value_info[:]  # shapes from before
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
