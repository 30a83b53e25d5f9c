"""Requests that start from a run: what it has forgotten, and what somebody changed in it."""

import json
import shutil

import pytest


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


@pytest.mark.parametrize("word", ["bee", "1", "forgotten-1"])
def test_a_class_that_was_already_forgotten(world, first_run, cli, tmp_path, word):
    result = cli(
        tmp_path, "forget", "--model", first_run[0] / "runs/forget-0001", "--data", world.data, "--classes", word
    )
    assert (result.status, result.document["error"]["kind"]) == (2, "already_forgotten")
    assert "bee" in result.document["error"]["message"]
    assert listing(tmp_path) == []


def _cut_ledger(run):
    (run / "ledger.jsonl").write_bytes((run / "ledger.jsonl").read_bytes()[:-20])


def _remove_ledger(run):
    (run / "ledger.jsonl").unlink()


def _flip_weights(run):
    raw = bytearray((run / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (run / "model.safetensors").write_bytes(raw)


def _edit_config(run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"crop_pct": 1.0', '"crop_pct": 0.9'))


def _edit_request(run):
    text = (run / "request.json").read_text()
    (run / "request.json").write_text(text.replace('"shots": null', '"shots": 5'))


def _spoil_request(run):
    (run / "request.json").write_text("{")


@pytest.mark.parametrize(
    "tamper", [_cut_ledger, _remove_ledger, _flip_weights, _edit_config, _edit_request, _spoil_request]
)
def test_a_tampered_parent_is_refused(world, first_run, cli, tmp_path, tamper):
    run = tmp_path / "runs" / "forget-0001"
    shutil.copytree(first_run[0] / "runs" / "forget-0001", run)
    tamper(run)
    before = listing(tmp_path)
    result = cli(tmp_path, "forget", "--model", run, "--data", world.data, "--classes", "cat")
    assert (result.status, result.document["error"]["kind"]) == (4, "broken_ledger"), result.document
    assert "forget-0001" in result.document["error"]["message"]
    assert result.document["error"]["hint"]
    assert listing(tmp_path) == before


def test_a_changed_line_of_a_parent_is_refused(world, first_run, cli, tmp_path):
    """The last line is held by nothing but a signature; any earlier one by the hash in the next."""
    run = tmp_path / "runs" / "forget-0001"
    shutil.copytree(first_run[0] / "runs" / "forget-0001", run)
    line = json.loads((run / "ledger.jsonl").read_text())
    line["base"] = "1" * 64
    (run / "ledger.jsonl").write_text(json.dumps(line) + "\n")  # not canonical: was written by another hand
    result = cli(tmp_path, "forget", "--model", run, "--data", world.data, "--classes", "cat")
    assert (result.status, result.document["error"]["kind"]) == (4, "broken_ledger")


def test_an_erased_class_may_have_its_new_name_as_a_folder(world, first_run, cli, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    for split in ("train", "test"):
        (data / split / "bee").rename(data / split / "forgotten-1")
    result = cli(tmp_path, "forget", "--model", first_run[0] / "runs/forget-0001", "--data", data, "--classes", "cat")
    assert result.status == 0, result.err
    assert result.document["metrics"]["old_acc_after"] <= 1
