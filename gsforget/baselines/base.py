"""What a baseline is: a function from a model and a request to merged weights, measured by the same code as gsforget's own.

A baseline sees training images only, chooses nothing on test images, and leaves the model that it was given as it was.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from gsforget.views import Images


@dataclass(frozen=True)
class BaselineRequest:
    """One request.

    Attributes:
        forget: class indices to forget now.
        erased: class indices that earlier requests forgot; their images are left out of training.
        num_classes: K, columns of the logits.
        task: 0 for the first request of a chain; published settings differ between requests.
        epochs: passes over the retained images at most; the budget that all methods have.
    """

    forget: tuple[int, ...]
    num_classes: int
    erased: tuple[int, ...] = ()
    task: int = 0
    epochs: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a baseline leaves.

    Attributes:
        state_dict: plain weights under the original names, on the CPU.
        seconds: wall time from the first pass to the merged weights.
        norms: per group of LoRA factors its Euclidean norm at the end; empty where the baseline has none.
        group_names: the feed-forward network of each group.
        history: one dict of plain numbers per epoch.
    """

    state_dict: dict[str, Tensor]
    seconds: float
    norms: list[float] = field(default_factory=list)
    group_names: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


class Baseline(Protocol):
    """A way to forget."""

    def __call__(
        self, model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: Any
    ) -> Result:
        """
        Args:
            model: logits from images, on the device on which to train; it is the same afterwards.
            images: training images by index.
            forget: bool [N], which of them belong to `request.forget`.
            settings: an object of the method's `settings` class.

        Raises:
            GsforgetError: kind ``diverged`` where the training ends in numbers that are none.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A way to forget with its name and numbers: what a file of this room is to define as `METHOD`.

    Attributes:
        name: as `gsforget bench --methods` spells it.
        paper: authors, place and year, arXiv number.
        run: the function itself.
        settings: makes a frozen dataclass whose defaults are the published numbers.
        trials: changes of these that tuning tries beside the defaults, on the first request of a protocol.
        control: "negative" for what must fail the audit, "positive" for what must pass it, "" for methods.
    """

    name: str
    paper: str
    run: Baseline
    settings: Callable[..., Any]
    trials: tuple[dict[str, Any], ...] = ()
    control: str = ""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with no parameter asking for gradients, and as it was afterwards.

    torch's fused encoder layer is off meanwhile: it would pass over forward hooks.
    """
    import torch

    required = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval().requires_grad_(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for module, mode in modes:
            module.training = mode


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
