"""What the host knows, put on the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, before which the host does not wait for what the device has to do."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def places(flags: Tensor, device: torch.device) -> Tensor:
    """Where flags, bool [B] on the host, are set: int64 [M] on a device.

    On the device itself a selection by flags would wait: how much it selects is known there only.
    """
    return there(torch.nonzero(flags)[:, 0], device)
