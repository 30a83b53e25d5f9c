"""`gsforget bench` on the tiny world: resumed cell by cell, tuned on validation images, and robust against bad methods."""

import json

import pytest

from gsforget import RequestError, run_bench
from gsforget.bench.run import Bench, code_sha256

METHODS = """
import torch
from dataclasses import dataclass
from gsforget.baselines.base import Method, Result, plain_state

@dataclass(frozen=True)
class Settings:
    strength: float = 0.0

def mask(model, images, forget, request, settings):
    # Zero rows, and biases that win or lose by the setting.
    state = plain_state(model)
    rows = list(request.forget + request.erased)
    state["head.weight"][rows] = 0
    state["head.bias"][rows] = -settings.strength
    {extra}
    return Result(state, 0.0)

METHOD = Method("{name}", "nobody", mask, Settings, ({{"strength": 1e4}}, {{"strength": -1e4}}))
"""


@pytest.fixture
def method(tmp_path):
    def write(name, extra=""):
        path = tmp_path / f"{name.replace('-', '_')}.py"
        path.write_text(METHODS.format(name=name, extra=extra))
        return str(path)

    return write


@pytest.fixture
def bench(world, tmp_path):
    def run(methods, **options):
        given = {"protocol": "3-1", "seeds": 1, "trials": 3, "epochs": 1, "out": tmp_path / "out", **options}
        return run_bench(methods, world.model, world.data, **given)

    return run


def stored(tmp_path):
    return json.loads((tmp_path / "out" / "bench.json").read_text())


def test_a_method_is_tuned_on_validation_images_and_measured_on_every_request(bench, method, tmp_path):
    found = bench([method("own-mask"), "head-mask"], never_seen=[])
    rows = {row["method"]: row for row in found["rows"]}
    content = stored(tmp_path)
    assert [content["tuning"][f"own-mask/{k}"]["change"] for k in range(3)] == [
        {},
        {"strength": 1e4},
        {"strength": -1e4},
    ]
    assert content["cells"]["own-mask/0/0"]["settings"] == {"strength": 1e4}
    for name in ("own-mask", "head-mask"):
        for n in (0, 1):
            cell = content["cells"][f"{name}/0/{n}"]
            assert cell["forget_acc_after"] == 0
            assert cell["changed_tensors"] == 2
            assert cell["h_mean"] == pytest.approx(cell["h_ideal"], abs=3)
    assert content["cells"]["own-mask/0/1"]["old_acc_after"] == 0
    assert content["cells"]["own-mask/0/0"]["old_acc_after"] is None
    assert [c["step"] for c in content["cells"].values()][:2] == ["4-1", "3-1"]
    assert rows["head-mask"]["verdict"] == "inconclusive"
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"bench.json", "bench.md", "bench.csv", "bench.png"}


def test_a_second_call_measures_nothing_and_a_killed_one_goes_on(bench, method, tmp_path, monkeypatch):
    names = [method("own-mask"), "head-mask"]
    measured = []
    original = Bench._cell

    def counted(self, method, *rest):
        if len(measured) == 1 and "dies" not in measured:
            measured.append("dies")
            raise KeyboardInterrupt
        measured.append(method.name)
        return original(self, method, *rest)

    monkeypatch.setattr(Bench, "_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        bench(names)
    assert list(stored(tmp_path)["cells"]) == ["own-mask/0/0"]
    bench(names)
    assert measured == ["own-mask", "dies", "own-mask", "head-mask", "head-mask"]
    times = {k: c["finished"] for k, c in stored(tmp_path)["cells"].items()}
    bench(names)
    assert len(measured) == 5
    assert {k: c["finished"] for k, c in stored(tmp_path)["cells"].items()} == times
    bench(names, again=["head-mask"])
    assert measured[5:] == ["head-mask", "head-mask"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("state['head.bias'][0] = float('nan')", "numbers that are none in head.bias"),
        ("state = {k: v.roll(1, 0) if k.startswith('head') else v for k, v in state.items()}", "another order"),
        ("del state['head.bias']", "names or shapes"),
        ("raise KeyError('oh')", "KeyError"),
    ],
)
def test_a_method_that_fails_is_reported_and_the_rest_goes_on(bench, method, tmp_path, extra, says):
    found = bench([method("broken", extra), "head-mask"], trials=1)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["broken"]["verdict"] == "failed"
    assert says in rows["broken"]["failed"][0]
    assert rows["head-mask"]["seeds"] == 1
    assert "broken" in (tmp_path / "out" / "bench.md").read_text()


def test_code_that_changed_is_said(bench, method, tmp_path):
    path = method("own-mask")
    assert bench([path], trials=1)["older_code"] == []
    method("own-mask", "pass")
    assert bench([path], trials=1)["older_code"] == ["own-mask"]


def test_another_setting_or_version_is_not_mixed_in(bench, tmp_path):
    bench(["head-mask"])
    with pytest.raises(RequestError, match="another setting \\(epochs\\)") as error:
        bench(["head-mask"], epochs=2)
    assert error.value.kind == "other_bench"
    path = tmp_path / "out" / "bench.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "gsforget": "0.0.1"}))
    with pytest.raises(RequestError, match=r"written by gsforget 0\.0\.1"):
        bench(["head-mask"])
    path.write_text("{")
    with pytest.raises(RequestError) as error:
        bench(["head-mask"])
    assert error.value.kind == "bad_bench"


def test_a_never_seen_model_gives_the_audit_its_verdict(bench, world, tmp_path):
    """The model itself as reference leaves no room: the negative control cannot be told from it, and is not passed."""
    found = bench(["head-mask"], never_seen=[world.model])
    assert found["rows"][0]["verdict"] in ("fail", "pass")
    assert "never-seen/1" in stored(tmp_path)["references"]
    with pytest.raises(RequestError) as error:
        bench(["head-mask"], never_seen=[world.model] * 3, out=tmp_path / "other")
    assert error.value.kind == "bad_reference"


def test_names_that_are_unknown(bench):
    for options, kind in (
        ({"methods": ["scrubb"]}, "unknown_method"),
        ({"methods": []}, "unknown_method"),
        ({"methods": ["head-mask"], "again": ["scrub"]}, "unknown_method"),
    ):
        with pytest.raises(RequestError) as error:
            bench(options.pop("methods"), **options)
        assert error.value.kind == kind


def test_our_own_method_forgets_in_the_bench(bench, tmp_path):
    found = bench(["gs-lora"], protocol="4-1", epochs=5)
    cell = stored(tmp_path)["cells"]["gs-lora/0/0"]
    assert cell["forget_acc_after"] <= 5
    assert cell["changed_parameters"] < cell["parameters"] / 2
    assert found["rows"][0]["seeds"] == 1


def test_code_that_methods_share_counts_as_theirs(tmp_path, monkeypatch):
    import sys

    from gsforget.baselines import find_method

    tuned, mask = find_method("finetune"), find_method("head-mask")
    before = [code_sha256(tuned), code_sha256(mask)]
    shared = tmp_path / "training.py"
    shared.write_text("# changed")
    monkeypatch.setattr(sys.modules["gsforget.baselines.training"], "__file__", str(shared))
    assert [a == b for a, b in zip(before, [code_sha256(tuned), code_sha256(mask)])] == [False, True]
