"""The GPU benchmark without a GPU: cells are kept and resumed, and the dispatcher reads the table that is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gsforget.kernels.lora_ffn import dispatch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import counted  # noqa: E402
import gpu  # noqa: E402


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A store, a setting, and a part of three cells that says which ones it measured."""
    measured = []

    def measure(setting, number):
        measured.append(number)
        return {"number": number}

    monkeypatch.setitem(gpu.PARTS, "ffn", lambda setting: ((f"cell/{i}", measure, (i,)) for i in range(3)))
    return gpu.Store(tmp_path / "ffn.json", False), gpu.Setting("cpu", "float32", True), measured


def test_a_second_call_measures_only_what_is_missing(part):
    store, setting, measured = part
    assert gpu.run_part("ffn", setting, store, minutes=1)
    again = gpu.Store(store.path, False)
    del again.content["cells"]["cell/1"]
    assert gpu.run_part("ffn", setting, again, minutes=1)
    assert measured == [0, 1, 2, 1]
    assert set(json.loads(store.path.read_text())["cells"]) == {"cell/0", "cell/1", "cell/2"}


def test_no_cell_begins_when_time_is_up(part):
    store, setting, measured = part
    assert not gpu.run_part("ffn", setting, store, minutes=-1)
    assert measured == []


def test_again_measures_every_cell(part):
    store, setting, measured = part
    assert gpu.run_part("ffn", setting, store, minutes=1)
    assert gpu.run_part("ffn", setting, gpu.Store(store.path, True), minutes=1)
    assert measured == [0, 1, 2, 0, 1, 2]


def test_speed_ups_need_tests_that_passed(tmp_path, capsys):
    ways = {"ours": {"ms": 1.0, "agrees": True}, "peft": {"ms": 2.0, "agrees": True}}
    store = gpu.Store(tmp_path / "ffn.json", False)
    store.content["cells"] = {"a": {"ways": ways}}
    for cells, tested in (({}, False), ({"x": {"passed": False}}, False), ({"x": {"passed": True}}, True)):
        (tmp_path / "tests.json").write_text(json.dumps({"cells": cells}))
        assert gpu.right(tmp_path) is tested
        gpu.report("ffn", store, gpu.right(tmp_path))
        assert ("times as fast" in capsys.readouterr().out) is tested
    ways["peft"]["agrees"] = False
    gpu.report("ffn", store, True)
    assert "times as fast" not in capsys.readouterr().out


def cell(m: int, fused: float, vendor: float, agrees: bool = True) -> dict:
    row = {"stage": "up", "dtype": "bfloat16", "m": m, "n": 3072, "k": 768, "fused": fused, "vendor": vendor}
    return {"ways": {"ours": {"ms": 1.0, "agrees": agrees}}, "stages": [row]}


def test_the_dispatcher_reads_the_table(tmp_path, monkeypatch):
    store = gpu.Store(tmp_path / "ffn.json", False)
    store.content["cells"] = {
        "small/8": cell(197, 1.0, 2.0),
        "small/16": cell(197, 2.0, 1.5),  # the sum over ranks decides: fused
        "large/8": cell(9850, 3.0, 2.0),
        "wrong/16": cell(9850, 1.0, 9.0, agrees=False),  # does not count
    }
    file = gpu.write_table(store, "Some GPU 1", tmp_path / "tables")
    assert file.name == "some-gpu-1.json"
    monkeypatch.setattr(dispatch.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(dispatch, "_table", dispatch._table.__wrapped__)
    monkeypatch.setattr(dispatch, "_choose", dispatch._choose.__wrapped__)
    assert dispatch._choose("up", "Some GPU 1", "bfloat16", 250, 3072, 768) == "fused"
    assert dispatch._choose("up", "Some GPU 1", "bfloat16", 9000, 3072, 768) == "vendor"
    assert dispatch._choose("up", "Some GPU 1", "float16", 9000, 3072, 768) == dispatch.DEFAULT["up"]


def test_each_stage_is_measured_both_ways_by_the_shape_that_is_asked_for(monkeypatch):
    rows = {"ours_base": {"ms": 1.0}, **{f"ours_{stage}": {"ms": 2.0} for stage in dispatch.DEFAULT}}
    setting = gpu.Setting("cpu", "float32", True)
    got = {r["stage"]: r for r in gpu.gpu_kernels.stage_rows(setting, 18, 32, 64, rows)}
    asked = {}
    monkeypatch.setattr(dispatch, "choose", lambda stage, x, m, n, k: asked.setdefault(stage, (m, n, k)) and "fused")
    p = gpu.gpu_kernels.ffn_ways.make_problem(32, 64, 2, 9, 4, setting.dtype, "cpu")
    gpu.gpu_kernels.ffn_ways.ours(p, backend="interpret")()
    assert asked == {stage: (r["m"], r["n"], r["k"]) for stage, r in got.items()}
    assert all(r[dispatch.DEFAULT[stage]] == 1.0 for stage, r in got.items())


def test_kept_memory_is_counted_as_it_is():
    """What the kernels keep, in the interpreter, equals the count; rank 16, which needs no padding."""
    ways = gpu.gpu_kernels.ffn_ways
    p = ways.make_problem(32, 64, 2, 9, 16, gpu.Setting("cpu", "float32", True).dtype, "cpu")
    for way, step in (("ours", ways.ours(p, backend="interpret")), ("peft", ways.peft(p)), ("frozen", ways.frozen(p))):
        assert ways.saved_bytes(step, p) == counted.kept_bytes(way, 18, 32, 64, 16, size=4), way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "ffn", "prox", "memory", "forget"])
def test_every_part_runs_on_a_cpu(name, tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--part",
        name,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "cpu-tiny" / f"{name}.json").read_text())
    assert content["cells"]
    assert all(c.get("passed", True) for c in content["cells"].values())
