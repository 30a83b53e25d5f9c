"""The report: every part measured or said to be missing, nothing of the data or the machine in it, nothing that runs."""

import base64
import copy
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from gsforget.errors import RequestError, SafetyError
from gsforget.report import Example, read_history, write_report
from gsforget.report.charts import Series, lines, ticks
from gsforget.report.markup import Html, listed, number, tag
from gsforget.report.privacy import shorten, shorten_path
from gsforget.report.tables import direction
from gsforget.report.verdict import headline, strand_of, strands

SECRET = "zebrafish"
OLD = "wombat"


def accuracy(right: int, count: int = 20) -> dict:
    return {"acc": 100 * right / count, "right": right, "count": count, "low": 0.0, "high": 16.1}


def check(name: str, verdict: str = "pass", **more) -> dict:
    values = {"value": 1.5, "original": 90.0, "reference": 2.5, "threshold": 3.0, "unit": "%", "says": f"About {name}."}
    return {"name": name, "verdict": verdict, **values, **more}


def document() -> dict:
    steps = [0, 10, 20]
    return {
        "gsforget": "0.1.0",
        "tier": "full",
        "kind": "run",
        "subject": "/home/alice/secret project/runs/forget-0002",
        "original": "/home/alice/secret project/model",
        "reference": {"kind": "model", "path": "/home/alice/secret project/without"},
        "time": "2026-01-06T09:30:00Z",
        "sha256": {"model": "a1" * 32, "original": "b2" * 32},
        "sequence": 2,
        "data": {"root": "/home/alice/data/animals", "train_sha256": "c3" * 32, "test_sha256": "d4" * 32},
        "seed": 7,
        "seconds": 12.34,
        "versions": {"torch": "2.11.0"},
        "device": "cpu",
        "classes": [
            {"index": 0, "name": "ant", "role": "retain", "before": accuracy(20), "after": accuracy(19)},
            {"index": 1, "name": SECRET, "role": "forget", "before": accuracy(18), "after": accuracy(0)},
            {"index": 2, "name": OLD, "role": "old", "before": accuracy(17), "after": accuracy(1)},
        ],
        "audited": [1],
        "checks": [
            check("forget_acc", says=f"The model names 0 of the images of {SECRET} rightly."),
            check("prototype_attack"),
            check("linear_probe_excess", unit="ratio"),
            check("relearn_full", unit="steps", value=40, threshold=35.0, reference=70, original=0),
            check("mia_auc", unit="auc", value=0.52),
            check("class_drop", unit="points"),
        ],
        "details": {
            "misattribution": [{"class": "ant", "share": 5.0, "mean_probability": 0.7}],
            "rank_of_truth": {"original": 1.0, "after": 3.0},
            "relearning": {
                "full": {"steps": steps, "subject": [0, 20, 60], "original": [90], "reference": [0, 10, None]}
            },
            "cka": [
                {"block": "blocks.0", "forget": 1.0, "retain": 1.0},
                {"block": "blocks.1", "forget": 0.4, "retain": 0.9},
            ],
            "interpolation": [{"t": 0.0, "forget": 90, "retain": 95}, {"t": 1.0, "forget": 0, "retain": 94}],
            "neighbours": [{"class": "ant", "drop": 5.0}],
            "changed": {"blocks": ["blocks.1.mlp"], "of_blocks": 2, "identical": 18, "total": 20},
            "membership": {"after": {"tpr": 0.034}, "original": {"tpr": 0.21}, "reference": None},
            "feature_map": {
                "before": {"forget": [[0, 1]], "retain": [[2, 3], [4, 5]]},
                "after": {"forget": [[1, 1]], "retain": [[2, 3], [4, 5]]},
            },
        },
        "not_tested": [f"{OLD}: the cache in /home/alice/cache/features was not looked at"],
        "verdict": "pass",
    }


