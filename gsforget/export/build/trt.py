"""What an engine must let erasures change: the weights of the feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gsforget.errors import RequestError

if TYPE_CHECKING:
    from torch import nn


def erasable(model: nn.Module, input_size: tuple[int, int, int], task: str = "classify") -> list[str]:
    """Names of the weights that an erasure may change, in the order in which they run.

    Args:
        model: of a task; input_size: channels, height and width of its images.

    Returns:
        Names as in the state dict and in the ONNX file; empty for a model without feed-forward networks.
    """
    import torch

    from gsforget.tasks import find_task

    try:
        found = find_task(task).networks(model, torch.zeros(1, *input_size))
    except RequestError:
        return []
    return [f"{linear}.weight" for block in found for linear in block.linears]
