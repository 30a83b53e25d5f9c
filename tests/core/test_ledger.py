"""The ledger: any line changed, lost, added or swapped is found, and so is a model that is not the one it names."""

import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from gsforget import ledger
from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.key_places import ENVIRONMENT, own_signing_key
from gsforget.export.device.keys import SigningKey, new_keys, read_public_key
from gsforget.folder import CONFIG, WEIGHTS, ModelConfig, sha256, write_file

CONFIG_0 = ModelConfig("vit_tiny", {}, ["cat", "dog", "cow", "ant"], (3, 8, 8), (0.5,), (0.5,))


def entry(index: int, **changes) -> dict:
    fields = {
        "classes": [{"index": index, "name": CONFIG_0.class_names[index]}],
        "method": "gs-lora",
        "base": f"model {index}",
        "model": f"model {index + 1}",
        "delta": "d",
        "request": "r",
        "config": "c",
        "verdict": "pass",
        "metrics": {"forget_acc_after": 0.0, "retain_acc_after": 91.5},
    }
    return {**fields, **changes}


def chain(count: int) -> list[str]:
    lines: list[str] = []
    for i in range(count):
        lines = ledger.append(lines, entry(i))
    return lines


def write_run(folder: Path, parent: Path | None, index: int) -> Path:
    """A run folder as `forget` writes it, with weights that are only bytes."""
    folder.mkdir()
    config = (ledger.read_config(parent) if parent else CONFIG_0).erase([index])
    (folder / WEIGHTS).write_bytes(f"weights {index}".encode())
    (folder / CONFIG).write_text(json.dumps(config.to_json()))
    (folder / "delta.safetensors").write_bytes(b"delta")
    (folder / "request.json").write_text("{}")
    hashes = {
        k: sha256(folder / n) for k, n in (("model", WEIGHTS), ("config", CONFIG), ("delta", "delta.safetensors"))
    }
    base = sha256(parent / WEIGHTS) if parent else "original"
    new = entry(index, sequence=config.sequence, base=base, request=sha256(folder / "request.json"), **hashes)
    lines = ledger.append(ledger.parent_lines(parent) if parent else [], new)
    write_file(folder / "ledger.jsonl", "".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # no key of whoever runs the tests
    return write_run(tmp_path / "second", write_run(tmp_path / "first", None, 3), 1)


def test_lines_are_canonical_and_hold_the_hash_of_the_line_before():
    lines = chain(2)
    first, second = (json.loads(line) for line in lines)
    assert first["previous"] == "0" * 64
    assert second["previous"] == hashlib.sha256(lines[0].encode()).hexdigest()
    assert [first["sequence"], second["sequence"]] == [1, 2]
    assert lines[0] == json.dumps(first, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert first["time"].endswith("Z")
    assert ledger.forgotten_names(ledger.parse(lines)) == {0: "cat", 1: "dog"}


def test_append_leaves_the_parent_and_checks_it():
    lines = chain(1)
    assert ledger.append(lines, entry(1))[0] == lines[0]
    assert len(lines) == 1
    with pytest.raises(ValueError, match="method"):
        ledger.append([], {k: v for k, v in entry(0).items() if k != "method"})
    with pytest.raises(SafetyError, match="erased 2 time"):
        ledger.append(lines, entry(2, sequence=3))
    with pytest.raises(SafetyError, match="does not start from the model"):
        ledger.append(lines, entry(2))


def test_names_keep_their_letters():
    (line,) = ledger.append([], entry(0, classes=[{"index": 0, "name": "Kätzchen 猫"}]))
    assert "Kätzchen 猫" in line
    assert ledger.parse([line])


@given(st.data())
def test_any_changed_byte_before_the_last_line_is_found(data):
    lines = chain(3)
    raw = bytearray("".join(f"{line}\n" for line in lines).encode())
    position = data.draw(st.integers(0, len(raw) - len(lines[-1]) - 3))
    raw[position] ^= data.draw(st.integers(1, 127))
    changed = raw.decode("latin1").split("\n")[:-1]
    with pytest.raises(SafetyError) as caught:
        ledger.parse(changed)
    assert caught.value.kind == "broken_ledger"
    assert caught.value.exit_status == 4
    assert "line" in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[1:], "line 1 has sequence 2"),
        (lambda x: [x[0], x[2]], "line 2 has sequence 3"),
        (lambda x: [x[1], x[0], x[2]], "line 1 has sequence 2"),
        (lambda x: [x[0].replace("cat", "bat"), *x[1:]], "line 1 was changed"),
        (lambda x: [*x, "{}"], "line 4 is malformed"),
        (lambda x: [*x, x[2] + " "], "line 4 is malformed"),
        (lambda x: [*x, "[]"], "line 4 is malformed"),
        (lambda x: [*x, ""], "line 4 is malformed"),
    ],
)
def test_the_broken_line_is_named(change, words):
    with pytest.raises(SafetyError, match=words):
        ledger.parse(change(chain(3)))


