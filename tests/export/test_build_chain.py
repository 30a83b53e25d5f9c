"""Weights at half precision are the chain of single roundings, not one rounding at the end."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsforget.errors import RequestError, SafetyError
from gsforget.export.build.chain import model_id, round_to, weights_at
from gsforget.folder import sha256

FC1 = "blocks.0.mlp.fc1.weight"


@pytest.fixture
def chain(original, tmp_path, make_run):
    first = make_run(original, tmp_path / "runs" / "forget-0001", 1, seed=1)
    return original, first, make_run(first, tmp_path / "runs" / "forget-0002", 2, seed=2)


def delta(run, name=FC1):
    t = load_file(run / "delta.safetensors")
    a, b = (t[f"{name}::{k}"].numpy().astype(np.float64) for k in ("a", "b"))
    scale = 2.0 ** (t[f"{name}::ea"] + t[f"{name}::eb"]).numpy().astype(np.float64)
    return (b * scale) @ a


def weights(folder, name=FC1):
    return load_file(folder / "model.safetensors")[name].numpy()


def test_fp32_is_the_runs_own_file(chain):
    state, info = weights_at(chain[2], "fp32")
    assert torch.equal(state[FC1], load_file(chain[2] / "model.safetensors")[FC1])
    assert (info.position, info.complete) == (2, True)


def test_fp16_is_the_closed_form_of_the_chain(chain):
    folder, first, second = chain
    state, info = weights_at(second, "fp16")
    wanted = weights(folder).astype(np.float16)
    for run in (first, second):
        wanted = (wanted.astype(np.float64) + delta(run)).astype(np.float16)
    assert state[FC1].numpy().tobytes() == wanted.tobytes()
    assert (state[FC1] != torch.from_numpy(weights(second)).half()).any(), "one rounding at the end would do the same"
    untouched = load_file(folder / "model.safetensors")["head.weight"].half()
    assert torch.equal(state["head.weight"], untouched)
    assert info.to_json() == {"position": 2, "base": 0, "complete": True, "reason": ""}


def test_a_purged_step_starts_the_chain_behind_it(chain):
    _, first, second = chain
    (first / "delta.safetensors").unlink()
    state, info = weights_at(second, "fp16")
    wanted = (weights(first).astype(np.float16).astype(np.float64) + delta(second)).astype(np.float16)
    assert state[FC1].numpy().tobytes() == wanted.tobytes()
    assert (info.base, info.complete) == (1, False)
    assert "erasure 1" in info.reason


def test_a_missing_or_changed_parent_starts_the_chain_at_the_run(chain):
    folder, first, _ = chain
    state = load_file(folder / "model.safetensors")
    save_file({n: t + 1 for n, t in state.items()}, folder / "model.safetensors")
    assert weights_at(first, "fp16")[1].base == 1
    shutil.rmtree(folder)
    state, info = weights_at(first, "fp16")
    assert torch.equal(state[FC1], torch.from_numpy(weights(first)).half())
    assert (info.position, info.base, info.complete) == (1, 1, False)


def test_relative_parents_and_runs_moved_together(chain, tmp_path, monkeypatch):
    _, first, second = chain
    monkeypatch.chdir(tmp_path)
    request = json.loads((second / "request.json").read_text())
    (second / "request.json").write_text(json.dumps({**request, "parent": "runs/forget-0001"}))
    assert weights_at(second, "fp16")[1].base == 0
    moved = tmp_path / "elsewhere"
    first.parent.rename(moved)
    assert weights_at(moved / "forget-0002", "fp16")[1].base == 0


def test_factors_that_do_not_lead_to_the_weights_are_refused(chain):
    second = chain[2]
    tensors = load_file(second / "delta.safetensors")
    tensors[f"{FC1}::b"] = -tensors[f"{FC1}::b"]
    save_file(tensors, second / "delta.safetensors")
    with pytest.raises(SafetyError, match=r"does not lead to the weights of blocks\.0\.mlp\.fc1\.weight"):
        weights_at(second, "fp16")


def test_rounding_is_one_rounding():
    # Just above the middle of two fp16 numbers: by way of float32 it would become the middle, and then the lower one.
    value = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert round_to(value, "w", "fp16").item() == 1 + 2.0**-10


def test_bfloat16_is_one_rounding_to_nearest_even():
    # Middles of neighbours, a little off them (float32 would not see it), subnormal numbers, and the ends of the range.
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 2 - 2.0**-40]
    values += [0.0, 2.0**-133, 2.0**-134, 1.5 * 2.0**-133, 2.0**-134 + 2.0**-170, 255 * 2.0**120]
    wanted = [1, 1 + 2.0**-6, 1 + 2.0**-7, -1 - 2.0**-7, 2, 0, 2.0**-133, 0, 2.0**-132, 2.0**-133, 255 * 2.0**120]
    found = round_to(torch.tensor(values, dtype=torch.float64), "w", "bf16")
    assert found.dtype == torch.bfloat16
    assert found.double().tolist() == wanted
    with pytest.raises(RequestError, match="beyond the range of bf16"):
        round_to(torch.tensor([2.0**128 - 2.0**119], dtype=torch.float64), "w", "bf16")


def test_bfloat16_agrees_with_torch_on_float32():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(round_to(values, "w", "bf16"), values.to(torch.bfloat16))


def test_bf16_is_the_closed_form_of_the_chain(chain):
    folder, first, second = chain
    state, info = weights_at(second, "bf16")
    wanted = torch.from_numpy(weights(folder)).to(torch.bfloat16)
    for run in (first, second):
        wanted = round_to(wanted.double() + torch.from_numpy(delta(run)), FC1, "bf16")
    assert torch.equal(state[FC1], wanted)
    assert (state[FC1] != torch.from_numpy(weights(second)).to(torch.bfloat16)).any()
    assert info.complete


def test_values_beyond_fp16_are_refused():
    with pytest.raises(RequestError, match="head"):
        round_to(torch.tensor([7e4]), "head.weight", "fp16")


def test_other_precisions_are_refused(original):
    with pytest.raises(RequestError, match="int8"):
        weights_at(original, "int8")


def test_the_chain_is_named_by_its_original(chain):
    folder, first, second = chain
    name = sha256(folder / "model.safetensors")[:16]
    assert model_id(folder) == model_id(first) == model_id(second) == name
