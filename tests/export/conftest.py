"""Run folders as `forget` writes them, from a ViT that is small enough to be exported in a second."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="session")
def small_config():
    from gsforget.folder import ModelConfig

    return ModelConfig("vit_tiny_patch16_224", dict(KWARGS), list(NAMES), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="session")
def make_original(small_config):
    """make_original(folder): an original model folder with random weights."""

    def make(folder):
        import torch

        from gsforget.folder import build_model, save_model

        torch.manual_seed(0)
        model = build_model(small_config)
        state = {k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()}
        folder.mkdir()
        save_model(state, small_config, folder)
        return folder

    return make


@pytest.fixture
def original(tmp_path, make_original):
    """An original model folder with random weights."""
    return make_original(tmp_path / "original")


@pytest.fixture(scope="session")
def make_run():
    """make_run(parent, folder, index, seed, strength=0.1, **request): erase a class by random factors in both fc1."""
    return _make_run


def _make_run(parent, folder, index, seed, strength=0.1, **request):
    import torch
    from safetensors.torch import save

    from gsforget.checkpoint import read_weights
    from gsforget.folder import read_config, save_model, sha256, write_file
    from gsforget.lora.grid import merge, to_grid

    state, config = read_weights(parent / "model.safetensors"), read_config(parent).erase([index])
    generator = torch.Generator().manual_seed(seed)
    delta = {}
    for block in range(KWARGS["depth"]):
        name = f"blocks.{block}.mlp.fc1.weight"
        rows, columns = state[name].shape
        pair = (torch.randn(2, columns, generator=generator), strength * torch.randn(rows, 2, generator=generator))
        delta[name] = to_grid(*pair)
        state[name] = merge(state[name], delta[name])
    folder.mkdir(parents=True)
    save_model(state, config, folder)
    tensors = {k: v for n, f in delta.items() for k, v in f.tensors(n).items()}
    write_file(folder / "delta.safetensors", save(tensors))
    content = {
        "sequence": config.sequence,
        "parent": str(parent),
        "parent_sha256": sha256(parent / "model.safetensors"),
        "names": NAMES,
        "erased": {str(i): NAMES[i] for i in config.forgotten},
        "thresholds": {"max_forget_acc": 1.0, "max_retain_drop": 1.0, "max_class_drop": 10.0},
        **request,
    }
    write_file(folder / "request.json", json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def make_chain(make_original):
    """make_chain(root, **request): an original, two erasures in a row, and keys, in a folder."""

    def make(root, **request):
        from gsforget.export.device.keys import new_keys

        original = make_original(root / "original")
        first = _make_run(original, root / "runs" / "forget-0001", 1, seed=1, **request)
        _make_run(first, root / "runs" / "forget-0002", 2, seed=2, **request)
        new_keys(root / "keys")
        return original

    return make


def copy_chain(made, root):
    """A copy of what `make_chain` has made, whose runs name their parents in the copy; where its parts are."""
    shutil.copytree(made, root)
    runs = root / "runs"
    for run, parent in (("forget-0001", root / "original"), ("forget-0002", runs / "forget-0001")):
        request = json.loads((runs / run / "request.json").read_text())
        (runs / run / "request.json").write_text(json.dumps({**request, "parent": str(parent)}))
    return SimpleNamespace(
        original=root / "original",
        first=runs / "forget-0001",
        second=runs / "forget-0002",
        key=root / "keys" / "signing.key",
        public=root / "keys" / "signing.pub.json",
    )


@pytest.fixture
def copied_chain(tmp_path, monkeypatch):
    """copied_chain(made): a copy of a chain to change, which is also the current folder."""

    def copied(made):
        chain = copy_chain(made, tmp_path / "copy")
        monkeypatch.chdir(tmp_path / "copy")
        return chain

    return copied


@pytest.fixture
def images(tmp_path):
    """An image folder of noise: per class 2 training and 6 test images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for split, count in (("train", 2), ("test", 6)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
