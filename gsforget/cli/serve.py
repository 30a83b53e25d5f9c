"""`gsforget serve`: a model behind HTTP, whose device folder may be patched while it answers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gsforget.cli.options import Device, DeviceOption, JsonOption
from gsforget.cli.output import emit_json, next_command, say


def serve(
    model: Annotated[Path, typer.Argument(metavar="DIR|MODEL.onnx", help="A device folder, or an exported file.")],
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    device: DeviceOption = Device.auto,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Images in one run of the model.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Answer images over HTTP until SIGTERM or Ctrl-C; packages are swapped in while it answers."""
    from gsforget.export.device.serve import Server, run_until_stopped

    server = Server(model, host, port, device.value, max_batch)

    def tell(started: dict[str, Any]) -> None:
        if as_json:
            emit_json(started)
        name = f"Sequence {started['sequence']} of model {started['model_id']}"
        say(f"{name} answers at {started['url']} (Ctrl-C ends it).")
        patch = [f"gsforget apply PATCH.gsf --device-dir {shlex.quote(str(model))}"] if server.source.is_folder else []
        next_command(f"curl --data-binary @IMAGE {started['url']}/infer", *patch)

    if not run_until_stopped(server, tell):
        say("Some requests were not answered in time.")
