"""ONNX files keep every parameter's name and bytes, whatever the architecture and the values."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import from_array, to_array
from torch import nn

from gsforget.errors import GsforgetError, RequestError
from gsforget.export.build.bfloat16 import open_emulated
from gsforget.export.build.half import round_constant
from gsforget.export.build.onnx import data_files, export_onnx, verify_names
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.runtime import open_model
from gsforget.lora.blocks import as_logits

CLASSES = 5


def timm_model(name, **kwargs):
    import timm

    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def hugging_face():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=CLASSES))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
ARCHITECTURES = {
    "vit": lambda: timm_model("vit_tiny_patch16_224", **SMALL),
    "deit3": lambda: timm_model("deit3_small_patch16_224", **SMALL),
    "eva02": lambda: timm_model("eva02_tiny_patch14_224", **{**SMALL, "embed_dim": 48}),
    "swin": lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN),
    "torchvision": torchvision_vit,
    "huggingface": hugging_face,
}


def noisy(model, seed=0):
    """Different values in all parameters, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def info_for(size=32, precision="fp32", classes=CLASSES):
    preprocess = Preprocess((3, size, size), (0.5,) * 3, (0.5,) * 3)
    return ArtifactInfo([f"c{i}" for i in range(classes)], (), 0, preprocess, precision, "0123456789abcdef")


def stored(path):
    return {t.name: to_array(t) for t in onnx.load(path).graph.initializer}


def logits_of(model, batch):
    with torch.inference_mode():
        return as_logits(model(torch.from_numpy(batch))).numpy()


def batches(*sizes, size=32):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((n, 3, size, size)).astype(np.float32) for n in sizes]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_bytes_and_answers(name, tmp_path):
    model = noisy(ARCHITECTURES[name]())
    path = tmp_path / "m.onnx"
    assert export_onnx(model, model.state_dict(), info_for(), path) == []
    found = stored(path)
    for parameter, value in model.named_parameters():
        assert found[parameter].tobytes() == value.detach().numpy().tobytes(), parameter
    predictor = open_model(path, "cpu")
    for batch in batches(1, 3):
        np.testing.assert_allclose(predictor.predict(batch), logits_of(model, batch), atol=2e-4)


@pytest.mark.parametrize("name", ["deit3", "eva02", "swin"])
def test_half_precision_keeps_names_and_answers(name, tmp_path):
    model = noisy(ARCHITECTURES[name]())
    half = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in half.items()})
    path = tmp_path / "m.onnx"
    export_onnx(model, half, info_for(precision="fp16"), path)
    found = stored(path)
    for parameter, _ in model.named_parameters():
        assert found[parameter].dtype == np.float16
        assert found[parameter].tobytes() == half[parameter].numpy().tobytes(), parameter
    session = onnxruntime.InferenceSession(path)
    assert [v.type for v in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    for batch in batches(1, 3):
        wanted = logits_of(model, batch)
        assert np.abs(open_model(path, "cpu").predict(batch) - wanted).max() < 0.02 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_bfloat16_keeps_names_and_answers(name, tmp_path):
    model = noisy(ARCHITECTURES[name]())
    rounded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in rounded.items()})
    path = tmp_path / "m.onnx"
    export_onnx(model, rounded, info_for(precision="bf16"), path)
    found = {t.name: t for t in onnx.load(path).graph.initializer}
    for parameter, _ in model.named_parameters():
        assert found[parameter].data_type == onnx.TensorProto.BFLOAT16
        assert found[parameter].raw_data == rounded[parameter].view(torch.int16).numpy().tobytes(), parameter
    predictor = open_emulated(path, tmp_path)
    for batch in batches(1, 3):
        wanted, answered = logits_of(model, batch), predictor.predict(batch)
        difference = np.abs(answered - wanted).max()
        assert 1e-4 < difference < 0.05 * max(1, np.abs(wanted).max()), "bf16 is neither exact nor far off"
        assert (torch.from_numpy(answered).bfloat16().float().numpy() == answered).all()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(RequestError) as refused:
        open_model(path, "cpu")
    assert refused.value.kind == "no_kernel", "else emulation would not be needed"


