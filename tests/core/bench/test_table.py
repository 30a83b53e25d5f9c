"""The table of a bench from cells that are made up."""

import csv
import io

import pytest

from gsforget.bench import figure, table
from gsforget.bench.table import Spread


def cell(h, excess=0.1, verdict="pass", checks=(), **more):
    figures = {"forget_acc_after": 0.0, "old_acc_after": None, "retain_acc_after": 80.0, "missing_acc_after": None}
    attacks = {"linear_probe_excess": excess, "prototype_attack": 5.0, "mia_auc": 0.5, "relearn_steps": None}
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