def past() -> list[dict]:
    groups = [{"name": f"blocks.{i}.mlp", "active": i == 1, "norm": 0.75 if i == 1 else 0.0} for i in range(2)]
    request = {"method": "gs-lora", "when": "2026-01-05T10:00:00Z", "groups": groups, "seed": 3}
    request |= {"metrics": {"forget_acc_after": 0.0, "retain_acc_after": 95.0}, "sha256": {"model": "e5" * 32}}
    request |= {"versions": {"torch": "2.11.0"}, "chosen": {"bnd": 3.25}, "gates": []}
    return [
        {**request, "sequence": 1, "classes": ["forgotten-2"], "note": "Only its line in the ledger is known."},
        {**request, "sequence": 2, "classes": ["forgotten-1"]},
    ]


class Page(HTMLParser):
    """Tags with their attributes, and the text between them; every tag that opens must close."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, name, attrs):
        self.tags.append((name, dict(attrs)))
        if name not in ("meta", "img", "br", "hr"):
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.tags.append((name, dict(attrs)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def write(tmp_path):
    def made(audit=None, history=None, examples=None) -> str:
        path = tmp_path / "report.html"
        write_report(path, document() if audit is None else audit, past() if history is None else history, examples)
        return path.read_text(encoding="utf-8")

    return made


def png(colour=(200, 30, 30), **options) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(target, options.pop("format", "PNG"), **options)
    return target.getvalue()


def test_all_parts_in_order(write):
    page = Page(write())
    ids = [a["id"] for name, a in page.tags if name == "h2" and "id" in a]
    assert ids == [
        "verdict",
        "before-and-after",
        "checks",
        "requests",
        "features",
        "relearning",
        "layers",
        "interpolation",
        "misattribution",
        "not-tested",
        "threats",
        "provenance",
        "glossary",
    ]
    for words in ("a1a1a1", "b2b2b2", "c3c3c3", "e5e5e5", "2.11.0", "0.75", "12.3 s", "3.25", "About class_drop."):
        assert words in page.text
    assert "not measured by" not in page.text
    assert "It names 0 of 20 test images of these classes rightly (before: 18)." in page.text
    assert "every check of the full audit passed" in page.text
    assert "Only its line in the ledger is known." in page.text


def test_when_and_against_what_it_was_measured(write):
    text = Page(write()).text
    assert "full audit of 2026-01-06" in text
    assert "2026-01-06 09:30:00" in text
    assert "…/without, trained without the classes" in text
    audit = document() | {"reference": {"kind": "classes", "classes": ["owl", "elk"], "path": "model"}}
    assert "the classes owl and elk, as model sees them" in Page(write(audit)).text


def test_figures_before_have_their_intervals_and_changes_their_sign(write):
    audit = document()
    audit["classes"][0]["before"] |= {"low": 83.9, "high": 100.0}
    text = Page(write(audit)).text
    assert "83.9 to 100.0" in text
    assert "69.9 to 97.2" in text  # Wilson's of 18 of 20, all forgotten classes together
    assert "−5.0 points" in text  # the neighbour's drop of 5 points
    assert "Training images told apart at 1 % false alarms 3.4 % 21.0 % –" in text
    assert "1 block of 2 changed (blocks.1); 18 of 20 tensors" in text
    assert "Of classes forgotten earlier: 1 of 20." in text


def test_a_request_is_known_by_its_id_and_not_by_who_asked(first_run, write, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(first_run[0] / "runs" / "forget-0001", run)
    request = json.loads((run / "request.json").read_text())
    asked = {"id": "2026-017", "date": "2026-01-02", "basis": "Art. 17", "requester": "Alice Example"}
    (run / "request.json").write_text(json.dumps(request | {"request": asked}))
    text = Page(write(history=read_history(run))).text
    for words in ("Request 1 came as 2026-017.", "2026-01-02", "Art. 17"):
        assert words in text
    assert "Alice" not in text


def test_the_word_is_evidence(write):
    html = write()
    assert "vidence" in html
    assert "certificate" not in html.lower()
    assert "not a proof of deletion" in html


def test_it_stands_alone_and_runs_nothing(write):
    html = write(examples=[Example(png(), "forget", SECRET, 0.9, "ant", 0.4)])
    page = Page(html)
    assert {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"} == set()
    for _, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on")]
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?:", html)
    policy = next(a["content"] for name, a in page.tags if name == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_no_erased_name_and_no_place_of_the_machine(write):
    examples = [Example(png(), "old", OLD, 0.9, "ant", None)]
    for html in (write(), write(examples=examples)):
        assert SECRET not in html
        assert OLD not in html
        assert "alice" not in html
        assert "secret project" not in html
    assert "forgotten-1 rightly" in html
    assert "forgotten-2: the cache in …/features was not looked at" in html
    assert "…/forget-0002" in html


def test_no_image_of_the_data_unless_given(write):
    assert "<img" not in write()
    assert "data:image" not in write()
    page = Page(write(examples=[Example(png(), "forget", SECRET, 0.93, "ant", 0.41)]))
    (image,) = [a for name, a in page.tags if name == "img"]
    assert image["alt"]
    for words in ("forgotten-1", "93 %", "41 %", "Forgotten in this request"):
        assert words in page.text


def test_images_are_written_anew_without_what_the_camera_noted(write, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    path = tmp_path / "photo.jpg"
    path.write_bytes(png(format="JPEG", exif=exif.tobytes()))
    assert b"taken at home" in path.read_bytes()
    html = write(examples=[Example(path, "retain", "ant", 0.5, "ant", 0.5)])
    raw = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])
    assert b"taken at home" not in raw
    with Image.open(io.BytesIO(raw)) as small:
        assert max(small.size) == 160
        assert not small.getexif()
    assert "photo.jpg" not in html


def test_an_example_that_is_no_image_is_said(write, tmp_path):
    with pytest.raises(RequestError) as caught:
        write(examples=[Example(b"no image", "retain", "ant", 0.5, "ant", 0.5)])
    assert caught.value.kind == "bad_image"
    assert not (tmp_path / "report.html").exists()


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def hostile(value, key=""):
    """The document with every text replaced, except where a word decides what is shown."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    return HOSTILE if isinstance(value, str) and key != "role" else value


