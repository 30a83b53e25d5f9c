"""The table of a bench from cells that are made up."""

import csv
import io

import pytest

from gsforget.bench import figure, table
from gsforget.bench.table import Spread


def cell(h, excess=0.1, verdict="pass", checks=(), **more):
    figures = {"forget_acc_after": 0.0, "old_acc_after": None, "retain_acc_after": 80.0, "missing_acc_after": None}
    attacks = {
        "linear_probe": 60.0,
        "linear_probe_excess": excess,
        "prototype_attack": 5.0,
        "mia_auc": 0.5,
        "relearn_steps": None,
    }
    cost = {"seconds": 2.0, "changed_parameters": 5, "parameters": 50, "control": "", "settings": {}}
    return {"h_mean": h, **figures, **attacks, **cost, "verdict": verdict, "failed_checks": list(checks), **more}


@pytest.fixture
def content():
    cells = {
        "scrub/0/0": cell(70.0),
        "scrub/0/1": cell(72.0, excess=0.4, verdict="fail", checks=["linear_probe_excess"]),
        "scrub/1/0": cell(74.0),
        "scrub/1/1": cell(76.0),
        "gs-lora++/0/0": cell(80.0),
        "gs-lora++/0/1": cell(81.0, old_acc_after=0.5),
        "gs-lora++/1/0": cell(82.0),
        "gs-lora++/1/1": cell(83.0, old_acc_after=0.0),
        "head-mask/0/0": cell(90.0, control="negative", verdict="fail"),
        "mine/0/0": {"failed": "leaves numbers that are none", "kind": "nan_weights"},
    }
    setting = {"requests": [["a"], ["b"]], "protocol": "3-1", "trials": 4, "epochs": 20}
    return {"setting": setting, "machine": {}, "cells": cells}


def test_rows_hold_medians_and_worst_requests(content):
    found = {row.method: row for row in table.rows(content)}
    assert [row.method for row in table.rows(content)] == ["gs-lora++", "scrub", "mine", "head-mask"]
    scrub = found["scrub"]
    assert scrub.h == [Spread(72.0, 70.0, 74.0), Spread(74.0, 72.0, 76.0)]
    assert scrub.worst["linear_probe_excess"] == Spread(0.25, 0.1, 0.4)
    assert (scrub.verdict, scrub.checks, scrub.seeds) == ("fail", ["linear_probe_excess"], 2)
    assert scrub.seconds == Spread(4.0, 4.0, 4.0)
    assert scrub.changed == pytest.approx(0.1)
    assert found["gs-lora++"].verdict == "pass"
    assert found["gs-lora++"].worst["old_acc_after"] == Spread(0.25, 0.0, 0.5)
    assert found["mine"].verdict == "failed"
    assert found["head-mask"].verdict == "unfinished"


def test_markdown_shows_what_failed_and_leaves_out_empty_columns(content):
    text = table.markdown(content)
    assert "| scrub | 72.0 (70.0 to 74.0) | 74.0 (72.0 to 76.0) |" in text
    assert "head-mask (negative control)" in text
    assert "relearn steps" not in text
    assert "- mine: seed 0, request 1: leaves numbers that are none" in text


def test_csv_has_a_line_per_cell(content):
    lines = list(csv.DictReader(io.StringIO(table.to_csv(content))))
    assert len(lines) == len(content["cells"])
    mine = next(line for line in lines if line["method"] == "mine")
    assert mine["failed"] == "leaves numbers that are none"
    worst = next(line for line in lines if (line["method"], line["seed"], line["request"]) == ("scrub", "0", "2"))
    assert (worst["h_mean"], worst["failed_checks"]) == ("72.0", "linear_probe_excess")


def test_the_figure_is_drawn(content, tmp_path):
    figure.draw(content, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def with_room(content, *rooms):
    probes = {f"original/{n}": {"linear_probe": 90.0 + room} for n, room in enumerate(rooms)}
    never = {f"never-seen/{n}": {"linear_probe": 90.0} for n in range(len(rooms))}
    return {**content, "references": {**probes, **never}}


def test_a_request_whose_probes_lie_too_near_has_no_excess(content):
    found = {row.method: row for row in table.rows(with_room(content, 5.0, 3.9))}
    assert found["scrub"].worst["linear_probe_excess"] == Spread(0.1, 0.1, 0.1)  # 0.4 was of the second request
    assert table.without_room(with_room(content, 5.0, 4.0)) == set()


def test_where_no_request_has_room_the_probe_itself_is_shown(content, tmp_path):
    nowhere = with_room(content, 3.0, -1.0)
    assert "probe" in table.headings(nowhere)
    assert "probe excess" not in table.headings(nowhere)
    assert {row.method: row for row in table.rows(nowhere)}["scrub"].worst["linear_probe"] == Spread(60.0, 60.0, 60.0)
    assert "| 60.0 |" in table.markdown(nowhere)
    figure.draw(nowhere, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize("leak", [{}, {"linear_probe": None}])
def test_references_without_a_probe_leave_the_columns_as_they_are(content, leak):
    content["references"] = {"original/0": leak, "never-seen/0": leak}
    assert table.without_room(content) == set()
