"""What a device has applied, signed by the device itself, and the server's side: who has reached which erasure.

A device makes its key when it first has something to sign, and keeps it in its folder.  The server knows the public half
(`device.pub.json`) from when it enrolled the device, so that nobody else can say that an erasure has arrived, and a device
that later says less than it said before was set back.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.canonical import canonical
from gsforget.errors import RequestError, SafetyError
from gsforget.export.device.counters import AckFolder, Acknowledge, RollbackCounter
from gsforget.export.device.files import flush_folder, read_json, write_json
from gsforget.export.device.keys import DEVICE, PublicKey, SigningKey, device_key, raw_public
from gsforget.export.device.records import State
from gsforget.export.device.store import DeviceFolder, now_text

SIGNED = b"gsforget acknowledgement 1\n"
HINT = "Ask the device again; take nothing from elsewhere in its name."


@dataclass(frozen=True)
class Acknowledgement:
    """What a device said and signed.

    Attributes:
        device: id of its key.
        state: what it held.
        time: UTC, of the device's clock.
        nonce: of the server's question that it answers; None where it spoke by itself, after an erasure.
    """

    device: str
    state: State
    time: str
    nonce: str | None


def sign(state: State, key: SigningKey, nonce: str | None = None) -> dict[str, Any]:
    """The record of what a device holds, signed: the fields of `state.json`, ``time``, ``nonce``, ``device``, ``signature``."""
    public = {"key_id": key.key_id, "public": key.public.public.hex()}
    record = {**state.to_json(), "time": now_text(), "nonce": nonce, "device": public}
    return {**record, "signature": key.sign(SIGNED + canonical(record).encode()).hex()}


def verify(record: Mapping[str, Any], device: PublicKey, nonce: str | None = None) -> Acknowledgement:
    """What a record says, if this device signed it, and in answer to this question where there was one.

    Raises SafetyError ``bad_acknowledgement``.
    """
    try:
        signed = {k: v for k, v in record.items() if k != "signature"}
        held = device.verify(bytes.fromhex(record["signature"]), SIGNED + canonical(signed).encode())
        stated = {"key_id": device.key_id, "public": device.public.hex()}
        if not held or record["device"] != stated or record["nonce"] != nonce:
            raise ValueError("another key, or the answer to another question")
        of_state = {k: v for k, v in signed.items() if k not in ("time", "nonce", "device")}
        return Acknowledgement(device.key_id, State.from_json(of_state), str(record["time"]), nonce)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SafetyError(
            f"An acknowledgement in the name of device {device.key_id} is not one that it has signed.",
            HINT,
            "bad_acknowledgement",
        ) from error


def tell(folder: DeviceFolder, state: State) -> None:
    """Acknowledge what was applied, where anybody is to be told; the device's key is made if it has none."""
    told = folder.acknowledge
    if isinstance(told, AckFolder) and not told.folder.is_dir():
        return
    told.applied(sign(state, device_key(folder.root)))


def report(
    root: str | Path,
    nonce: str,
    counter: RollbackCounter | None = None,
    acknowledge: Acknowledge | None = None,
) -> dict[str, Any]:
    """A device's answer to a server that asks what it holds now; signed.

    The folder is finished and checked first, and all its files are compared with their hashes.

    Args:
        counter, acknowledge: as of `apply`.

    Raises RequestError ``empty_device``, SafetyError as `apply.open_device` does.
    """
    from gsforget.export.device.apply import empty_device
    from gsforget.export.device.rollforward import RollForward

    folder = DeviceFolder(root, counter, acknowledge)
    if not folder.root.is_dir():
        raise empty_device(folder.root)
    with folder.locked():
        RollForward(folder).recover()
        state = folder.check()
        if state is None:
            raise empty_device(folder.root)
        for held in state.artifacts:
            folder.check_artifact(held)
        return sign(state, device_key(folder.root), nonce)


def question() -> str:
    """A nonce that was never used before."""
    return secrets.token_hex(16)


class Register:
    """The server's side: devices that it knows, and the furthest that each has come, kept in one JSON file.

    Args:
        path: of the file; made with the first device.

    Raises RequestError ``bad_file`` for a file that is none of ours.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        raw = read_json(self.path) if self.path.is_file() else {}
        try:
            self._keys = {d: PublicKey(DEVICE, raw_public(one["public"])) for d, one in raw.items()}
            self._reached = {d: {str(m): int(n) for m, n in one["reached"].items()} for d, one in raw.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"{self.path} is no register of devices.", "Name another file.", "bad_file") from error

    def enroll(self, device: PublicKey) -> None:
        """Know a device from now on, by its `device.pub.json` (``read_public_key(path, "device")``), fetched from itself."""
        self._keys[device.key_id] = device
        self._reached.setdefault(device.key_id, {})
        self._write()

    def take(self, record: Mapping[str, Any], nonce: str | None = None) -> Acknowledgement:
        """Verify a record and remember how far its device has come.

        Args:
            nonce: of the question that this server asked.

        Raises SafetyError: ``unknown_device``, ``bad_acknowledgement``, and ``rollback`` where a device that was asked
        holds fewer erasures than it has acknowledged.  An old acknowledgement that comes again changes nothing.
        """
        named = record.get("device")
        key = self._keys.get(str(named.get("key_id"))) if isinstance(named, Mapping) else None
        if key is None:
            raise SafetyError(
                "An acknowledgement comes from a device that is not enrolled.",
                "Enroll it by its device.pub.json, fetched from the device itself.",
                "unknown_device",
            )
        said = verify(record, key, nonce)
        reached = self.newest(said.device, said.state.model_id)
        if nonce is not None and said.state.sequence < reached:
            raise SafetyError(
                f"Device {said.device} holds erasure {said.state.sequence}, and had acknowledged {reached}: it was set back.",
                "Install a full package on it, made by gsforget export --patch --full.",
                "rollback",
            )
        self._reached[said.device][said.state.model_id] = max(reached, said.state.sequence)
        self._write()
        return said

    def newest(self, device: str, model_id: str) -> int:
        """The largest sequence that a device has acknowledged for a model; 0 where it has none."""
        return self._reached.get(device, {}).get(model_id, 0)

    def behind(self, model_id: str, sequence: int) -> list[str]:
        """The enrolled devices that have not acknowledged an erasure of a model."""
        return sorted(device for device in self._keys if self.newest(device, model_id) < sequence)

    def _write(self) -> None:
        content = {d: {"public": key.public.hex(), "reached": self._reached[d]} for d, key in self._keys.items()}
        write_json(self.path, content)
        flush_folder(self.path.parent)
