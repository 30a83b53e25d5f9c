"""`gsforget verify` end to end: each check is printed, and a broken run exits with 4."""

import json

import pytest

from gsforget import ledger
from gsforget.__main__ import main
from gsforget.export.device.keys import read_signing_key
from gsforget.folder import ModelConfig, sha256


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # no key of whoever runs the tests
    folder = tmp_path / "runs" / "forget-0001"
    (folder / "artifacts").mkdir(parents=True)
    config = ModelConfig("vit_tiny", {}, ["a", "b", "c"], (3, 8, 8), (0.5,), (0.5,)).erase([1])
    contents = {
        "model": ("model.safetensors", "weights"),
        "config": ("config.json", json.dumps(config.to_json())),
        "delta": ("delta.safetensors", "delta"),
        "request": ("request.json", "{}"),
    }
    hashes = {}
    for field, (name, text) in contents.items():
        (folder / name).write_text(text)
        hashes[field] = sha256(folder / name)
    entry = {"classes": [{"index": 1, "name": "b"}], "method": "gs-lora", "base": "0", "verdict": "pass", "metrics": {}}
    (line,) = ledger.append([], {**entry, **hashes})
    (folder / "ledger.jsonl").write_text(line + "\n")
    artifact = folder / "artifacts" / "model.onnx"
    artifact.write_bytes(b"onnx")
    artifact.with_name("model.onnx.json").write_text(json.dumps({"sha256": sha256(artifact)}))
    return folder


def test_a_whole_run(run, capsys):
    assert main(["verify"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for word in (
        "chain",
        "model",
        "config",
        "delta",
        "request",
        "forgotten",
        "artifacts/model.onnx",
        "gsforget history",
    ):
        assert word in err
    assert main(["verify", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "pass"
    assert {c["verdict"] for c in document["checks"] if c["name"] != "signature"} == {"pass"}


def test_a_key_is_asked_for_by_name(run, tmp_path, capsys):
    assert main(["keys", "new", "--out", str(tmp_path / "keys")]) == 0
    public = str(tmp_path / "keys" / "signing.pub.json")
    assert main(["verify", str(run), "--key", public]) == 4  # no line is signed
    assert "line 1 of ledger.jsonl is not signed" in capsys.readouterr().err
    entry = json.loads((run / "ledger.jsonl").read_text())
    fields = {k: v for k, v in entry.items() if k not in ("sequence", "previous")}
    (line,) = ledger.append([], fields, read_signing_key(tmp_path / "keys" / "signing.key"))
    (run / "ledger.jsonl").write_text(line + "\n")
    assert main(["verify", str(run), "--key", public]) == 0
    assert "signed by a key that is trusted here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "artifacts/model.onnx", "ledger.jsonl"])
def test_a_broken_run_exits_with_4_and_still_lists_every_check(run, name, capsys):
    path = run / name
    if name == "config.json":
        path.write_text(path.read_text() + "\n")
    elif name == "ledger.jsonl":
        path.write_text(path.read_text() + "{}\n")
    else:
        path.write_bytes(b"other")
    assert main(["verify", "--json"]) == 4
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["verdict"] == "fail"
    assert document["error"]["kind"] == "broken_ledger"
    assert sum(c["verdict"] == "fail" for c in document["checks"]) == 1
    assert "artifacts/model.onnx" in [c["name"] for c in document["checks"]]
    assert document["error"]["message"] in err


def test_nothing_to_verify(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify"]) == 2
    assert "gsforget forget" in capsys.readouterr().err
