"""The model in use: a swap waits for those who use the old one, and never goes back."""

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from gsforget.errors import SafetyError
from gsforget.export.device.metadata import ArtifactInfo
from gsforget.export.device.preprocess import Preprocess
from gsforget.export.device.slot import Slot, describe

INFO = ArtifactInfo(["a"], (), 1, Preprocess((1, 2, 2), (0.5,), (0.5,)), "fp32", "m")


class Model:
    def __init__(self, sequence, model_id="m"):
        self.info = dataclasses.replace(INFO, sequence=sequence, model_id=model_id)
        self.path, self.sha256 = Path(f"model-{sequence}.onnx"), "0" * 64


def test_uses_in_flight_finish_on_the_old_model_and_the_swap_waits_for_them():
    slot, new = Slot(Model(1)), Model(2)
    lease = slot.take()
    done = []
    swapping = threading.Thread(target=lambda: done.append(slot.swap(new)))
    swapping.start()
    until = time.monotonic() + 5
    while slot.current is not new and time.monotonic() < until:
        time.sleep(0.001)
    assert slot.current is new, "new uses get the new model at once"
    with slot.take() as other:
        assert other.predictor is new
    again = lease.again()
    assert lease.predictor.info.sequence == again.predictor.info.sequence == 1
    lease.release()
    lease.release()  # no harm
    time.sleep(0.02)
    assert not done, "one use of the old model has not ended"
    again.release()
    swapping.join(5)
    assert done == [True]


def test_a_swap_that_waits_in_vain_says_so():
    slot = Slot(Model(1))
    slot.take()
    assert slot.swap(Model(2), wait=0.01) is False


def test_no_way_back():
    slot = Slot(Model(2))
    with pytest.raises(SafetyError) as refused:
        slot.swap(Model(1))
    assert refused.value.kind == "rollback"
    assert slot.current.info.sequence == 2
    slot.swap(Model(0, "another model"))


def test_a_closed_slot_answers_its_reason_until_a_swap():
    slot, reason = Slot(Model(1)), SafetyError("It was begun and cannot be finished.", "Repair.", "cannot_finish")
    assert slot.closed is None
    assert slot.close(reason)
    assert slot.closed is reason
    for use in (slot.take, lambda: slot.current):
        with pytest.raises(SafetyError) as raised:
            use()
        assert raised.value is reason
    slot.swap(Model(2))
    assert (slot.closed, slot.current.info.sequence) == (None, 2)


def test_many_threads_never_see_the_old_model_after_the_swap():
    slot, wrong, stop = Slot(Model(0)), [], threading.Event()
    reported = 0

    def use():
        while not stop.is_set():
            least = reported
            with slot.take() as lease:
                if lease.predictor.info.sequence < least:
                    wrong.append(lease.predictor.info.sequence)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for sequence in range(1, 200):
        assert slot.swap(Model(sequence), wait=5)
        reported = sequence
    stop.set()
    for thread in threads:
        thread.join(5)
    assert not wrong


def test_what_is_said_of_a_model():
    assert describe(Model(3)) == {
        "model_id": "m",
        "sequence": 3,
        "precision": "fp32",
        "artifact": "model-3.onnx",
        "sha256": "0" * 64,
    }
