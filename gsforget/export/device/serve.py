"""`gsforget serve`: an HTTP endpoint over a device folder or one file, with hot swap and an end that loses no request.

`serve.json` in the device folder says where it listens, so that `gsforget apply` hands its package to the server, see
`handover`.  The server library is waitress: threads, pure Python, no other packages.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gsforget.errors import GsforgetError, RequestError
from gsforget.export.device.endpoint import IMAGES_LIMIT, PACKAGE_LIMIT, Endpoint, remove_incoming
from gsforget.export.device.files import write_file
from gsforget.export.device.handover import SERVE, find_server
from gsforget.export.device.slot import Slot, describe
from gsforget.export.device.source import Source

THREADS = 12  # requests that are read, decoded and written at the same time; one more thread runs the model
FOLLOW = 1.0  # seconds between two looks at what other processes did to the device folder
DRAIN = 30.0  # seconds that requests in flight have to finish when the server ends
QUIET = 0.2  # seconds without any, after which it ends: what was sent just before has arrived by then


class Server:
    """A server that runs in the background from ``start`` to ``stop``.

    Args:
        path: a device folder, or an exported `.onnx` file.
        host, port: where to listen; port 0 takes a free one.
        device: as for `open_model`.
        largest: images in one run of the model.

    Raises as ``Source.load`` does, and RequestError ``port_in_use``.
    """

    def __init__(
        self, path: str | Path, host: str = "127.0.0.1", port: int = 8080, device: str = "auto", largest: int = 8
    ):
        self.source = Source(path, device)
        other = find_server(self.source.path) if self.source.is_folder else None
        if other is not None:
            raise RequestError(f"{path} is served already, at {other}.", "Stop that server first.", "already_served")
        self.slot = Slot(self.source.load())
        self.endpoint = Endpoint(self.source, self.slot, largest, secrets.token_hex(8))
        limit = PACKAGE_LIMIT if self.source.is_folder else IMAGES_LIMIT
        self._http, bound = _listen(self.endpoint, host, port, limit)
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://{f'[{reached}]' if ':' in reached else reached}:{bound}"
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._http.run, name="gsforget-http", daemon=True),
            threading.Thread(target=self._follow, name="gsforget-follow", daemon=True),
        ]

    def start(self) -> dict[str, Any]:
        """Answer from now on.  Returns ``{"url", "pid", …}`` and which model it is."""
        for thread in self._threads:
            thread.start()
        if self.source.is_folder:
            remove_incoming(self.source.path)
            record = {"format": 1, "url": self.url, "pid": os.getpid(), "instance": self.endpoint.instance}
            write_file(self.source.path / SERVE, json.dumps(record, indent=2) + "\n")
        return {"url": self.url, "pid": os.getpid(), **describe(self.slot.current)}

    @property
    def alive(self) -> bool:
        return self._threads[0].is_alive()

    def stop(self, wait: float = DRAIN) -> bool:
        """Take no new connections, answer what is in flight, and end.  Returns whether all of it was answered."""
        if self._stopped.is_set():
            return True
        self._stopped.set()
        until = time.monotonic() + wait
        self._forget_record()
        self.endpoint.stopping = True
        loop, server = self._http.asyncore, self._http
        server.trigger.pull_trigger(lambda: loop.dispatcher.close(server))  # in the thread that listens
        quiet = time.monotonic() + QUIET
        while time.monotonic() < min(quiet, until):
            time.sleep(0.01)
            if self._busy():
                quiet = time.monotonic() + QUIET
        drained = not self._busy()
        server.trigger.pull_trigger(lambda: loop.close_all(server._map))
        server.task_dispatcher.shutdown(timeout=1)
        self._threads[0].join(timeout=5)
        self.endpoint.batcher.stop()
        return drained

    def _busy(self) -> bool:
        """Whether a request is being read, waits, is answered, or its answer is not yet sent."""
        channels = list(self._http.active_channels.values())
        return any(c.request is not None or c.requests or c.total_outbufs_len for c in channels)

    def _follow(self) -> None:
        """See what other processes did to the device folder; while a package is applied here, there is nothing to see."""
        while not self._stopped.wait(FOLLOW):
            if not self.endpoint.applying.acquire(blocking=False):
                continue
            try:
                self.source.follow(self.slot)
            except GsforgetError as error:  # another process holds the folder; the next look sees what it did
                logging.getLogger("gsforget.serve").warning("%s", error.message)
            finally:
                self.endpoint.applying.release()

    def _forget_record(self) -> None:
        path = self.source.path / SERVE
        if self.source.is_folder and path.is_file() and self.endpoint.instance in path.read_text(encoding="utf-8"):
            path.unlink(missing_ok=True)


def run_until_stopped(server: Server, on_start: Callable[[dict[str, Any]], None]) -> bool:
    """Start a server and stop it on SIGTERM, or on Ctrl-C, which is passed on; a second signal ends it at once.

    Ctrl-C raises nothing before the end: raised wherever this thread happens to be, in an import's callback it would
    be swallowed, and the import lock stay taken for all requests.

    Args:
        on_start: told what ``Server.start`` returns, once it answers.

    Returns whether all requests in flight were answered.  Raises GsforgetError where the server ended by itself.
    """
    asked: SimpleQueue[int] = SimpleQueue()  # the one queue that a signal handler may put to
    before = {n: signal.signal(n, lambda number, _: asked.put(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        on_start(server.start())
        number = _wait(asked, server)
    except BaseException:
        server.stop()
        raise
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    drained = server.stop()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    return drained


def _wait(asked: SimpleQueue[int], server: Server) -> int:
    """The signal that ends the server."""
    while server.alive:
        with contextlib.suppress(Empty):
            return asked.get(timeout=1.0)
    raise GsforgetError("The server has ended by itself.", "Start it again; its log says why.", "ended")


def _listen(endpoint: Endpoint, host: str, port: int, limit: int) -> tuple[Any, int]:
    """The HTTP server, not yet running, and its port."""
    try:
        from waitress.server import create_server
    except ImportError as error:
        raise RequestError(
            "Serving needs waitress, which is not installed.", "pip install waitress", "no_server"
        ) from error

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue is what a busy server has
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        endpoint.batcher.stop()
        raise RequestError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}).", "Type another --port.", "port_in_use"
        ) from error
    made = create_server(endpoint, sockets=[listening], threads=THREADS, ident="gsforget", max_request_body_size=limit)
    return made, listening.getsockname()[1]
