"""`gsforget history` end to end on run folders that hold a real ledger."""

import json

import pytest

from gsforget import ledger
from gsforget.__main__ import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """runs/forget-0001 in the working folder, with two erasures behind it; history needs the ledger only."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "forget-0001"
    folder.mkdir(parents=True)
    lines: list[str] = []
    for i, name in enumerate(["cat", "dog"]):
        hashes = dict.fromkeys(("delta", "request", "config"), "0")
        entry = {
            "classes": [{"index": i, "name": name}],
            "method": "gs-lora",
            "base": f"{i:064d}",
            "model": f"{i + 1:064d}",
            "verdict": "pass",
            "metrics": {"forget_acc_after": 0.25, "retain_acc_after": 91.5},
            "time": "2026-01-02T03:04:05Z",
            **hashes,
        }
        lines = ledger.append(lines, entry)
    (folder / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text("{}")
    return folder


def test_table_on_stderr(run, capsys):
    assert main(["history"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("cat", "dog", "gs-lora", "91.5", "2026-01-02 03:04:05", "gsforget verify"):
        assert word in err


def test_json_on_stdout(run, capsys):
    assert main(["history", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [e["sequence"] for e in document["erasures"]] == [1, 2]
    assert document["erasures"][1]["classes"] == [{"index": 1, "name": "dog"}]


def test_a_broken_ledger_is_refused(run, capsys):
    path = run / "ledger.jsonl"
    path.write_text(path.read_text().replace("cat", "cow"))
    assert main(["history", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "broken_ledger"
    assert "line 1" in error["message"]


def test_no_run_and_no_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["history", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no_run"
    assert main(["history", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no_model"
