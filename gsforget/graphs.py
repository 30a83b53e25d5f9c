"""CUDA graphs of a training step, for small batches, at which a GPU may wait longer for launches than it computes.

Two things are captured.  The network, forward and backward, from a static input to the gradients of the factors: what a
task makes of the outputs lies between the two and stays ordinary code.  And the proximal step with what steers it, which
is all on the device.  A graph is captured anew where the groups, the batch or what is reused have changed.

A graph is checked against the same work done eagerly before it is used.  Where capturing fails, or the values do not
agree, training goes on eagerly, and the log says why.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gsforget import processes

LARGEST = 128  # images in a batch, above which what is launched should hide the launches; not measured yet
AGREES = 1e-3  # largest difference between a replay and the eager step, as a share of the largest value
WARM_UP = 3  # runs before a capture, in which libraries and kernels load

log = logging.getLogger("gsforget.graphs")

Read = Callable[[Tensor], Sequence[Tensor]]


class Capture(Protocol):
    """Turns work into something that does it again: CUDA graphs, or a double of them in tests."""

    def network(self, read: Read, given: Tensor, leaves: Sequence[Tensor]) -> Read:
        """`read` as one that copies its input to `given`, and whose gradients reach `leaves`, which must not move."""
        ...

    def work(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run`, which reads and writes tensors in place, as a replay of it.  It may run a few times on the way."""
        ...


class CudaCapture:
    """Captures on a GPU.  Memory that is asked for while capturing belongs to the graph."""

    def __init__(self, device: torch.device):
        self.device = device

    def network(self, read: Read, given: Tensor, leaves: Sequence[Tensor]) -> Read:
        def function(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            return tuple(read(x))

        gc.collect()  # a dropped graph is a cycle of references, with all its memory
        with torch.cuda.device(self.device):
            graphed: Any = torch.cuda.make_graphed_callables(
                function, (given, *leaves), num_warmup_iters=WARM_UP, allow_unused_input=True
            )
        return lambda x: graphed(x, *leaves)

    def work(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            side, here = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        return graph.replay


class Graphs:
    """The graphs of one training; without a `capture`, everything runs eagerly.

    Attributes:
        off: why everything runs eagerly; None where it does not.
    """

    def __init__(self, capture: Capture | None, off: str | None = None):
        self.capture, self.off = capture, off
        self._network: tuple[Hashable, Read, Any] | None = None
        self._works: dict[Hashable, Callable[[], None]] = {}

    @classmethod
    def on(cls, device: torch.device, wanted: bool, prox_on_device: bool) -> Graphs:
        """For a device; `prox_on_device`: whether the proximal step waits for nothing on the host."""
        reasons = {
            "there is no GPU": device.type != "cuda",
            "it was not asked for": not wanted,
            "several processes train together": processes.world() > 1,
            "the proximal step runs on plain PyTorch": not prox_on_device,
        }
        off = next((reason for reason, true in reasons.items() if true), None)
        if off and device.type == "cuda":
            log.info("no CUDA graphs: %s", off)
        return cls(None if off else CudaCapture(device), off)

    def network(
        self,
        key: Hashable,
        read: Read,
        given: Tensor,
        leaves: Sequence[Tensor],
        held: Callable[[], Any] = lambda: None,
    ) -> Sequence[Tensor]:
        """What `read` makes of an input, with gradient; by a graph where there can be one.

        The tensors are overwritten by the next call.

        Args:
            key: whatever else the result depends on but the values of `given` and of tensors that stay where they are.
            given: [B, …] on the device.
            leaves: tensors whose gradients are wanted.
            held: gives what the graph reads and nobody else may keep; it lives as long as the graph.
        """
        if self.capture is None or len(given) > LARGEST:
            return read(given)
        key = (key, given.shape, given.dtype)
        if self._network is None or self._network[0] != key:
            self._network = None  # its memory is free before the next one asks for some
            kept = held()
            try:
                replay = self.capture.network(read, given.clone(), leaves)
                agrees = _same_network(read, replay, given, leaves)
            except Exception as error:  # CUDA, a library or the user's own module, each with its own
                self._give_up("the network cannot be captured", error)
                return read(given)
            if not agrees:
                self._give_up("the captured network computes something else")
                return read(given)
            self._network = key, replay, kept
        return self._network[1](given)

    def work(self, key: Hashable, run: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Do `run` once, by a graph where there can be one.

        Args:
            key: whatever else `run` depends on but the values of tensors that stay where they are.
            state: every tensor that `run` changes.
        """
        if self.capture is None:
            run()
        elif key in self._works:
            self._works[key]()
        else:
            self._first(self.capture, key, run, state)

    def _first(self, capture: Capture, key: Hashable, run: Callable[[], None], state: Sequence[Tensor]) -> None:
        before = _copies(state)
        try:
            replay = capture.work(run)
        except Exception as error:
            _restore(state, before)
            self._give_up("the proximal step cannot be captured", error)
            run()
            return
        _restore(state, before)
        run()
        wanted = _copies(state)
        _restore(state, before)
        replay()
        if all(_close(got, want) for got, want in zip(state, wanted)):
            self._works[key] = replay
        else:
            _restore(state, wanted)
            self._give_up("the captured proximal step computes something else")

    def _give_up(self, what: str, error: Exception | None = None) -> None:
        reason = f"{what} ({str(error).splitlines()[0] if str(error) else type(error).__name__})" if error else what
        log.warning("no CUDA graphs: %s; training goes on without", reason)
        self.capture, self.off = None, reason
        self._network = None
        self._works.clear()
        gc.collect()  # what a failed capture held is memory that the eager step may need


def _same_network(read: Read, replay: Read, given: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether two ways give the same values and the same gradients of the leaves."""
    found = []
    for way in (read, replay):
        outputs = [t for t in way(given) if t.requires_grad]
        # No constant and no multiple of the outputs, whose gradients a norm layer would swallow.
        pull = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, leaves, pull, allow_unused=True)
        found.append([*(t.detach().clone() for t in outputs), *(g.clone() for g in gradients if g is not None)])
    return len(found[0]) == len(found[1]) and all(_close(b, a) for a, b in zip(*found))


def _close(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or not want.is_floating_point():
        return torch.equal(got, want)
    largest = want.abs().nan_to_num().max().item() if want.numel() else 0.0
    return torch.allclose(got, want, rtol=0, atol=AGREES * largest, equal_nan=True)


def _copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in state]


def _restore(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(state, kept):
            tensor.copy_(value)
