"""What outlives a device's disk, so that a disk that was set back is found out: a counter, or a server that remembers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gsforget.export.device.files import flush_folder, write_json

ACKS = "acks"


class RollbackCounter(Protocol):
    """A counter that cannot be set back, such as a TPM's or a secure element's; one per model.

    With it, a whole disk that was set back is found out: its state lies behind the counter.
    """

    def read(self, model_id: str) -> int:
        """The largest sequence that was ever stored for a model; 0 where there is none."""
        ...

    def advance(self, model_id: str, sequence: int) -> None:
        """Store a sequence; a smaller one than is stored changes nothing."""
        ...


class Acknowledge(Protocol):
    """A server that is told what was applied and remembers it."""

    def applied(self, record: Mapping[str, Any]) -> None:
        """Take a record, signed by the device: what `state.json` says, ``time``, ``device``, ``signature``.

        A server checks it by `acknowledgements.Register`.
        """
        ...

    def newest(self, model_id: str) -> int:
        """The largest sequence that was acknowledged for a model; 0 where that is not known."""
        ...


class NoCounter:
    """The default: the counter is in `state.json` and the ledger, and nothing outlives the disk."""

    def read(self, model_id: str) -> int:
        return 0

    def advance(self, model_id: str, sequence: int) -> None:
        """Nothing to do: the state holds it."""


class AckFolder:
    """The default: records go into `acks/` of the device folder, if there is one, for whoever collects them."""

    def __init__(self, root: Path):
        self.folder = root / ACKS

    def applied(self, record: Mapping[str, Any]) -> None:
        if self.folder.is_dir():
            write_json(self.folder / f"{record['sequence']:04d}-{record['ledger'][:16]}.json", record)
            flush_folder(self.folder)

    def newest(self, model_id: str) -> int:
        return 0
