"""The numbers that nobody should tune: prox strength, number of groups, and how long to train.

The strength of the group penalty starts from the gradient of the loss with respect to each block's product dW = B A at
dW = 0 (the gradients of the factors vanish where both are zero) and is then steered towards the number of groups asked
for.  The length follows from validation accuracy, checked at the end of each stage.  The values below were fixed once,
on the demo and a 100-class set, and serve every request.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsforget import processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from gsforget.kernels.group_prox import ProxStep
    from gsforget.lora.groups import LoRAGroups

START = 0.2  # share of the median force on a block's product that the first penalty balances
GROWTH = 1.08  # of the strength per step while more groups are active than asked for
DECAY = 0.9  # of the strength per step once they are not
GONE = 1e-4  # share of the first strength below which the penalty is over
HOLD = 1.1  # times the strength at which a group just stays zero, which falls from step to step
PATIENCE = 10  # steps for which a group must be zero before it counts as dead: Adam's first moment has decayed by then
LR, LR_WIDTH = 5e-3, 96  # step size of Adam for networks of up to this width; above it falls as 1 / width
WARMUP = 20  # steps before the first penalty, so that Adam's second moment of every factor is known
SELECT_LIMIT = 400  # steps after which selection ends, whatever the number of groups
FORGET_SHARE = 0.5  # forgotten images per retained one in a batch, at least
SETTLE_EPOCHS, SETTLE_MIN, SETTLE_MAX = 3, 120, 300  # length of one settling stage: epochs, then bounds in steps
DEPTHS = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
)  # weight of what is taken from the features, stage by stage, while it costs nothing
BLUR = 5.0  # points of retained accuracy whose loss validation must be able to rule out before a stage goes deeper
NOISE = 1.0  # points that validation may show as lost by a depth that costs nothing
STUCK = 0.25  # points of retained accuracy that a further stage must win to be followed by another
STAGES, SETTLE_TOTAL = 6, 720  # settling stages at most, and steps of them together (but one stage is always run)
LEAK_WON, IDLE = 1.0, 2  # points of the leak that a deeper stage must win, and how many may fail to before it ends
ALONG = 4  # stages, at most, that take from classes forgotten earlier
SHALLOWER = 2  # depths below that of the request's own classes, at which they begin
RETRIES = 2  # further stages for a depth that costs retained accuracy: they often win it back
STEPS_OF_IMAGES = 400  # more images than so many steps can see are not read: a million cost no more than these
STAGES_UNSEEN = 2  # settling stages, at least, where there are too few images for validation to tell


def product_forces(groups: LoRAGroups, loss: Callable[[], Tensor]) -> Tensor:
    """How hard the loss pulls on each group's products at dW = 0, per unit of group weight.

    The gradient with respect to dW of a layer is the gradient with respect to its weight, G [out, in]; a rank-one pair
    of unit factors lowers the loss at most at the rate of G's spectral norm.  Returns float64 [G]:
    sqrt(sum of squared spectral norms over the group's layers) / group weight.
    """
    weights = [pair.module.weight for pair in groups.pairs]
    required = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(loss(), weights)
        processes.sum_(gradients)
    finally:
        for w, flag in zip(weights, required):
            w.requires_grad_(flag)
    squares = torch.zeros(len(groups), dtype=torch.float64, device=groups.flat.device)
    for pair, gradient in zip(groups.pairs, gradients):
        squares[pair.group] += square_of_spectral_norm(gradient.double())
    return squares.sqrt() / groups.weights


def square_of_spectral_norm(matrix: Tensor) -> Tensor:
    """Of a float64 matrix [m, n]: the largest eigenvalue of its product with its own transpose, [].

    All singular values take nine times as long for a ViT-B's, and longer on a GPU; half of float64's digits are enough.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(wide @ wide.T)[-1].clamp_min(0)


class StrengthControl:
    """Steers the penalty strength, all on the device: nothing here waits for it.

    Attributes:
        strength: float64 [], in place of which the next one is written.
        zero_for: int64 [G], counts the steps in a row at which each group was zero.
    """

    def __init__(self, strength: float, target: int, zero_for: Tensor, fixed: bool = False):
        self.strength = torch.tensor(strength, dtype=torch.float64, device=zero_for.device)
        self.target, self.zero_for, self.fixed = target, zero_for, fixed
        self._over = GONE * strength

    @property
    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.strength, self.zero_for]

    def after_step(self, step: ProxStep, active: Tensor) -> Tensor:
        """Adjust the strength and say which groups are dead now, bool [G].

        Args:
            step: norms are exactly zero for a group that the prox removed.
            active: bool [G].
        """
        zero = (step.norms == 0) & active
        left = step.critical - self.strength  # what this step's penalty left of it: ||D x|| = ||D z|| - s
        self.zero_for.add_(1).mul_(zero)
        if not self.fixed:
            # Once enough groups are zero, no more than holds them there: the others would follow them by momentum.
            holds = HOLD * step.critical.masked_fill(~zero, 0).max()
            fallen = _lower(DECAY * self.strength, holds.masked_fill(holds == 0, torch.inf))
            self.strength.copy_(torch.where(step.alive > self.target, self.strength * GROWTH, fallen))
            self.bound(left)
            self.strength.masked_fill_((step.alive <= self.target) & (self.strength < self._over), 0)
        return self.zero_for >= PATIENCE

    def bound(self, left: Tensor) -> None:
        """Never so strong that fewer groups than asked for would survive the next step: a group at zero stays there."""
        if not self.fixed:
            keep = torch.topk(left, min(self.target, len(left))).values[-1]
            self.strength.copy_(torch.where(keep > 0, _lower(self.strength, 0.9 * keep), self.strength))


