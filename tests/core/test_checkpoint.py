"""Checkpoints: every usual wrapping is opened, code never runs, and what does not fit is named."""

import contextlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gsforget.checkpoint import apply_weights, check_finite, read_weights, strip_prefix
from gsforget.errors import GsforgetError, RequestError, SafetyError


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()


def same(read, wanted=None) -> bool:
    wanted = state() if wanted is None else wanted
    return read.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in read.items())


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{n}": t for n, t in state().items()}


def test_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state(), path)
    assert same(read_weights(path))
    save_file(prefixed("model."), path)
    assert same(read_weights(path))
    assert same(read_weights(path, as_saved=True), prefixed("model."))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: state(),
        lambda: {"state_dict": state(), "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda: {"epoch": torch.tensor(3), "best": torch.tensor(0.9), "state_dict": state()},
        lambda: {"model": {"state_dict": state()}, "args": None},
        lambda: {"model": prefixed("_orig_mod.module.")},
        lambda: {"model": {"0.weight": torch.zeros(4, 3)}, "model_ema": state()},
        lambda: prefixed("module."),
        lambda: {"state_dict": prefixed("model.backbone.")},
        lambda: {**state(), "version": 2},
    ],
    ids=["plain", "state_dict", "beside tensors", "nested", "compiled", "ema", "parallel", "backbone", "extra"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, wrap, zipped):
    path = tmp_path / "w.pth"
    torch.save(wrap(), path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path))


def test_prefix_goes_only_where_every_name_has_it():
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert strip_prefix(mixed).keys() == mixed.keys()
    assert strip_prefix({}) == {}


class Code:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("protocol", ["zip", "legacy", 0, 2, 5])
def test_pickles_with_code_are_refused_and_do_not_run(tmp_path, protocol):
    path, trace = tmp_path / "w.pt", tmp_path / "ran"
    content = {"state_dict": state(), "extra": Code(trace)}
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Code(trace), protocol=protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(SafetyError, match="could run code") as caught:
        read_weights(path)
    assert caught.value.exit_status == 4
    assert not trace.exists()
    pickle.loads(pickle.dumps(Code(trace)))  # the trap works
    assert trace.exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(SafetyError) as caught:
        read_weights(tmp_path / "m.pt")
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "legacy.pt"])
def test_truncated_and_damaged_files_are_one_sentence(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=name != "legacy.pt")
    whole = path.read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:cut])
        with pytest.raises(GsforgetError if name == "legacy.pt" else RequestError):  # legacy files are bare pickles
            read_weights(path)
    for at in range(0, len(whole), max(1, len(whole) // 80)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(GsforgetError):  # anything else is a traceback on the screen
            read_weights(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", bytes(64), b"version https://git-lfs"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_at_all(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="not a readable") as caught:
        read_weights(path)
    assert caught.value.exit_status == 2


def test_files_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "b.pt")
    torch.save([torch.ones(1)], tmp_path / "c.pt")
    torch.save({"state_dict": {}}, tmp_path / "d.pt")
    itself: dict = {}
    itself["model"] = itself
    torch.save(itself, tmp_path / "e.pt")
    save_file({}, tmp_path / "f.safetensors")
    for name in ("a.pt", "b.pt", "c.pt", "d.pt", "e.pt", "f.safetensors"):
        with pytest.raises(RequestError, match=r"holds no (state dict|tensors)"):
            read_weights(tmp_path / name)
    for absent in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(RequestError, match="no checkpoint"):
            read_weights(absent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    bad = state()
    bad["2.weight"][1, 1] = value
    save_file(bad, tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match=r"tensor 2\.weight"):
        read_weights(tmp_path / "w.safetensors")
    check_finite({"count": torch.tensor(7)}, "integers are finite")


def test_weights_of_another_architecture_name_a_tensor():
    def refusal(model, changed):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(RequestError) as caught:
            apply_weights(model, changed, "w.pt")
        assert same(model.state_dict(), before)  # nothing was written
        return caught.value.message

    def model():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    plain = state()
    assert "2.weight is [2, 5], the model has [2, 4]" in refusal(model(), {**plain, "2.weight": torch.zeros(2, 5)})
    assert "0.bias" in refusal(model(), {n: t for n, t in plain.items() if n != "0.bias"})
    assert "9.weight" in refusal(model(), {**plain, "9.weight": torch.zeros(1)})
    fits = model()
    apply_weights(fits, {n: t for n, t in plain.items() if "running" not in n and "num_batches" not in n}, "w.pt")
    assert torch.equal(fits[0].weight, plain["0.weight"])