def test_nothing_in_the_documents_becomes_markup(write):
    page = Page(write(hostile(document()), hostile(past()), [Example(png(), "retain", HOSTILE, 0.5, HOSTILE, 0.5)]))
    assert "script" not in {name for name, _ in page.tags}
    assert len([1 for name, _ in page.tags if name == "img"]) == 1
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "<script>alert(1)</script>" in page.text


def test_style_cannot_be_left_by_a_number(write):
    history = past()
    history[0]["groups"][1]["norm"] = "1;background:url(x)"
    assert "url(" not in write(history=history)


@pytest.mark.parametrize("tier", ["quick", "standard", "full"])
def test_what_is_missing_is_said_with_its_reason(write, tier):
    audit = {"tier": tier, "kind": "model", "verdict": "inconclusive", "not_tested": ["features: no reference"]}
    page = Page(write(audit, []))
    for words in ("No check was made", "Relearning was not measured", "Nothing is on record", "features: no reference"):
        assert words in page.text
    assert ("gsforget audit --tier standard measures it" in page.text) == (tier == "quick")
    assert "nan" not in page.text.lower()
    assert "None" not in page.text


def test_a_file_is_not_promised_what_only_weights_can_show(write):
    audit = {"tier": "quick", "kind": "onnx", "verdict": "inconclusive", "sequence": 0}
    text = Page(write(audit, [])).text
    assert "--tier" not in text
    assert "audit the run folder for it" in text
    assert "0 requests" not in text


