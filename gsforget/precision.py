"""In which precision the network runs while it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from gsforget.tasks.base import Reader, Seen


def in_bfloat16(read: Reader, device: torch.device) -> Reader:
    """A reader under autocast, whose results are float32.  No cast is kept, as a captured network could not have it."""

    def run(images: Tensor) -> Seen:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            seen = read(images)
        return seen.with_tensors([tensor.float() for tensor in seen.tensors])

    return run
