"""The main job on the embedded photographs, and that what is embedded is real, small and licensed."""

import json
from importlib import resources

import numpy as np
import pytest

from gsforget.__main__ import main
from gsforget.demo.lay_out import LICENCE, lay_out
from gsforget.folder import load_model
from gsforget.metrics import h_mean

ASSETS = resources.files("gsforget.demo") / "assets"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("demo"))


def test_assets_are_small_and_licensed():
    assert sum(f.stat().st_size for f in ASSETS.iterdir()) <= 8e6
    assert "Permission is hereby granted, free of charge" in (ASSETS / LICENCE).read_text()


def test_lay_out_is_an_ordinary_image_folder(embedded):
    _, data = embedded
    for split, count in (("train", 300), ("test", 100)):
        folders = sorted(p for p in (data / split).iterdir())
        assert len(folders) == 10
        assert all(len(list(f.glob("*.png"))) == count for f in folders)
    assert (data / LICENCE).is_file()


def test_embedded_images_do_not_repeat_between_splits():
    with np.load(ASSETS / "fashion_mnist_subset.npz") as arrays:
        train, test = ({image.tobytes() for image in arrays[f"{split}_images"]} for split in ("train", "test"))
    assert len(train) > 2990
    assert not train & test


def test_a_second_lay_out_repairs_the_model_and_keeps_the_images(embedded):
    model, data = embedded
    before = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"damaged")
    kept = data / "test" / "bag" / "own.png"
    kept.write_bytes((data / "test" / "bag" / "0800.png").read_bytes())
    lay_out(model.parent)
    assert (model / "model.safetensors").read_bytes() == before
    assert kept.is_file()
    kept.unlink()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "demo").write_text("")
    assert main(["demo", "--dir", str(tmp_path / "demo"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "not_a_folder"


def test_demo_forgets_exports_and_infers(tmp_path, capsys):
    root = tmp_path / "demo"
    assert main(["demo", "--dir", str(root), "--json", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    metrics = document["forget"]["metrics"]
    assert metrics["forget_acc_before"] > 90
    assert metrics["forget_acc_after"] <= 1
    assert metrics["retain_acc_before"] - metrics["retain_acc_after"] <= 0.5
    assert metrics["h_mean"] >= h_mean(metrics["forget_acc_before"], metrics["retain_acc_before"]) - 1
    assert len(document["forget"]["groups"]["active"]) <= document["forget"]["groups"]["total"] / 2
    artifact = document["export"]["artifacts"][0]
    assert artifact["parity"]["top1_agreement"] == 100
    assert artifact["parity"]["max_abs_diff"] < 1e-3
    assert artifact["parity"]["forget_acc"] <= 1
    tops = [image["top"][0]["class"] for image in document["infer"]["images"]]
    assert not {"sandal", "sneaker"} & {top["class"] for image in document["infer"]["images"] for top in image["top"]}
    assert tops[-2:] == ["trouser", "bag"]
    assert "Next:" in captured.err
    assert (root / "runs" / "forget-0001" / "audit" / "groups.png").read_bytes().startswith(b"\x89PNG")
    original, _ = load_model(root / "model")
    erased, config = load_model(root / "runs" / "forget-0001")
    assert (original.head.weight == erased.head.weight).all()
    assert config.class_names[5] == "forgotten-5"
