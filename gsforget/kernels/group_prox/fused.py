"""Adam with the group-lasso proximal step as an object that keeps its state on the device.

On a GPU a step is one launch that waits for nothing on the host: step size, strength and the number of steps are read
from the device, so that it may be part of a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsforget.errors import RequestError
from gsforget.kernels.backend import choose
from gsforget.kernels.group_prox.naive import ProxStep, proximal_adam_step

METRICS = ("adam", "euclidean")
MOST = 32  # programs per group
BLOCK, WARPS = 2048, 16
REGISTERS = 128  # of a thread at most: a multiprocessor has room for one program; unasked, ptxas saves some and spills
VECTOR = 4  # as in `kernel`


class ProximalAdam:
    """Adam for all groups of a flat buffer, each followed by its proximal step; see `naive.proximal_adam_step`.

    Attributes:
        exp_avg, exp_avg_sq: float32 [n], Adam's moments.
        backend: what runs, see `gsforget.kernels.backend`.
        programs: how many share a group; more than one only where all groups' programs are on the device together.
    """

    def __init__(
        self,
        lengths: Tensor,
        weights: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        metric: str = "adam",
        backend: str | None = None,
        programs: int | None = None,
    ):
        """
        Args:
            lengths, weights: group table, int64 [G] and float64 [G], on the device of the buffer.
            backend: see `gsforget.kernels.backend.choose`.
            programs: how many share a group, if the device holds them all at once; None: as many as pay.

        Raises:
            RequestError: kind ``metric`` for an unknown metric, ``kernel_input`` for a table that is none.
        """
        if metric not in METRICS:
            raise RequestError(f"There is no metric named {metric}.", f"Give one of {', '.join(METRICS)}.", "metric")
        fits = (weights.shape, weights.device) == (lengths.shape, lengths.device)
        if lengths.ndim != 1 or lengths.dtype != torch.int64 or not fits:
            raise RequestError(
                f"The table of groups has lengths {_kind(lengths)} and weights {_kind(weights)}.",
                "Give lengths as int64 [G] and weights as float64 [G], on the device of the buffer.",
                "kernel_input",
            )
        sizes = lengths.tolist()
        if not sizes or min(sizes) < 1:
            raise RequestError("A group without factors was given.", "Leave it out of the table.", "kernel_input")
        device = weights.device
        self.lengths, self.weights, self.betas, self.eps, self.metric = lengths, weights, betas, eps, metric
        self.exp_avg = torch.zeros(sum(sizes), device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.backend = choose(device, backend)
        self._done = torch.zeros((), dtype=torch.int64)  # steps, where the host counts them
        if self.backend != "torch":
            self._prepare(sizes, programs)

    def _prepare(self, sizes: list[int], asked: int | None) -> None:
        from gsforget.kernels.group_prox.kernel import PHASES, WIDTH

        device, count = self.weights.device, len(sizes)
        self.programs = fitting(sizes, asked, processors(device))
        self.aligned = all(size % VECTOR == 0 for size in sizes)
        self._offsets = torch.cumsum(self.lengths, 0) - self.lengths
        self._weights = self.weights.float()
        self._done = torch.zeros(count, dtype=torch.int64, device=device)
        self._counters = torch.zeros(count, dtype=torch.int64, device=device)
        self._finished = torch.zeros(1, dtype=torch.int64, device=device)
        self._slots = torch.zeros((PHASES.value, count, WIDTH.value, 2), device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)

    @property
    def state(self) -> list[Tensor]:
        """What a step changes besides the factors: moments, and the number of steps."""
        return [self.exp_avg, self.exp_avg_sq, self._done]

    @property
    def on_device(self) -> bool:
        """Whether a step is all on the device, so that it may be captured and replayed."""
        return self.backend == "triton"

    def step(
        self, flat: Tensor, grad: Tensor, active: Tensor, lr: float | Tensor, strength: float | Tensor = 0.0
    ) -> ProxStep:
        """One step in place on `flat`.

        Args:
            flat, grad: float32 [n]; the gradient is not changed.
            active: bool [G]; inactive groups stay as they are.
            lr, strength: numbers, or float64 scalars on the device, which are read there.
        """
        if flat.shape != self.exp_avg.shape or grad.shape != flat.shape:
            raise RequestError(
                f"The groups have {len(self.exp_avg)} factors, and the buffers {len(flat)} and {len(grad)}.",
                "Make a new ProximalAdam for other groups.",
                "kernel_input",
            )
        if any(
            t.dtype != torch.float32 or not t.is_contiguous() or t.device != self.exp_avg.device for t in (flat, grad)
        ):
            raise RequestError(
                f"The buffers are not float32 and contiguous on {self.exp_avg.device}.",
                "Give flat.float().contiguous(), and a gradient alike.",
                "kernel_input",
            )
        if (active.shape, active.dtype, active.device) != (self.lengths.shape, torch.bool, self.lengths.device):
            raise RequestError(
                f"Which groups are active is {_kind(active)}, and there are {len(self.lengths)} groups.",
                f"Give bool [{len(self.lengths)}] on {self.lengths.device}.",
                "kernel_input",
            )
        if self.backend != "torch":
            return self._launch(flat, grad, active, lr, strength)
        self._done += 1
        return proximal_adam_step(
            flat, grad, self.exp_avg, self.exp_avg_sq, self.lengths, self.weights, active, int(self._done),
            lr, strength, self.betas, self.eps, self.metric,
        )  # fmt: skip

    def _launch(
        self, flat: Tensor, grad: Tensor, active: Tensor, lr: float | Tensor, strength: float | Tensor
    ) -> ProxStep:
        from gsforget.kernels.ahead.precompiled import launch as run
        from gsforget.kernels.group_prox.kernel import PHASES, proximal_adam_kernel

        norms, critical = (flat.new_empty(len(self.lengths), dtype=torch.float64) for _ in range(2))
        alive = flat.new_empty(1, dtype=torch.int64)
        lr_at, lr_by = self._place(lr)
        strength_at, strength_by = self._place(strength)
        beta1, beta2 = self.betas
        compiled, shared = self.backend == "triton", self.programs > 1
        options = {"num_warps": WARPS, "maxnreg": REGISTERS, "launch_cooperative_grid": shared} if compiled else {}

        def launch(store: int) -> None:
            run(
                proximal_adam_kernel, (len(self.lengths), self.programs),
                flat, grad, self.exp_avg, self.exp_avg_sq, self._offsets, self.lengths, self._weights, active,
                self._done, lr_at, strength_at, norms, critical, alive, self._slots, self._counters, self._finished,
                lr_by, strength_by, math.log(beta1), 1 - beta1, math.log(beta2), beta2, 1 - beta2, self.eps, store,
                EUCLIDEAN=self.metric == "euclidean", SHARED=shared, ALIGNED=self.aligned and _at_vectors(flat, grad),
                BLOCK=BLOCK if compiled else 64, WAIT=compiled, **options,
            )  # fmt: skip

        # The interpreter runs one program after the other, so that none can wait for the next.  Repeating the launch
        # without writing makes the sums of one more phase right each time; the last launch finds all of them right.
        for _ in range(0 if compiled or not shared else PHASES.value):
            launch(0)
        launch(1)
        return ProxStep(norms, critical, alive.view(()))

    def _place(self, value: float | Tensor) -> tuple[Tensor, float]:
        """A scalar on the device and a factor, which together are the value: a number costs no launch of its own."""
        return (value, 1.0) if isinstance(value, Tensor) else (self._one, float(value))


def fitting(sizes: list[int], asked: int | None, processors: int | None) -> int:
    """Programs per group: as many as there is work for, and no more than the device holds together.

    Programs of a shared group wait for each other, so all of them have to be there at once: one for each
    multiprocessor, which always has room for one.  Where there are more groups, each has one program, and none waits.

    Args:
        sizes: factors of each group.
        asked: what to take instead of what pays.
        processors: multiprocessors; None: nothing is waited for, as in the interpreter.
    """
    wanted = min(MOST, asked or -(-max(sizes) // BLOCK))
    return max(1, wanted if processors is None else min(wanted, processors // len(sizes)))


def processors(device: torch.device) -> int | None:
    """Multiprocessors of a GPU; None elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _at_vectors(*buffers: Tensor) -> bool:
    return all(b.data_ptr() % (VECTOR * b.element_size()) == 0 for b in buffers)
