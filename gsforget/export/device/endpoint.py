"""The HTTP endpoint of `gsforget serve`, as a WSGI application.

    GET  /health    ready or not, which model and for how long
    GET  /model     what the model says of itself
    POST /infer     one image as the body, several as multipart/form-data, or {"images": [base64, …]}; ?top=5,
                    of a detector ?min_score=0.3
    POST /patches   a signed package, applied to the device folder

An error is ``{"error": {"kind", "message", "hint"}}`` with a status that says whose fault it was.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device.answering import Wish
from gsforget.export.device.apply import apply
from gsforget.export.device.batcher import Answer, Batcher, Picture
from gsforget.export.device.detect import MIN_SCORE
from gsforget.export.device.runtime import Predictor
from gsforget.export.device.slot import Slot, describe
from gsforget.export.device.source import Source
from gsforget.export.device.store import INTENT

IMAGES_LIMIT = 64 * 2**20  # bytes of one request for answers
PACKAGE_LIMIT = 2**31 - 1  # bytes of one package
MOST_IMAGES = 256  # in one request
INCOMING = ".incoming-"  # a package while it arrives
CHUNK = 2**20
STATUS = {
    200: "200 OK",
    400: "400 Bad Request",
    403: "403 Forbidden",
    404: "404 Not Found",
    405: "405 Method Not Allowed",
    409: "409 Conflict",
    413: "413 Content Too Large",
    500: "500 Internal Server Error",
    503: "503 Service Unavailable",
    507: "507 Insufficient Storage",
}
BY_KIND = {"sequence_gap": 409, "locked": 409, "no_space": 507, "stopping": 503, "too_large": 413}
NOT_FOUND, NOT_ALLOWED = 404, 405
log = logging.getLogger("gsforget.serve")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class Endpoint:
    """Answers requests by the model of a source.

    Args:
        source: where the model comes from, and where packages go.
        slot: the model in use.
        largest: images in one run of the model.
        instance: says which process this is, so that `serve.json` can be trusted.
    """

    def __init__(self, source: Source, slot: Slot, largest: int = 8, instance: str = ""):
        self.source, self.slot, self.instance = source, slot, instance
        self.batcher = Batcher(slot, largest)
        self.applying = threading.Lock()
        self.started, self.answered, self.stopping = time.monotonic(), 0, False
        self._counting = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        leases: list[Answer] = []
        try:
            status, document = self._route(environ, leases)
        except Exception as error:
            status, document = self._explain(error, environ.get("PATH_INFO", ""))
        body = json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        headers = [("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(len(body)))]
        start_response(STATUS[status], headers)
        return _Body(body, leases)

    def _route(self, environ: dict[str, Any], leases: list[Answer]) -> tuple[int, dict[str, Any]]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "/").rstrip("/") or "/"
        routes: dict[str, tuple[str, Callable[[], tuple[int, dict[str, Any]]]]] = {
            "/health": ("GET", self._health),
            "/model": ("GET", self._model),
            "/infer": ("POST", lambda: self._infer(environ, leases)),
            "/patches": ("POST", lambda: self._patch(environ)),
        }
        if path not in routes:
            known = ", ".join(f"{m} {p}" for p, (m, _) in routes.items())
            return NOT_FOUND, _error("not_found", f"There is nothing at {path}.", f"There is {known}.")
        wanted, answer = routes[path]
        if method != wanted:
            return NOT_ALLOWED, _error("bad_method", f"{path} does not take {method}.", f"Send {wanted}.")
        return answer()

    def _health(self) -> tuple[int, dict[str, Any]]:
        document: dict[str, Any] = {
            "status": "stopping" if self.stopping else "ready",
            "uptime": round(time.monotonic() - self.started, 3),
            "answered": self.answered,
            "instance": self.instance,
        }
        try:
            document |= describe(self.slot.current)
        except GsforgetError as error:
            document |= {"status": "failed", **error.to_json()}
        return (200 if document["status"] == "ready" else 503), document

    def _model(self) -> tuple[int, dict[str, Any]]:
        predictor = self.slot.current
        return 200, {**describe(predictor), "info": predictor.info.to_json()}

    def _infer(self, environ: dict[str, Any], leases: list[Answer]) -> tuple[int, dict[str, Any]]:
        wish = _wish(environ.get("QUERY_STRING", ""))
        pictures = read_pictures(environ.get("CONTENT_TYPE", ""), _read(environ, IMAGES_LIMIT))
        leases += self.batcher.answer(pictures, wish)
        with self._counting:
            self.answered += len(leases)
        images = [{"path": p.name, **a.said} for p, a in zip(pictures, leases, strict=True)]
        return 200, {"images": images, **describe(leases[0].lease.predictor)}

    def _patch(self, environ: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.source.is_folder:
            raise RequestError(
                "A lone file is served, and packages change device folders.",
                "Serve a device folder: gsforget serve DIR.",
                "no_device_folder",
            )
        with self.applying:
            handle, name = tempfile.mkstemp(prefix=INCOMING, suffix=".gsf", dir=self.source.path)
            try:
                with open(handle, "wb") as target:
                    for chunk in _chunks(environ, PACKAGE_LIMIT):
                        target.write(chunk)
                done = self._apply(Path(name))
            finally:
                Path(name).unlink(missing_ok=True)
        return 200, {**done, "serving": describe(self.slot.current)}

    def _apply(self, package: Path) -> dict[str, Any]:
        """Apply a package, with the swap before its old files go; what must not load again answers no more either."""
        root = self.source.path
        try:
            done = apply(package, root, device=self.source.device, swap=self._swap)
            if done.loaded.predictor is None:
                self._swap(self.source.load())
        except GsforgetError as error:
            error.message = error.message.replace(str(package), "The package")
            if (root / INTENT).exists():
                self.slot.close(error)
            raise
        return done.to_json()

    def _swap(self, predictor: Predictor | None) -> None:
        if predictor is not None and not self.slot.swap(predictor):
            log.warning("requests still run on the model before, long after it was replaced")

    def _explain(self, error: Exception, path: str) -> tuple[int, dict[str, Any]]:
        """Status and document of a failure; 500 and a line in the log for a fault of ours."""
        if isinstance(error, GsforgetError) and error is self.slot.closed and not path.startswith("/patches"):
            return 503, error.to_json()
        if isinstance(error, SafetyError):
            return 403, error.to_json()
        if isinstance(error, GsforgetError):
            return BY_KIND.get(error.kind, 400 if isinstance(error, RequestError) else 500), error.to_json()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 507, _error("no_space", "The server's disk is full.", "Free some space and send it again.")
        log.error("a request failed by a fault of ours", exc_info=error)
        return 500, _error("internal", f"The server failed by a fault of ours: {type(error).__name__}.", "See its log.")


class _Body(Iterator[bytes]):
    """A body in one piece; once it is sent, or cannot be, the model that gave it is no longer in use."""

    def __init__(self, body: bytes, answers: list[Answer]):
        self._parts, self._answers = [body], answers

    def __next__(self) -> bytes:
        if not self._parts:
            raise StopIteration
        return self._parts.pop()

    def close(self) -> None:
        for answer in self._answers:
            answer.lease.release()


def read_pictures(content_type: str, body: bytes) -> list[Picture]:
    """The images of a request.

    Args:
        content_type: ``multipart/form-data`` (each part is an image file), ``application/json``
            (``{"images": [base64, …]}``), anything else: the body is one image file.

    Raises RequestError: ``bad_body`` for no images or a body that cannot be taken apart, ``too_large`` for too many.
    """
    header = Message()
    header["Content-Type"] = content_type or "application/octet-stream"
    kind = header.get_content_type()
    if kind == "multipart/form-data":
        pictures = _parts(header.get_param("boundary"), body)
    elif kind == "application/json":
        pictures = _from_json(body)
    else:  # whatever it is called: curl --data-binary says application/x-www-form-urlencoded
        pictures = [Picture("body", body)]
    if not pictures or not any(p.data for p in pictures):
        raise RequestError("The request holds no image.", "curl --data-binary @IMAGE URL/infer", "bad_body")
    if len(pictures) > MOST_IMAGES:
        raise RequestError(
            f"The request holds {len(pictures)} images, and {MOST_IMAGES} are answered at once.",
            "Send them in several requests.",
            "too_large",
        )
    return pictures


def _parts(boundary: Any, body: bytes) -> list[Picture]:
    """The parts of a multipart body (RFC 7578), each an image file."""
    if not isinstance(boundary, str) or not boundary:
        raise RequestError("The multipart request names no boundary.", "Let the client set Content-Type.", "bad_body")
    delimiter = b"\r\n--" + boundary.encode("latin-1", errors="replace")
    sections = (b"\r\n" + body).split(delimiter)[1:]
    if not sections or not sections[-1].startswith(b"--"):
        raise RequestError("The multipart request is cut off.", "Send it again.", "bad_body")
    pictures = []
    for number, section in enumerate(sections[:-1], 1):
        head, blank, data = section.partition(b"\r\n\r\n")
        if not blank:
            raise RequestError(
                f"Part {number} of the request has no headers.", "Send files as form fields.", "bad_body"
            )
        found = re.search(rb'filename="([^"\r\n]*)"', head)
        name = found[1].decode("utf-8", errors="replace") if found and found[1] else f"part {number}"
        pictures.append(Picture(name, data))
    return pictures


def _from_json(body: bytes) -> list[Picture]:
    try:
        images = json.loads(body)["images"]
        return [Picture(f"image {i}", base64.b64decode(text, validate=True)) for i, text in enumerate(images, 1)]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise RequestError(
            f"The JSON body cannot be read ({type(error).__name__}: {error}).",
            'Send {"images": ["…base64 of an image file…"]}.',
            "bad_body",
        ) from error


def _wish(query: str) -> Wish:
    asked = parse_qs(query)
    text, score = asked.get("top", ["5"])[-1], asked.get("min_score", [str(MIN_SCORE)])[-1]
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise RequestError(f"top={text!r} is no number of classes.", "For example /infer?top=5.", "bad_top")
    if not re.fullmatch(r"0|1|(0?\.[0-9]{1,6})|1\.0+", score):
        raise RequestError(
            f"min_score={score!r} is no score from 0 to 1.", "For example /infer?min_score=0.3.", "bad_score"
        )
    return Wish(int(text), float(score))


def _read(environ: dict[str, Any], limit: int) -> bytes:
    return b"".join(_chunks(environ, limit))


def _chunks(environ: dict[str, Any], limit: int) -> Iterator[bytes]:
    """The body, piece by piece.  Raises RequestError ``too_large`` beyond the limit, ``bad_body`` where it is cut off."""
    stated = environ.get("CONTENT_LENGTH") or ""
    left = int(stated) if stated.isdigit() else 0
    if left > limit:
        raise RequestError(
            f"The body has {left} bytes, and at most {limit} are taken.", "Send less at once.", "too_large"
        )
    stream: BinaryIO = environ["wsgi.input"]
    while left:
        chunk = stream.read(min(CHUNK, left))
        if not chunk:
            raise RequestError("The body is cut off.", "Send it again.", "bad_body")
        left -= len(chunk)
        yield chunk


def remove_incoming(root: Path) -> None:
    """Remove packages that were arriving when a server was killed; they hold factors."""
    for path in root.glob(f"{INCOMING}*"):
        path.unlink(missing_ok=True)


def _error(kind: str, message: str, hint: str) -> dict[str, Any]:
    return GsforgetError(message, hint, kind).to_json()
