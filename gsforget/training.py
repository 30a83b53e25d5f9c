"""The forgetting loop of GS-LoRA (arXiv 2403.11530): select groups by the proximal step, then settle those that remain.

Selection trains all groups while the penalty grows until no more groups are active than asked for; dead groups leave
training.  Settling trains the remaining ones with a falling step size, on reused outputs of everything that lies before
the first of them, in stages, until validation says that the classes are gone and the rest stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gsforget import control, processes, rehearsal
from gsforget.control import (
    After,
    StageControl,
    StrengthControl,
    Watch,
    default_lr,
    default_target,
    product_forces,
    settle_steps,
    stage_limit,
)
from gsforget.earlier import EarlierClasses
from gsforget.errors import GsforgetError, RequestError
from gsforget.graphs import Graphs
from gsforget.kernels.group_prox import ProximalAdam
from gsforget.lora.forms import find_forms
from gsforget.lora.groups import LoRAGroups
from gsforget.material import Material
from gsforget.rehearsal import Rehearsal, weights_from
from gsforget.rounds import Rounds
from gsforget.settings import Settings
from gsforget.sight import Sight
from gsforget.steps import StepLog
from gsforget.tasks.base import Duel, Losses, Seen, Task
from gsforget.validation import GLANCE_IMAGES, Validation

GLANCE_EVERY = 20  # steps between live figures
Event = dict[str, Any]


@dataclass
class Trained:
    """What the loop leaves: the groups (still attached to the model), what it chose, and how it went."""

    groups: LoRAGroups
    chosen: dict[str, Any]
    watches: list[Watch] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)  # one row per step: the norm of each group
    seconds: float = 0.0


class Loop:
    """One request's training.  The model's own parameters are never written to."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        material: Material,
        settings: Settings,
        progress: Callable[[Event], None] | None = None,
    ):
        """
        Args:
            model: whatever the task makes of its images; on the device on which to train.
            material: what to learn from and to decide by.  Images of classes that earlier requests forgot are learned
                from only where validation says that the model names their class again.
            progress: called with one small dict per step and per validation.
        """
        self.model, self.task, self.settings = model.eval().requires_grad_(False), task, settings
        self.images, forget, old, train, val = (
            material.images,
            material.forget,
            material.old,
            material.train,
            material.val,
        )
        self.progress = progress or (lambda _event: None)
        self.device = next(model.parameters()).device
        self.earlier = EarlierClasses.of(self.images.labels.cpu(), old, train, val)
        train, val = train[~old[train]], val[~old[val]]
        self.forget, self.val = forget | old, val
        self.material, self.known = material, material.known[~old[material.known]]
        self.labels = self.images.labels.to(self.device)
        self.rng = torch.Generator().manual_seed(settings.seed)
        pools = {"retain": train[~forget[train]], "forget": train[forget[train]], "earlier": train[:0]}
        self.rounds = Rounds(pools, self.rng)
        retained, forgotten = (len(self.rounds.pools[k]) for k in ("retain", "forget"))
        self.batch_retain = min(settings.batch_size, retained)
        share = round(self.batch_retain * forgotten / max(1, retained))
        self.batch_forget = min(forgotten, max(round(self.batch_retain * control.FORGET_SHARE), share, 1))
        self.batch_earlier = 0
        self.sight = Sight(model, task, self.images, settings.autocast)
        two = self.sight.probe[:2]
        networks = task.networks(model, two)
        forms = find_forms(model, networks, two)
        self.groups = LoRAGroups(model, networks, settings.rank, settings.seed, forms)
        self.lr = default_lr(self._width()) if settings.lr is None else settings.lr
        self.adam = ProximalAdam(self.groups.lengths.to(self.device), self.groups.weights)
        self.step, self.stages = 0, StageControl(0, 0, False)
        self.depth = control.DEPTHS[0]  # that the request's own classes have come to
        self.depth_earlier: float | None = None  # … and earlier ones, where they are taken along
        self.alive = list(range(len(self.groups)))  # as the host last read it
        self.rate = torch.zeros((), dtype=torch.float64, device=self.device)
        self.log = StepLog(len(self.groups), self.device)
        self.graphs = Graphs.on(self.device, settings.cuda_graphs, self.adam.on_device)
        self.trained = Trained(self.groups, {})

    def run(self) -> Trained:
        start = time.perf_counter()
        before = self.sight.of_many(torch.arange(len(self.labels)))
        here = [x.to(self.device) for x in (self.forget, self.known)]
        self.objective = self.task.objective(before, self.labels, *here)
        held = self.earlier.val.to(self.device)
        named = self.objective.right(before.rows(held), held).cpu() if len(held) else torch.zeros(0, dtype=torch.bool)
        self._forget_again(self.earlier.returned(named, self.settings.max_forget_acc))
        self.validation = self._validation()
        forces = product_forces(self.groups, lambda: self._losses(self._draw_batch(2)).total)
        processes.broadcast_(forces)
        target = self.settings.target_groups or default_target(len(self.groups))
        first = control.START * forces.median().item() if self.settings.prox is None else self.settings.prox
        counter = torch.zeros(len(self.groups), dtype=torch.int64, device=self.device)
        self.control = StrengthControl(first, target, counter, self.settings.prox is not None)
        self._select()
        selected = self.step
        if self.settings.reuse_prefix:
            self.sight.reuse_from(self._first_module(), self.settings.cache_bytes)
        stages = self._settle_until_satisfied()
        self.trained.chosen = {
            "lr": self.lr,
            "target_groups": target,
            "product_forces": forces.tolist(),
            "prox_first": first,
            "prox_last": self.control.strength.item(),
            "batch_retain": self.batch_retain,
            "batch_forget": self.batch_forget,
            "steps_select": selected,
            "steps": self.step,
            "stages": stages,
            "depth": self.depth if self.objective.deepens else None,
            "depth_earlier": self.depth_earlier,
            "forgotten_again": self.earlier.again,
            "batch_earlier": self.batch_earlier,
            "reused_outputs": self.sight.end_reuse(),
        }
        self.trained.seconds = time.perf_counter() - start
        return self.trained

    def _validation(self) -> Validation:
        shuffled = torch.randperm(len(self.val), generator=torch.Generator().manual_seed(self.settings.seed))
        return Validation(
            self.objective,
            self.sight.of_many,
            rows=self.val,
            few=self.val[shuffled[:GLANCE_IMAGES]],
            forget=self.forget,
            shows=self.material.shows,
            earlier=self.earlier,
            max_forget=self.settings.max_forget_acc,
            device=self.device,
        )

    def _select(self) -> None:
        target = self.control.target
        while len(self._alive()) > target and self.step < control.SELECT_LIMIT:
            self._train_step(self.lr)
            self._report("select", None)
        self._catch_up()

    def _settle_until_satisfied(self) -> int:
        """Stages as validation wants them; by a fixed number where there is none.  Returns how many there were."""
        per_epoch = -(-self.material.kept // max(1, self.batch_retain))
        s = self.settings
        length = settle_steps(per_epoch) if s.epochs is None else max(1, round(s.epochs * per_epoch))
        weights = weights_from(self.model, self._first_module(), self.sight.probe[:2]) if self.objective.duel else []
        self.rehearsal = Rehearsal(weights, s.seed)
        if not len(self.val):
            fixed = control.STAGES_UNSEEN if s.epochs is None else 1
            for _ in range(fixed):
                self._settle(length)
            return fixed
        limit = stage_limit(length) if s.epochs is None else 1
        deepens = self.objective.deepens and not (self.material.blind or self.material.handful)
        least = control.STAGES_UNSEEN if self.material.handful else 1
        limits = s.max_forget_acc, s.max_retain_drop
        self.stages = StageControl(*limits, deepens, limit, self.objective.noise, s.max_class_drop, least=least)
        self._run_stages(length)
        done, self.depth = self.stages.done, self.stages.good_depth
        if deepens and s.epochs is None and self._take_earlier_along():
            self._run_stages(length)
            done += self.stages.done
            self.depth_earlier = self.stages.good_depth
        return done

    def _run_stages(self, length: int) -> None:
        """As `stages` decides; ends with the factors of the best of them."""
        after, kept = After.GO_ON, (self.groups.flat.detach().clone(), self._alive())
        while after is After.GO_ON:
            self._settle(length)
            watch = self._watch()
            self._forget_again(watch.returned)
            after = self.stages.after(watch)
            if self.stages.good is watch:
                kept = self.groups.flat.detach().clone(), self._alive()
        if after is After.GO_BACK and kept[1] == self._alive():
            self._go_back(kept[0])

    def _take_earlier_along(self) -> bool:
        """From now on, take from the features of all classes forgotten so far; whether there is anything to take."""
        rows = self.earlier.not_learned_from()
        good = self.stages.good
        if good is None or not self.stages.lossless(good) or not len(rows):
            return False
        known = torch.cat([self.known, self.earlier.train]).sort().values
        everything = torch.arange(len(self.labels))
        wider = self.objective.with_earlier(
            lambda: self.sight.of_many(everything), known.to(self.device), self.stages.good_depth
        )
        if wider is None:
            return False
        self.objective = self.validation.objective = wider
        self.validation.along = True
        self.rounds.add("earlier", rows)
        self.batch_earlier = min(len(rows), self.batch_forget)
        self.stages = self.stages.along(self._watch())
        return True

    def _settle(self, length: int) -> None:
        for k in range(length):
            self._train_step(self.lr * (1 - k / length), self.objective.duel)
            self._report("settle", k / length)
        self._catch_up()

    def _go_back(self, factors: Tensor) -> None:
        assert self.stages.good is not None
        with torch.no_grad():
            self.groups.flat.copy_(factors)
        self.stages.depth = self.stages.good_depth
        self.trained.watches.append(self.stages.good)

    def _train_step(self, lr: float, duel: Duel | None = None) -> None:
        """One step; on a GPU the host queues it and goes on."""
        rows = self._draw_batch()
        try:
            losses = self.objective.losses(self._see_to_train(rows), rows, self.stages.depth)
        except RuntimeError:  # of code that was given no numbers: then the loss of the step before says so first
            self._read_log()
            raise
        if self.log.every == 1:
            self._check_finite(losses.total.item(), self.step)
        self.groups.grad.zero_()
        losses.total.backward()
        if duel is not None and self.step % rehearsal.EVERY == 0:
            self._rehearse(duel, rows[self.forget[rows]])
        processes.sum_([self.groups.grad])
        self.rate.fill_(lr)
        warm = self.step < control.WARMUP
        state = [self.groups.flat, self.groups.active, self.log.latest, *self.adam.state, *self.control.state]
        self.graphs.work(warm, lambda: self._advance(warm), state)
        self.step += 1
        self.log.add(losses)
        if self.log.full or self.step % GLANCE_EVERY == 0:
            self._read_log()

    def _advance(self, warm: bool) -> None:
        """The proximal step, and what follows from it for the strength and for which groups are active."""
        g = self.groups
        result = self.adam.step(g.flat, g.grad, g.active, self.rate, 0.0 if warm else self.control.strength)
        processes.broadcast_(result.norms, result.critical, result.alive)
        if warm:
            self.control.bound(result.critical)
        else:
            g.active.logical_and_(~self.control.after_step(result, g.active))
        torch.cat([result.norms, g.active.double()], out=self.log.latest)

    def _read_log(self) -> None:
        """Let the host know the steps that it has not seen: dead groups leave training, and an error is said."""
        alive = self.alive
        for step in self.log.read(self.step):
            self._check_finite(step.total, step.number - 1)
            self.trained.norms.append(step.norms)
            alive = step.active
        self._remove([g for g in self.alive if g not in alive])

    def _see_to_train(self, rows: Tensor) -> Seen:
        def leaves() -> list[Tensor]:
            return [factor for pair in self.groups.pairs if pair.group in self.alive for factor in (pair.a, pair.b)]

        return self.sight.to_train(rows, self.graphs, tuple(self.alive), leaves)

    def _rehearse(self, duel: Duel, rows: Tensor) -> None:
        """Add the gradient of the loss on forgotten images a few steps into an attacker's fine-tuning."""
        see = self.sight.of
        self.rehearsal.run(lambda: duel.attack(see(rows), rows), lambda: duel.defence(see(rows), rows))

    def _remove(self, dead: list[int]) -> None:
        """Take dead groups out of training.  Both factors are zero, so their gradients vanish: they stay dead anyway."""
        if not dead:
            return
        if self.settings.retire_groups:
            self.groups.retire(dead)
        self.alive = [g for g in self.alive if g not in dead]
        if not self._alive():
            raise RequestError(
                f"The group penalty removed every group by step {self.step}: nothing is left to train.",
                "Give a smaller --prox, or leave it out.",
                "all_groups_removed",
            )

    def _alive(self) -> list[int]:
        return list(self.alive)

    def _width(self) -> int:
        """How many features the widest feed-forward network reads."""
        read = [[p.module.in_features for p in self.groups.pairs if p.group == g] for g in range(len(self.groups))]
        return max(min(features) for features in read)

    def _first_module(self) -> str:
        """Name of the first module that the model calls and that still trains."""
        return self.groups.entry(self._alive()[0])

    def _draw_batch(self, times: int = 1) -> Tensor:
        return torch.cat(
            [
                self.rounds.draw("retain", times * self.batch_retain),
                self.rounds.draw("forget", times * self.batch_forget),
                self.rounds.draw("earlier", times * self.batch_earlier),
            ]
        )

    def _losses(self, rows: Tensor) -> Losses:
        losses = self.objective.losses(self.sight.of(rows), rows, self.stages.depth)
        self._check_finite(losses.total.item(), self.step)
        return losses

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise GsforgetError(
                f"Training diverged at step {step} (the loss is {loss}).",
                f"Lower the step size: --lr {self.lr / 5:g}.",
                "diverged",
            )

    def _watch(self) -> Watch:
        """What all validation images say, and decides."""
        found = self.validation.watch(self.step, self._alive())
        self._tell_of(found)
        watch = processes.from_first(lambda: found)
        self.trained.watches.append(watch)
        return watch

    def _tell_of(self, watch: Watch) -> None:
        self.progress({"stage": "validate", **watch.to_json()})

    def _forget_again(self, returned: Sequence[int]) -> None:
        """Learn from images of classes that came back as from those of the classes to forget."""
        rows = self.earlier.learn_from(returned)
        if len(rows):
            self.rounds.add("forget", rows)
            self.batch_forget = max(self.batch_forget, min(len(rows), self.batch_retain // 4))

    def _report(self, stage: str, fraction: float | None) -> None:
        """Note where the last step belongs, and tell of all steps that the host knows."""
        self.log.place(stage, fraction)
        self._tell()

    def _tell(self) -> None:
        if not self.log.unread and self.step % GLANCE_EVERY == 0:
            glance = self.validation.glance(self.step, self._alive())
            if glance is not None:
                self._tell_of(glance)
        for event in self.log.events(self.control.target):
            self.progress(event)

    def _catch_up(self) -> None:
        """At the end of a stage the host knows and tells everything."""
        if self.log.unread:
            self._read_log()
            self._tell()
