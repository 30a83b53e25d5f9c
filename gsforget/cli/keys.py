"""`gsforget keys`: make signing and fleet keys, rotate them, and tell a device whom to trust."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gsforget.cli.options import JsonOption
from gsforget.cli.output import emit_json, next_command, say

keys = typer.Typer(
    help="Make signing and fleet keys, rotate them, and tell a device whom to trust.", no_args_is_help=True
)


@keys.command()
def new(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write them; default: ~/.config/gsforget.")
    ] = None,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Keys to encrypt payloads for a fleet, instead of keys to sign with.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key pair; a private key never leaves the machine that signs (a fleet key goes to its devices)."""
    from gsforget.export.device.key_places import FLEET, SIGNING, default_folder
    from gsforget.export.device.keys import new_keys, read_public_key

    private, public = new_keys(out or default_folder(), fleet)
    made = read_public_key(public, FLEET if fleet else SIGNING)
    say(f"Made {made.kind} key {made.key_id}: {private} (keep it to yourself) and {public}.")
    if as_json:
        emit_json({"kind": made.kind, "key_id": made.key_id, "private": str(private), "public": str(public)})
    shown = shlex.quote(str(public))
    next_command(
        f"gsforget export --patch --from PREVIOUS_RUN --encrypt-for {shown}"
        if fleet
        else f"gsforget keys trust {shown} --device-dir DIR"
    )


@keys.command()
def rotate(
    from_sequence: Annotated[
        int, typer.Option("--from-sequence", metavar="N", min=1, help="First erasure that the new key signs.")
    ],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="OLD", help="The key to retire; default: $GSFORGET_KEY or ~/.config/gsforget."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write the new pair; default: a folder beside OLD."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new signing key, and a statement signed by the old one that devices follow."""
    from gsforget.export.device.trust import rotate_keys

    private, public, statement, made = rotate_keys(key, out, from_sequence)
    say(f"Key {made.new.key_id} follows {made.old} from sequence {from_sequence} on: {private} and {statement}.")
    say(f"Sign with it from then on: export GSFORGET_KEY={shlex.quote(str(private))}")
    if as_json:
        places = {"private": str(private), "public": str(public), "rotation": str(statement)}
        emit_json({"old": made.old, "key_id": made.new.key_id, "from_sequence": from_sequence, **places})
    next_command(f"gsforget keys trust {shlex.quote(str(statement))} --device-dir DIR")


@keys.command()
def trust(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="signing.pub.json, or rotation.json of keys rotate.")],
    device_dir: Annotated[Path, typer.Option("--device-dir", metavar="DIR", help="The device folder.")],
    as_json: JsonOption = False,
) -> None:
    """Let a device trust its first key, or follow a rotation that its key has signed."""
    from gsforget.export.device.apply import trust_key

    trusted = trust_key(file, device_dir)
    current = trusted.current
    assert current is not None
    say(f"{device_dir} trusts signing key {current.key.key_id}, from sequence {current.first} on.")
    if as_json:
        emit_json({"device_dir": str(device_dir), **trusted.to_json()})
    next_command(f"gsforget apply FILE --device-dir {shlex.quote(str(device_dir))}")
