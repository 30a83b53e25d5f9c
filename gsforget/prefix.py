"""What lies before the first active group is computed once per image and reused.

While a request trains, everything that runs before the first active feed-forward network is frozen, so its outputs for
an image never change.  `PrefixReuse` finds, for any module, which outputs of that frozen part the rest really reads: it
runs the model on a probe batch with every frozen module answering from a recording, poisons one recording at a time
with NaN, and sees whether the logits change.  Those few outputs are kept for every image; all other frozen modules
answer with blanks.  The plan is checked on other images before it is used, and dropped where it does not hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsforget import processes
from gsforget.lora.blocks import as_logits

Answers = Callable[[Tensor], Tensor]  # images [B, …] -> all that training looks at, [B, …]

TOLERANCE = 1e-4


class _Reached(Exception):
    """The first layer that trains is about to run: all frozen outputs are known."""


@dataclass
class _Frozen:
    """A frozen module whose forward is answered from a recording; `rows` output rows per image."""

    name: str
    module: nn.Module
    recorded: Tensor
    rows: int
    blanks: dict[int, Tensor] = field(default_factory=dict)
    own: Any = field(init=False)  # a forward that somebody else had put on the instance

    def __post_init__(self) -> None:
        self.own = self.module.__dict__.get("forward")

    def restore(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self.own is not None:
            self.module.forward = self.own

    def blank(self, images: int) -> Tensor:
        if images not in self.blanks:
            self.blanks = {images: self.recorded.new_zeros((images * self.rows, *self.recorded.shape[1:]))}
        return self.blanks[images]


class PrefixReuse:
    """Reuse of frozen outputs before `first`, the first linear layer that still trains.

    Use `PrefixReuse.plan(...)`, then `fill` once, then `with reuse.images(indices): model(blank)`.
    """

    def __init__(
        self, model: nn.Module, first: str, frozen: list[_Frozen], needed: list[str], answers: Answers | None = None
    ):
        self.model, self.run = model, answers or _logits_of(model)
        self.first = first
        self.frozen = frozen
        self.needed = needed
        self.store: dict[str, Tensor] = {}

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        first: str,
        probe: Tensor,
        images: int,
        budget: float,
        answers: Answers | None = None,
    ) -> PrefixReuse | None:
        """Find what must be kept; None where nothing can be gained or the budget (bytes) is too small.

        Args:
            model: in eval mode, on the probe's device.
            first: dotted name of the first linear layer that trains.
            probe: float [B, C, H, W], B >= 3, of different images.
            images: how many images will be kept.
            answers: runs the model and returns all that training looks at; None: its logits.
        """
        run = answers or _logits_of(model)
        half = max(2, len(probe) // 2)
        frozen = _record_frozen(model, first, probe[:half], run)
        with torch.no_grad():
            truth = run(probe[:half])
        while frozen:
            plan = cls(model, first, frozen, [], run)
            plan.needed = [f.name for f in frozen if plan._matters(f, probe[:half], truth)]
            size = sum(f.recorded.nbytes for f in frozen if f.name in plan.needed) / half * images
            if size <= budget and plan._holds(probe):
                return plan
            if size <= budget:
                return None
            frozen = frozen[:-1]
        return None

    def _matters(self, poisoned: _Frozen, probe: Tensor, truth: Tensor) -> bool:
        """Whether the logits change when one recording is replaced by NaN."""

        def answer(f: _Frozen) -> Tensor:
            return torch.full_like(f.recorded, torch.nan) if f is poisoned else f.recorded.clone()

        return not torch.allclose(self._answered(answer, probe), truth, atol=TOLERANCE, rtol=TOLERANCE)

    def _holds(self, probe: Tensor) -> bool:
        """Whether kept outputs, and a blank input, give the same logits for images in another order and number."""
        truth = self._run(probe)
        order = torch.arange(len(probe)).flip(0)
        try:
            self.fill(len(probe), lambda i: probe[i], 2, shared=False)
            with self.images(order):
                reused = self._run(self.blank_input(probe, len(order)))
        except Exception:  # the model may refuse wrong shapes in its own words
            return False
        finally:
            self.store.clear()
        truth = truth[order.to(truth.device)]
        return reused.shape == truth.shape and torch.allclose(reused, truth, atol=TOLERANCE, rtol=TOLERANCE)

    @torch.no_grad()
    def _run(self, batch: Tensor) -> Tensor:
        return self.run(batch)

    def _answered(self, answer: Callable[[_Frozen], Tensor], batch: Tensor) -> Tensor:
        try:
            for f in self.frozen:
                f.module.forward = _constant(answer, f)
            return self._run(batch)
        finally:
            self._restore()

    def _restore(self) -> None:
        for f in self.frozen:
            f.restore()

    def fill(self, images: int, batch_of: Callable[[Tensor], Tensor], batch_size: int, shared: bool = True) -> None:
        """Run the frozen part, and no more, over all images and keep what is needed.

        Args:
            images: number of images N.
            batch_of: maps int64 indices [B] to images [B, C, H, W].
            shared: of several processes each runs its part of the images, and all keep the whole.
        """
        mine = processes.mine(images) if shared else range(images)
        needed = [f for f in self.frozen if f.name in self.needed]
        self.store = {f.name: f.recorded.new_empty((images, f.rows, *f.recorded.shape[1:])) for f in needed}
        place = slice(0)

        def keep(f: _Frozen):
            return lambda _module, _inputs, output: self.store[f.name][place].copy_(output.unflatten(0, (-1, f.rows)))

        def stop(*_: Any) -> None:
            raise _Reached

        handles: list[Any] = [f.module.register_forward_hook(_quietly(keep(f))) for f in needed]
        handles.append(self.model.get_submodule(self.first).register_forward_pre_hook(stop))
        try:
            for indices in torch.arange(mine.start, mine.stop).split(batch_size) if mine else ():
                place = slice(int(indices[0]), int(indices[-1]) + 1)
                with contextlib.suppress(_Reached):
                    self._run(batch_of(indices))
        finally:
            for handle in handles:
                handle.remove()
        for kept in self.store.values() if shared else ():
            processes.complete_(kept)

    def images(self, indices: Tensor) -> _Answering:
        """Context in which the model answers for the kept images `indices` (int64 [B]), whatever it is fed."""
        return _Answering(self, indices)

    def blanks(self, images: int) -> list[Tensor]:
        """What frozen modules answer with that need not be kept; whoever captures an answer has to hold on to it."""
        return [f.blank(images) for f in self.frozen if f.name not in self.store]

    def blank_input(self, like: Tensor, images: int) -> Tensor:
        """An input of the right shape for a model whose first modules answer by themselves: [images, C, H, W]."""
        return like.new_zeros((1, *like.shape[1:])).expand(images, *like.shape[1:])


class _Answering:
    def __init__(self, reuse: PrefixReuse, indices: Tensor):
        self.reuse, self.indices = reuse, indices

    def __enter__(self) -> None:
        def answer(f: _Frozen) -> Tensor:
            if f.name in self.reuse.store:
                kept = self.reuse.store[f.name]
                return kept[self.indices.to(kept.device)].flatten(0, 1)
            return f.blank(len(self.indices))

        for f in self.reuse.frozen:
            f.module.forward = _constant(answer, f)  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        self.reuse._restore()


def _quietly(note: Callable[..., Any]) -> Callable[..., None]:
    """A forward hook that leaves the output as it is."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        note(module, inputs, output)

    return hook


