"""The negative control: forget accuracy 0 without forgetting anything.

The classifier's rows of the forgotten classes are zeroed and their biases put at -10,000, so that no image is ever given
these classes.  Features, and with them all that an attacker could use, stay as they were: an audit that passes this
model audits nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gsforget.baselines.base import BaselineRequest, Method, Result, frozen, plain_state
from gsforget.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.views import Images

BIAS = -1e4  # below any logit, and a number that float16 holds


@dataclass(frozen=True)
class HeadMaskSettings:
    """There is nothing to set."""


def head_mask(
    model: nn.Module,
    images: Images,
    forget: Tensor,
    request: BaselineRequest,
    settings: HeadMaskSettings | None = None,
) -> Result:
    """Mask the classes of this request and of earlier ones; logits of all others stay bit-identical.

    Raises:
        RequestError: kind ``no_classifier`` where the model does not end in a linear layer, ``no_bias`` where that
            layer has no bias.
    """
    import torch

    from gsforget.features import find_classifier

    start = time.perf_counter()
    device = next(model.parameters()).device
    with frozen(model):
        classifier = find_classifier(model, images.batch(torch.arange(min(2, len(images.labels)))).to(device))
    state = plain_state(model)
    if f"{classifier}.bias" not in state:
        raise RequestError(
            f"The classifier {classifier} has no bias, so its classes cannot be masked by it.",
            "Mask a model whose last linear layer has a bias.",
            "no_bias",
        )
    rows = sorted({*request.forget, *request.erased})
    state[f"{classifier}.weight"][rows] = 0
    state[f"{classifier}.bias"][rows] = BIAS
    return Result(state, time.perf_counter() - start)


METHOD = Method("head-mask", "the negative control of this project", head_mask, HeadMaskSettings, control="negative")
