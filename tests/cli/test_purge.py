"""`gsforget purge` end to end: a purged run verifies, has a history, is continued and exported; nothing goes unasked."""

import io
import json
import shutil
import sys

import pytest

from gsforget.__main__ import main


@pytest.fixture
def run(first_run, tmp_path, monkeypatch):
    shutil.copytree(first_run[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "forget-0001"


def test_a_purged_run_is_verified_continued_and_exported(run, world, cli, tmp_path):
    listed = cli(tmp_path, "purge", "--dry-run")
    assert listed.status == 0
    assert listed.document["dry_run"] is True
    assert [f["path"] for f in listed.document["files"]] == ["runs/forget-0001/delta.safetensors"]
    assert (run / "delta.safetensors").exists()
    done = cli(tmp_path, "purge", "--yes")
    assert done.status == 0
    assert done.document["files"] == listed.document["files"]
    assert not (run / "delta.safetensors").exists()
    assert str(world.model) in done.err
    assert "gsforget verify runs/forget-0001" in done.err
    checked = cli(tmp_path, "verify")
    assert checked.status == 0
    assert {c["name"]: c["verdict"] for c in checked.document["checks"]}["delta"] == "purged"
    assert len(cli(tmp_path, "history").document["erasures"]) == 1
    more = cli(tmp_path, "forget", "--model", run, "--data", world.data, "--classes", "dog")
    assert more.status in (0, 3), more.err
    assert more.document["sequence"] == 2
    half = cli(tmp_path, "export", run, "--onnx", "--precision", "fp16", "--data", world.data)
    assert half.status in (0, 3), half.err
    assert "erasure 1 were removed by gsforget purge on 20" in half.err
    again = cli(tmp_path, "purge", run, "--yes")
    assert again.document["files"] == []
    assert "Nothing is left" in again.err


def test_without_a_terminal_it_needs_yes(run, capsys):
    assert main(["purge", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == "not_confirmed"
    assert "gsforget purge runs/forget-0001 --yes" in err
    assert "delta.safetensors" in err
    assert (run / "delta.safetensors").exists()


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("Yes\n", 0), ("n\n", 2), ("\n", 2), ("", 2)])
def test_on_a_terminal_it_asks(run, answer, status, monkeypatch, capsys):
    keyboard = io.StringIO(answer)
    monkeypatch.setattr(keyboard, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", keyboard)
    assert main(["purge", str(run)]) == status
    assert (run / "delta.safetensors").exists() == (status != 0)
    assert "[y/N]" in capsys.readouterr().err


def test_nothing_to_purge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["purge"]) == 2
    assert "gsforget forget" in capsys.readouterr().err
