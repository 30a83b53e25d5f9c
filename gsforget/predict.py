"""A torch model behind the same `predict(batch)` that artifacts on devices have, and where it runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gsforget import processes
from gsforget.errors import RequestError
from gsforget.lora.blocks import as_logits


class TorchPredictor:
    """A model in eval mode on a device.

    Args:
        model: logits from images; it is moved to the device.
        device: where to compute.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """float32 images [N, C, H, W] to float32 logits [N, K]; the same batch always gives the same logits."""
        # TensorFloat-32 convolutions and autotuned algorithms would make a GPU's answers differ from run to run.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            images = torch.from_numpy(np.ascontiguousarray(batch, np.float32)).to(self.device)
            return as_logits(self.model(images)).float().cpu().numpy()


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`, where each of several processes has a GPU of its own.

    Raises RequestError for cuda where there is none, or fewer than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RequestError(f"There is no device {name!r}.", "Type --device auto, cpu or cuda.", "unknown_device")
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("This machine has no CUDA device that torch can use.", "Type --device cpu.", "no_cuda")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    own = processes.gpu()
    return torch.device("cuda") if own is None else torch.device("cuda", own)
