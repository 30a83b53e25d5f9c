"""After the intent record: what cannot be finished loads nothing, and a full package repairs."""

from datetime import UTC, datetime

import pytest
from device_helpers import refused

from gsforget.export.device.apply import apply, open_device


def test_wrong_answers_load_nothing_and_a_full_package_repairs(chain, device, patch2):
    answers = chain.answers(1)
    answers["tests"][0]["new"][0][0] += 1
    bad = chain.patch(1, "answers.gsf", known_answers=answers)
    assert "answers a known test otherwise" in refused("known_answers", apply, bad, device).message
    for _ in range(2):
        refused("known_answers", open_device, device)
    refused("known_answers", apply, chain.root / "patch-0001-fp32.gsf", device)
    refused("known_answers", apply, bad, device)
    assert refused("rollback", apply, chain.full(0, "full-0000.gsf"), device)
    apply(chain.root / "full-0001-fp32.gsf", device)
    assert open_device(device).info == chain.info(1)
    apply(patch2, device)


@pytest.mark.parametrize("gone", ["base", "package", "both"])
def test_what_cannot_be_finished_loads_nothing_and_a_full_package_repairs(chain, device, patch1, monkeypatch, gone):
    monkeypatch.setattr("gsforget.export.device.rollforward.write_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(patch1, device)
    monkeypatch.undo()
    assert (device / "intent.json").is_file()
    if gone in ("base", "both"):
        (device / "models" / chain.artifact(0).name).unlink()
    if gone in ("package", "both"):
        (device / "pending.gsf").write_bytes((chain.root / "patch-0002-fp32.gsf").read_bytes())
    refused(("base_gone", "cannot_finish"), open_device, device)
    refused(("base_gone", "cannot_finish"), apply, patch1, device)
    refused("rollback", apply, chain.full(0, "full-0000.gsf"), device)
    apply(chain.root / "full-0001-fp32.gsf", device)
    assert open_device(device).info == chain.info(1)
    assert not (device / "intent.json").exists()


def test_a_package_that_was_accepted_is_finished_after_it_expired(chain, device, monkeypatch):
    path = chain.patch(1, "soon.gsf", expires="2026-11-26T00:00:00Z")
    monkeypatch.setattr("gsforget.export.device.rollforward.write_pieces", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply(path, device, now=datetime(2026, 11, 25, tzinfo=UTC))
    monkeypatch.undo()
    monkeypatch.setattr("gsforget.export.device.package.datetime", None)  # no clock is asked
    assert open_device(device).info == chain.info(1)
