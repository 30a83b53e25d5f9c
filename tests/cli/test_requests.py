"""Requests in other shapes as a person types them: files with several requests, and lists of images."""

import hashlib
import json

import pytest

GATES = tuple(f"--max-{gate}=100" for gate in ("forget-acc", "retain-drop", "class-drop"))
QUICK = ("--epochs", "1", "--lr", "0.01", "--rank", "2", "--prox", "0.001", "--target-groups", "1")


def weights(run):
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def served(world, cli, tmp_path_factory):
    """Two requests of one file, by name and by index."""
    cwd = tmp_path_factory.mktemp("served")
    (cwd / "r.yaml").write_text(
        "requests:\n"
        "  - {id: 2026-11-001, date: 2026-11-24, requester: pseudonym-17, basis: GDPR Art. 17, classes: [bee]}\n"
        "  - {classes: [2], seed: 3, retain: [ant]}\n"
    )
    return cwd, cli(cwd, "forget", "--model", world.model, "--data", world.data, "--request", "r.yaml", *QUICK, *GATES)


def test_several_requests_give_one_document(served):
    _, result = served
    assert result.status == 0, result.err
    assert set(result.document) == {"requests", "verdict"}
    assert result.document["verdict"] == "pass"
    first, second = result.document["requests"]
    assert (first["sequence"], first["classes"], first["seed"]) == (1, ["bee"], 0)
    assert (second["sequence"], second["classes"], second["seed"]) == (2, ["cat"], 3)
    assert second["metrics"]["old_acc_after"] is not None
    assert "entry 2: done (runs/forget-0002)" in result.err
    assert "gsforget export runs/forget-0002" in result.err


def test_who_asked_is_in_request_json_and_nowhere_else(served):
    cwd, result = served
    record = json.loads((cwd / "runs/forget-0001/request.json").read_text())
    assert record["request"] == {
        "id": "2026-11-001",
        "date": "2026-11-24",
        "requester": "pseudonym-17",
        "basis": "GDPR Art. 17",
    }
    assert "request" not in json.loads((cwd / "runs/forget-0002/request.json").read_text())
    holders = [p for p in (cwd / "runs").rglob("*") if p.is_file() and b"pseudonym-17" in p.read_bytes()]
    assert holders == [cwd / "runs/forget-0001/request.json"]
    assert "pseudonym-17" not in result.err + json.dumps(result.document)


def test_a_file_gives_what_two_commands_give(world, served, cli, tmp_path):
    options = ("--data", world.data, *QUICK, *GATES)
    assert cli(tmp_path, "forget", "--model", world.model, "--classes", "bee", *options).status == 0
    assert (
        cli(tmp_path, "forget", "--model", "runs/forget-0001", "--classes", "cat", "--seed", "3", *options).status == 0
    )
    for run in ("runs/forget-0001", "runs/forget-0002"):
        assert weights(tmp_path / run) == weights(served[0] / run)
    assert cli(served[0], "verify", "runs/forget-0002").status == 0


def test_what_an_earlier_run_forgot_cannot_be_retained(world, served, cli):
    (served[0] / "keep.yaml").write_text("classes: [ant]\nretain: [bee]\n")
    typed = ("--model", "runs/forget-0001", "--data", world.data, "--request", "keep.yaml")
    found = cli(served[0], "forget", *typed)
    assert (found.status, found.document["error"]["kind"]) == (2, "already_forgotten")
    assert "remove it from retain" in found.document["error"]["hint"]


def test_a_failed_gate_ends_the_course(world, cli, tmp_path):
    entries = [{"id": "a", "classes": ["bee"]}, {"id": "b", "classes": ["cat"], "max_forget_acc": -1}, {"classes": [0]}]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--request", "r.json", *QUICK, *GATES
    )
    assert result.status == 3
    assert result.document["verdict"] == "fail"
    assert [d["verdict"] for d in result.document["requests"]] == ["pass", "fail"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["failed-0001", "forget-0001"]
    for line in ("entry 1 (a): done (runs/forget-0001)", "entry 2 (b): failed", "entry 3: not started"):
        assert line in result.err
    assert "Next:" not in result.err


def test_one_request_gives_its_own_document_and_a_list_of_all_images_is_a_class(world, cli, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"train/bee/{i:03d}.png" for i in range(24)))
    (tmp_path / "r.yaml").write_text("images: list.txt")
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--request", "r.yaml",
        "--out", "here", *QUICK, *GATES,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.document["classes"] == ["bee"]
    assert "list.txt lists all training images of 'bee'" in result.document["warnings"][0]
    assert json.loads((tmp_path / "here/config.json").read_text())["forgotten"] == [1]


def test_an_error_on_the_way_says_what_is_done(world, cli, tmp_path, monkeypatch):
    """The disk fills up after the first request."""
    from gsforget import forgetting
    from gsforget.errors import GsforgetError

    whole, calls = forgetting.forget, []

    def once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise GsforgetError("The disk is full.", "Free some space.", "disk_full")
        return whole(*args, **kwargs)

    monkeypatch.setattr(forgetting, "forget", once)
    (tmp_path / "r.yaml").write_text("[{classes: [bee]}, {id: x, classes: [cat]}]")
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--request", "r.yaml", *QUICK, *GATES
    )
    assert (result.status, result.document["error"]["kind"]) == (1, "disk_full")
    assert "entry 2 (x): The disk is full." in result.document["error"]["message"]
    assert "entry 1: done (runs/forget-0001)" in result.document["error"]["message"]


