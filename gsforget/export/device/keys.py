"""Keys: Ed25519 for signatures, X25519 for payloads, and their files; see `key_places` for where these are.

A signing key belongs to the people who erase; a device knows its public half only.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.files import PARTIAL, flush_folder, read_json, write_json
from gsforget.export.device.key_places import DEVICE, FILES, FLEET, SIGNING, signing_key_path
from gsforget.export.device.manifest import Encryption

FORMAT = 1
SEALED = b"gsforget patch payload 1\n"
LARGEST_SEALED = 2**31 - 32  # bytes that the cipher takes at once


def key_id(public: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a raw public key."""
    return hashlib.sha256(public).hexdigest()[:16]


@dataclass(frozen=True)
class PublicKey:
    """A public key of a kind, ``signing``, ``fleet`` or ``device``: 32 raw bytes."""

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
    _write_private(private, made)
    write_json(public, made.public.to_json())
    return private, public


def device_key(root: Path) -> SigningKey:
    """A device's own key, which signs what it acknowledges: `device.key` of its folder, made where there is none.

    Beside it lies `device.pub.json`, for the server.  The caller holds the folder's lock.  Raises as ``read_signing_key``.
    """
    private, public = (root / name for name in FILES[DEVICE])
    if not private.exists():
        partial = root / f".{private.name}{PARTIAL}"  # complete or absent, as all files of the folder
        partial.unlink(missing_ok=True)
        _write_private(partial, SigningKey(Ed25519PrivateKey.generate()))
        os.replace(partial, private)
    key = read_signing_key(private)
    if not public.exists():
        write_json(public, PublicKey(DEVICE, key.public.public).to_json())
        flush_folder(root)
    return key


def _write_private(path: Path, key: SigningKey | FleetKey) -> None:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = key.private.private_bytes(encoding, form, serialization.NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as handle:
        handle.write(pem)
        handle.flush()
        os.fsync(handle.fileno())


def find_signing_key(given: Path | None = None) -> SigningKey:
    """The signing key, from where ``signing_key_path`` looks.

    Raises RequestError ``no_key`` where there is none, and as ``read_signing_key`` does.
    """
    path = signing_key_path(given)
    if not path.is_file():
        raise RequestError(f"There is no signing key {path}.", "Make one: gsforget keys new.", "no_key")
    return read_signing_key(path)


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
        key = PublicKey(str(raw["kind"]), raw_public(raw["public"]))
        fits = set(raw) == set(key.to_json()) and raw == key.to_json() and key.kind == kind
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise RequestError(f"{path} does not hold a {kind} key.", f"Name {FILES[kind][1]}.", "bad_key")
    return key


def raw_public(raw: Any) -> bytes:
    """The bytes of a public key from its 64 hexadecimal digits.  Raises ValueError for anything else."""
    if not isinstance(raw, str) or not re.fullmatch("[0-9a-f]{64}", raw):
        raise ValueError("not 64 hexadecimal digits")
    return bytes.fromhex(raw)
