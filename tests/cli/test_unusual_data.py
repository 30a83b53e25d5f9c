"""Data out of the ordinary with which a request still goes through, and what it then says."""

import json
import shutil
from pathlib import Path


def test_corrupt_images_may_be_left_out(world, cli, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    image = data / "train/cat/003.png"
    image.write_bytes(image.read_bytes()[:100])
    (data / "test/cat/003.png").write_bytes(b"")
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", data, "--classes", "bee", "--skip-corrupt", "--epochs", "1",
        "--max-forget-acc", "100", "--max-retain-drop", "100", "--max-class-drop", "100",
    )  # fmt: skip
    assert result.status == 0, result.err
    dropped = json.loads((tmp_path / "runs/forget-0001/metrics.json").read_text())["dropped_images"]
    assert sorted(Path(p).relative_to(data).as_posix() for p in dropped) == ["test/cat/003.png", "train/cat/003.png"]
    assert "003.png" in result.err, "people are told what was left out"


def test_one_image_per_class(world, cli, draw, tmp_path):
    draw(tmp_path / "data" / "train", 1, 1)
    draw(tmp_path / "data" / "test", 1, 2)
    result = cli(tmp_path, "forget", "--model", world.model, "--data", "data", "--classes", "bee")
    assert result.status in (0, 3), result.err
    assert result.document["verdict"] == ("pass" if result.status == 0 else "fail")
    forgotten, retained, unseen = result.document["warnings"]
    assert "1 forgotten class(es) have only 1 to 4 training images: 'bee'" in forgotten
    assert "3 retained class(es) have only 1 to 4 training images: 'ant', 'cat', 'dog'" in retained
    assert "no validation part" in forgotten
    assert "fixed rule" in unseen


def test_two_classes_forgetting_one(world, cli, teach, tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file

    for split in ("train", "test"):
        for name in ("ant", "bee"):
            shutil.copytree(world.data / split / name, tmp_path / "data" / split / name)
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **kwargs)
    assert teach(model, tmp_path / "data", names=["ant", "bee"], lr=5e-3) > 95
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "two.safetensors")
    options = {"model": world.architecture, "checkpoint": "two.safetensors", "data": "data", "classes": "bee"}
    options |= {"mean": "0.5", "std": "0.5", "crop_pct": "1"}
    options["model_kwargs"] = ",".join(f"{k}={v}" for k, v in kwargs.items())
    result = cli(tmp_path, "forget", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items()))
    assert result.status == 0, result.err
    assert result.document["metrics"]["forget_acc_after"] == 0
    found = cli(tmp_path, "infer", "runs/forget-0001", "data/test")
    assert {g["class"] for i in found.document["images"] for g in i["top"]} == {"ant"}
    again = cli(tmp_path, "forget", "--model", "runs/forget-0001", "--data", "data", "--classes", "ant")
    assert (again.status, again.document["error"]["kind"]) == (2, "all_classes")


def test_retained_classes_without_images_are_kept_with_a_warning(world, cli, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    shutil.rmtree(data / "train" / "cat")
    for path in (data / "train" / "dog").iterdir():
        path.unlink()
    shutil.rmtree(data / "test" / "cat")
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", data, "--classes", "bee",
        "--max-retain-drop", "100", "--max-class-drop", "100",
    )  # fmt: skip
    assert result.status == 0, result.err
    warning = result.document["warnings"][0]
    assert "2 of 3 retained classes have no training images: 'cat', 'dog'" in warning
    assert f"Warning: {warning}" in result.err
    assert any("without test images: cat" in note for note in result.document["not_tested"])
    metrics = json.loads((tmp_path / "runs/forget-0001/metrics.json").read_text())
    assert metrics["classes"][2]["after"]["acc"] is None
    assert metrics["classes"][3]["after"]["count"] == 20
    assert metrics["warnings"] == result.document["warnings"]


def test_an_image_on_both_sides_is_named(world, cli, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    shutil.copyfile(data / "train/bee/003.png", data / "train/cat/twin.png")
    shutil.copyfile(data / "test/bee/003.png", data / "test/dog/twin.png")
    gates = [f"--max-{g}=100" for g in ("forget-acc", "retain-drop", "class-drop")]
    result = cli(tmp_path, "forget", "--model", world.model, "--data", data, "--classes", "bee", "--epochs=1", *gates)
    assert result.status == 0, result.err
    train, test = result.document["warnings"]
    assert "1 image file(s) in train" in train
    assert "bee/003.png, the same as cat/twin.png" in train
    assert "1 image file(s) in test" in test
