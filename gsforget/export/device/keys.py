"""Keys: Ed25519 for signatures, X25519 for payloads, and which public keys a device trusts, from and until when.

A signing key belongs to the people who erase; a device knows its public half only.  A rotation names the next key and
is signed by the one before it, so that trust is passed on and never asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import write_file
from gsforget.export.device.manifest import Encryption

FORMAT = 1
SIGNING, FLEET, ROTATION = "signing", "fleet", "rotation"
FILES = {SIGNING: ("signing.key", "signing.pub.json"), FLEET: ("fleet.key", "fleet.pub.json")}
ROTATED = b"gsforget rotation 1\n"
SEALED = b"gsforget patch payload 1\n"
ENVIRONMENT = "GSFORGET_KEY"
LARGEST_SEALED = 2**31 - 32  # bytes that the cipher takes at once


def default_folder() -> Path:
    """Where keys are made and looked for unless a path is given: `~/.config/gsforget`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "gsforget")


def key_id(public: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a raw public key."""
    return hashlib.sha256(public).hexdigest()[:16]


@dataclass(frozen=True)
class PublicKey:
    """A public key of a kind, ``signing`` or ``fleet``: 32 raw bytes."""

    kind: str
    public: bytes

    @property
    def key_id(self) -> str:
        return key_id(self.public)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "key_id": self.key_id, "public": self.public.hex()}

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether a signature of this signing key holds for a message."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """A private signing key."""

    private: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(SIGNING, self.private.public_key().public_bytes_raw())

    @property
    def key_id(self) -> str:
        return self.public.key_id

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of an Ed25519 signature."""
        return self.private.sign(message)


@dataclass(frozen=True)
class FleetKey:
    """A private key that opens payloads."""

    private: X25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(FLEET, self.private.public_key().public_bytes_raw())

    def open(self, sealed: bytes | memoryview, encryption: Encryption, identity: bytes) -> bytes:
        """Decrypt a payload.

        Args:
            identity: what the payload was bound to when it was sealed.

        Raises SafetyError ``wrong_fleet_key`` for another recipient, ``bad_payload`` where the bytes were changed.
        """
        if encryption.recipient != self.public.key_id:
            raise SafetyError(
                f"The payload is encrypted for fleet key {encryption.recipient}, and this device has "
                f"{self.public.key_id}.",
                "Ask for a package for this fleet: gsforget export --patch --encrypt-for fleet.pub.json.",
                "wrong_fleet_key",
            )
        ephemeral = bytes.fromhex(encryption.ephemeral)
        try:
            shared = self.private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
            cipher = ChaCha20Poly1305(_derive(shared, ephemeral, self.public.public))
            return cipher.decrypt(bytes.fromhex(encryption.nonce), sealed, identity)
        except (InvalidTag, ValueError) as error:
            message = "The payload does not open with the fleet key: it was changed, or belongs to another package."
            raise SafetyError(message, "Ask for the package again where it was built.", "bad_payload") from error


def seal(plain: bytes, recipient: PublicKey, identity: bytes) -> tuple[bytes, Encryption]:
    """Encrypt a payload for a fleet key, bound to what the package is; see `package.identity`.

    A new X25519 key is agreed with the recipient's, HKDF-SHA256 makes a key of it, and ChaCha20-Poly1305 encrypts.
    Raises RequestError ``not_a_fleet_key``, or ``too_large`` beyond 2 GiB.
    """
    if recipient.kind != FLEET:
        raise RequestError(
            "Payloads are encrypted for a fleet key, not for a signing key.", "Name fleet.pub.json.", "not_a_fleet_key"
        )
    if len(plain) > LARGEST_SEALED:
        raise RequestError("A payload beyond 2 GiB cannot be encrypted.", "Leave out --encrypt-for.", "too_large")
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(recipient.public))
    nonce = os.urandom(12)
    sealed = ChaCha20Poly1305(_derive(shared, public, recipient.public)).encrypt(nonce, plain, identity)
    return sealed, Encryption(recipient.key_id, public.hex(), nonce.hex())


def _derive(shared: bytes, ephemeral: bytes, recipient: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, None, SEALED + ephemeral + recipient).derive(shared)


