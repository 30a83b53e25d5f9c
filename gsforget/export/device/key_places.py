"""Where a workstation's keys are looked for, without what it takes to use them: without keys no cipher is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsforget.export.device.keys import SigningKey

SIGNING, FLEET, DEVICE = "signing", "fleet", "device"
FILES = {kind: (f"{kind}.key", f"{kind}.pub.json") for kind in (SIGNING, FLEET, DEVICE)}
ENVIRONMENT = "GSFORGET_KEY"


def default_folder() -> Path:
    """Where keys are made and looked for unless a path is given: `~/.config/gsforget`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "gsforget")


def signing_key_path(given: Path | None = None) -> Path:
    """Where the signing key is looked for: a path, else $GSFORGET_KEY, else `~/.config/gsforget/signing.key`."""
    named = given or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    return named or default_folder() / FILES[SIGNING][0]


def own_signing_key() -> SigningKey | None:
    """The signing key of this workstation; None where it has none.

    Raises as ``keys.find_signing_key`` does where $GSFORGET_KEY names a file that is not there, or a key cannot be used.
    """
    if not (signing_key_path().is_file() or os.environ.get(ENVIRONMENT)):
        return None
    from gsforget.export.device.keys import find_signing_key

    return find_signing_key()
