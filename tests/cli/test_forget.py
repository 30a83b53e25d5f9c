"""`gsforget forget` as a person types it: what it answers, what it writes, and what it leaves alone."""

import hashlib
import json
import shutil

import pytest

FIELDS = {
    "sequence": int,
    "classes": [str],
    "forgotten_again": [str],
    "method": str,
    "seed": int,
    "device": str,
    "verdict": str,
    "metrics": {
        "forget_acc_before": float,
        "forget_acc_after": float,
        "retain_acc_before": float,
        "retain_acc_after": float,
        "old_acc_after": (float, type(None)),
        "h_mean": float,
    },
    "groups": {"total": int, "active": [int]},
    "changed_tensors": [str],
    "seconds": {"total": float, "train": float, "audit": float},
    "audit": {"linear_probe": float, "linear_probe_excess": type(None), "prototype_attack": float, "mia_auc": float},
    "not_tested": [str],
    "warnings": [str],
    "artifacts": dict,
    "sha256": dict,
    # Beyond the design's list: which promise was judged how.
    "gates": [dict],
}
RUN_FILES = [
    "artifacts",
    "audit",
    "audit/groups.png",
    "config.json",
    "delta.safetensors",
    "ledger.jsonl",
    "metrics.json",
    "model.safetensors",
    "request.json",
]
FEED_FORWARD = tuple(f"blocks.{b}.mlp.fc{i}.weight" for b in range(4) for i in (1, 2))
QUICK = ("--epochs", "1", "--lr", "0.01", "--rank", "2", "--prox", "0.001", "--target-groups", "1", "--bnd", "3")


def check_shape(value, shape, where="document"):
    if isinstance(shape, dict):
        assert set(value) == set(shape), where
        for key, inner in shape.items():
            check_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for entry in value:
            check_shape(entry, shape[0], f"{where}[]")
    else:
        assert isinstance(value, shape), f"{where} is {value!r}"
        assert not (shape is int and isinstance(value, bool)), where


