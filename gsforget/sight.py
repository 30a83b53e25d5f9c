"""What the model under training makes of images, given by their rows.

Outputs of everything before the first module that trains are kept and reused (`prefix`); of several processes each computes
a share (`processes`); steps for small batches may be replayed (`graphs`).  Whoever asks sees none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gsforget import processes
from gsforget.machine import available_memory
from gsforget.precision import in_bfloat16
from gsforget.prefix import PrefixReuse
from gsforget.tasks.base import Seen, Task
from gsforget.there import there

if TYPE_CHECKING:
    from gsforget.graphs import Graphs
    from gsforget.views import Images

EVAL_BATCH = 256
PROBE = 6  # images on which it is tried what may be reused


class Sight:
    """
    Attributes:
        probe: a few of the images, [6, C, H, W], on the device.
        reuse: what answers instead of the frozen part of the model; None before `reuse_from` and after `end_reuse`.
    """

    def __init__(self, model: nn.Module, task: Task, images: Images, autocast: bool = False):
        """
        Args:
            model: in eval mode, on the device on which to train.
            autocast: run the network, and nothing else, in bfloat16.
        """
        self.model, self.source = model, images
        self.count, self.device = len(images.labels), next(model.parameters()).device
        self.probe = self.images(torch.linspace(0, self.count - 1, PROBE).long())
        self.read = task.reader(model, self.probe[:2])
        if autocast:
            self.read = in_bfloat16(self.read, self.device)
        self.batch = min(EVAL_BATCH, getattr(task, "batch", EVAL_BATCH))
        self.reuse: PrefixReuse | None = None
        self._parts: Seen | None = None  # of two images: which tensors there are, for those that a graph gives

    def images(self, rows: Tensor) -> Tensor:
        """The images themselves, [B, C, H, W], on the device."""
        return there(self.source.batch(rows), self.device)

    def of(self, rows: Tensor) -> Seen:
        """What the model makes of images, each tensor [B, …]; of several processes all get the whole."""
        mine: list[Seen] = []

        def read(share: Tensor) -> list[Tensor]:
            mine.append(self._run(share))
            return mine[0].tensors

        tensors = processes.gather_rows(read, rows)
        return mine[0].with_tensors(tensors)

    @torch.no_grad()
    def of_many(self, rows: Tensor) -> Seen:
        """The same without gradients, in batches, float32."""
        return Seen.joined([self.of(piece) for piece in rows.split(self.batch)])

    def to_train(self, rows: Tensor, graphs: Graphs, key: Hashable, leaves: Callable[[], Sequence[Tensor]]) -> Seen:
        """As `of`, by a CUDA graph where there is one.

        Args:
            key: what else than the images the graph depends on, such as which groups train.
            leaves: gives the tensors whose gradients are wanted.
        """
        if graphs.off is not None:
            return self.of(rows)
        reuse = self.reuse
        tensors = graphs.network(
            (key, reuse is not None),
            self._tensors,
            self.images(rows) if reuse is None else there(rows, self.device),
            leaves(),
            lambda: None if reuse is None else reuse.blanks(len(rows)),
        )
        if self._parts is None:
            with torch.no_grad():
                self._parts = self.read(self.probe[:2])
        return self._parts.with_tensors(tensors)

    def reuse_from(self, first: str, budget: float | None = None) -> None:
        """Keep what all that runs before a module says of each image, where that can be done.

        Args:
            first: dotted name of the first module that still trains.
            budget: bytes that may be kept; None: a quarter of what is free.
        """
        budget = self._free_memory() / 4 if budget is None else budget
        least = min(processes.of_all(budget))
        plan = PrefixReuse.plan(self.model, first, self.probe, self.count, least, self._answers)
        plans = processes.of_all((plan.needed, len(plan.frozen)) if plan else None)
        self.reuse = plan if plans == [plans[0]] * len(plans) else None
        if self.reuse:
            self.reuse.fill(self.count, self.images, self.batch)

    def end_reuse(self) -> list[str]:
        """Free what is kept; returns the names of the modules whose outputs were."""
        kept = self.reuse.needed if self.reuse else []
        self.reuse = None
        return kept

    def _run(self, rows: Tensor) -> Seen:
        if self.reuse is None:
            return self.read(self.images(rows))
        with self.reuse.images(rows):
            return self.read(self.reuse.blank_input(self.probe, len(rows)))

    def _tensors(self, given: Tensor) -> list[Tensor]:
        """What there is to see in images or, where outputs are reused, in rows."""
        return (self.read(given) if self.reuse is None else self._run(given)).tensors

    def _answers(self, images: Tensor) -> Tensor:
        """All that the losses look at, [B, …]: boxes depend on more of the network than logits do."""
        return torch.cat([tensor.flatten(1) for tensor in self.read(images).tensors], 1)

    def _free_memory(self) -> float:
        """Bytes that are free where the model is."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return available_memory() / processes.on_this_machine()
