"""The container of a package (`.gsf`): a signed manifest, and a payload that the manifest holds the hash of.

Nothing in the file is believed before the step that makes it believable: lengths against the file's size, then the form
of the manifest, then its signature, then the payload's hash.  `docs/patches.md` describes the format.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device import keys
from gsforget.export.device.files import write_file
from gsforget.export.device.keys import FleetKey, PublicKey
from gsforget.export.device.manifest import Manifest, bad_package
from gsforget.export.device.strict_json import TIME
from gsforget.export.device.trust import Trust

SUFFIX = ".gsf"
MAGIC, FORMAT = b"GSFPATCH", 1
HEADER = struct.Struct("<8sII")  # magic, format, length of the manifest
SIGNATURE = 64
SIGNED = b"gsforget patch 1\n"
LARGEST_MANIFEST = 64 * 2**20


@dataclass(frozen=True)
class Package:
    """A package file whose structure is whole; nothing in it is to be believed until ``verify`` has returned.

    Attributes:
        path: the file.
        manifest: its content.
        signed: the manifest's bytes.
        signature: over them.
        payload_at: where in the file the payload begins; it reaches to the end.
    """

    path: Path
    manifest: Manifest
    signed: bytes
    signature: bytes
    payload_at: int

    @property
    def manifest_sha256(self) -> str:
        """What a device's ledger and intent record call this package by."""
        return hashlib.sha256(self.signed).hexdigest()

    def stored(self) -> bytes:
        """The payload's bytes as they lie in the file.  Raises SafetyError ``bad_payload`` where they were changed."""
        size = self.manifest.payload.bytes
        with open(self.path, "rb") as handle:
            handle.seek(self.payload_at)
            raw = handle.read(size + 1)
        if len(raw) != size or hashlib.sha256(raw).hexdigest() != self.manifest.payload.sha256:
            raise _bad_payload(self.path)
        return raw

    def plain(self, fleet: FleetKey | None = None) -> bytes:
        """The payload, decrypted where it is encrypted.

        Raises SafetyError: ``bad_payload``, ``wrong_fleet_key``, and ``no_fleet_key`` where a key is needed.
        """
        raw, payload = self.stored(), self.manifest.payload
        if payload.encryption is None:
            return raw
        if fleet is None:
            raise SafetyError(
                f"The payload of {self.path} is encrypted for fleet key {payload.encryption.recipient}, and this device "
                "has none.",
                "Put fleet.key into the device folder.",
                "no_fleet_key",
            )
        plain = fleet.open(raw, payload.encryption, identity(self.manifest))
        if len(plain) != payload.plain_bytes or hashlib.sha256(plain).hexdigest() != payload.plain_sha256:
            raise _bad_payload(self.path)
        return plain


def identity(manifest: Manifest) -> bytes:
    """What an encrypted payload is bound to, so that it opens in no other package: the associated data."""
    m = manifest
    return canonical(
        {
            "kind": m.kind,
            "model_id": m.model_id,
            "sequence": m.sequence,
            "precision": m.precision,
            "created": m.created.strftime(TIME),
            "key_id": m.key_id,
            "plain_bytes": m.payload.plain_bytes,
            "plain_sha256": m.payload.plain_sha256,
        }
    ).encode()


def plain_payload(payload: bytes) -> dict[str, Any]:
    """The manifest's ``payload`` for a payload that is stored as it is."""
    digest = hashlib.sha256(payload).hexdigest()
    sizes = {"bytes": len(payload), "plain_bytes": len(payload)}
    return {**sizes, "sha256": digest, "plain_sha256": digest, "encryption": None}


def write_package(
    path: Path,
    manifest: dict[str, Any],
    payload: bytes,
    sign: Callable[[bytes], bytes],
    recipient: PublicKey | None = None,
) -> Package:
    """Write a package, complete or not at all.

    Args:
        manifest: its content; ``payload`` in it is filled in here.
        payload: the plain bytes.
        sign: gives the 64 bytes of a signature by the key that ``key_id`` names, such as ``SigningKey.sign``.
        recipient: public fleet key to encrypt the payload for.

    Returns:
        The package as a device will read it.

    Raises:
        SafetyError: ``bad_package``: the manifest is not one that a device would take.
    """
    content = Manifest.from_json({**manifest, "payload": plain_payload(payload)}, str(path))
    stored = payload
    if recipient is not None:
        stored, encryption = keys.seal(payload, recipient, identity(content))
        digest = hashlib.sha256(stored).hexdigest()
        sealed = replace(content.payload, bytes=len(stored), sha256=digest, encryption=encryption)
        content = replace(content, payload=sealed)
    signed = canonical(content.to_json()).encode()
    if len(signed) > LARGEST_MANIFEST:
        raise bad_package(str(path), "its manifest is too long")
    header = HEADER.pack(MAGIC, FORMAT, len(signed))
    write_file(path, b"".join((header, signed, sign(SIGNED + signed), stored)))
    return read_package(path)


def read_package(path: Path) -> Package:
    """Read a package's manifest, and check its structure; the payload is read by ``Package.plain``.

    Raises RequestError ``no_file`` where there is none, SafetyError ``bad_package`` for a file that is cut, longer than
    it says, of another kind or format, or whose manifest is not canonical and valid.
    """
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            header = handle.read(HEADER.size)
            if len(header) < HEADER.size or not header.startswith(MAGIC):
                raise bad_package(str(path), "it does not begin as one")
            _, number, length = HEADER.unpack(header)
            if number != FORMAT:
                raise bad_package(str(path), f"its format is {number}, and this gsforget reads format {FORMAT}")
            start = HEADER.size + length + SIGNATURE
            if length > LARGEST_MANIFEST or start > size:
                raise bad_package(str(path), "it ends before its manifest and signature do")
            signed, signature = handle.read(length), handle.read(SIGNATURE)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}).", "Check the path.", "no_file") from error
    manifest = Manifest.parse(signed, str(path))
    if size - start != manifest.payload.bytes:
        raise bad_package(str(path), "its payload is shorter or longer than its manifest says")
    return Package(Path(path), manifest, signed, signature, start)


def verify(package: Package, trust: Trust, now: datetime | None = None) -> Manifest:
    """The manifest of a package that a trusted key signed for its sequence, and that has not expired.

    Args:
        now: UTC; default: this machine's clock.

    Raises SafetyError: ``no_trust``, ``wrong_key``, ``retired_key``, ``bad_signature``, ``expired``.
    """
    manifest = verify_signature(package, trust)
    if manifest.expires is not None and (now or datetime.now(UTC)) >= manifest.expires:
        raise SafetyError(
            f"{package.path} expired on {manifest.expires.strftime('%d %B %Y')}.",
            "Ask for a new package where it was built, and check this device's clock.",
            "expired",
        )
    return manifest


def verify_signature(package: Package, trust: Trust) -> Manifest:
    """As ``verify``, but without the clock: for a package that was accepted before it expired."""
    m = package.manifest
    if not trust.find(m.key_id, m.sequence).verify(package.signature, SIGNED + package.signed):
        raise SafetyError(
            f"The signature of {package.path} does not hold: the file was changed, or signed by another key.",
            "Ask for the package again where it was built.",
            "bad_signature",
        )
    return m


def _bad_payload(path: Path) -> SafetyError:
    hint = "Ask for the package again where it was built."
    return SafetyError(f"The payload of {path} is not the one that was signed.", hint, "bad_payload")