@pytest.mark.parametrize("path", sorted(document()) + [f"details.{k}" for k in sorted(document()["details"])])
@pytest.mark.parametrize("absent", [None, "gone"])
def test_any_field_may_be_null_or_absent(write, path, absent):
    audit = document()
    place = audit["details"] if "." in path else audit
    key = path.rpartition(".")[2]
    if absent is None:
        place[key] = None
    else:
        del place[key]
    Page(write(audit))


def test_null_figures_everywhere(write):
    audit = document()
    for entry in audit["classes"]:
        entry["before"] = None
    for entry in audit["checks"]:
        entry.update(value=None, original=None, reference=None, threshold=None, verdict="inconclusive", says=None)
    page = Page(write({**audit, "verdict": "inconclusive"}))
    assert "It names 0 of 20 test images of these classes rightly." in page.text
    assert "unknown. 2 of 2 checks could not be concluded" in page.text


def test_arguments_are_not_changed(write):
    audit, history = document(), past()
    kept = copy.deepcopy((audit, history))
    write(audit, history)
    assert (audit, history) == kept


def test_the_same_facts_give_the_same_page(write):
    assert write() == write()


def test_many_classes_move_to_the_end(write):
    audit = document()
    audit["classes"] += [
        {"index": i, "name": f"thing {i}", "role": "retain", "before": accuracy(20), "after": accuracy(20 - i % 7)}
        for i in range(3, 60)
    ]
    page = Page(write(audit))
    ids = [a["id"] for name, a in page.tags if name == "h2" and "id" in a]
    assert ids.index("every-class") > ids.index("provenance")
    assert "Retained classes that lost most (10 of " in page.text


def test_pictures_and_tables_can_be_read_aloud(write):
    page = Page(write())
    charts = [a for name, a in page.tags if name == "svg" and a.get("role") == "img"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert len(charts) == 5
    for chart in charts:
        assert set(chart["aria-labelledby"].split()) <= ids
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for name, a in page.tags if name == "svg")
    listed_ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(listed_ids) == len(set(listed_ids))
    assert all("scope" in a for name, a in page.tags if name == "th")
    names = [name for name, _ in page.tags]
    assert names.count("caption") == names.count("table")


@pytest.mark.parametrize(
    ("name", "strand"),
    [
        ("forget_acc", "answers"),
        ("forget_train_acc", "answers"),
        ("old_acc", "answers"),
        ("retain_drop", "kept"),
        ("class_drop", "kept"),
        ("prototype_attack", "features"),
        ("five_shot", "features"),
        ("linear_probe_excess", "features"),
        ("nearest_class_mean", "features"),
        ("mia_auc", "membership"),
        ("relearn_head", "recovery"),
        ("relearn_full", "recovery"),
        ("relearn_retain", "recovery"),
        ("something_new", "other"),
    ],
)
def test_each_check_answers_one_question(name, strand):
    assert strand_of(name) == strand


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        (["forget_acc", "linear_probe_excess"], "still recognises"),
        (["linear_probe_excess"], "Gone from the answers, but not from the features"),
        (["relearn_full"], "too easily learned again"),
        (["mia_auc"], "trained on"),
        (["class_drop"], "lost more of the rest"),
    ],
)
def test_the_headline_names_the_worst(write, failed, words):
    audit = document()
    audit["verdict"] = "fail"
    for entry in audit["checks"]:
        entry["verdict"] = "fail" if entry["name"] in failed else "pass"
    assert words in headline(audit, strands(audit))
    assert words in Page(write(audit)).text


def test_a_pass_without_features_does_not_say_more_than_was_measured(write):
    audit = document()
    audit["checks"] = [c for c in audit["checks"] if c["name"] == "forget_acc"]
    text = Page(write(audit)).text
    assert "Gone from the answers; whether it is gone from the features was not measured" in text
    assert "supports forgetting" not in text