def test_half_precision_computes_sensitive_operators_in_float32(tmp_path):
    model = noisy(ARCHITECTURES["vit"]())
    path = tmp_path / "m.onnx"
    export_onnx(model, {n: t.half() for n, t in model.state_dict().items()}, info_for(precision="fp16"), path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    by_kind = {k: {types[n.output[0]] for n in graph.node if n.op_type == k} for k in ("Softmax", "LayerNormalization")}
    assert by_kind == {"Softmax": {onnx.TensorProto.FLOAT}, "LayerNormalization": {onnx.TensorProto.FLOAT}}
    assert {types[n.output[0]] for n in graph.node if n.op_type in ("MatMul", "Gelu")} == {onnx.TensorProto.FLOAT16}


def test_equal_and_neutral_values_are_neither_merged_nor_dropped(tmp_path):
    model = ARCHITECTURES["eva02"]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    path = tmp_path / "m.onnx"
    assert export_onnx(model, model.state_dict(), info_for(), path) == []
    found = stored(path)
    assert {n for n, _ in model.named_parameters()} <= found.keys()
    used = {i for node in onnx.load(path).graph.node for i in node.input}
    assert {n for n, _ in model.named_parameters()} <= used


def test_changing_one_of_two_equal_tensors_changes_only_its_own_layer(tmp_path):
    model = noisy(ARCHITECTURES["vit"]())
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.copy_(model.blocks[0].mlp.fc1.weight)
    path = tmp_path / "m.onnx"
    export_onnx(model, model.state_dict(), info_for(), path)
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == "blocks.1.mlp.fc1.weight")
    tensor.CopyFrom(from_array(np.zeros_like(to_array(tensor)), tensor.name))
    onnx.save(proto, path)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.zero_()
    (batch,) = batches(3)
    np.testing.assert_allclose(open_model(path, "cpu").predict(batch), logits_of(model, batch), atol=2e-4)


def test_metadata_and_nothing_of_this_machine(tmp_path):
    model = noisy(ARCHITECTURES["vit"]())
    path = tmp_path / "m.onnx"
    export_onnx(model, model.state_dict(), info_for(), path)
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert ArtifactInfo.from_json(json.loads(properties["gsforget"])) == info_for()
    assert not any(word in path.read_bytes() for word in (b"site-packages", b"stack_trace", b".py"))


def test_large_weights_lie_beside_the_file_under_a_name_of_their_own(tmp_path):
    model = noisy(ARCHITECTURES["vit"]())
    path = tmp_path / "m.onnx"
    export_onnx(model, model.state_dict(), info_for(), path, external_from=1000)
    (first,) = data_files(path)
    assert first.is_file()
    assert path.stat().st_size < first.stat().st_size
    (batch,) = batches(2)
    np.testing.assert_allclose(open_model(path, "cpu").predict(batch), logits_of(model, batch), atol=2e-4)
    export_onnx(noisy(model), model.state_dict(), info_for(), path, external_from=1000)
    assert data_files(path) != [first]
    assert first.is_file()


def test_tampered_weights_are_noticed(tmp_path):
    model = noisy(ARCHITECTURES["vit"]())
    path = tmp_path / "m.onnx"
    export_onnx(model, model.state_dict(), info_for(), path)
    arrays = {n: t.numpy().copy() for n, t in model.state_dict().items()}
    parameters = set(arrays)
    assert verify_names(path, arrays, parameters) == []
    arrays["blocks.0.mlp.fc1.weight"][0, 0] += 1e-6
    with pytest.raises(GsforgetError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        verify_names(path, arrays, parameters)
    assert verify_names(path, {}, {"extra.weight"}) == ["extra.weight"]


class Odd(nn.Module):
    """Uses one of its layers, ties two names, and can be made to branch on values."""

    def __init__(self, branch=False):
        super().__init__()
        self.used, self.unused, self.branch = nn.Linear(12, 12), nn.Linear(12, 12), branch
        self.tied = self.used

    def forward(self, images):
        pooled = images.flatten(2)[:, :, :4].flatten(1)
        return self.tied(pooled) if not self.branch or pooled.sum() > 0 else pooled


def test_unused_parameters_are_named_and_tied_ones_are_found(tmp_path):
    model = Odd().eval()
    unused = export_onnx(model, model.state_dict(), info_for(4, classes=12), tmp_path / "m.onnx")
    assert unused == ["unused.bias", "unused.weight"]


def test_a_model_that_branches_on_values_is_refused_in_a_sentence(tmp_path):
    model = Odd(branch=True).eval()
    with pytest.raises(RequestError, match="cannot be exported"):
        export_onnx(model, model.state_dict(), info_for(4, classes=12), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_other_precisions_are_refused(tmp_path):
    model = Odd().eval()
    with pytest.raises(RequestError, match="int8"):
        export_onnx(model, model.state_dict(), info_for(4, "int8", 12), tmp_path / "m.onnx")


def test_constants_neither_vanish_nor_overflow():
    values = np.array([0.0, 1e-12, -1e-12, 1e9, -np.inf, 0.5], np.float32)
    half = round_constant(values, ir.DataType.FLOAT16)
    assert half.dtype == np.float16
    assert half.tolist() == [0.0, 2.0**-24, -(2.0**-24), 65504.0, -np.inf, 0.5]
    brain = round_constant(np.array([1e-45, np.finfo(np.float32).max, np.inf], np.float32), ir.DataType.BFLOAT16)
    assert brain.astype(np.float64).tolist() == [2.0**-133, 255 * 2.0**120, np.inf]
