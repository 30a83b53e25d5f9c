"""What the tests of the device folder ask again and again.  `conftest.py` loads it as ``device_helpers``."""

from pathlib import Path

import pytest

from gsforget.errors import GsforgetError
from gsforget.export.device import opening


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file of a device folder but the lock."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "lock"}


def refused(kind, call, *args, **kwargs):
    kinds = (kind,) if isinstance(kind, str) else kind
    with pytest.raises(GsforgetError) as caught:
        call(*args, **kwargs)
    assert caught.value.kind in kinds, caught.value.message
    return caught.value


def logits(predictor, seed=3):
    return predictor.predict(opening.noise(seed, 4, predictor.info.preprocess.input_size))