def test_verdicts_are_words_and_not_colour_alone(write):
    audit = document()
    audit["checks"] = [check(v, v) for v in ("pass", "fail", "inconclusive")]
    page = Page(write({**audit, "verdict": "fail"}))
    for words in ("✓ pass", "✕ fail", "? inconclusive"):
        assert words in page.text


def test_limits_say_their_direction():
    assert direction(check("relearn_full", unit="steps")) == "at least"
    assert direction(check("relearn_retain")) == "at most"
    assert direction(check("prototype_attack")) == "at most"


def test_numbers():
    assert number(12.345, "%") == "12.3 %"
    assert number(-0.5, "points") == "−0.5 points"
    assert number(-0.01, "points") == "0.0 points"
    assert number(7.5, "steps") == "7.5 steps"
    assert number(70.0, "steps") == "70 steps"
    assert number(0.123, "auc") == "0.12"
    assert [number(v, "%") for v in (None, float("nan"), float("inf"), True, "1")] == ["–"] * 5
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
    assert tag("p", "<b>", Html("<i>x</i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i>x</i></p>'


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 12, [0, 2.5, 5, 7.5, 10]),
        (-20, 100, [0, 25, 50, 75, 100]),
        (3, 3, [3]),
    ],
)
def test_ticks(low, high, wanted):
    assert ticks(low, high) == wanted


def test_a_line_chart_is_to_scale_and_leaves_gaps_out():
    svg = lines("t", "d", "x", "y", [Series("a", [0, 5, 10], [0, None, 100], "subject")])
    x0, y0, x1, y1 = map(float, re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg).groups())
    assert (x0, x1) == (46, 446)
    assert (y0, y1) == (220, 12)
    assert svg.count("<circle") == 3  # two points, and the legend
    assert "nan" not in lines("t", "d", "x", "y", [Series("a", [0], [1.0], "subject")])
    assert "polyline" not in lines("t", "d", "x", "y", [])


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shorten_path(str(tmp_path / "runs" / "forget-0001")) == "runs/forget-0001"
    assert shorten_path("runs/forget-0001") == "runs/forget-0001"
    assert shorten_path("/home/bob/a b/model.onnx") == "…/model.onnx"
    assert shorten_path("C:\\Users\\bob\\model.onnx") == "…/model.onnx"
    assert shorten_path("~/data") == "…/data"
    assert shorten_path("../bob/data") == "…/data"
    assert shorten_path(None) is None
    assert shorten(f"see {tmp_path}/runs/x and /home/bob/y.") == "see runs/x and …/y."
    assert shorten("C:\\Users\\bob\\z") == "…/z"
    assert shorten("and/or, 3/4, a / b, blocks.0/mlp") == "and/or, 3/4, a / b, blocks.0/mlp"


def test_history_of_a_real_run(first_run, tmp_path):
    run = first_run[0] / "runs" / "forget-0001"
    (request,) = read_history(run)
    assert (request["sequence"], request["classes"], request["note"]) == (1, ["forgotten-1"], None)
    assert len(request["groups"]) == 4
    assert request["metrics"]["retain_acc_after"] > 50
    assert request["seed"] == 0
    assert request["when"].endswith("Z")
    assert {"base", "model", "delta"} <= request["sha256"].keys()
    assert not re.search(r"(?<![0-9a-f])bee(?![0-9a-f])", json.dumps(request))  # but a hash may hold these digits
    write_report(tmp_path / "report.html", {**document(), "classes": []}, [request])
    assert "Request 1" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_history_without_its_folders(first_run, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    for name in ("ledger.jsonl", "request.json", "config.json"):
        (run / name).write_bytes((first_run[0] / "runs" / "forget-0001" / name).read_bytes())
    (request,) = read_history(run)
    assert "metrics.json" in request["note"]
    assert request["metrics"]["forget_acc_after"] is not None
    (run / "request.json").unlink()
    assert read_history(run)[0]["classes"] == ["forgotten-1"]
    (run / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(SafetyError):
        read_history(run)
    assert read_history(tmp_path) == []
