"""Whole requests on a device whose tensors do not mix with those of the host, see `tests/device_apart.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import gsforget
from gsforget import Settings, predict, training
from gsforget.steps import READ_EVERY, StepLog

SPEC = importlib.util.spec_from_file_location("device_apart", Path(__file__).parents[1] / "device_apart.py")
double = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = double
SPEC.loader.exec_module(double)


def test_the_double_tells_both_sides_apart():
    with double.device_apart() as device:
        there, here = torch.ones(3, device=device), torch.arange(3.0)
        assert (there + here.to(device)).cpu().tolist() == [1, 2, 3]
        assert (there * 2.0).sum().item() == 6
        assert there[torch.tensor([0, 2])].device == device
        with pytest.raises(RuntimeError, match="of the host"):
            there + here
        with pytest.raises(RuntimeError, match="of the host"):
            here[there.long()]
        weight = torch.zeros(3, device=device, requires_grad=True)
        (weight * there).sum().backward()
        assert weight.grad.cpu().tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_two_requests_leave_nothing_on_the_wrong_side(world, tmp_path, monkeypatch):
    """Read every few steps, as on a GPU; the second request knows an earlier one."""
    monkeypatch.setattr(predict, "pick_device", lambda _: double.APART)
    monkeypatch.setattr(training, "StepLog", lambda groups, device: StepLog(groups, device, READ_EVERY))
    model = world.model
    with double.device_apart():
        for name in ("bee", "cat"):
            outcome = gsforget.forget(
                model, world.data, [name], settings=Settings(rank=4, epochs=1.0), runs=tmp_path / "runs"
            )
            assert outcome.document["verdict"] == "pass"
            assert outcome.document["metrics"]["forget_acc_after"] <= 1
            model = outcome.folder