def _lower(a: Tensor, b: Tensor) -> Tensor:
    """The lower of two scalars, and a where one is no number."""
    return torch.where(b < a, b, a)


@dataclass(frozen=True)
class Watch:
    """What validation images say at one moment; percent and points, None where there are no such images.

    Attributes:
        retain, retain_before: on views of the images, see `material`, which the original does not remember.
        drop_bound: lower one-sided 95 % bound of the loss of retained accuracy, in points, as the gates judge it.
        drop_most: the upper bound; with few images it is large, and says that a loss would not be seen.
        old: of the classes that earlier requests forgot; returned: those of them that the model names again.
        leak: percent of images to forget whose class a fresh linear probe names, see `separability`; of all classes
            forgotten so far once earlier ones are taken along.
        class_bound: as `drop_bound`, of the retained class that lost most; None where no gate looks at it.
    """

    step: int
    forget: float | None
    retain: float | None
    retain_before: float | None
    drop_bound: float | None
    drop_most: float | None
    active: list[int]
    old: float | None = None
    returned: list[int] = field(default_factory=list)
    leak: float | None = None
    class_bound: float | None = None

    def forgotten(self, max_forget: float) -> bool:
        """Whether the classes to forget are gone, and none that was forgotten earlier is back."""
        return not self.returned and (self.forget is None or self.forget <= max_forget)

    def satisfied(self, max_forget: float, max_drop: float) -> bool:
        """Forgotten, and retained accuracy not down by more than `max_drop` points, as far as chance lets it be said."""
        return self.forgotten(max_forget) and (self.drop_bound is None or self.drop_bound <= max_drop)

    @property
    def sharp(self) -> bool:
        """Whether there are enough images to rule out a loss of `BLUR` points."""
        return self.drop_most is not None and self.drop_most <= BLUR

    def lossless(self, max_forget: float, noise: float = NOISE, max_class: float = math.inf) -> bool:
        """Forgotten, with no loss beyond `noise` points and no class beyond `max_class`, by enough images to have seen it."""
        if self.retain is None or self.retain_before is None:
            return False
        if self.class_bound is not None and self.class_bound > max_class:
            return False
        return self.sharp and self.forgotten(max_forget) and self.retain >= self.retain_before - noise

    def stuck(self, earlier: Watch, max_forget: float) -> bool:
        """Forgotten twice, and the stage in between has won back no retained accuracy worth speaking of."""
        if self.retain is None or earlier.retain is None:
            return False
        return all(w.forgotten(max_forget) for w in (self, earlier)) and self.retain < earlier.retain + STUCK

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class After(Enum):
    """What follows a settling stage."""

    GO_ON = "another stage"
    STOP = "the result is that of this stage"
    GO_BACK = "the result is that of the last good stage"