@pytest.fixture(scope="module")
def single(world, cli, tmp_path_factory):
    """Six images of bee and one of cat, by path and by hash, forgotten while their classes stay."""
    cwd = tmp_path_factory.mktemp("single")
    digest = hashlib.sha256((world.data / "train/cat/004.png").read_bytes()).hexdigest()
    (cwd / "list.txt").write_text("\n".join([*(f"train/bee/{i:03d}.png" for i in range(6)), digest]))
    options = ("--images", "list.txt", "--sample-mode")
    return cwd, cli(cwd, "forget", "--model", world.model, "--data", world.data, *options, *GATES)


def test_single_images_are_forgotten_and_their_classes_kept(single, cli):
    cwd, result = single
    assert result.status == 0, result.err
    document = result.document
    assert document["mode"] == "sample"
    assert document["classes"] == []
    assert document["method"] == "gs-lora"
    assert document["sample"]["images"] == 7
    assert document["sample"]["set_aside"] == 20, "half of the test images of bee and cat"
    assert 0 <= document["sample"]["membership"]["after"]["auc"] <= 1
    assert [gate["name"] for gate in document["gates"]] == ["membership", "retain_drop", "class_drop"]
    assert document["metrics"]["forget_acc_after"] > 50, "their class is still known"
    assert any("weaker evidence" in note for note in document["not_tested"])
    assert "6 of 24 of 'bee', 1 of 24 of 'cat'" in document["warnings"][0]
    assert "AUC" in result.err
    config = json.loads((cwd / "runs/forget-0001/config.json").read_text())
    assert config["class_names"] == ["ant", "bee", "cat", "dog"]
    assert (config["forgotten"], config["sequence"]) == ([], 1)
    line = json.loads((cwd / "runs/forget-0001/ledger.jsonl").read_text())
    assert (line["mode"], line["images"], line["classes"]) == ("sample", 7, [])
    assert cli(cwd, "verify", "runs/forget-0001").status == 0
    history = cli(cwd, "history", "runs/forget-0001")
    assert "7 single image(s)" in history.err


def test_later_requests_leave_the_images_out_of_training(world, single, cli, tmp_path, monkeypatch):
    from gsforget.images import ImageSet

    run = single[0] / "runs/forget-0001"
    record = json.loads((run / "request.json").read_text())
    assert len(record["images"]) == len(record["erased_images"]) == 7
    read, check = [], ImageSet.check
    monkeypatch.setattr(ImageSet, "check", lambda images: (read.extend(images.paths), check(images))[1])
    options = ("--model", run, "--data", world.data, *QUICK, *GATES)
    result = cli(tmp_path, "forget", *options, "--classes", "dog")
    assert result.status == 0, result.err
    assert world.data / "train/bee/000.png" not in read
    assert world.data / "train/cat/004.png" not in read
    assert world.data / "train/bee/006.png" in read
    later = json.loads((tmp_path / "runs/forget-0001/request.json").read_text())
    assert later["erased_images"] == record["erased_images"]
    again = cli(tmp_path, "forget", *options, "--images", single[0] / "list.txt", "--sample-mode")
    assert (again.status, again.document["error"]["kind"]) == (2, "already_forgotten")


def test_a_run_of_single_images_without_its_ledger_is_no_original(world, single, cli, tmp_path):
    import shutil

    shutil.copytree(single[0] / "runs/forget-0001", tmp_path / "run")
    (tmp_path / "run/ledger.jsonl").unlink()
    result = cli(tmp_path, "forget", "--model", "run", "--data", world.data, "--classes", "bee")
    assert (result.status, result.document["error"]["kind"]) == (4, "broken_ledger")


def test_classes_and_single_images_in_one_file(world, cli, tmp_path):
    entries = [{"images": ["train/bee/000.png", "train/ant/001.png"], "sample_mode": True}, {"classes": ["bee"]}]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    options = ("--data", world.data, "--request", "r.json", "--epochs", "1", *GATES)
    result = cli(tmp_path, "forget", "--model", world.model, *options)
    assert result.status == 0, result.err
    first, second = result.document["requests"]
    assert (first["mode"], first["classes"]) == ("sample", [])
    assert second["classes"] == ["bee"]
    assert "mode" not in second
    record = json.loads((tmp_path / "runs/forget-0002/request.json").read_text())
    assert len(record["erased_images"]) == 2


def test_a_class_that_came_back_is_forgotten_again_with_the_next_request(world, cli, tmp_path):
    """The first run is made to change next to nothing, and all gates are open: its class is still named."""
    idle = ("--lr", "1e-9", "--epochs", "1", "--target-groups", "4", *GATES)
    first = cli(tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "bee", *idle)
    assert first.status == 0, first.err
    assert first.document["metrics"]["forget_acc_after"] > 90
    assert first.document["forgotten_again"] == []
    second = cli(tmp_path, "forget", "--model", "runs/forget-0001", "--data", world.data, "--classes", "cat")
    assert second.status == 0, second.err
    assert second.document["forgotten_again"] == ["bee"]
    assert second.document["metrics"]["old_acc_after"] <= 1
    assert second.document["metrics"]["forget_acc_after"] <= 1
    assert any("forgotten again" in w and "bee" in w for w in second.document["warnings"])
