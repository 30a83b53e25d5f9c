"""A watched folder: each complete image answered once, also across restarts, and by the new model after a package."""

import io
import itertools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import lock
from gsforget.export.device.apply import apply, open_device
from gsforget.export.device.infer import classify
from gsforget.export.device.runtime import open_model
from gsforget.export.device.source import Source
from gsforget.export.device.store import DeviceFolder
from gsforget.export.device.watch import PREDICTIONS, Watcher


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def inbox(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def lines(inbox):
    """The whole lines there are; whoever reads while a line is written finds a part of it behind the last newline."""
    path = inbox / PREDICTIONS
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def paths(entries):
    return [e["path"] for e in entries]


def test_each_image_is_answered_once_and_as_infer_answers_it(inbox, chain):
    watcher = Watcher(Source(chain.artifact(1), "cpu"), inbox, top=2, batch_size=2)
    for name in ("a.png", "b.jpg", "c.PNG"):
        (inbox / name).write_bytes(picture(len(name) + ord(name[0])))
    (inbox / "below").mkdir()
    (inbox / "below" / "d.png").write_bytes(picture(9))
    for hidden in (".e.png", "notes.txt"):
        (inbox / hidden).write_bytes(picture())
    assert watcher.look() == [], "they may still be written to"
    assert watcher.waiting == 4
    found = watcher.look()
    assert sorted(paths(found)) == ["a.png", "b.jpg", "below/d.png", "c.PNG"]
    assert (watcher.waiting, watcher.look(), lines(inbox)) == (0, [], found)
    model = open_model(chain.artifact(1), "cpu")
    info = model.info
    expected = classify(
        model, info.preprocess, info.forgotten, info.class_names, [inbox / p for p in paths(found)], top=2
    )
    for entry, image in zip(found, expected["images"], strict=True):
        assert [t["class"] for t in entry["top"]] == [t["class"] for t in image["top"]]
        assert [t["score"] for t in entry["top"]] == pytest.approx([t["score"] for t in image["top"]], abs=1e-6)
        assert (entry["sequence"], entry["model_id"]) == (1, info.model_id)


def test_a_file_that_is_still_written_waits(inbox, chain):
    watcher = Watcher(Source(chain.artifact(0), "cpu"), inbox)
    raw = picture()
    for end in (20, 40, len(raw)):
        (inbox / "a.png").write_bytes(raw[:end])
        os.utime(inbox / "a.png", ns=(end, end))
        assert watcher.look() == []
    assert "top" in watcher.look()[0]


def test_what_is_no_image_is_noted_once_and_answered_when_it_is_replaced(inbox, chain):
    watcher = Watcher(Source(chain.artifact(0), "cpu"), inbox)
    (inbox / "a.png").write_bytes(picture()[:30])
    (inbox / "b.png").write_bytes(picture(1))
    watcher.look()
    bad, good = watcher.look()
    assert bad["error"]["kind"] == "corrupt_image"
    assert "top" in good
    assert watcher.look() == []
    (inbox / "a.png").write_bytes(picture(2))
    watcher.look()
    (again,) = watcher.look()
    assert (again["path"], "top" in again) == ("a.png", True)


def test_a_restart_answers_nothing_twice_and_what_a_kill_cut_off_again(inbox, chain):
    for i in range(3):
        (inbox / f"{i}.png").write_bytes(picture(i))
    first = Watcher(Source(chain.artifact(0), "cpu"), inbox)
    first.look(), first.look()
    raw = (inbox / PREDICTIONS).read_bytes()
    (inbox / PREDICTIONS).write_bytes(raw[:-10])
    second = Watcher(Source(chain.artifact(0), "cpu"), inbox)
    second.look()
    assert paths(second.look()) == ["2.png"]
    assert (inbox / PREDICTIONS).read_bytes() == raw
    for foreign in ('{"by": "hand"}\n', "a list of mine", "[]\n"):
        (inbox / PREDICTIONS).write_text(foreign)
        with pytest.raises(RequestError) as refused:
            Watcher(Source(chain.artifact(0), "cpu"), inbox)
        assert refused.value.kind == "bad_predictions"
        assert (inbox / PREDICTIONS).read_text() == foreign


def test_the_next_batch_after_a_package_is_the_new_model_s(inbox, device, chain):
    watcher = Watcher(Source(device, "cpu"), inbox, top=9, batch_size=1)
    (inbox / "a.png").write_bytes(picture())
    watcher.look()
    assert watcher.look()[0]["sequence"] == 0
    apply(chain.patch(1), device)
    (inbox / "b.png").write_bytes(picture())
    watcher.look()
    (entry,) = watcher.look()
    assert entry["sequence"] == 1
    assert not {t["class"] for t in entry["top"]} & {"ant", "forgotten-0"}
    (device / "state.json").write_text("{}")
    (inbox / "c.png").write_bytes(picture())
    watcher.look()
    with pytest.raises(SafetyError):
        watcher.look()


class Slow:
    """A model whose answers wait until they are let go."""

    def __init__(self, model):
        self.model, self.asked, self.go = model, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def predict(self, batch):
        self.asked.set()
        assert self.go.wait(60)
        return self.model.predict(batch)


def test_apply_reports_only_when_the_batch_in_flight_has_ended_and_its_old_answers_are_not_written(
    inbox, device, chain
):
    source = Source(device, "cpu")
    watcher = Watcher(source, inbox, batch_size=2)
    slow = Slow(watcher.slot.current)
    watcher.slot.swap(slow)
    for name in ("a.png", "b.png", "c.png"):
        (inbox / name).write_bytes(picture(ord(name[0])))
    watcher.look()
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(watcher.look)
        assert slow.asked.wait(60)
        applying = pool.submit(apply, chain.root / "patch-0001-fp32.gsf", device)
        until = time.monotonic() + 60
        while DeviceFolder(device).state().sequence != 1 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert not applying.done(), "the old model still answers"
        assert (device / "models" / chain.artifact(0).name).exists()
        assert lines(inbox) == []
        slow.go.set()
        done = applying.result(60)
        assert [entry["sequence"] for entry in found.result(60)] == [1, 1, 1]
    assert done.loaded.not_tested == []
    assert paths(lines(inbox)) == ["a.png", "b.png", "c.png"]
    assert {entry["sequence"] for entry in lines(inbox)} == {1}


def test_a_batch_that_never_ends_does_not_stop_an_erasure_and_is_said(device, chain, monkeypatch):
    monkeypatch.setattr(lock.wait_for_answers, "__defaults__", (0.05,))
    with lock.answering(device):
        done = apply(chain.root / "patch-0001-fp32.gsf", device)
    assert done.state.sequence == 1
    assert any("a batch has not ended" in note for note in done.loaded.not_tested)
    assert lock.wait_for_answers(device)


def test_batches_that_follow_each_other_without_a_gap_do_not_keep_apply_waiting(device):
    stop, entered = threading.Event(), []

    def batches():
        while not stop.is_set():
            with lock.answering(device):
                entered.append(time.monotonic())
                time.sleep(0.02)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(batches)
        while len(entered) < 9:
            time.sleep(0.01)
        start = time.monotonic()
        assert lock.wait_for_answers(device, 20)
        waited, before = time.monotonic() - start, len(entered)
        while len(entered) < before + 6:
            time.sleep(0.01)
        stop.set()
    assert waited < 10, "a batch or two, on a machine that does other things as well"


class Kill(BaseException):
    pass


def begin(patch, device, monkeypatch):
    """Apply a package in a process that is killed after the intent record."""

    def kill(*_):
        raise Kill

    with monkeypatch.context() as during:
        during.setattr(DeviceFolder, "append", kill)
        with pytest.raises(Kill):
            apply(patch, device)


def test_a_watcher_that_finishes_a_package_does_not_wait_for_itself(inbox, device, chain, monkeypatch):
    watcher = Watcher(Source(device, "cpu"), inbox)
    begin(chain.root / "patch-0001-fp32.gsf", device, monkeypatch)
    monkeypatch.setattr(lock.wait_for_answers, "__defaults__", (20.0,))
    start = time.monotonic()
    watcher.look()
    assert time.monotonic() - start < 10
    assert watcher.slot.current.info.sequence == 1
    assert not (device / "intent.json").exists()


def test_nothing_is_answered_while_another_process_makes_a_model_and_then_by_that_one(
    inbox, device, chain, monkeypatch
):
    watcher = Watcher(Source(device, "cpu"), inbox)
    (inbox / "a.png").write_bytes(picture())
    watcher.look()
    begin(chain.root / "patch-0001-fp32.gsf", device, monkeypatch)
    with monkeypatch.context() as during, lock.locked(device):
        during.setattr(open_device, "__defaults__", (*open_device.__defaults__[:-1], 0.05))
        for _ in range(3):
            assert watcher.look() == []
    assert lines(inbox) == []
    assert [entry["sequence"] for entry in watcher.look()] == [1]


def test_where_nothing_arrives_the_old_model_does_not_stay_loaded(inbox, device, chain):
    watcher = Watcher(Source(device, "cpu"), inbox)
    apply(chain.root / "patch-0001-fp32.gsf", device)
    assert watcher.look() == []
    assert watcher.slot.current.info.sequence == 1


def test_a_running_watch_never_answers_by_the_old_model_after_apply_has_returned(inbox, device, chain, start_command):
    process = start_command("infer", device, "--watch", inbox, "--device", "cpu")
    stop = threading.Event()

    def feed():
        for number in itertools.count():
            if stop.wait(0.02):
                return
            (inbox / f".{number}").write_bytes(picture(number))
            (inbox / f".{number}").rename(inbox / f"{number}.png")

    def arrive(count):
        until = time.monotonic() + 90
        while len(lines(inbox)) < count and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        assert len(lines(inbox)) >= count, process.stderr.read() if process.poll() is not None else "too slow"

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        reported = []
        for sequence in (1, 2):
            arrive(len(lines(inbox)) + 10)
            apply(chain.root / f"patch-{sequence:04d}-fp32.gsf", device)
            reported.append(len(lines(inbox)))
        arrive(reported[-1] + 10)
    finally:
        stop.set()
        feeder.join()
    sequences = [entry["sequence"] for entry in lines(inbox)]
    assert sequences == sorted(sequences)
    assert set(sequences[: reported[0]]) <= {0, 1}
    assert sequences[0] == 0
    assert set(sequences[reported[0] : reported[1]]) <= {1, 2}
    assert set(sequences[reported[1] :]) == {2}


def test_folders_that_cannot_be_watched(inbox, tmp_path, chain):
    with pytest.raises(RequestError, match="no folder"):
        Watcher(Source(chain.artifact(0), "cpu"), tmp_path / "none")
    with pytest.raises(RequestError, match="not a device folder"):
        Source(inbox)


def test_the_command_ends_on_ctrl_c(inbox, device, start_command):
    (inbox / "a.png").write_bytes(picture())
    process = start_command("infer", device, "--watch", inbox, "--device", "cpu", "--json")
    until = time.monotonic() + 60
    while not lines(inbox) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["kind"] == "interrupted", "one document, as of every command"
    assert paths(lines(inbox)) == ["a.png"]
    assert "Sequence 0 answers what arrives" in err


@pytest.mark.parametrize("more", [[], ["image.png", "--watch", "folder"]])
def test_images_or_a_folder(device, more, capsys):
    from gsforget.__main__ import main

    assert main(["infer", str(device), *more, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "no_images"