def _constant(answer: Callable[[_Frozen], Tensor], f: _Frozen) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: answer(f)


def _logits_of(model: nn.Module) -> Answers:
    return lambda batch: as_logits(model(batch))


def _record_frozen(model: nn.Module, first: str, probe: Tensor, run: Answers) -> list[_Frozen]:
    """Modules, as large as possible, that finish before `first` is called; called once, returning one tensor per image."""
    names = {module: name for name, module in model.named_modules()}
    finished: list[tuple[str, Tensor | None]] = []
    reached = [False]
    counts: dict[str, int] = {}

    def before(module: nn.Module, _: Any) -> None:
        name = names[module]
        counts[name] = counts.get(name, 0) + 1
        reached[0] |= name == first

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if not reached[0]:
            finished.append((names[module], output.detach().clone() if isinstance(output, Tensor) else None))

    handles = [
        h
        for m in names
        if m is not model
        for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))
    ]
    try:
        with torch.no_grad():
            run(probe)
    finally:
        for handle in handles:
            handle.remove()
    usable = {
        name: output
        for name, output in finished
        if output is not None
        and output.is_floating_point()
        and output.numel() > 0
        and output.ndim > 0
        and output.shape[0] % len(probe) == 0
        and counts[name] == 1
    }
    modules = dict(model.named_modules())
    return [
        _Frozen(name, modules[name], output, output.shape[0] // len(probe))
        for name, output in usable.items()
        if not any(name.startswith(f"{other}.") for other in usable)
    ]
