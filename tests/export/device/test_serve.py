"""The HTTP endpoint: answers as `infer` gives them, refusals in sentences, and swaps during which no request is lost."""

import base64
import http.client
import io
import json
import os
import signal
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device import endpoint, serve
from gsforget.export.device.answering import Wish
from gsforget.export.device.apply import apply
from gsforget.export.device.endpoint import read_pictures
from gsforget.export.device.handover import SERVE, hand_over
from gsforget.export.device.infer import classify
from gsforget.export.device.runtime import open_model
from gsforget.export.device.serve import Server
from gsforget.export.device.store import INTENT


def picture(seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def ask(url, method, path, body=None, **headers):
    """(status, document) of one request."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.fixture
def start():
    """start(path, …): a running server, stopped at the end."""
    running = []

    def begin(path, **options):
        server = Server(path, port=0, device="cpu", **options)
        server.start()
        running.append(server)
        return server

    yield begin
    for server in running:
        server.stop(5)


# --------------------------------------------------------------------------------------------------------------- answers
def test_an_image_is_answered_as_infer_answers_it(start, device, chain, tmp_path):
    server = start(device)
    (tmp_path / "a.png").write_bytes(picture())
    model = open_model(chain.artifact(0), "cpu")
    info = model.info
    expected = classify(model, info.preprocess, info.forgotten, info.class_names, [tmp_path / "a.png"], top=3)
    as_curl_says = {"Content_Type": "application/x-www-form-urlencoded"}
    status, document = ask(server.url, "POST", "/infer?top=3", picture(), **as_curl_says)
    assert status == 200
    assert [t["class"] for t in document["images"][0]["top"]] == [t["class"] for t in expected["images"][0]["top"]]
    scores = [[t["score"] for t in d["images"][0]["top"]] for d in (document, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert (document["sequence"], document["model_id"]) == (0, info.model_id)
    assert document["sha256"] == model.sha256


def test_several_images_in_one_request(start, device):
    server = start(device)
    images = {"one.png": picture(1), "twö.jpg": picture(2, "JPEG"), "": picture(3, "BMP")}
    body = b"".join(
        f'--xyz\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in images.items()
    )
    status, document = ask(
        server.url, "POST", "/infer", body + b"--xyz--\r\n", Content_Type='multipart/form-data; boundary="xyz"'
    )
    assert status == 200, document
    assert [i["path"] for i in document["images"]] == ["one.png", "twö.jpg", "part 3"]
    encoded = json.dumps({"images": [base64.b64encode(data).decode() for data in images.values()]})
    status, same = ask(server.url, "POST", "/infer", encoded, Content_Type="application/json")
    assert status == 200
    for one, other in zip(document["images"], same["images"], strict=True):
        assert [t["class"] for t in one["top"]] == [t["class"] for t in other["top"]]
        assert [t["score"] for t in one["top"]] == pytest.approx([t["score"] for t in other["top"]], abs=1e-6)
    alone = [ask(server.url, "POST", "/infer", data)[1]["images"][0]["top"][0]["class"] for data in images.values()]
    assert alone == [i["top"][0]["class"] for i in document["images"]]


def test_more_images_than_a_batch_holds(start, device):
    server = start(device, largest=2)
    encoded = json.dumps({"images": [base64.b64encode(picture(i)).decode() for i in range(5)]})
    status, document = ask(server.url, "POST", "/infer", encoded, Content_Type="application/json")
    assert (status, len(document["images"])) == (200, 5)


def test_what_the_server_says_of_itself(start, device, chain):
    server = start(device)
    status, health = ask(server.url, "GET", "/health")
    assert status == 200
    assert (health["status"], health["sequence"], health["answered"]) == ("ready", 0, 0)
    assert health["artifact"] == chain.artifact(0).name
    assert health["uptime"] >= 0
    status, model = ask(server.url, "GET", "/model")
    assert model["info"] == chain.info(0).to_json()
    record = json.loads((device / SERVE).read_text())
    assert (record["url"], record["pid"], record["instance"]) == (server.url, os.getpid(), health["instance"])


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (("GET", "/nothing", None), 404, "not_found"),
        (("GET", "/infer", None), 405, "bad_method"),
        (("POST", "/infer", b""), 400, "bad_body"),
        (("POST", "/infer", b"no image"), 400, "corrupt_image"),
        (("POST", "/infer", picture()[:60]), 400, "corrupt_image"),
        (("POST", "/infer?top=0", picture()), 400, "bad_top"),
        (("POST", "/infer?top=many", picture()), 400, "bad_top"),
        (("POST", "/patches", b"no package"), 403, None),
    ],
)
def test_refusals_are_sentences(start, device, request_, status, kind):
    server = start(device)
    found, document = ask(server.url, *request_)
    assert found == status, document
    assert kind in (None, document["error"]["kind"])
    assert document["error"]["message"]
    assert ".incoming" not in json.dumps(document)
    assert ask(server.url, "POST", "/infer", picture())[0] == 200, "the server goes on"
    assert not list(device.glob(f"{endpoint.INCOMING}*"))


@pytest.mark.parametrize(
    ("content_type", "body", "kind"),
    [
        ("application/json", b"{", "bad_body"),
        ("application/json", b'{"images": ["%"]}', "bad_body"),
        ("application/json", b'{"images": []}', "bad_body"),
        ("application/json", b"[" * 100000, "bad_body"),
        ("application/json", json.dumps({"images": ["QQ=="] * 257}).encode(), "too_large"),
        ("multipart/form-data", b"--x--", "bad_body"),
        ("multipart/form-data; boundary=x", b"--x\r\nno end", "bad_body"),
        ("multipart/form-data; boundary=x", b"--x\r\nno blank line\r\n--x--", "bad_body"),
        ("application/x-www-form-urlencoded", b"", "bad_body"),
    ],
)
def test_bodies_that_hold_no_images(content_type, body, kind):
    with pytest.raises(RequestError) as refused:
        read_pictures(content_type, body)
    assert refused.value.kind == kind


@given(st.lists(st.binary(min_size=1, max_size=200).filter(lambda b: b"--bound" not in b), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_parts_arrive_as_they_were_sent(parts):
    body = b"".join(b"--bound\r\nContent-Disposition: form-data; name=a\r\n\r\n" + p + b"\r\n" for p in parts)
    found = read_pictures("multipart/form-data; boundary=bound", body + b"--bound--\r\n")
    assert [p.data for p in found] == parts


def test_bodies_that_are_too_large(start, device, monkeypatch):
    monkeypatch.setattr(endpoint, "IMAGES_LIMIT", 100)
    server = start(device)
    status, document = ask(server.url, "POST", "/infer", bytes(101))
    assert (status, document["error"]["kind"]) == (413, "too_large")


# ----------------------------------------------------------------------------------------------------------------- swaps
def test_a_package_is_applied_while_requests_run(start, device, chain):
    """Eight clients, two swaps: none fails, and none asked after a swap was reported gets the model before."""
    server, stop, wrong, failed = start(device), threading.Event(), [], []
    reported, answered = 0, 0

    def client(seed):
        nonlocal answered
        data = picture(seed)
        while not stop.is_set():
            least = reported
            status, document = ask(server.url, "POST", "/infer", data)
            if status != 200:
                failed.append(document)
            elif document["sequence"] < least:
                wrong.append((least, document["sequence"]))
            else:
                answered += 1

    clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in clients:
        thread.start()
    for sequence in (1, 2):
        status, document = ask(server.url, "POST", "/patches", chain.patch(sequence).read_bytes())
        assert status == 200, document
        assert document["sequence"] == document["serving"]["sequence"] == sequence
        reported = sequence
        time.sleep(0.1)
    stop.set()
    for thread in clients:
        thread.join(20)
    assert (failed, wrong) == ([], [])
    assert answered > 16
    _, document = ask(server.url, "POST", "/infer?top=9", picture())
    assert not {t["class"] for t in document["images"][0]["top"]} & {"ant", "bee", "forgotten-0", "forgotten-1"}
    assert sorted(p.name for p in (device / "models").iterdir() if p.suffix == ".onnx") == [chain.artifact(2).name]


def test_packages_that_are_refused_change_nothing(start, device, chain):
    server = start(device)
    raw = chain.patch(1).read_bytes()
    for body, status, kind in (
        (raw[:-1], 403, None),
        (raw[:200] + bytes([raw[200] ^ 1]) + raw[201:], 403, None),
        (chain.patch(2).read_bytes(), 409, "sequence_gap"),
        (b"", 403, None),
    ):
        found, document = ask(server.url, "POST", "/patches", body)
        assert found == status, document
        assert kind in (None, document["error"]["kind"])
        assert ask(server.url, "POST", "/infer", picture())[1]["sequence"] == 0
    assert ask(server.url, "POST", "/patches", raw)[0] == 200
    assert ask(server.url, "POST", "/patches", raw)[0] == 403, "a replay"


def test_what_was_begun_and_cannot_be_finished_answers_no_more(start, device, chain, tmp_path):
    """The new model does not answer as it must, after the intent record: the old one is not fallen back to."""
    known = chain.answers(1)
    known["tests"][0]["new"] = (np.array(known["tests"][0]["new"]) + 1).tolist()
    server = start(device)
    bad = chain.patch(1, "bad.gsf", known_answers=known).read_bytes()
    status, document = ask(server.url, "POST", "/patches", bad)
    assert (status, document["error"]["kind"]) == (403, "known_answers")
    assert (device / INTENT).exists()
    status, document = ask(server.url, "POST", "/infer", picture())
    assert (status, document["error"]["kind"]) == (503, "known_answers")
    status, health = ask(server.url, "GET", "/health")
    assert (status, health["status"]) == (503, "failed")
    assert ask(server.url, "POST", "/patches", chain.full(2).read_bytes())[0] == 200, "a full package repairs"
    assert ask(server.url, "POST", "/infer", picture())[1]["sequence"] == 2


def test_a_package_that_another_process_applied_is_seen(start, device, chain, monkeypatch):
    monkeypatch.setattr(serve, "FOLLOW", 0.02)
    server = start(device)
    apply(chain.patch(1), device)
    until = time.monotonic() + 10
    while ask(server.url, "GET", "/health")[1]["sequence"] != 1 and time.monotonic() < until:
        time.sleep(0.02)
    assert ask(server.url, "POST", "/infer", picture())[1]["sequence"] == 1
    (device / "state.json").write_text("{}")
    while ask(server.url, "GET", "/health")[0] == 200 and time.monotonic() < until:
        time.sleep(0.02)
    status, health = ask(server.url, "GET", "/health")
    assert (status, health["error"]["kind"]) == (503, "broken_state")


def test_apply_hands_its_package_to_the_server(start, device, chain):
    assert hand_over([chain.patch(1)], device) is None, "no server runs"
    server = start(device)
    document = hand_over([chain.patch(1)], device)
    assert document is not None
    assert (document["kind"], document["serving"]["sequence"]) == ("patch", 1)
    assert server.slot.current.info.sequence == 1
    with pytest.raises(SafetyError) as refused:
        hand_over([chain.patch(1)], device)
    assert refused.value.kind == "rollback"
    with pytest.raises(RequestError) as refused:
        Server(device, port=0)
    assert refused.value.kind == "already_served"
    record = json.loads((device / SERVE).read_text())
    (device / SERVE).write_text(json.dumps({**record, "instance": "another"}))
    assert hand_over([chain.patch(2)], device) is None, "that server does not hold this folder"


def test_a_server_that_only_says_that_it_applied_is_not_believed(start, device, chain, monkeypatch):
    server = start(device)
    monkeypatch.setattr(server.endpoint, "_apply", lambda package: {"kind": "patch", "sequence": 1})
    with pytest.raises(SafetyError) as refused:
        hand_over([chain.patch(1)], device)
    assert refused.value.kind == "not_applied"


def test_a_lone_file_is_served_without_patches(start, chain, tmp_path):
    server = start(chain.artifact(1))
    assert ask(server.url, "POST", "/infer", picture())[1]["sequence"] == 1
    status, document = ask(server.url, "POST", "/patches", b"x")
    assert (status, document["error"]["kind"]) == (400, "no_device_folder")
    for path, kind in ((tmp_path, "no_model"), (tmp_path / "none.onnx", "no_model")):
        with pytest.raises(RequestError) as refused:
            Server(path, port=0)
        assert refused.value.kind == kind
    with pytest.raises(RequestError) as refused:
        Server(chain.artifact(1), port=urlsplit(server.url).port)
    assert refused.value.kind == "port_in_use"


# ------------------------------------------------------------------------------------------------------------------- end
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_ends_on_a_signal_and_answers_what_is_in_flight(device, start_command, number, status):
    process = start_command("serve", device, "--port", "0", "--device", "cpu", "--json")
    lines = [process.stdout.readline()]
    while lines[-1].rstrip() != "}":
        assert lines[-1], process.stderr.read()
        lines.append(process.stdout.readline())
    started = json.loads("".join(lines))
    assert (started["sequence"], started["pid"]) == (0, process.pid)
    body = json.dumps({"images": [base64.b64encode(picture(i)).decode() for i in range(200)]})
    where = urlsplit(started["url"])
    client = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
    client.request("POST", "/infer", body, {"Content-Type": "application/json"})
    assert ask(started["url"], "GET", "/health")[0] == 200, "connections are taken in their order"
    process.send_signal(number)
    answer = client.getresponse()
    assert answer.status == 200
    assert len(json.loads(answer.read())["images"]) == 200
    client.close()
    assert process.wait(60) == status
    assert not (device / SERVE).exists()


def test_a_request_after_the_end_is_refused(start, device):
    server = start(device)
    assert server.stop(5)
    with pytest.raises(ConnectionRefusedError):
        ask(server.url, "GET", "/health")
    with pytest.raises(GsforgetError):
        server.endpoint.batcher.answer([endpoint.Picture("a", picture())], Wish(1))