@dataclass
class StageControl:
    """Decides from validation how many stages there are, and how deep each goes.

    Stages follow each other until one satisfies, at least two where validation is too small to tell; then deeper ones,
    for as long as validation sees no loss and a probe names ever fewer of the images to forget.  A stage that costs
    retained accuracy is given `RETRIES` more to win it back, and is undone where they do not.

    Attributes:
        max_forget, max_drop: percent and points at which a stage satisfies.
        deepens: whether there is a depth to choose.
        limit: stages at most.
        noise, max_class: points that a depth may cost, and one class may lose by the bound, and count as free.
        depth: of the stage to come; good: the last stage that satisfied, good_depth: its depth.
        goal: a leak that is low enough; None: ever less.
        optional: whether a stage counts only where validation sees no loss, at whatever depth.
        least: stages at least, where the limit allows; `STAGES_UNSEEN` where validation is too small to rule out a loss.
    """

    max_forget: float
    max_drop: float
    deepens: bool
    limit: int = STAGES
    noise: float = NOISE
    max_class: float = math.inf
    depth: float = DEPTHS[0]
    good: Watch | None = None
    good_depth: float = DEPTHS[0]
    goal: float | None = None
    optional: bool = False
    least: int = 1
    done: int = 0
    failed: int = 0
    idle: int = 0
    last: Watch | None = None

    def along(self, start: Watch) -> StageControl:
        """What decides on the stages that follow, whose depth is that of classes forgotten earlier; `start`: before them.

        They end when all classes forgotten so far tell no more than the request's own did.
        """
        first = DEPTHS[max(0, DEPTHS.index(self.good_depth) - SHALLOWER)]
        return StageControl(
            self.max_forget,
            self.max_drop,
            deepens=True,
            limit=ALONG,
            noise=self.noise,
            max_class=self.max_class,
            depth=first,
            good=start,
            good_depth=0.0,
            goal=self.good.leak if self.good else None,
            optional=True,
        )

    def _wins_nothing(self, watch: Watch) -> bool:
        """Whether a deeper stage took no more from the features than the last good one."""
        if self.good is None or not self.lossless(self.good) or watch.leak is None or self.good.leak is None:
            return False
        return watch.leak > self.good.leak - LEAK_WON

    def lossless(self, watch: Watch) -> bool:
        """Whether validation sees no loss, by the limits of this request."""
        return watch.lossless(self.max_forget, self.noise, self.max_class)

    def _deeper(self, end: After) -> After:
        """Another stage at the next depth; `end` where there is none, or no stage left."""
        deeper = [d for d in DEPTHS if d > self.depth]
        if not deeper or self.done == self.limit:
            return end
        self.depth = deeper[0]
        return After.GO_ON

    def after(self, watch: Watch) -> After:
        """Judge a stage; `good` is this watch afterwards if and only if it is the best so far."""
        before, self.last, self.done = self.last, watch, self.done + 1
        lossless = self.lossless(watch)
        if lossless and self._wins_nothing(watch):
            self.idle += 1
            return After.GO_BACK if self.idle == IDLE else self._deeper(After.GO_BACK)
        needed = self.depth == DEPTHS[0] and not self.optional
        if lossless or (needed and watch.satisfied(self.max_forget, self.max_drop)):
            return self._satisfied(watch, lossless)
        if self.good is not None:
            self.failed += 1
            return After.GO_BACK if self.failed > RETRIES or self.done == self.limit else After.GO_ON
        stuck = before is not None and watch.stuck(before, self.max_forget)
        return After.STOP if stuck or self.done == self.limit else After.GO_ON

    def _satisfied(self, watch: Watch, lossless: bool) -> After:
        if self.deepens and watch.sharp and not lossless:
            self.failed += 1
            if self.good is None or (watch.retain or 0) > (self.good.retain or 0):
                self.good = watch
            if self.failed <= RETRIES and self.done < self.limit:
                return After.GO_ON
            return After.STOP if self.good is watch else After.GO_BACK
        self.good, self.good_depth, self.failed, self.idle = watch, self.depth, 0, 0
        if self.done < (self.least if watch.sharp else STAGES_UNSEEN):
            return After.GO_ON if self.done < self.limit else After.STOP
        enough = self.goal is not None and watch.leak is not None and watch.leak <= self.goal
        return self._deeper(After.STOP) if self.deepens and lossless and not enough else After.STOP


def default_lr(width: int) -> float:
    """Step size of Adam for feed-forward networks that read `width` features.

    Each step moves every entry of a factor by about the step size, and a layer's output by that times its width
    (the scaling of Yang and Hu, arXiv 2203.03466, for Adam).
    """
    return LR * min(1.0, LR_WIDTH / width)


def default_target(groups: int) -> int:
    """A third of the groups, rounded up, may stay active unless the user says otherwise."""
    return max(1, -(-groups // 3))


def stage_limit(length: int) -> int:
    """How many stages of so many steps there may be."""
    return max(1, min(STAGES, SETTLE_TOTAL // length))


def settle_steps(per_epoch: int) -> int:
    """Steps of one settling stage: two epochs, within bounds for a handful of images and for a million."""
    return min(SETTLE_MAX, max(SETTLE_MIN, SETTLE_EPOCHS * per_epoch))
