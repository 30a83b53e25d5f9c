"""The GPU benchmark without a GPU: cells are kept and resumed, and the dispatcher reads the table that is written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gsforget.kernels.lora_ffn import dispatch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import counted  # noqa: E402
import gpu  # noqa: E402

# Not imported by its name, which the room has too.
SPEC = importlib.util.spec_from_file_location("cpu_kernels", BENCHMARKS / "kernels.py")
cpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cpu)


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


def test_trying_it_leaves_nothing_among_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TRIED", tmp_path / "tried")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(gpu.PARTS, "ffn", lambda setting: iter([("a", lambda *_: cell(197, 1.0, 2.0), ())]))
    gpu.main(["--device", "cpu", "--tiny", "--part", "ffn", "--write-table"])
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "tried" / "tables" / "cpu.json").is_file()
    assert str(tmp_path / "tried") in capsys.readouterr().out


def cells_of(out: Path, name: str) -> dict:
    return json.loads((out / "cpu-tiny" / f"{name}.json").read_text())["cells"]


@pytest.mark.parametrize("name", ["tests", "ffn", "prox", "memory", "forget"])
def test_every_part_runs_on_a_cpu(name, tmp_path, monkeypatch, capsys):
    """All that a part does but what only a GPU has; without the whole request, which takes longer: see below."""
    cells = [c for c in gpu.PARTS[name](gpu.Setting("cpu", "float32", True)) if not c[0].startswith("erase")]
    monkeypatch.setitem(gpu.PARTS, name, lambda setting: iter(cells))
    gpu.main(["--device", "cpu", "--tiny", "--part", name, "--out", str(tmp_path)])
    found = cells_of(tmp_path, name)
    assert set(found) == {c[0] for c in cells}
    assert all(c.get("passed", True) for c in found.values())
    assert all(row.get("agrees", True) for c in found.values() for row in c.get("ways", {}).values())
    assert "not done" not in capsys.readouterr().out


def test_no_figure_is_printed_where_a_test_of_the_kernels_fails(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "tests_pass", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="no speed-up"):
        cpu.main()
    assert capsys.readouterr().out == ""


def test_what_is_stored_is_what_is_counted(tmp_path, capsys):
    """And the table and the picture are made of it."""
    content = json.loads(cpu.RESULTS.read_text())
    assert content["counted"] == {name: cpu.counted_for(name) for name in cpu.WIDTHS}
    cpu.report(content)
    assert "not measured" in capsys.readouterr().out
    cpu.draw(content, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_proximal_step_is_counted_by_watching_it():
    small, large = counted.prox(3, 100), counted.prox(3, 1000)
    assert small["eager"]["launches"] == large["eager"]["launches"] > 100
    assert large["ours"] == {"launches": 1, "megabytes": 0.1, "megabytes_from_cache": 0.3}
    assert large["eager"]["megabytes"] > 20 * large["ours"]["megabytes"]


MISSING = ["tensorrt", "cryptography", "onnxruntime", "onnxscript", "typer", "rich", "pytest", "hypothesis", "loralib"]
BARE = f"""
import runpy, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in {MISSING} else self.finder.find_spec(name, *more)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
del sys.argv[0]
sys.path.insert(0, {str(BENCHMARKS)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("tests", "interpret"), ("prox", "torch"), ("forget", "torch")])
def test_parts_need_nothing_that_a_rented_machine_lacks(name, backend, tmp_path):
    """With the kernels in the interpreter, the tests of the kernels themselves; and whole requests."""
    arguments = [str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--part", name, "--out", str(tmp_path)]
    own = {"GSFORGET_KERNELS": backend} | ({"TRITON_INTERPRET": "1"} if backend == "interpret" else {})
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, env=os.environ | own, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = cells_of(tmp_path, name)
    assert found
    assert all(c.get("passed", True) for c in found.values())
    if name == "forget":
        for way in ("ours", "ours_bfloat16", "unfused"):
            assert found[f"erase/{way}"]["warm"]["forget_acc_after"] <= 1
            assert found[f"erase/{way}"]["warm"]["seconds"]["total"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_the_compiled_rival_computes_the_same(mode):
    ways = gpu.gpu_kernels.ffn_ways
    p = ways.make_problem(32, 64, 2, 9, 4, gpu.Setting("cpu", "float32", True).dtype, "cpu")
    assert ways.off(ways.peft(p, mode)(), ways.truth(p)) < 1e-5
