"""`gsforget bench` as typed: one document, a table for people, and one sentence for what does not fit."""

import pytest


@pytest.fixture
def typed(cli, world, tmp_path):
    def run(*more, model=None):
        given = ["--model", model or world.model, "--data", world.data, "--seeds", 1, "--trials", 1, "--epochs", 1]
        return cli(tmp_path, "bench", *given, *more)

    return run


def test_a_bench_gives_a_table_and_one_document(typed, tmp_path):
    found = typed("--methods", "head-mask", "--protocol", "4-1")
    assert found.status == 0, found.err
    (row,) = found.document["rows"]
    assert (row["method"], row["control"], row["verdict"]) == ("head-mask", "negative", "inconclusive")
    assert found.document["artifacts"] == [f"bench/bench.{end}" for end in ("json", "md", "csv", "png")]
    assert "head-mask (negative control)" in found.err
    assert "--reference" in found.err, "an inconclusive audit says what it lacks"
    again = typed("--methods", "head-mask", "--protocol", "4-1")
    assert again.document["rows"] == found.document["rows"]


def test_the_list_names_methods_and_recipes(cli, tmp_path):
    found = cli(tmp_path, "bench", "--list")
    assert found.status == 0
    names = [m["name"] for m in found.document["methods"]]
    assert {"gs-lora++", "gs-lora", "published-gs-lora++", "head-mask"} <= set(names)
    recipes = {r["name"]: r for r in found.document["recipes"]}
    assert recipes["imagenet100-sequence"]["published"]["FG-OrIU"] == [87.01, 88.45, 88.9, 89.15]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ([], "usage", "--methods and --protocol"),
        (["--methods", "hed-mask", "--protocol", "4-1"], "unknown_method", "head-mask"),
        (["--methods", "none.py", "--protocol", "4-1"], "unknown_method", "no file none.py"),
        (["--methods", "head-mask", "--protocol", "100-20"], "unknown_protocol", "4 classes"),
        (["--methods", "head-mask", "--protocol", "casia-5"], "unknown_protocol", "casia100-5"),
        (["--methods", "head-mask", "--protocol", "4-1", "--reference", "nowhere"], "no_model", "nowhere"),
        (["--methods", "head-mask", "--protocol", "4-1", "--checkpoint", "x.pth"], "two_sources", "own weights"),
        (["--methods", "head-mask", "--protocol", "4-1", "--model-kwargs", "depth=2"], "two_sources", "own weights"),
        (["--methods", "head-mask", "--protocol", "4-1", "--task", "face"], "other_task", "--task classify"),
    ],
)
def test_bad_input(typed, options, kind, says):
    found = typed(*options)
    assert found.status == 2
    assert found.document["error"]["kind"] == kind
    assert says in found.document["error"]["message"] + found.document["error"]["hint"]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ([], "no_model", "--checkpoint FILE"),
        (["--checkpoint", "none.pth"], "no_checkpoint", "none.pth"),
        (["--checkpoint", "weights.pth"], "not_published_layout", "Face Transformer"),
        (["--checkpoint", "weights.pth", "--task", "detect"], "not_a_classifier", "detect"),
    ],
)
def test_a_model_by_its_name(typed, tmp_path, options, kind, says):
    import torch

    torch.save({"head.weight": torch.zeros(4, 8)}, tmp_path / "weights.pth")
    task = [] if "--task" in options else ["--task", "face"]
    given = ["--methods", "gs-lora", "--protocol", "4-1", *task, *options]
    found = typed(*given, model="face-transformer")
    assert found.status == 2
    assert found.document["error"]["kind"] == kind, found.document
    assert says in found.document["error"]["message"] + found.document["error"]["hint"]


def test_a_model_from_which_classes_were_forgotten_is_no_start(typed, first_run):
    cwd, _ = first_run
    found = typed("--methods", "head-mask", "--protocol", "4-1", model=cwd / "runs" / "forget-0001")
    assert found.document["error"]["kind"] == "not_the_original"
