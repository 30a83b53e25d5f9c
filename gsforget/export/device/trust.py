"""Which public keys a device trusts, from and until when.

A rotation names the next key and is signed by the one before it, so that trust is passed on and never asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import read_json, write_json
from gsforget.export.device.key_places import SIGNING, signing_key_path
from gsforget.export.device.keys import (
    FORMAT,
    PublicKey,
    SigningKey,
    find_signing_key,
    new_keys,
    raw_public,
    read_public_key,
)

ROTATION = "rotation"
ROTATED = b"gsforget rotation 1\n"


@dataclass(frozen=True)
class Rotation:
    """The next signing key, and the sequence from which it counts, signed by the key before it."""

    old: str
    new: PublicKey
    from_sequence: int
    signature: bytes = b""

    def statement(self) -> dict[str, Any]:
        new = {"key_id": self.new.key_id, "public": self.new.public.hex()}
        return {"format": FORMAT, "kind": ROTATION, "old": self.old, "new": new, "from_sequence": self.from_sequence}

    def message(self) -> bytes:
        return ROTATED + canonical(self.statement()).encode()

    def to_json(self) -> dict[str, Any]:
        return {**self.statement(), "signature": self.signature.hex()}


def rotate(old: SigningKey, new: PublicKey, from_sequence: int) -> Rotation:
    """State that packages from a sequence on are signed by a new key.  Raises RequestError ``bad_sequence`` below 1."""
    if from_sequence < 1:
        raise RequestError(
            f"A key cannot count from sequence {from_sequence}.", "Name the next erasure's number.", "bad_sequence"
        )
    made = Rotation(old.key_id, new, from_sequence)
    return replace(made, signature=old.sign(made.message()))


def rotate_keys(old: Path | None, out: Path | None, from_sequence: int) -> tuple[Path, Path, Path, Rotation]:
    """Make the signing key that follows another, and write `rotation.json` beside it.

    Args:
        old: the key to retire; default as for ``find_signing_key``.
        out: folder of the new pair; default: `from-N` beside the old key.

    Returns:
        The paths of the new private key, its public half and the rotation; and the rotation.

    Raises RequestError as ``find_signing_key``, ``new_keys`` and ``rotate`` do.
    """
    path = signing_key_path(old)
    retiring = find_signing_key(old)
    private, public = new_keys(out or path.parent / f"from-{from_sequence:04d}")
    made = rotate(retiring, read_public_key(public), from_sequence)
    statement = private.with_name("rotation.json")
    write_json(statement, made.to_json())
    return private, public, statement, made


def read_rotation(path: Path) -> Rotation:
    """A rotation from its file, not yet believed.  Raises RequestError ``bad_rotation`` for anything else."""
    raw = read_json(path)
    try:
        new = PublicKey(SIGNING, raw_public(raw["new"]["public"]))
        number, signature = raw["from_sequence"], bytes.fromhex(raw["signature"])
        made = Rotation(str(raw["old"]), new, number, signature)
        fits = made.to_json() == raw and type(number) is int and number >= 1
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise RequestError(
            f"{path} is not a rotation of keys.", "Name rotation.json of gsforget keys rotate.", "bad_rotation"
        )
    return made


@dataclass(frozen=True)
class TrustedKey:
    """A signing key with the first sequence that it may sign, and the first that it may no longer sign (or None)."""

    key: PublicKey
    first: int = 0
    until: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"key_id": self.key.key_id, "public": self.key.public.hex(), "from": self.first, "until": self.until}


@dataclass(frozen=True)
class Trust:
    """What a device trusts: at most one key that counts now, and those that were retired before it, oldest first."""

    keys: tuple[TrustedKey, ...] = ()

    @property
    def current(self) -> TrustedKey | None:
        return next((k for k in self.keys if k.until is None), None)

    def find(self, wanted: str, sequence: int) -> PublicKey:
        """The key that may sign a package of a sequence.

        Raises SafetyError: ``no_trust`` (nothing is trusted yet), ``wrong_key`` (not a key of this device), and
        ``retired_key`` (the key ended before this sequence, or begins after it).
        """
        if not self.keys:
            raise SafetyError(
                "This device trusts no signing key yet, so that no package can be believed.",
                "gsforget keys trust signing.pub.json --device-dir DIR",
                "no_trust",
            )
        found = next((k for k in self.keys if k.key.key_id == wanted), None)
        if found is None:
            raise SafetyError(
                f"The package names signing key {wanted}, which this device does not trust.",
                "If the key was changed, type gsforget keys trust rotation.json --device-dir DIR first.",
                "wrong_key",
            )
        if sequence < found.first or (found.until is not None and sequence >= found.until):
            counts = f"from sequence {found.first}" + ("" if found.until is None else f" and until {found.until - 1}")
            raise SafetyError(
                f"Signing key {wanted} counts {counts}, and the package has sequence {sequence}.",
                "Ask for a package that is signed by the key that counts now.",
                "retired_key",
            )
        return found.key

    def add(self, key: PublicKey) -> Trust:
        """Trust a first key.  The same key again changes nothing; another one is refused (SafetyError ``other_trust``)."""
        if self.current is None:
            return Trust((TrustedKey(key),))
        if self.current.key == key:
            return self
        raise SafetyError(
            f"This device trusts signing key {self.current.key.key_id} already, and not {key.key_id}.",
            "A new key comes with a rotation that the old one signed: gsforget keys rotate --key OLD.",
            "other_trust",
        )

    def rotated(self, rotation: Rotation) -> Trust:
        """Retire the current key for the next one.  The same rotation again changes nothing.

        Raises SafetyError ``bad_rotation`` where it is not signed by the current key, names a key that was trusted
        before, or begins before the current key does.
        """
        current = self.current
        if current is None:
            raise SafetyError("This device trusts no key that could be rotated.", "Trust a key first.", "no_trust")
        if current.key == rotation.new and self.keys[-2:-1] and self.keys[-2].until == rotation.from_sequence:
            return self
        known = {k.key.key_id for k in self.keys}
        signed = rotation.old == current.key.key_id and current.key.verify(rotation.signature, rotation.message())
        if not signed or rotation.new.key_id in known or rotation.from_sequence < current.first:
            raise SafetyError(
                f"The rotation to key {rotation.new.key_id} is not signed by {current.key.key_id}, the key that this "
                "device trusts, or leads back to an earlier one.",
                "Ask for a rotation that is signed by the current key: gsforget keys rotate --key CURRENT.",
                "bad_rotation",
            )
        retired = replace(current, until=rotation.from_sequence)
        return Trust((*self.keys[:-1], retired, TrustedKey(rotation.new, rotation.from_sequence)))

    def to_json(self) -> dict[str, Any]:
        current = self.current
        return {
            "format": FORMAT,
            "keys": [current.to_json()] if current else [],
            "retired": [k.to_json() for k in self.keys if k.until is not None],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Trust:
        """Raises SafetyError ``bad_trust`` where the content is not what `to_json` gives."""
        try:
            entries = [*raw["retired"], *raw["keys"]]
            keys = [TrustedKey(PublicKey(SIGNING, raw_public(e["public"])), e["from"], e["until"]) for e in entries]
            made = cls(tuple(keys))
            numbers = [n for k in keys for n in (k.first, *(() if k.until is None else (k.until,)))]
            fits = made.to_json() == raw and all(type(n) is int for n in numbers) and len(raw["keys"]) <= 1
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise SafetyError(
                f"{where} does not hold trusted keys.", "Restore it, or install the device again.", "bad_trust"
            )
        return made


def read_trust(path: Path) -> Trust:
    """What a `trust.json` holds; nothing is trusted where it is absent.  Raises SafetyError ``bad_trust``."""
    if not path.is_file():
        return Trust()
    try:
        raw = json.loads(path.read_bytes())
    except ValueError:
        raw = {}
    return Trust.from_json(raw if isinstance(raw, dict) else {}, str(path))
