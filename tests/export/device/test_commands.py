"""`gsforget apply`, `gsforget keys`, and `gsforget infer` on a device folder, as typed."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gsforget.__main__ import main


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_from_keys_to_answers(make_world, cli, tmp_path, images, monkeypatch):
    """keys new, apply (install), apply (patch), infer; each names the next command."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = cli(tmp_path, "keys", "new")
    assert made.status == 0
    assert made.document["private"] == str(tmp_path / "config" / "gsforget" / "signing.key")
    assert f"gsforget keys trust {made.document['public']} --device-dir DIR" in made.err
    world = make_world(tmp_path / "world")
    world.erase()
    installed = cli(tmp_path, "apply", world.artifact(0), "--device-dir", "device", "--trust", world.public)
    assert installed.status == 0
    assert (installed.document["kind"], installed.document["sequence"]) == ("install", 0)
    done = cli(tmp_path, "apply", world.patch(1), "--device-dir", "device")
    assert done.status == 0, done.err
    assert "Next:\n  gsforget infer device IMAGE" in done.err
    assert "Destroyed: model-0000-fp32.onnx." in done.err
    document = done.document
    assert set(document) == {
        "device_dir", "kind", "model_id", "sequence", "precision", "artifacts", "removed", "seconds", "not_tested",
        "verdict",
    }  # fmt: skip
    (artifact,) = document["artifacts"]
    assert artifact["bytes"] == world.artifact(1).stat().st_size
    assert set(artifact) == {"name", "kind", "sha256", "bytes", "answered"}
    answers = cli(tmp_path, "infer", "device", images)
    assert answers.status == 0, answers.err
    shown = {t["class"] for image in answers.document["images"] for t in image["top"]}
    assert shown == {"bee", "cat", "dog"}
    again = cli(tmp_path, "apply", world.patch(1), "--device-dir", "device")
    assert (again.status, again.document["error"]["kind"]) == (4, "rollback")
    early = cli(tmp_path, "apply", world.patch(1), "--device-dir", "elsewhere")
    assert (early.status, early.document["error"]["kind"]) == (2, "empty_device")


def test_rotation(chain, device, cli, tmp_path):
    old = chain.root / "keys" / "signing.key"
    made = cli(tmp_path, "keys", "rotate", "--key", old, "--from-sequence", 2, "--out", "next")
    assert made.status == 0, made.err
    assert made.document["old"] == chain.key.key_id
    trusted = cli(tmp_path, "keys", "trust", made.document["rotation"], "--device-dir", device)
    assert trusted.status == 0, trusted.err
    assert [k["key_id"] for k in trusted.document["keys"]] == [made.document["key_id"]]
    assert [(k["key_id"], k["until"]) for k in trusted.document["retired"]] == [(chain.key.key_id, 2)]
    stranger = cli(tmp_path, "keys", "new", "--out", "stranger")
    refused = cli(tmp_path, "keys", "trust", stranger.document["public"], "--device-dir", device)
    assert (refused.status, refused.document["error"]["kind"]) == (4, "other_trust")
    none = cli(tmp_path, "keys", "rotate", "--key", "none.key", "--from-sequence", 2)
    assert (none.status, none.document["error"]["kind"]) == (2, "no_key")
    fleet = cli(tmp_path, "keys", "new", "--fleet", "--out", "fleet")
    assert fleet.document["kind"] == "fleet"
    assert "--encrypt-for fleet/fleet.pub.json" in fleet.err


def test_a_device_folder_without_its_state_is_refused_and_not_taken_for_a_model(chain, device, cli, tmp_path, images):
    (device / "state.json").unlink()
    result = cli(tmp_path, "infer", device, images)
    assert (result.status, result.document["error"]["kind"]) == (4, "broken_state")


def test_people_get_sentences(chain, device, capsys):
    assert main(["keys"]) in (0, 2)
    assert "rotate" in "".join(capsys.readouterr())
    path = chain.root / "patch-0001-fp32.gsf"
    assert main(["apply", str(path), "--device-dir", str(device)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Patched to sequence 1" in printed.err
    assert "model-0001-fp32.onnx" in printed.err


def test_apply_and_infer_need_no_torch(chain, device, images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(device, copy)
    code = """
import sys
from gsforget.__main__ import main
assert main(["apply", sys.argv[1], "--device-dir", sys.argv[2], "--json"]) == 0
assert main(["infer", sys.argv[2], sys.argv[3]]) == 0
core = {"torch", "timm", "onnx", "torchvision", "safetensors", "gsforget.folder", "gsforget.ledger", "gsforget.models"}
assert not core & set(sys.modules), core & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(chain.root / "patch-0001-fp32.gsf"), str(copy), str(images)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sequence"] == 1