def tensors(path):
    """SHA-256 of each tensor of a safetensors file, with its type and shape."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {n: (str(a.dtype), a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for n, a in arrays.items()}


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def second_run(world, first_run, cli, tmp_path_factory):
    """Forget `cat` from the first run, typed in a copy of its folder."""
    cwd = tmp_path_factory.mktemp("second")
    shutil.copytree(first_run[0] / "runs", cwd / "runs")
    return cwd, cli(cwd, "forget", "--model", "runs/forget-0001", "--data", world.data, "--classes", "cat")


def test_the_document_is_the_design_s(first_run):
    _, result = first_run
    assert result.status == 0, result.err
    check_shape(result.document, FIELDS)
    assert result.document["verdict"] == "pass"
    assert result.document["sequence"] == 1
    assert result.document["classes"] == ["bee"]
    assert result.document["method"] in ("gs-lora", "gs-lora++")
    assert result.document["metrics"]["old_acc_after"] is None
    assert result.document["metrics"]["forget_acc_before"] > 95
    assert result.document["metrics"]["forget_acc_after"] <= 1
    assert result.document["metrics"]["retain_acc_after"] >= result.document["metrics"]["retain_acc_before"] - 1
    assert all(0 <= v <= 100 for v in result.document["metrics"].values() if v is not None)
    assert result.document["groups"]["total"] == 4
    assert 1 <= len(result.document["groups"]["active"]) <= 2
    assert result.document["not_tested"]
    assert "gsforget export runs/forget-0001 --onnx" in result.err


def test_the_run_folder_is_complete(first_run):
    cwd, result = first_run
    assert listing(cwd) == sorted(["runs", "runs/forget-0001", *(f"runs/forget-0001/{f}" for f in RUN_FILES)])
    run = cwd / "runs" / "forget-0001"
    assert result.document["artifacts"] == {"model": "runs/forget-0001/model.safetensors"}
    assert result.document["sha256"] == {"model": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()}
    config = json.loads((run / "config.json").read_text())
    assert config["class_names"] == ["ant", "forgotten-1", "cat", "dog"]
    assert config["forgotten"] == [1]
    assert config["sequence"] == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"before", "after", "role", "name", "index"} == set(metrics["classes"][0])
    assert {"acc", "right", "count", "low", "high"} == set(metrics["classes"][1]["after"])
    assert [entry["sequence"] for entry in lines(run / "ledger.jsonl")] == [1]
    assert "bee" not in (run / "config.json").read_text()


def test_only_feed_forward_weights_of_active_groups_change(world, first_run):
    cwd, result = first_run
    before, after = tensors(world.model / "model.safetensors"), tensors(cwd / "runs/forget-0001/model.safetensors")
    changed = [name for name in before if before[name] != after[name]]
    assert list(before) == list(after)
    assert sorted(changed) == sorted(result.document["changed_tensors"])
    assert set(changed) <= set(FEED_FORWARD)
    assert {int(name.split(".")[1]) for name in changed} == set(result.document["groups"]["active"])
    assert before["head.weight"] == after["head.weight"]
    assert before["head.bias"] == after["head.bias"]
    recorded = json.loads((cwd / "runs/forget-0001/metrics.json").read_text())["tensors"]
    assert recorded["identical"] == len(before) - len(changed)


def test_the_second_erasure_continues_the_chain(second_run, first_run):
    cwd, result = second_run
    assert result.status == 0, result.err
    assert result.document["artifacts"] == {"model": "runs/forget-0002/model.safetensors"}
    assert result.document["sequence"] == 2
    assert result.document["classes"] == ["cat"]
    assert result.document["metrics"]["old_acc_after"] <= 1
    assert isinstance(result.document["metrics"]["old_acc_after"], float)
    run = cwd / "runs/forget-0002"
    config = json.loads((run / "config.json").read_text())
    assert config["class_names"] == ["ant", "forgotten-1", "forgotten-2", "dog"]
    assert config["forgotten"] == [1, 2]
    first, second = lines(run / "ledger.jsonl")
    assert first == lines(cwd / "runs/forget-0001/ledger.jsonl")[0]
    assert second["base"] == first["model"]
    assert second["previous"] == hashlib.sha256((run / "ledger.jsonl").read_bytes().splitlines()[0]).hexdigest()
    assert contents(cwd / "runs/forget-0001") == contents(first_run[0] / "runs/forget-0001")


@pytest.mark.parametrize("run", ["forget-0001", "forget-0002"])
def test_infer_never_returns_a_forgotten_class(world, second_run, cli, run):
    cwd, _ = second_run
    found = cli(cwd, "infer", f"runs/{run}", world.data / "test")
    assert found.status == 0, found.err
    names = {guess["class"] for image in found.document["images"] for guess in image["top"]}
    assert names == ({"ant", "cat", "dog"} if run == "forget-0001" else {"ant", "dog"})
    assert len(found.document["images"]) == 80
    ants = [i for i in found.document["images"] if "/ant/" in i["path"]]
    assert sum(i["top"][0]["class"] == "ant" for i in ants) >= 19


def test_verify_and_history_accept_the_chain(second_run, cli):
    cwd, _ = second_run
    assert cli(cwd, "verify").status == 0
    assert cli(cwd, "history").status == 0


def test_the_same_seed_gives_the_same_weights_whatever_the_order_of_files(world, first_run, cli, tmp_path):
    """Also: a class by its index, an --out whose parents are absent, a folder named val, and a copied model."""
    data = tmp_path / "elsewhere"
    for split, name in (("train", "train"), ("test", "val")):
        for path in sorted((world.data / split).rglob("*.png"), reverse=True):
            there = data / name / path.parent.name / path.name
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    shutil.copytree(world.model, tmp_path / "model")
    before = contents(tmp_path / "model")
    result = cli(
        tmp_path, "forget", "--model", "model", "--data", data, "--classes", "1", "--out", "some/where/run"
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.document["classes"] == ["bee"]
    assert result.document["artifacts"] == {"model": "some/where/run/model.safetensors"}
    assert listing(tmp_path / "some/where/run") == RUN_FILES
    assert listing(tmp_path / "some/where") == sorted(["run", *(f"run/{f}" for f in RUN_FILES)])
    assert not (tmp_path / "runs").exists()
    assert result.document["sha256"] == first_run[1].document["sha256"]
    assert contents(tmp_path / "model") == before


def test_a_checkpoint_gives_what_the_model_folder_gives(world, first_run, cli, tmp_path):
    """A wrapped torch file with `module.` prefixes; classes from a file with blank lines and a byte-order mark."""
    (tmp_path / "wanted.txt").write_bytes("\ufeffbee\r\n\r\n".encode())
    result = cli(
        tmp_path, "forget", "--model", world.architecture, "--checkpoint", world.pt, "--model-kwargs", world.model_kwargs,
        "--data", world.data, "--classes-file", "wanted.txt", "--mean", "0.5", "--std", "0.5,0.5,0.5", "--crop-pct", "1",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.document["sha256"] == first_run[1].document["sha256"]
    config = json.loads((tmp_path / "runs/forget-0001/config.json").read_text())
    assert config["class_names"] == ["ant", "forgotten-1", "cat", "dog"]
    assert config["input_size"] == [3, 16, 16]
    assert config["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("shots", [4, 1])
def test_few_shots(world, cli, tmp_path, shots):
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "dog,bee", "--shots", shots
    )
    assert result.status == 0, result.err
    assert result.document["classes"] == ["bee", "dog"]
    request = json.loads((tmp_path / "runs/forget-0001/request.json").read_text())
    assert request["shots"] == shots
    metrics = json.loads((tmp_path / "runs/forget-0001/metrics.json").read_text())
    assert bool(metrics["validation"]) == (shots >= 3), "below three images per class there is no validation part"


def test_numbers_by_flags_are_kept(world, cli, tmp_path):
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "bee", *QUICK,
        "--seed", "7", "--max-forget-acc", "100", "--max-retain-drop", "100", "--max-class-drop", "100",
    )  # fmt: skip
    assert result.status == 0, result.err
    request = json.loads((tmp_path / "runs/forget-0001/request.json").read_text())
    settings = request["settings"]
    asked = {"epochs": 1, "lr": 0.01, "rank": 2, "prox": 0.001, "target_groups": 1, "bnd": 3, "seed": 7}
    assert {k: settings[k] for k in asked} == asked
    assert request["thresholds"] == {
        "max_forget_acc": 100,
        "max_retain_drop": 100,
        "max_class_drop": 100,
        "max_probe_excess": None,
    }
    assert request["chosen"]["bnd"] == 3
    assert request["chosen"]["target_groups"] == 1
    assert request["chosen"]["prox_first"] == request["chosen"]["prox_last"] == 0.001
    assert result.document["seed"] == 7
    from safetensors import safe_open

    with safe_open(tmp_path / "runs/forget-0001/delta.safetensors", "np") as delta:
        assert {min(delta.get_tensor(n).shape) for n in delta.keys() if delta.get_tensor(n).ndim == 2} == {2}  # noqa: SIM118


@pytest.mark.parametrize("gate", ["--max-retain-drop=-100", "--max-forget-acc=-1"])
def test_a_breached_gate_publishes_reports_and_no_model(world, cli, tmp_path, gate):
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "bee", *QUICK,
        gate, "--out", "asked/for",
    )  # fmt: skip
    assert result.status == 3
    check_shape(result.document, FIELDS)
    assert result.document["verdict"] == "fail"
    assert result.document["artifacts"] == {}
    assert result.document["sha256"] == {}
    assert any(not g["passed"] for g in result.document["gates"])
    reports = ["audit", "audit/groups.png", "metrics.json", "request.json"]
    assert listing(tmp_path) == sorted(["runs", "runs/failed-0001", *(f"runs/failed-0001/{f}" for f in reports)])
    assert "Gate breached" in result.err
    assert "Next:" not in result.err


def test_text_for_people_stays_on_stderr(world, first_run, capsys, tmp_path, monkeypatch):
    from gsforget.__main__ import main

    monkeypatch.chdir(tmp_path)
    gates = [f"--max-{g}=100" for g in ("forget-acc", "retain-drop", "class-drop")]
    assert (
        main(["forget", "--model", str(world.model), "--data", str(world.data), "--classes", "ant", *QUICK, *gates])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Accuracy on the test images" in printed.err
    assert "\x1b" not in printed.err


def test_a_pass_says_that_the_features_were_not_judged(first_run):
    passed = next(line for line in first_run[1].err.splitlines() if line.startswith("Passed."))
    assert passed == (
        "Passed. The model without these classes is in runs/forget-0001. Its answers were judged, its features were not: "
        "gsforget audit runs/forget-0001 --data DIR --tier standard --reference FOLDER judges them."
    )


@pytest.mark.parametrize(
    ("excess", "probe", "reference", "words", "command"),
    [
        (None, 60.0, None, True, True),
        (None, None, None, True, False),  # no features to judge
        (None, 60.0, {"linear_probe": 70.0}, True, False),  # no room: the same reference would tell the audit no more
        (0.2, 60.0, {"linear_probe": 50.0}, False, False),
    ],
)
def test_the_audit_is_named_where_it_could_judge_the_features(excess, probe, reference, words, command):
    from types import SimpleNamespace

    from gsforget.cli.forget import _unjudged

    audit = {"after": {"linear_probe": probe}, "reference": reference}
    document = {"audit": {"linear_probe_excess": excess}}
    said = _unjudged(SimpleNamespace(document=document, metrics={"audit": audit}, folder="my runs/1"))
    assert ("features were not" in said) is words
    assert ("gsforget audit 'my runs/1' --data DIR" in said) is command
    single = SimpleNamespace(document={**document, "sample": {}}, metrics={"audit": None}, folder="x")
    assert _unjudged(single) == ""


def test_names_that_break_formats(world, cli, draw, tmp_path):
    """Commas, spaces, dollars, markup, quotes and other alphabets; a class named like another one's index."""
    names = ["0", "a, b", "[bold]$x_{^$", "ключ 蟻"]
    draw(tmp_path / "data" / "train", 6, 1, names)
    draw(tmp_path / "data" / "test", 6, 2, names)
    (tmp_path / "order.txt").write_text("\n".join(names))
    result = cli(
        tmp_path, "forget", "--model", world.architecture, "--checkpoint", world.checkpoint,
        "--model-kwargs", world.model_kwargs, "--mean", "0.5", "--std", "0.5", "--crop-pct", "1", "--data", "data",
        "--class-names", "order.txt", "--classes", '"a, b",[bold]$x_{^$', *QUICK,
        "--max-forget-acc", "100", "--max-retain-drop", "100", "--max-class-drop", "100",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.document["classes"] == ["a, b", "[bold]$x_{^$"]
    assert "[bold]$x_{^$" in result.err


def test_one_group_survives_where_one_is_asked_for(world, cli, tmp_path):
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "cat", "--target-groups", "1"
    )
    assert result.status in (0, 3), result.err
    assert len(result.document["groups"]["active"]) == 1
