"""Model folders: what is saved comes back, what is wrong in a config is named, code needs trust."""

import json
import sys

import pytest
import torch
from torch import nn

from gsforget.errors import RequestError, SafetyError
from gsforget.folder import (
    CONFIG,
    WEIGHTS,
    ModelConfig,
    build_model,
    is_model_folder,
    load_model,
    read_config,
    save_model,
    sha256,
    write_file,
)
from gsforget.models import create_timm

KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def config(**changes) -> ModelConfig:
    fields = {
        "architecture": "vit_tiny_patch16_224",
        "model_kwargs": KWARGS,
        "class_names": ["ant", "bee", "größer"],
        "input_size": (3, 16, 16),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
    }
    return ModelConfig(**{**fields, **changes})


def test_round_trip(tmp_path):
    torch.manual_seed(0)
    model = build_model(config())
    save_model(model.state_dict(), config(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert is_model_folder(tmp_path)
    back, read = load_model(tmp_path)
    assert read == config()
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())
    again = tmp_path / "again"
    again.mkdir()
    save_model(back.state_dict(), read, again)
    assert sha256(again / WEIGHTS) == sha256(tmp_path / WEIGHTS)


def test_config_by_hand_may_be_utf8_and_carry_more(tmp_path):
    save_model(build_model(config()).state_dict(), config(), tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    raw["note"] = "ours"
    (tmp_path / CONFIG).write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    assert read_config(tmp_path) == config()


def test_erase_keeps_indices():
    once = config().erase([1])
    twice = once.erase([0])
    assert once.class_names == ["ant", "forgotten-1", "größer"]
    assert (once.forgotten, once.sequence, once.retained) == ((1,), 1, [0, 2])
    assert twice.class_names == ["forgotten-0", "forgotten-1", "größer"]
    assert (twice.forgotten, twice.sequence, twice.retained) == ((0, 1), 2, [2])
    assert config().class_names[1] == "bee"
    assert ModelConfig.from_json(json.loads(json.dumps(twice.to_json()))) == twice


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": None}, "class_names"),
        ({"class_names": "ant,bee"}, "class_names"),
        ({"class_names": {"0": "ant"}}, "class_names"),
        ({"class_names": []}, "class_names"),
        ({"input_size": [16, 16]}, "input_size"),
        ({"input_size": 16}, "input_size"),
        ({"mean": 0.5}, "mean"),
        ({"std": ["a"]}, "std"),
        ({"model_kwargs": []}, "model_kwargs"),
        ({"architecture": 7}, "architecture"),
        ({"forgotten": ["ant"]}, "forgotten"),
        ({"crop_pct": "1"}, "crop_pct"),
        ({"format": 99}, "Update|newer"),
        ({"format": "x"}, "format"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, words):
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / CONFIG).write_text(json.dumps({**config().to_json(), **change}))
    with pytest.raises(RequestError, match=words) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("field", ["architecture", "model_kwargs", "class_names", "input_size", "mean", "std"])
def test_missing_fields_are_named(field):
    raw = config().to_json()
    del raw[field]
    with pytest.raises(RequestError, match=f"lacks {field}"):
        ModelConfig.from_json(raw)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"3", b"null", b'"text"', b"\xff\xfe{}"])
def test_config_that_is_no_object(tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(RequestError):
        read_config(tmp_path)


@pytest.mark.parametrize("lacking", [CONFIG, WEIGHTS])
def test_incomplete_folders_say_what_is_missing(tmp_path, lacking):
    save_model(build_model(config()).state_dict(), config(), tmp_path)
    (tmp_path / lacking).unlink()
    assert not is_model_folder(tmp_path)
    with pytest.raises(RequestError, match=rf"{lacking} is missing"):
        load_model(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    save_model(build_model(config()).state_dict(), config(model_kwargs={**KWARGS, "embed_dim": 32}), tmp_path)
    with pytest.raises(RequestError, match="the model has"):
        load_model(tmp_path)


MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

class Wrapped(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3))
        self.model[1].weight = nn.Parameter(self.model[1].weight)

    def forward(self, x):
        return self.model(x)

class Outer:
    Inner = Wrapped
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "gsforget_test_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("gsforget_test_models", None)


def test_code_is_not_even_imported_without_trust(own_module, tmp_path):
    with pytest.raises(SafetyError, match="run code") as caught:
        build_model(config(architecture="gsforget_test_models:Wrapped", model_kwargs={}))
    assert caught.value.exit_status == 4
    assert "--trust-code" in caught.value.hint
    assert not own_module.exists()


@pytest.mark.parametrize("factory", ["Wrapped", "Outer.Inner"])
def test_own_module_round_trip_with_trust(own_module, tmp_path, factory):
    settings = config(architecture=f"gsforget_test_models:{factory}", model_kwargs={"width": 5})
    model = build_model(settings, trust_code=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_model(model.state_dict(), settings, folder)  # every name begins with "model.", which must stay
    back, _ = load_model(folder, trust_code=True)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())


@pytest.mark.parametrize("path", ["no_such_module_anywhere:f", "gsforget_test_models:Missing", ":f"])
def test_import_paths_that_lead_nowhere(own_module, path):
    with pytest.raises(RequestError, match="cannot be imported"):
        build_model(config(architecture=path), trust_code=True)


def test_tied_weights_are_saved_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_model(model.state_dict(), config(), tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / WEIGHTS)
    assert torch.equal(saved["0.weight"], saved["1.weight"])
    assert len(saved) == 4


def test_write_file_is_complete_or_absent(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_unknown_timm_names_and_kwargs():
    with pytest.raises(RequestError, match="no model named") as caught:
        create_timm("vit_tinny_patch16_224", 3, {})
    assert "vit_tiny_patch16_224" in caught.value.hint
    with pytest.raises(RequestError, match="cannot build"):
        create_timm("vit_tiny_patch16_224", 3, {"no_such_argument": 1})
    with pytest.raises(RequestError, match="cannot build"):
        create_timm("vit_tiny_patch16_224", 3, {**KWARGS, "num_heads": 3})
