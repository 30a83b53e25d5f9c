"""The doctor: no probe takes the others down, and a model that does not fit its data is refused."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gsforget import doctor
from gsforget.data import ImageFolder, Split
from gsforget.errors import RequestError


def test_all_probes_answer():
    findings = {f.name: f for f in doctor.examine_machine()}
    assert list(findings) == list(doctor.PROBES)
    for name in ("Python", "gsforget", "torch", "timm", "memory", "disk", "CPU threads"):
        assert findings[name].available, findings[name]
    assert torch.__version__ in findings["torch"].detail
    assert findings["CUDA GPU"].available == torch.cuda.is_available()


@pytest.mark.parametrize("error", [RuntimeError("driver broken\nlong trace"), OSError(), ImportError("no libx.so")])
def test_a_probe_that_raises_says_why_and_leaves_the_others(monkeypatch, error):
    def fails() -> str:
        raise error

    monkeypatch.setattr(doctor, "PROBES", {"broken": fails, "sound": lambda: "1.0"})
    broken, sound = doctor.examine_machine()
    assert not broken.available
    assert broken.detail.startswith("not available: ")
    assert "\n" not in broken.detail
    assert len(broken.detail) > len("not available: ")
    assert sound == doctor.Finding("sound", True, "1.0")


def test_packages_are_looked_up_under_all_their_names():
    assert doctor._package("no-such-package", "numpy")() == np.__version__
    finding = doctor._probe("x", doctor._package("no-such-package", "nor-this"))
    assert finding.detail == "not available: no-such-package is not installed"


def test_importing_the_doctor_touches_no_driver():
    code = (
        "import sys, gsforget.doctor; sys.exit(bool({'torch', 'triton', 'onnxruntime', 'tensorrt'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Net(nn.Module):
    """Reads the class off the pixel that is lit, behind one feed-forward network."""

    def __init__(self, order: list[int]):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        self.head.weight.data = torch.eye(4)[order]

    def forward(self, x):
        x = x.flatten(1) * self.scale
        return self.head(x + self.fc2(torch.relu(self.fc1(x))))


def examine(order: list[int], erased: dict[int, str] | None = None) -> dict:
    split = Split([Path(str(k)) for k in range(4) for _ in range(3)], np.repeat(np.arange(4), 3))
    data = ImageFolder(Path(), list("abcd"), split, split, "val")
    source = SimpleNamespace(model=Net(order).eval(), names=list("abcd"), erased=erased or {})
    return doctor.examine_model(source, data, lambda p: np.eye(4, dtype=np.float32)[int(p.name)].reshape(1, 2, 2))


def test_a_model_that_fits():
    found = examine([0, 1, 2, 3])
    assert found["groups"] == [{"name": "fc1", "linears": ["fc1", "fc2"]}]
    assert found["accuracy"] == 100
    assert found["images"] == {"train": 12, "val": 12, "dropped": []}


def test_a_model_in_another_order_is_refused_but_not_for_erased_classes():
    with pytest.raises(RequestError) as caught:
        examine([0, 1, 3, 2])
    assert caught.value.kind == "class_order"
    assert examine([0, 1, 3, 2], erased={2: "c", 3: "d"})["accuracy"] == 100
