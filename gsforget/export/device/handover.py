"""A package for a device folder that a server holds goes to the server, which swaps its model before it says done."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gsforget.errors import GsforgetError, RequestError, SafetyError
from gsforget.export.device.apply import trust_key
from gsforget.export.device.store import DeviceFolder

SERVE = "serve.json"
ASK = 5.0  # seconds for a server to say that it is there
APPLY = 600.0  # seconds for it to apply a package


def hand_over(files: Sequence[str | Path], root: str | Path, trust: str | Path | None = None) -> dict[str, Any] | None:
    """Let the server of a device folder apply a package; None where no server holds the folder, or it is no package.

    Args:
        files: what `gsforget apply` was given; a server takes one `.gsf` file.
        trust: a public signing key to trust from now on.

    Returns:
        What `gsforget apply` would have printed, with ``serving``: the model that answers now.

    Raises:
        RequestError, SafetyError, GsforgetError: what the server refused it for; SafetyError ``not_applied`` where it says
            that it did what the folder does not show.
    """
    package = Path(files[0])
    url = find_server(Path(root)) if len(files) == 1 and package.suffix == ".gsf" and package.is_file() else None
    if url is None:
        return None
    if trust is not None:
        trust_key(trust, root)
    size = package.stat().st_size
    with open(package, "rb") as body:
        status, document = _ask(url, "POST", "/patches", APPLY, body, size)
    if status == 200:
        state = DeviceFolder(root).state()
        if state is None or state.sequence != document.get("sequence"):
            raise SafetyError(
                f"The server at {url} says that it applied the package, and {root} does not hold the result.",
                f"Stop that server, remove {Path(root) / SERVE}, and apply again.",
                "not_applied",
            )
        return document
    error = document.get("error", {})
    kinds: dict[int, type[GsforgetError]] = {403: SafetyError, 500: GsforgetError, 507: GsforgetError}
    made = kinds.get(status, RequestError)
    message = str(error.get("message") or f"The server at {url} answered {status}.")
    raise made(message, str(error.get("hint", "")), str(error.get("kind") or "refused"))


def find_server(root: Path) -> str | None:
    """Where the server of a folder listens: `serve.json`, where the server there says that it wrote it."""
    try:
        record = json.loads((root / SERVE).read_bytes())
        url, instance = str(record["url"]), record["instance"]
        _, health = _ask(url, "GET", "/health", ASK)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None  # no server, or one that was killed
    return url if health.get("instance") == instance else None


def _ask(
    url: str, method: str, path: str, timeout: float, body: Any = None, size: int = 0
) -> tuple[int, dict[str, Any]]:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout)
    try:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)} if body else {}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        document = json.loads(response.read())
    finally:
        connection.close()
    if not isinstance(document, dict):
        raise ValueError(f"{url}{path} answers no JSON object")
    return response.status, document
