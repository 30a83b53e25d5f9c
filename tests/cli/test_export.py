"""`gsforget export` from the command line: one document on stdout, refusals that say what to type."""

import json
import shutil
from pathlib import Path

import pytest

import gsforget.demo
from gsforget.__main__ import main
from gsforget.errors import GateError
from gsforget.export.device.keys import new_keys

ASSETS = Path(gsforget.demo.__file__).parent / "assets"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ASSETS / name, folder / name)
    return folder


def test_onnx_and_the_next_command(model, capsys):
    assert main(["export", str(model), "--onnx", "--out", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["verdict"] == "pass"
    assert document["artifacts"][0]["path"] == "out/model-0000-fp32.onnx"
    assert "gsforget infer out/model-0000-fp32.onnx IMAGE" in err
    assert "Skipping" not in err


def test_neither_kind(model, capsys):
    assert main(["export", str(model), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "gsforget export --onnx" in error["hint"]


def test_no_run_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--onnx", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no_run"


@pytest.mark.parametrize("batch", ["8", "a,b,c", "64,8,1"])
def test_impossible_batches(model, capsys, batch):
    assert main(["export", str(model), "--onnx", "--batch", batch, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "bad_batch"


def test_unsupported_target(model, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert main(["export", str(model), "--trt", "--backend", "rtx", "--targets", "sm87"]) == 2
    assert "on the device" in capsys.readouterr().err


def test_a_failed_gate(model, monkeypatch, capsys):
    from gsforget.export.build import parity

    def fail(*_args):
        raise GateError("It differs.", "Look.", "parity")

    monkeypatch.setattr(parity, "check", fail)
    assert main(["export", str(model), "--onnx", "--out", "out", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["artifacts"]) == ("fail", {})
    assert document["error"]["kind"] == "parity"
    assert not list(Path("out").iterdir())


def test_help_names_the_patch(capsys):
    assert main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--onnx", "--patch", "--from", "--full", "--key", "--expires"))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--patch", "--onnx"], "mixed_kinds"),
        (["--onnx", "--from", "model"], "mixed_kinds"),
        (["--onnx", "--precision", "int8", "--from", "model", "--key", "k"], "mixed_kinds"),
        (["--onnx", "--precision", "int8", "--from", "model"], "not_a_run"),
        (["--onnx", "--precision", "int8"], "no_calibration"),
        (["--patch", "--from", "model"], "not_a_run"),
        (["--patch", "--full", "--from", "model"], "two_bases"),
        (["--patch", "--full", "--expires", "0"], "bad_expires"),
        (["--patch", "--full", "--key", "absent.key"], "no_key"),
    ],
)
def test_patches_that_cannot_be(model, tmp_path, monkeypatch, capsys, arguments, kind):
    monkeypatch.setenv("GSFORGET_KEY", str(new_keys(tmp_path / "keys")[0]))
    assert main(["export", "model", *arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == kind
    assert "gsforget keys new" in error["hint"] or kind != "no_key"
    assert not Path("artifacts").exists()


def test_a_full_package_of_an_original_and_the_next_command(model, tmp_path, monkeypatch, capsys):
    key = new_keys(tmp_path / "keys")[0]
    assert main(["export", "model", "--patch", "--full", "--key", str(key), "--precision", "fp16", "--json"]) == 0
    out, err = capsys.readouterr()
    package = json.loads(out)["artifacts"][0]
    assert (package["kind"], package["path"]) == ("full", "artifacts/model-0000-fp16.gsf")
    assert "gsforget apply artifacts/model-0000-fp16.gsf --device-dir DIR" in err
