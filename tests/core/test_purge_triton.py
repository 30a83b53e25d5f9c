"""Purging reaches into the Triton repositories that exports were published in, and says where it cannot."""

import json
import shutil
from pathlib import Path

import pytest

from gsforget import ledger, purge
from gsforget.export.device import triton
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import WEIGHTS, sha256


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repository"


@pytest.fixture
def publish(repository, tmp_path):
    """publish(run, precision, …): as an export of a run with --triton-repo does, and its note."""

    def put(run, precision="fp16", sequence=None, model_id=None, data=()):
        entries = ledger.history(run)
        names, sequence = ["cat", "dog", "cow", "ant"], sequence or entries[-1]["sequence"]
        model_id = model_id or entries[0]["base"][:16]
        pre = Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
        served = triton.Served("onnx", ArtifactInfo(names, (), sequence, pre, precision, model_id), (1, 8, 64))
        artifact = tmp_path / "model.onnx"
        artifact.write_bytes(f"{precision} {sequence}".encode())
        for path in data:
            path.write_bytes(b"weights")
        triton.note(run / "artifacts", repository, served)
        triton.publish(repository, served, artifact, {"source_sha256": sha256(run / WEIGHTS)}, data)
        return repository / served.name

    return put


def carry_out(run, chain=False):
    made = purge.plan(run, chain)
    purge.purge(made)
    return made


def test_a_model_that_was_not_exported_again_goes_with_all_that_names_its_classes(runs, publish, repository, tmp_path):
    _, first, second = runs
    stale = publish(first, "fp32", data=[tmp_path / "beside.data"])
    new = publish(first), publish(second)
    made = carry_out(second)
    assert not stale.exists()
    assert repository.is_dir()
    assert (new[1] / "2" / "model.onnx").read_bytes() == b"fp16 2"
    assert sorted(p.name for p in new[1].iterdir()) == ["2", "config.pbtxt", "labels.txt"]
    said = [sentence for sentence in made.out_of_reach if "unload" in sentence]
    assert len(said) == 1
    assert "model-fp32-onnx" in said[0]
    assert (second / "artifacts" / "triton.json").is_file()
    assert not made.left
    ledger.verify(second)
    assert not [i for i in purge.plan(second).items if str(repository) in str(i.path)]


def test_a_version_beside_a_newer_one_goes_and_the_newer_stays(runs, publish):
    _, _, second = runs
    model = publish(second)
    shutil.copytree(model / "2", model / "1")  # as a restored backup leaves it
    carry_out(second)
    assert sorted(p.name for p in model.iterdir()) == ["2", "config.pbtxt", "labels.txt"]


def test_links_are_not_followed(runs, publish, tmp_path):
    _, first, second = runs
    model, elsewhere = publish(first), tmp_path / "elsewhere"
    (model / "1").rename(elsewhere)
    (model / "1").symlink_to(elsewhere)
    made = carry_out(second, chain=True)
    assert not model.exists()
    assert (elsewhere / "model.onnx").exists()
    assert any(f"what {model / '1'} points to ({elsewhere})" in sentence for sentence in made.out_of_reach)


class Kill(BaseException):
    pass


def kill(*_):
    raise Kill


def test_a_purge_that_was_killed_is_finished_by_the_next(runs, publish, monkeypatch):
    _, first, second = runs
    stale = publish(first, "fp32")
    publish(second)
    for last in range(1, 4):
        made = purge.plan(second)
        served = [item.path for item in made.items if item.path.is_relative_to(stale)]
        with monkeypatch.context() as during:
            remove = purge._remove
            during.setattr(purge, "_remove", lambda item: kill() if item.path == served[1] else remove(item))  # noqa: B023
            with pytest.raises(Kill):
                purge.purge(made)
        assert len([p for p in stale.rglob("*") if p.is_file()]) == 4 - last
    carry_out(second)
    assert not stale.exists()


def test_what_a_killed_export_left_goes_as_well(runs, publish, monkeypatch):
    _, first, second = runs
    model = publish(first)
    with monkeypatch.context() as during:
        rename = Path.rename
        during.setattr(Path, "rename", lambda p, to: kill() if p.name == ".1-partial" else rename(p, to))
        with pytest.raises(Kill):
            publish(first)
    assert sorted(p.name for p in model.iterdir()) == [".1-old", ".1-partial", "config.pbtxt", "labels.txt"]
    publish(second, "fp32")
    carry_out(second)
    assert not model.exists()


def test_what_a_first_export_left_that_was_killed_is_known_as_ours(runs, publish, repository, monkeypatch):
    _, first, second = runs
    for run in (first, second):
        with monkeypatch.context() as during:
            copy = triton._copy
            during.setattr(triton, "_copy", lambda source, target, copy=copy: (copy(source, target), kill()))
            with pytest.raises(Kill):
                publish(run, "fp16" if run == first else "fp32")
    (left,) = repository.glob("model-fp16-onnx/.1-partial")
    carry_out(second, chain=True)
    assert not left.parent.exists()
    assert (publish(second, "fp32") / "2").is_dir()


@pytest.mark.parametrize("names", [[], ["beside.data"]])
def test_what_only_an_earlier_run_was_published_in_is_named_and_goes_with_the_chain(runs, publish, tmp_path, names):
    _, first, second = runs
    model = publish(first, data=[tmp_path / name for name in names])
    made = carry_out(second)
    assert model.exists()
    assert any(str(model / "1") in s and "--chain" in s for s in made.out_of_reach)
    carry_out(second, chain=True)
    assert not model.exists()


def test_other_models_and_other_chains_are_left_alone(runs, publish, repository):
    _, _, second = runs
    publish(second)
    foreign = publish(second, "fp32", 1, "f" * 16)
    hand = repository / "by-hand" / "1"
    hand.mkdir(parents=True)
    (hand / "model.onnx").write_bytes(b"not ours")
    carry_out(second)
    assert (foreign / "1" / "model.onnx").exists()
    assert (hand / "model.onnx").exists()


def test_a_repository_that_is_not_here_is_said(runs, publish, repository):
    _, _, second = runs
    publish(second)
    shutil.move(repository, repository.with_name("elsewhere"))
    text = "\n".join(purge.plan(second).out_of_reach)
    assert f"the Triton repository {repository}" in text
    assert "cannot be read here" in text
    (second / "artifacts" / "triton.json").write_text(json.dumps({"published": 1}))
    assert "does not say where" in "\n".join(purge.plan(second).out_of_reach)


def test_each_place_is_noted_once(runs, publish, repository):
    _, first, _ = runs
    publish(first), publish(first), publish(first, "fp32")
    noted = triton.read_record(first / "artifacts")
    assert [(e["repository"], e["model"]) for e in noted] == [
        (str(repository.resolve()), "model-fp16-onnx"),
        (str(repository.resolve()), "model-fp32-onnx"),
    ]