def test_a_rebuilt_line_must_start_from_the_model_before():
    lines = chain(1)
    forged = json.loads(chain(2)[1])
    forged["base"] = "another model"
    with pytest.raises(SafetyError, match="line 2 does not start from the model of line 1"):
        ledger.parse([lines[0], canonical(forged)])


def test_a_cut_file_is_found(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(f"{line}\n" for line in chain(2))[:-1])
    with pytest.raises(SafetyError, match="line 2 is cut off"):
        ledger.read_lines(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(SafetyError, match="UTF-8"):
        ledger.read_lines(path)
    assert ledger.read_lines(tmp_path / "none") == []


def test_a_sound_run_passes(run):
    report = ledger.verify(run)
    assert report.passed
    assert [c.name for c in report.checks] == ["chain", "signature", "model", "config", "delta", "request", "forgotten"]
    assert {c.verdict for c in report.checks if c.name != "signature"} == {"pass"}
    assert ledger.parent_lines(run) == ledger.read_lines(run / "ledger.jsonl")


@pytest.mark.parametrize("name", [WEIGHTS, "delta.safetensors", "request.json"])
def test_a_changed_file_is_named_with_its_line(run, name):
    (run / name).write_bytes(b"other")
    with pytest.raises(SafetyError) as caught:
        ledger.verify(run)
    assert name in caught.value.message
    assert "line 2" in caught.value.message
    with pytest.raises(SafetyError):
        ledger.parent_lines(run)


def test_purged_files_are_not_missed(run):
    (run / "delta.safetensors").unlink()
    assert {c.name: c.verdict for c in ledger.verify(run).checks}["delta"] == "not checked"


def test_a_config_that_hides_an_erasure_is_found(run):
    raw = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps({**raw, "forgotten": [1]}))
    failed = [c.name for c in ledger.inspect(run).checks if c.verdict == "fail"]
    assert failed == ["config", "forgotten"]


@pytest.fixture
def told(run) -> Path:
    """A run whose request and metrics say what its last line says."""
    request = {"indices": [1], "names": CONFIG_0.class_names}
    (run / "request.json").write_text(json.dumps(request))
    (run / "metrics.json").write_text(json.dumps({"summary": {"forget_acc_after": 0.0, "retain_acc_after": 91.5}}))
    write_last(run, request=sha256(run / "request.json"))
    return run


def write_last(run: Path, **changes) -> None:
    """Write the last line anew: nothing after it holds its hash."""
    lines = ledger.read_lines(run / "ledger.jsonl")
    lines[-1] = canonical({**json.loads(lines[-1]), **changes})
    (run / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_last_line_that_agrees_with_request_and_metrics_passes(told):
    assert {c.name: c.verdict for c in ledger.verify(told).checks}["metrics"] == "pass"


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"classes": [{"index": 1, "name": "bog"}]}, "forgotten", "names other classes than request.json"),
        ({"metrics": {"retain_acc_after": 99.0}}, "metrics", "retain_acc_after 91.5, line 2 of ledger.jsonl 99.0"),
    ],
)
def test_a_last_line_with_another_class_or_figure_is_found(told, changes, name, words):
    write_last(told, **changes)
    assert [c.name for c in ledger.inspect(told).checks if c.verdict == "fail"] == [name]
    with pytest.raises(SafetyError, match=words):
        ledger.verify(told)


def test_a_lost_last_line_is_found(run):
    lines = ledger.read_lines(run / "ledger.jsonl")
    (run / "ledger.jsonl").write_text(lines[0] + "\n")
    failed = {c.name for c in ledger.inspect(run).checks if c.verdict == "fail"}
    assert {"model", "forgotten"} <= failed


