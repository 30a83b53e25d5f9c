"""Several processes that train one request together: `torchrun --nproc-per-node N -m gsforget forget …`.

Each process runs the network on its share of every batch.  Outputs and features, which are small, are gathered with
their gradient, so every process takes the loss of the whole batch, whatever mixes its images; the gradients of the
factors are summed afterwards.  Decisions are made by the first process, which alone writes and speaks.

Tensors travel by torch.distributed, nccl between GPUs and gloo between CPUs; decisions and failures by the key-value
store of the launch.  Whoever waits looks at the store as well, so a failure anywhere ends all with its own sentence.
A single process is the trivial case: nothing here does anything then, and torch.distributed is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from gsforget.errors import GsforgetError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
LAST_RESORT = 3600.0  # seconds that one process waits for another that neither fails nor ends
FAREWELL = 15.0  # seconds that the first process waits at the end for the others to have seen it
LOOK = 0.5  # seconds between looks at the store while tensors are under way
FAILED, ENDED = "failed", "ended"


class _State:
    """What this process holds once it has met the others."""

    store: Any = None
    joined = False
    meetings = 0  # how many decisions were shared: the next one's key
    lost = False  # a failure, here or elsewhere, is known to all
    gone = False  # another process ended without a word: none is waited for any more


def world() -> int:
    """How many processes train together, from the environment that torchrun sets.

    A scheduler may set some of it for other reasons; without a place to meet, a process is alone.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return 1
    return max(1, int(os.environ["WORLD_SIZE"]))


def rank() -> int:
    return int(os.environ["RANK"]) if world() > 1 else 0


def is_first() -> bool:
    """Whether this process decides, writes and speaks for all."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def gpu() -> int | None:
    """Which of this machine's GPUs is this process's own; None for a single process.

    Raises RequestError ``too_few_gpus``.
    """
    import torch

    if world() == 1:
        return None
    here, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if here >= there:
        raise RequestError(
            f"There are more processes than the {there} GPU(s) of this machine.",
            f"Type torchrun --nproc-per-node {there}, or --device cpu.",
            "too_few_gpus",
        )
    return here


def join(device: torch.device) -> None:
    """Meet the other processes; every process calls it before the first tensor is shared."""
    if world() == 1 or _State.joined:
        return
    import torch
    import torch.distributed as dist

    of_all(None)  # a process that failed on its way here would be waited for in vain
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("tensors", _store()),
        rank=rank(),
        world_size=world(),
        timeout=timedelta(seconds=LAST_RESORT),
    )
    _State.joined = True


# Tensors


def gather_rows(compute: Callable[[Tensor], Sequence[Tensor]], rows: Tensor) -> list[Tensor]:
    """What `compute` makes of rows, int64 [B]: tensors [B, …], each process computing its share, with gradient.

    The gradient that arrives at a gathered tensor must be the same in every process, as that of one loss is; each
    process then holds the gradient of its own images' part, and `sum_` completes it.
    """
    if world() == 1 or not len(rows):
        return list(compute(rows))
    each = -(-len(rows) // world())
    padded = rows[[min(i, len(rows) - 1) for i in range(rank() * each, (rank() + 1) * each)]]
    gather = _gather()
    return [gather.apply(mine, len(rows)) for mine in compute(padded)]


def sum_(tensors: Iterable[Tensor | None]) -> None:
    """Replace tensors by their sum over all processes, in one call for all of a kind; None is passed over."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    there = [t for t in tensors if t is not None]
    if len(there) == 1 and there[0].is_contiguous():
        _finish(lambda: dist.all_reduce(there[0], async_op=True))
    elif there:
        flat = torch.cat([t.reshape(-1) for t in there])
        _finish(lambda: dist.all_reduce(flat, async_op=True))
        for tensor, summed in zip(there, flat.split([t.numel() for t in there])):
            tensor.copy_(summed.view_as(tensor))


def broadcast_(*tensors: Tensor) -> None:
    """Replace tensors by those of the first process."""
    for tensor in tensors if world() > 1 else ():
        _send(tensor, 0)


def complete_(tensor: Tensor) -> None:
    """Fill a tensor [N, …] of which each process has filled the rows `mine(N)`."""
    for sender in range(world() if world() > 1 else 0):
        begin, end = _bounds(len(tensor), sender)
        if end > begin:
            _send(tensor[begin:end], sender)


def mine(count: int) -> range:
    """The part of `count` rows that this process computes alone."""
    return range(*_bounds(count, rank()))


def _bounds(count: int, of: int) -> tuple[int, int]:
    return count * of // world(), count * (of + 1) // world()


def _send(tensor: Tensor, sender: int) -> None:
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        packed = tensor.detach().contiguous()
        _finish(lambda: dist.broadcast(packed, sender, async_op=True))
        if packed.data_ptr() != tensor.data_ptr():
            tensor.copy_(packed)


