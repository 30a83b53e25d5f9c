"""A bench from its options to its cells: tune on the first request, freeze, run all seeds and requests, measure.

Every method gets the same model, images and requests.  Those that have something to tune try at most as many settings as
the others, on a validation part of the first request's training images; test images choose nothing.  A request starts
from what the same method made of the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gsforget.audit.relearn import steps_to
from gsforget.baselines.base import BaselineRequest, Method, Result
from gsforget.bench.measure import LIMITS, Judge, Leak, Look, Relearning, Stage, stages
from gsforget.bench.store import Cell, Say, Store
from gsforget.bench.subject import open_subject, stored_names
from gsforget.data import few_shot, manifest_sha256, split_validation
from gsforget.errors import GsforgetError, RequestError
from gsforget.folder import WEIGHTS, save_model, sha256
from gsforget.lora.blocks import as_logits
from gsforget.metrics import confusion_matrix, h_mean, of_classes, plausibility, predict
from gsforget.views import Some

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.bench.protocols import Protocol
    from gsforget.data import ImageFolder
    from gsforget.folder import ModelConfig
    from gsforget.images import ImageSet
    from gsforget.views import Images

ROOM, BASE = "gsforget.baselines.", "gsforget.baselines.base"
BENCH = "bench.json"


@dataclass(frozen=True)
class Options:
    """What is the same for all methods.

    Attributes:
        seeds: how many, from 0 on.
        trials: settings that each method may try, its defaults among them.
        epochs: passes over the retained images at most.
        never_seen: model folders of models trained without a request's classes: none, one for all, or one per request.
        relearn: whether full relearning is measured, which trains anew for each cell.
        settings: changes of the published loops' numbers that a recipe brings.
    """

    seeds: int = 3
    trials: int = 8
    epochs: int = 20
    never_seen: tuple[Path, ...] = ()
    relearn: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Bench:
    """Cells of methods on one model and data set, stored in `out` / bench.json; models in `out` / models.

    Args:
        model: model folder to start from; it is never written to.
        data: images in the model's class order; train, test: its splits, decoded or to be decoded.

    Raises RequestError: what was asked for does not fit, or `out` holds another bench.
    """

    def __init__(
        self,
        model: Path,
        data: ImageFolder,
        train: ImageSet,
        test: ImageSet,
        protocol: Protocol,
        options: Options,
        out: Path,
        device: torch.device,
        say: Say = lambda _text: None,
    ):
        self.start, self.data, self.train, self.test = model, data, train, test
        self.protocol, self.options, self.out, self.device, self.say = protocol, options, out, device, say
        self.names = data.class_names
        self.stages = stages(protocol.requests, len(self.names), protocol.missing)
        if len(options.never_seen) not in (0, 1, len(self.stages)):
            raise RequestError(
                f"{len(options.never_seen)} never-seen models were given for {len(self.stages)} requests.",
                "Give one for each request, in their order, or one for all.",
                "bad_reference",
            )
        out.mkdir(parents=True, exist_ok=True)
        self.store = Store(out / BENCH, self._setting())
        self.judge = Judge(train, test, device)
        self.images = Some(train, self._allowed())

    def run(self, methods: Sequence[Method]) -> dict[str, Any]:
        """Measure what is missing; returns the content of `bench.json`."""
        self._references()
        chosen = {method.name: self._tune(method) for method in methods}
        steps = [self.protocol.step(n) for n in range(len(self.stages))]
        for seed in range(self.options.seeds):
            for method in methods:
                measure = functools.partial(self._cell, method, chosen[method.name], seed)
                self.store.chain(method.name, seed, steps, self.out, self.say, measure)
        return self.store.content

    # -------------------------------------------------------------------------------------------------------- in common
    def _setting(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.label,
            "requests": [[self.names[k] for k in r] for r in self.protocol.requests],
            "missing": [self.names[k] for k in self.protocol.missing],
            "model_sha256": sha256(self.start / WEIGHTS),
            "train_sha256": manifest_sha256(self.data.train),
            "test_sha256": manifest_sha256(self.data.test),
            "never_seen_sha256": [sha256(folder / WEIGHTS) for folder in self.options.never_seen],
            "trials": self.options.trials,
            "epochs": self.options.epochs,
            "relearn": self.options.relearn,
            "settings": self.options.settings,
        }

    def _allowed(self) -> Tensor:
        """Training images that methods get: so many of each class, and none of the classes without images."""
        labels = self.train.labels.numpy()
        rows = np.flatnonzero(~of_classes(labels, self.protocol.missing))
        if self.protocol.shots is not None:
            rows = rows[few_shot(labels[rows], self.protocol.shots)]
        return torch.from_numpy(rows)

    def _open(self, folder: Path) -> tuple[nn.Module, ModelConfig]:
        model, config = open_subject(folder)
        return model.to(self.device), config

    def _references(self) -> None:
        """What the original and never-seen models give away of each request's classes."""
        original = self._open(self.start)[0]
        self.original = self.judge.look(original)
        self._latest: tuple[Path, Look] = self.start, self.original
        known = predict(self.original.test_logits) == self.judge.truth
        self.step_size = self.judge.step_size(self.original, self.stages[0]) if self.options.relearn else None
        self.leaks: list[tuple[Leak, Leak | None]] = []
        for n, stage in enumerate(self.stages):
            relearn = self._relearning(100 * known[of_classes(self.judge.truth, stage.wanted)].mean())
            first = self._leak(f"original/{n}", stage, relearn, lambda: self.original)
            folders = self.options.never_seen
            second = None
            if folders:
                folder = folders[n if len(folders) > 1 else 0]
                look = functools.partial(lambda f: self.judge.look(self._open(f)[0]), folder)
                second = self._leak(f"never-seen/{n}", stage, relearn, look)
            self.leaks.append((first, second))

    def _relearning(self, known: float) -> Relearning | None:
        return None if self.step_size is None else Relearning(LIMITS.recover_share * known, self.step_size)

    def _leak(self, key: str, stage: Stage, relearn: Relearning | None, look: Callable[[], Look]) -> Leak:
        self.say(f"reference {key}")
        cell = self.store.cell("references", key, lambda: self.judge.leak(look(), stage, relearn).to_json())
        if "failed" in cell:
            self.store.drop("references", key)
            self.store.save()
            raise RequestError(f"The reference {key} could not be measured: {cell['failed']}", "", cell["kind"])
        return Leak.from_json({k: v for k, v in cell.items() if k != "finished"})

    # ----------------------------------------------------------------------------------------------------------- tuning
    def _tune(self, method: Method) -> dict[str, Any]:
        """The changes of a method's defaults that did best on validation images of the first request."""
        base = self.options.settings if method.name.startswith("published-") else {}
        tried = [{}, *method.trials][: self.options.trials]
        if len(tried) == 1:
            return base
        learn, validation = split_validation(self.images.labels.numpy())
        if not len(validation):  # too few images: the published numbers
            return base
        scores: list[tuple[float, int]] = []
        for k, change in enumerate(tried):
            self.say(f"{method.name}: trial {k + 1} of {len(tried)}")
            trial = functools.partial(self._trial, method, {**base, **change}, learn, validation)
            cell = self.store.cell("tuning", f"{method.name}/{k}", trial)
            if "failed" not in cell:
                scores.append((cell["h_mean"], -k))
        return {**base, **tried[-max(scores)[1]]} if scores else base

    def _trial(self, method: Method, change: dict[str, Any], learn: np.ndarray, validation: np.ndarray) -> Cell:
        stage, start = self.stages[0], time.perf_counter()
        some, held = (Some(self.images, torch.from_numpy(rows)) for rows in (learn, validation))
        model = self._open(self.start)[0]
        said = [_said(model, held, self.device)]
        result = self._result(method, change, model, some, stage, 0, 0)
        model.load_state_dict(result.state_dict)
        said.append(_said(model, held, self.device))
        truth = held.labels.numpy()
        wanted, kept = of_classes(truth, stage.wanted), of_classes(truth, stage.retained)
        before, after = (100 * (answers == truth)[wanted].mean() for answers in said)
        retained = 100 * (said[1] == truth)[kept].mean()
        return {
            "change": change,
            "h_mean": h_mean(float(before - after), float(retained)),
            "forget_acc": float(after),
            "retain_acc": float(retained),
            "seconds": time.perf_counter() - start,
        }

    # ------------------------------------------------------------------------------------------------------------ cells
    def _cell(
        self, method: Method, change: dict[str, Any], seed: int, n: int, before: Path | None, after: Path
    ) -> Cell:
        stage, before = self.stages[n], before or self.start
        model, config = self._open(before)
        unchanged = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        looked = self.original if n == 0 else self._looked(before)
        cpu = time.process_time()
        result = self._result(method, change, model, self.images, stage, seed, n)
        cpu = time.process_time() - cpu  # what other jobs on the machine do not change
        model.load_state_dict(result.state_dict)
        look = self.judge.look(model)
        self._check_order(look, stage)
        found = self.judge.accuracies(looked, look, stage)
        original, never = self.leaks[n]
        relearn = self._relearning(found["forget_acc_before"] or 0.0)
        leak = self.judge.leak(look, stage, relearn)
        failed, excess = self.judge.failures(found, leak, never, original, stage)
        changed = [k for k, tensor in unchanged.items() if not torch.equal(tensor, result.state_dict[k])]
        after.mkdir(parents=True, exist_ok=True)
        save_model(stored_names(model, result.state_dict), config.erase(list(stage.wanted)), after)
        self._latest = after, look
        return {
            "method": method.name,
            "paper": method.paper,
            "control": method.control,
            "code_sha256": code_sha256(method),
            "settings": change,
            "seed": seed,
            "step": self.protocol.step(n),
            **found,
            "linear_probe": leak.linear_probe,
            "linear_probe_excess": excess,
            "prototype_attack": leak.prototype_attack,
            "five_shot": leak.five_shot,
            "mia_auc": leak.mia.auc,
            "relearn_steps": _relearn_steps(leak, relearn),
            "seconds": result.seconds,
            "cpu_seconds": cpu,
            "changed_tensors": len(changed),
            "changed_parameters": sum(unchanged[k].numel() for k in changed),
            "parameters": sum(tensor.numel() for tensor in unchanged.values()),
            "failed_checks": failed,
            "verdict": "fail" if failed else "pass" if never else "inconclusive",
        }

    def _looked(self, folder: Path) -> Look:
        """What a model makes of the images; the one measured last is not run again."""
        if self._latest[0] != folder:
            self._latest = folder, self.judge.look(self._open(folder)[0])
        return self._latest[1]

    def _result(
        self, method: Method, change: dict[str, Any], model: nn.Module, images: Images, stage: Stage, seed: int, n: int
    ) -> Result:
        """What a method leaves, checked: the same tensors, all finite."""
        request = BaselineRequest(stage.wanted, len(self.names), stage.erased, n, self.options.epochs, seed)
        settings = dataclasses.replace(method.settings(), **change)
        forget = torch.isin(images.labels, torch.tensor(stage.wanted))
        torch.manual_seed(seed)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        result = method.run(model, images, forget, request, settings)
        if {name: tensor.shape for name, tensor in result.state_dict.items()} != shapes:
            raise GsforgetError(f"{method.name} changes names or shapes of the weights.", "", "other_weights")
        broken = [name for name, t in result.state_dict.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise GsforgetError(f"{method.name} leaves numbers that are none in {broken[0]}.", "", "nan_weights")
        return result

    def _check_order(self, look: Look, stage: Stage) -> None:
        said = predict(look.test_logits)
        retained = of_classes(self.judge.truth, stage.retained)
        confusion = confusion_matrix(self.judge.truth[retained], said[retained], len(self.names))
        if plausibility(confusion, stage.retained).wrong_order:
            raise GsforgetError("The classes come back in another order.", "", "class_order")


def code_sha256(method: Method) -> str:
    """Of the file that defines a method and of those of `gsforget.baselines` that it takes things from."""
    run = inspect.unwrap(method.run)  # type: ignore[arg-type]
    module = inspect.getmodule(run)
    used = {getattr(value, "__module__", None) for value in vars(module).values()} if module else set()
    names = sorted(
        name for name in used if name and name.startswith(ROOM) and name not in (BASE, getattr(module, "__name__", ""))
    )
    files = [Path(inspect.getfile(run)), *(Path(str(sys.modules[name].__file__)) for name in names)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _relearn_steps(leak: Leak, relearn: Relearning | None) -> int | None:
    return steps_to(leak.starts.faster(relearn.goal), relearn.goal) if leak.starts and relearn else None


@torch.no_grad()
def _said(model: nn.Module, images: Images, device: torch.device) -> np.ndarray:
    pieces = torch.arange(len(images.labels)).split(256)
    return torch.cat([as_logits(model.eval()(images.batch(p).to(device))).argmax(1).cpu() for p in pieces]).numpy()
