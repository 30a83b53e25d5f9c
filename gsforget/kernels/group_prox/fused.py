"""Adam with the group-lasso proximal step as an object that keeps its state on the device.

On a GPU a step is one launch that waits for nothing on the host: step size, strength and the number of steps are read
from the device, so that it may be part of a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gsforget.errors import RequestError
from gsforget.kernels.backend import choose
from gsforget.kernels.group_prox.naive import ProxStep, proximal_adam_step

METRICS = ("adam", "euclidean")
MOST = 32  # programs per group
BLOCK, WARPS = 2048, 8


class ProximalAdam:
    """Adam for all groups of a flat buffer, each followed by its proximal step; see `naive.proximal_adam_step`.

    Attributes:
        exp_avg, exp_avg_sq: float32 [n], Adam's moments.
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
            programs: how many share a group; None: as many as the device holds at once.
        """
        if metric not in METRICS:
            raise RequestError(f"There is no metric named {metric}.", f"Give one of {', '.join(METRICS)}.", "metric")
        device = weights.device
        self.lengths, self.weights, self.betas, self.eps, self.metric = lengths, weights, betas, eps, metric
        self.exp_avg = torch.zeros(int(lengths.sum()), device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.backend = choose(device, backend)
        self.steps = 0
        if self.backend != "torch":
            self._prepare(programs)

    def _prepare(self, programs: int | None) -> None:
        from gsforget.kernels.group_prox.kernel import PHASES

        device, count = self.weights.device, len(self.lengths)
        self.programs = programs or self._fitting()
        self.width = max(2, 1 << (self.programs - 1).bit_length())
        self._offsets = torch.cumsum(self.lengths, 0) - self.lengths
        self._weights = self.weights.float()
        self._steps = torch.zeros(count, dtype=torch.int64, device=device)
        self._counters = torch.zeros(count, dtype=torch.int64, device=device)
        self._slots = torch.zeros((PHASES.value, count, self.width, 2), device=device)
        self._lr, self._strength = torch.zeros((), device=device), torch.zeros((), device=device)

    def _fitting(self) -> int:
        """Programs per group, so that all of them are on the device together."""
        blocks = -(-int(self.lengths.max()) // BLOCK)
        if self.weights.device.type != "cuda":
            return min(MOST, blocks)
        processors = torch.cuda.get_device_properties(self.weights.device).multi_processor_count
        return max(1, min(MOST, blocks, processors // len(self.lengths)))

    def step(
        self, flat: Tensor, grad: Tensor, active: Tensor, lr: float | Tensor, strength: float | Tensor = 0.0
    ) -> ProxStep:
        """One step in place on `flat`.

        Args:
            flat, grad: float32 [n]; the gradient is not changed.
            active: bool [G]; inactive groups stay as they are.
            lr, strength: numbers, or float32 scalars on the device, which are read there.
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
        self.steps += 1
        if self.backend == "torch":
            return proximal_adam_step(
                flat, grad, self.exp_avg, self.exp_avg_sq, self.lengths, self.weights, active, self.steps,
                float(lr), float(strength), self.betas, self.eps, self.metric,
            )  # fmt: skip
        return self._launch(flat, grad, active, self._scalar(lr, self._lr), self._scalar(strength, self._strength))

    @staticmethod
    def _scalar(value: float | Tensor, place: Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else place.fill_(value)

    def _launch(self, flat: Tensor, grad: Tensor, active: Tensor, lr: Tensor, strength: Tensor) -> ProxStep:
        from gsforget.kernels.ahead.precompiled import launch as run
        from gsforget.kernels.group_prox.kernel import PHASES, proximal_adam_kernel

        norms, critical = flat.new_empty(len(self.lengths)), flat.new_empty(len(self.lengths))
        beta1, beta2 = self.betas

        def launch(store: int, **options: Any) -> None:
            run(
                proximal_adam_kernel, (len(self.lengths), self.programs),
                flat, grad, self.exp_avg, self.exp_avg_sq, self._offsets, self.lengths, self._weights, active,
                self._steps, lr, strength, norms, critical, self._slots, self._counters,
                math.log(beta1), 1 - beta1, math.log(beta2), beta2, 1 - beta2, self.eps, store,
                EUCLIDEAN=self.metric == "euclidean", PROGRAMS=self.programs, WIDTH=self.width,
                BLOCK=BLOCK if self.backend == "triton" else 64, **options,
            )  # fmt: skip

        if self.backend == "triton":
            launch(1, WAIT=True, num_warps=WARPS, launch_cooperative_grid=True)
        else:
            # The interpreter runs one program after the other, so that none can wait for the next.  Repeating the launch
            # without writing makes the sums of one more phase right each time; the last launch finds all of them right.
            for _ in range(PHASES.value if self.programs > 1 else 0):
                launch(0, WAIT=False)
            launch(1, WAIT=False)
        return ProxStep(norms.double(), critical.double())