@functools.cache
def _gather() -> Any:
    """The autograd function that gathers equal shares of rows and hands back each share's gradient."""
    import torch
    import torch.distributed as dist

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, share: Tensor, count: int) -> Tensor:
            whole = share.new_empty((world() * len(share), *share.shape[1:]))
            packed = share.detach().contiguous()
            _finish(lambda: dist.all_gather_into_tensor(whole, packed, async_op=True))
            ctx.each = len(share)
            return whole[:count].clone() if count < len(whole) else whole

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            (gradient,) = gradients
            there = gradient[rank() * ctx.each : (rank() + 1) * ctx.each]
            padded = gradient.new_zeros((ctx.each, *gradient.shape[1:]))  # rows that only pad have no gradient
            padded[: len(there)] = there
            return padded, None

    return Gather


def _finish(start: Callable[[], Any]) -> None:
    """Run a collective call to its end, with an eye on the store: a process that failed never answers."""
    begun = looked = time.monotonic()
    try:
        work = start()
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                _raise_failures()
                _check_patience(begun)
            time.sleep(0 if now - begun < 0.002 else 0.0002)
        work.wait()
    except RuntimeError as error:  # gloo's word for a peer that is gone
        for _ in range(4):
            _raise_failures()
            time.sleep(LOOK / 2)
        raise _lost() from error


# Decisions


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, for all of them; the others do not run it."""
    if world() == 1:
        return make()
    key = _next_key()
    if is_first():
        made = make()
        _store().set(key, pickle.dumps(made))
        return made
    return pickle.loads(_await(key))


def of_all(value: T) -> list[T]:
    """The values of all processes in order; none goes on before all are here."""
    if world() == 1:
        return [value]
    key = _next_key()
    _store().set(f"{key}/{rank()}", pickle.dumps(value))
    return [pickle.loads(_await(f"{key}/{other}")) for other in range(world())]


def _next_key() -> str:
    _State.meetings += 1
    return f"meeting/{_State.meetings}"


def _store() -> Any:
    """The key-value store of the launch."""
    if _State.store is None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        opened = next(rendezvous("env://", timeout=timedelta(seconds=120)))
        _State.store = dist.PrefixStore("gsforget", opened[0])
    return _State.store


def _await(key: str, watch: bool = True, patience: float = LAST_RESORT) -> bytes:
    begun = time.monotonic()
    while not _has(key):
        if watch:
            _raise_failures()
        _check_patience(begun, patience)
        time.sleep(min(0.05, 0.001 + (time.monotonic() - begun) / 10))
    return _store().get(key)


def _has(key: str) -> bool:
    try:
        return bool(_store().check([key]))
    except RuntimeError as error:  # the store's host is gone
        raise _lost() from error


def _check_patience(begun: float, patience: float = LAST_RESORT) -> None:
    if time.monotonic() - begun > patience:
        raise _lost()


# Beginning and end


def together(run: Callable[[], int], shared: bool = True) -> int:
    """Run a command line in this process as one of several, and return the first process's exit status.

    Only the first is heard; the others wait for its end, so that it has always spoken before anyone leaves.
    What is not `shared` the first process runs alone.
    """
    if world() == 1:
        return run()
    before = signal.signal(signal.SIGTERM, _ended_from_outside)  # how torchrun ends those that are left
    try:
        with _silence():
            status = run() if shared or is_first() else 0
        return _leave(status)
    except GsforgetError as error:
        if is_first():
            print(f"Error: {error.message}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def report_failure(status: int, failure: GsforgetError) -> None:
    """Let the other processes end as this one does; the first failure counts."""
    if world() > 1 and not _State.lost:
        _State.lost = True
        with contextlib.suppress(RuntimeError, GsforgetError):
            if not _has(FAILED):
                fields = (rank(), status, failure.message, failure.hint, failure.kind)
                _store().set(FAILED, pickle.dumps(fields))


def _raise_failures() -> None:
    if not _has(FAILED):
        return
    _State.lost = True
    _, status, *sentence = pickle.loads(_store().get(FAILED))
    failure = GsforgetError(*sentence)
    failure.exit_status = status
    raise failure


def _leave(status: int) -> int:
    """Wait until all have come to their end; the first process's status."""
    if not is_first():
        # Without an eye on failures: the first one has them from the same place, and says so.
        status = int(_await(ENDED, watch=False, patience=FAREWELL if _State.lost or _State.gone else LAST_RESORT))
        _store().set(f"gone/{rank()}", b"")
    else:
        _store().set(ENDED, str(status))
        with contextlib.suppress(GsforgetError):
            for other in range(1, world()):
                _await(f"gone/{other}", watch=False, patience=1 if _State.gone else FAREWELL)
    if _State.joined and not (_State.lost or _State.gone):
        import torch.distributed as dist

        dist.destroy_process_group()
        _State.joined = False
    return status


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _ended_from_outside(*_: Any) -> None:
    raise _lost()


def _lost() -> GsforgetError:
    _State.gone = True
    return GsforgetError(
        "Another process of this run has ended or no longer answers; nothing was published.",
        "Look at what it said above; with too little memory, start fewer processes.",
        "process_lost",
    )
