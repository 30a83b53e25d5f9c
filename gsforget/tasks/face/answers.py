"""A face model that is asked like a classifier: whom of its head's people an image shows.

Images in, answers out: no label goes in, as released code lets it at evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gsforget.tasks.face.model import FaceTransformer, TimmFace

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.tasks.face.model import FaceModel

PREFIX = "face."  # of tensor names


class FaceClassifier(nn.Module):
    """Images [B, C, H, W] to the answers [B, K] of the head, its last linear layer."""

    def __init__(self, face: FaceModel):
        super().__init__()
        self.face = face

    def forward(self, images: Tensor) -> Tensor:
        read = self.face.features if self.face.loss.kind == "softmax" else self.face
        return self.face.loss(read(images))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw anew what no layer of torch does by itself, and what timm draws by rules of its own."""
        from timm.layers import trunc_normal_

        if isinstance(self.face, FaceTransformer):
            for parameter in (self.face.pos_embedding, self.face.cls_token):
                trunc_normal_(parameter, std=0.02)
        elif isinstance(self.face, TimmFace) and hasattr(self.face.backbone, "init_weights"):
            self.face.backbone.init_weights()
