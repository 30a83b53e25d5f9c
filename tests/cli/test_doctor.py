"""`gsforget doctor` end to end on a small model: machine report, model report, refusals."""

import json

import pytest
import torch
from PIL import Image

from gsforget.__main__ import main
from gsforget.folder import ModelConfig, save_model
from gsforget.models import create_timm

KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def model_and_data(tmp_path):
    """An untrained model of two blocks, and two classes of grey images."""
    torch.manual_seed(0)
    config = ModelConfig("vit_tiny_patch16_224", KWARGS, ["dark", "light"], (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "model").mkdir()
    model = create_timm(config.architecture, 2, KWARGS)
    save_model(model.state_dict(), config, tmp_path / "model")
    for split in ("train", "test"):
        for k, name in enumerate(config.class_names):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (200 * k + i,) * 3).save(folder / f"{i}.png")
    return tmp_path / "model", tmp_path / "data"


def test_machine(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "ONNX Runtime" in err
    assert main(["doctor", "--json"]) == 0
    machine = {f["name"]: f for f in json.loads(capsys.readouterr().out)["machine"]}
    assert machine["torch"]["available"] is True
    assert {"TensorRT", "TensorRT for RTX", "Triton", "CUDA GPU"} <= set(machine)


def test_kernel_backends_are_reported(monkeypatch, capsys):
    monkeypatch.setenv("GSFORGET_KERNELS", "torch")
    assert main(["doctor", "--json"]) == 0
    machine = {f["name"]: f for f in json.loads(capsys.readouterr().out)["machine"]}
    assert machine["kernels"]["available"] is True
    assert "torch on" in machine["kernels"]["detail"]
    assert "GSFORGET_KERNELS asks for it" in machine["kernels"]["detail"]
    monkeypatch.setenv("GSFORGET_KERNELS", "cuda")
    assert main(["doctor", "--json"]) == 0  # a finding, not a failure
    machine = {f["name"]: f for f in json.loads(capsys.readouterr().out)["machine"]}
    assert machine["kernels"]["available"] is False
    assert "no kernel backend named cuda" in machine["kernels"]["detail"]


def test_whether_compiled_kernels_are_there_for_this_gpu(monkeypatch, tmp_path):
    from gsforget import doctor

    def detail():
        return doctor._probe("compiled kernels", doctor._compiled_kernels).detail

    monkeypatch.delenv("GSFORGET_KERNEL_DIR", raising=False)
    assert "names no folder" in detail()
    monkeypatch.setenv("GSFORGET_KERNEL_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU" in detail()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "gsforget kernels compile --target sm_90" in detail()
    content = {"format": 1, "target": 90, "triton": "3.6.0", "sources": {}, "kernels": []}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert detail() == f"0 for sm_90 in {tmp_path}, by Triton 3.6.0"
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"target": 87}))
    assert "compiled for sm_87, and the GPU is sm_90" in detail()


def test_an_untrained_model_is_refused(model_and_data, capsys):
    model, data = map(str, model_and_data)
    assert main(["doctor", "--model", model, "--data", data, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] in ("implausible_accuracy", "class_order")


def test_model_and_data_that_fit(model_and_data, capsys):
    from safetensors.torch import save_file

    folder, data = model_and_data
    model = create_timm("vit_tiny_patch16_224", 2, KWARGS)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    pixels = torch.cat([torch.full((4, 3, 16, 16), v) for v in (-1.0, 0.57)])
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), torch.arange(2).repeat_interleave(4)).backward()
        optimiser.step()
    save_file(model.state_dict(), folder / "model.safetensors")
    assert main(["doctor", "--model", str(folder), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["accuracy"] == 100
    assert [g["name"] for g in found["groups"]] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert found["groups"][0]["linears"] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


def test_model_without_data(capsys):
    assert main(["doctor", "--model", "vit_tiny_patch16_224"]) == 2
    assert "--data" in capsys.readouterr().err
