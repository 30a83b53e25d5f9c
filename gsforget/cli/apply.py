"""`gsforget apply`: install a model on a device, or apply a signed package to it; rolls forward only."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gsforget.cli.options import Device, DeviceOption, JsonOption
from gsforget.cli.output import emit_json, next_command, say, table


def apply(
    file: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A package (.gsf); or, for an empty device folder, an exported .onnx file, with its .engine if any.",
        ),
    ],
    device_dir: Annotated[Path, typer.Option("--device-dir", metavar="DIR", help="The device folder.")],
    trust: Annotated[
        Path | None,
        typer.Option("--trust", metavar="FILE", help="Public signing key (signing.pub.json) to trust from now on."),
    ] = None,
    device: DeviceOption = Device.auto,
    as_json: JsonOption = False,
) -> None:
    """Install a model on a device, or erase there by a signed patch; the model before never loads again."""
    from gsforget.export.device.apply import apply as carry_out
    from gsforget.export.device.handover import hand_over

    done = hand_over(file, device_dir, trust)  # a running server swaps its model before it says done
    if done is None:
        done = carry_out(file, device_dir, trust=trust, device=device.value).to_json()
    document = {"device_dir": str(device_dir), **done}
    rows = [
        (a["name"], f"{a['bytes'] / 1e6:.1f} MB", a["sha256"][:12], "yes" if a["answered"] else "no")
        for a in document["artifacts"]
    ]
    what = {"install": "Installed", "patch": "Patched to", "full": "Replaced by"}[done["kind"]]
    table(
        ("artifact", "size", "sha256", "answered known tests"),
        rows,
        f"{what} sequence {done['sequence']}",
        ("size",),
    )
    for name in done["removed"]:
        say(f"Destroyed: {name}.")
    for note in done["not_tested"]:
        say(f"Not tested: {note}.")
    if "serving" in done:
        say(f"The running server answers by sequence {done['serving']['sequence']}.")
    say(f"Took {sum(done['seconds'].values()):.2f} s.", "dim")
    if as_json:
        emit_json(document)
    next_command(f"gsforget infer {shlex.quote(str(device_dir))} IMAGE")