def new_keys(folder: Path, fleet: bool = False) -> tuple[Path, Path]:
    """Make a key pair and write it as `signing.key` and `signing.pub.json`, or `fleet.key` and `fleet.pub.json`.

    Returns the two paths.  Raises RequestError ``key_exists`` where one of them is there: keys are never overwritten.
    """
    kind = FLEET if fleet else SIGNING
    private, public = (folder / name for name in FILES[kind])
    for path in (private, public):
        if path.exists():
            raise RequestError(f"{path} is there already.", "Name another folder: --out DIR.", "key_exists")
    made: SigningKey | FleetKey = (
        FleetKey(X25519PrivateKey.generate()) if fleet else SigningKey(Ed25519PrivateKey.generate())
    )
    folder.mkdir(parents=True, exist_ok=True)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = made.private.private_bytes(encoding, form, serialization.NoEncryption())
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as handle:
        handle.write(pem)
        handle.flush()
        os.fsync(handle.fileno())
    write_json(public, made.public.to_json())
    return private, public


def signing_key_path(given: Path | None = None) -> Path:
    """Where the signing key is looked for: a path, else $GSFORGET_KEY, else `~/.config/gsforget/signing.key`."""
    named = given or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    return named or default_folder() / FILES[SIGNING][0]


def find_signing_key(given: Path | None = None) -> SigningKey:
    """The signing key, from where ``signing_key_path`` looks.

    Raises RequestError ``no_key`` where there is none, and as ``read_signing_key`` does.
    """
    path = signing_key_path(given)
    if not path.is_file():
        raise RequestError(f"There is no signing key {path}.", "Make one: gsforget keys new.", "no_key")
    return read_signing_key(path)


def own_signing_key() -> SigningKey | None:
    """The signing key of this workstation; None where it has none.

    Raises as ``find_signing_key`` does where $GSFORGET_KEY names a file that is not there, or a key cannot be used.
    """
    path = signing_key_path()
    return find_signing_key() if path.is_file() or os.environ.get(ENVIRONMENT) else None


def own_public_key() -> PublicKey | None:
    """The public half of this workstation's signing key, from the file beside it; None where there is none."""
    path = signing_key_path().with_name(FILES[SIGNING][1])
    return read_public_key(path) if path.is_file() else None


def read_signing_key(path: Path) -> SigningKey:
    """A signing key from its PEM file.

    Raises RequestError ``bad_key`` for a file of another kind, ``open_key`` where others than its owner may read it.
    """
    private = _read_private(path)
    if not isinstance(private, Ed25519PrivateKey):
        raise RequestError(f"{path} is not an Ed25519 key.", "Make one: gsforget keys new.", "bad_key")
    return SigningKey(private)


def read_fleet_key(path: Path) -> FleetKey:
    """A fleet key from its PEM file.  Raises as ``read_signing_key`` does."""
    private = _read_private(path)
    if not isinstance(private, X25519PrivateKey):
        raise RequestError(f"{path} is not an X25519 key.", "Copy fleet.key of gsforget keys new --fleet.", "bad_key")
    return FleetKey(private)


def _read_private(path: Path) -> Any:
    try:
        raw = path.read_bytes()
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise RequestError(f"{path} can be read by others than its owner.", f"chmod 600 {path}", "open_key")
        return serialization.load_pem_private_key(raw, None)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}).", "Check the path.", "no_key") from error
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"{path} is not an unencrypted private key in PEM.", "Name another file.", "bad_key"
        ) from error


def read_public_key(path: Path, kind: str = SIGNING) -> PublicKey:
    """A public key from its JSON file.  Raises RequestError ``bad_key`` for anything else."""
    raw = read_json(path)
    try:
        key = PublicKey(str(raw["kind"]), _public(raw["public"]))
        fits = set(raw) == set(key.to_json()) and raw == key.to_json() and key.kind == kind
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise RequestError(f"{path} does not hold a {kind} key.", f"Name {FILES[kind][1]}.", "bad_key")
    return key


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
        new = PublicKey(SIGNING, _public(raw["new"]["public"]))
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
            keys = [TrustedKey(PublicKey(SIGNING, _public(e["public"])), e["from"], e["until"]) for e in entries]
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.  Raises RequestError ``bad_file`` for an absent file and for anything else."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}).", "Check the path.", "bad_file") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON ({error}).", "Name another file.", "bad_file") from error
    if not isinstance(raw, dict):
        raise RequestError(f"{path} does not hold a JSON object.", "Name another file.", "bad_file")
    return raw


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object for people and programs, complete or not at all."""
    write_file(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _public(raw: Any) -> bytes:
    if not isinstance(raw, str) or not re.fullmatch("[0-9a-f]{64}", raw):
        raise ValueError("not 64 hexadecimal digits")
    return bytes.fromhex(raw)