def test_a_removed_ledger_is_found_but_an_original_model_needs_none(run, tmp_path):
    (run / "ledger.jsonl").unlink()
    for check in (ledger.verify, ledger.parent_lines):
        with pytest.raises(SafetyError, match="absent or empty"):
            check(run)
    original = tmp_path / "original"
    original.mkdir()
    (original / WEIGHTS).write_bytes(b"weights")
    (original / CONFIG).write_text(json.dumps(CONFIG_0.to_json()))
    assert ledger.parent_lines(original) == []
    with pytest.raises(RequestError) as caught:
        ledger.verify(original)
    assert caught.value.kind == "no_ledger"


def test_artifacts_are_hashed_against_their_sidecars(run):
    folder = run / "artifacts"
    folder.mkdir()
    for name in ("good.onnx", "bad.onnx", "odd.engine", "bare.onnx"):
        (folder / name).write_bytes(name.encode())
    (folder / "good.onnx.json").write_text(json.dumps({"sha256": sha256(folder / "good.onnx")}))
    (folder / "bad.onnx.json").write_text(json.dumps({"sha256": "0" * 64}))
    (folder / "odd.engine.json").write_text("[]")
    verdicts = {c.name: c.verdict for c in ledger.check_artifacts(run)}
    assert verdicts == {
        "artifacts/good.onnx": "pass",
        "artifacts/bad.onnx": "fail",
        "artifacts/odd.engine": "fail",
        "artifacts/bare.onnx": "not checked",
    }
    with pytest.raises(SafetyError, match=r"bad\.onnx"):
        ledger.verify(run)


def signing_key() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.generate())


def signed_chain(*keys: SigningKey | None) -> list[dict]:
    lines: list[str] = []
    for i, key in enumerate(keys):
        lines = ledger.append(lines, entry(i), key)
    return ledger.parse(lines)


def test_signed_lines_hold_for_the_key_that_signed_them():
    ours, theirs = signing_key(), signing_key()
    entries = signed_chain(ours, ours)
    assert ledger.check_signatures(entries, [ours.public], True).verdict == "pass"
    assert ledger.check_signatures(entries, [theirs.public, ours.public], True).verdict == "pass"
    for entire, verdict in ((True, "fail"), (False, "not checked")):
        found = ledger.check_signatures(entries, [theirs.public], entire)
        assert found.verdict == verdict
        assert ours.key_id in found.detail
        bare = ledger.check_signatures(signed_chain(ours, None), [ours.public], entire)
        assert (bare.verdict, bare.detail) == (verdict, "line 2 of ledger.jsonl is not signed")


@given(
    st.sampled_from(["time", "method", "verdict", "classes", "metrics", "signature", "key_id", "sequence"]),
    st.booleans(),
)
def test_a_signed_line_that_was_changed_is_found(field, entire):
    key = signing_key()
    (line,) = signed_chain(key)
    other = {"classes": [{"index": 3, "name": "ant"}], "metrics": {}, "sequence": 2, "key_id": key.key_id}
    changed = {**line, field: other.get(field, "00")}
    if field == "key_id":
        changed["signature"] = "00" * 64
    assert ledger.check_signatures([changed], [key.public], entire).verdict == "fail"


def test_a_workstation_with_a_key_signs_and_checks_its_own_lines(tmp_path, run, monkeypatch):
    private, public = new_keys(tmp_path / "keys")
    monkeypatch.setenv(ENVIRONMENT, str(private))
    assert own_signing_key().public == read_public_key(public)
    found = {c.name: c for c in ledger.inspect(run).checks}
    assert found["signature"].verdict == "not checked"  # the run is older than the key
    lines = ledger.read_lines(run / "ledger.jsonl")
    last = {k: v for k, v in ledger.parse(lines)[-1].items() if k not in ("sequence", "previous", "time")}
    again = ledger.append(lines[:-1], last, own_signing_key())
    write_file(run / "ledger.jsonl", "".join(f"{line}\n" for line in again))
    if len(again) == 1:
        assert {c.name: c.verdict for c in ledger.inspect(run).checks}["signature"] == "pass"
    forged = json.loads(again[-1])
    forged["method"] = "retrain"
    write_file(run / "ledger.jsonl", "".join(f"{line}\n" for line in (*again[:-1], canonical(forged))))
    with pytest.raises(SafetyError, match="signature of line"):
        ledger.verify(run)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(RequestError) as caught:
        own_signing_key()
    assert caught.value.kind == "no_key"
