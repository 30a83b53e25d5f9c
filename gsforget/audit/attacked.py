"""A network to be relearned with all of its weights: from which images, at which step size, from which two heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gsforget.audit import probes, relearn
from gsforget.audit.measure import subset
from gsforget.audit.relearn import Curve, Starts
from gsforget.features import features_and_logits
from gsforget.images import ImageSet
from gsforget.lora.blocks import as_logits

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.audit.case import Side
    from gsforget.audit.measure import Evidence

# Steps of optimiser after which relearning is measured: closer where it is fast.
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100)
MOST = 500  # test images of a kind that are looked at
TRIED, KEPT = (
    10,
    0.9,
)  # steps by which a step size is tried, and the share of its accuracy that a network keeps at a bearable one
TRIED_ON = 256  # training images of retained classes
BATCH = 128


@dataclass(frozen=True)
class Attacked:
    """A network to be relearned, where it learns from and where it is measured.

    Attributes:
        classes: the attacked ones.
        rows, retained: rows of the training images of the attacked and of the retained classes.
        test_rows: rows of test images of the attacked classes.
    """

    module: nn.Module
    classifier: str
    classes: list[int]
    train: ImageSet
    test: ImageSet
    rows: np.ndarray
    retained: np.ndarray
    test_rows: np.ndarray


def attacked(e: Evidence) -> dict[str, Attacked | None]:
    """The networks of ``subject``, ``original`` and ``reference``; None where there are no weights or no classifier."""
    found: dict[str, Attacked | None] = {"subject": None, "original": None, "reference": None}
    for name, measured in (("subject", e.subject), ("original", e.original), ("reference", e.reference)):
        if measured is not None and e.attackable:
            found[name] = _attacked(e, measured.side, e.attackable)
    if e.never_seen is not None:
        found["reference"] = _attacked(e, e.base.side, np.unique(e.never_seen[1].labels).tolist())
    return found


def _attacked(e: Evidence, side: Side, classes: list[int]) -> Attacked | None:
    module, classifier = side.subject.module, side.subject.classifier
    if module is None or classifier is None:
        return None
    new = max(classes) + 1 - len(e.case.names)
    if new > 0:
        module = _with_rows(module, classifier, new)
    seed = e.case.ask.seed
    rows = e.sets.rows("train", classes)
    retained = e.sets.rows("train", e.case.retained)
    test_rows = subset(e.sets.rows("test", classes), MOST, seed)
    train, test = (e.sets.images(split, side.load) for split in ("train", "test"))
    return Attacked(module, classifier, classes, train, test, rows, retained, test_rows)


def _with_rows(module: nn.Module, classifier: str, new: int) -> nn.Module:
    """A copy whose classifier has further rows, of zeros and the mean bias, for classes that it never had."""
    grown = copy.deepcopy(module)
    old = grown.get_submodule(classifier)
    bias = old.bias is not None
    layer = nn.Linear(old.in_features, old.out_features + new, bias, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        layer.weight.zero_()[: old.out_features] = old.weight
        if bias:
            layer.bias.fill_(float(old.bias.mean()))[: old.out_features] = old.bias
    parent, _, name = classifier.rpartition(".")
    setattr(grown.get_submodule(parent), name, layer)
    return grown


def step_size(a: Attacked, seed: int) -> float:
    """The largest of `relearn.FULL_LRS` that a network bears: after ten steps on retained images it still names them.

    What ruins a network brings nothing back and shows nothing: a pre-trained ViT-S loses all of its accuracy by one step of
    3e-4, at which a small network that was trained from nothing learns well.  The least is taken untried.
    """
    rows = torch.from_numpy(subset(a.retained, TRIED_ON, seed))
    truth = a.train.labels[rows]

    def kept(model: nn.Module) -> float:
        return float(100 * (said(model, a.train, rows.numpy()) == truth).float().mean())

    for lr in relearn.FULL_LRS[:-1] if len(rows) else ():
        curve = relearn.relearn(
            a.module,
            a.classifier,
            a.train.batch,
            torch.from_numpy(a.retained),
            a.train.labels,
            kept,
            "retain",
            TRIED,
            TRIED,
            lr,
            seed=seed,
        )
        if curve.accuracies[-1] >= KEPT * curve.accuracies[0]:
            return lr
    return relearn.FULL_LRS[-1] if len(rows) else relearn.FULL_LRS[0]


def relearned(a: Attacked, mode: relearn.Mode, seed: int, until: float | None, lr: float) -> Curve:
    """The curve of one network; ``full`` sees equally many retained images, ``retain`` nothing else."""
    rows = a.retained if mode == "retain" else np.concatenate([a.rows, subset(a.retained, len(a.rows), seed)])

    def evaluate(model: nn.Module) -> float:
        answers = said(model, a.test, a.test_rows)
        return float(100 * (answers == a.test.labels[torch.from_numpy(a.test_rows)]).float().mean())

    return relearn.relearn(
        a.module,
        a.classifier,
        a.train.batch,
        torch.from_numpy(rows),
        a.train.labels,
        evaluate,
        mode,
        STEPS[-1],
        STEPS,
        lr,
        seed=seed,
        until=until,
    )


def both_starts(a: Attacked, seed: int, until: float | None, lr: float) -> Starts:
    """``full`` relearning from the network's own head, and from one with class means of the same images in it."""
    return Starts(relearned(a, "full", seed, until, lr), relearned(imprinted(a, seed), "full", seed, until, lr))


@torch.no_grad()
def imprinted(a: Attacked, seed: int) -> Attacked:
    """A copy whose head has the class means of all relearning images as the attacked classes' rows."""
    module = copy.deepcopy(a.module)
    head = module.get_submodule(a.classifier)
    attacked, others = (_features(a, rows) for rows in (a.rows, subset(a.retained, len(a.rows), seed)))
    bias = None if head.bias is None else head.bias.double().cpu().numpy()
    labels = a.train.labels[torch.from_numpy(a.rows)].numpy()
    weight, offset = probes.imprint(
        head.weight.double().cpu().numpy(),
        bias,
        attacked,
        labels,
        a.classes,
        others if len(others) else None,
        a.train.labels[torch.from_numpy(a.retained)].unique().tolist(),
    )
    head.weight.copy_(torch.from_numpy(weight))
    if head.bias is not None:
        head.bias.copy_(torch.from_numpy(offset))
    return replace(a, module=module)


def _features(a: Attacked, rows: np.ndarray) -> np.ndarray:
    device = next(a.module.parameters()).device
    parts = torch.from_numpy(np.asarray(rows, dtype=np.int64)).split(BATCH) if len(rows) else ()
    found = [features_and_logits(a.module, a.classifier, a.train.batch(p).to(device))[0].cpu() for p in parts]
    return torch.cat(found).numpy() if found else np.zeros((0, 0), np.float32)


@torch.no_grad()
def said(model: nn.Module, images: ImageSet, rows: np.ndarray) -> Tensor:
    """The class that a network names first for each of the images, int64 [len(rows)]."""
    device = next(model.parameters()).device
    parts = torch.from_numpy(np.asarray(rows, dtype=np.int64)).split(BATCH)
    return torch.cat([as_logits(model(images.batch(part).to(device))).argmax(1).cpu() for part in parts])
