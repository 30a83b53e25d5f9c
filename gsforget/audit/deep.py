"""Standard and full tier: what fresh training finds, and what lies between the model and the original.  Needs weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gsforget.audit import checks, relearn, similarity
from gsforget.audit.attacked import MOST, STEPS, attacked, both_starts, relearned, said, step_size
from gsforget.audit.checks import Check, Limits
from gsforget.audit.measure import subset
from gsforget.audit.relearn import Curve, Starts
from gsforget.errors import RequestError
from gsforget.images import ImageSet
from gsforget.lora.blocks import find_feed_forward
from gsforget.metrics import Z_ONE_SIDED, of_classes, wilson

if TYPE_CHECKING:
    from torch import Tensor

    from gsforget.audit.measure import Evidence, View


def head_curves(views: dict[str, View | None], seed: int) -> dict[str, Curve | None]:
    """Relearning of the head alone on features that are known already, with equal shares of retained images."""
    return {
        name: None if view is None or view.head is None else _head_curve(view, seed) for name, view in views.items()
    }


def _head_curve(view: View, seed: int) -> Curve:
    assert view.head is not None
    labels = view.train.labels
    attacked = np.flatnonzero(of_classes(labels, view.tested))
    others = np.setdiff1d(np.arange(len(labels)), attacked)
    rows = np.concatenate([attacked, subset(others, len(attacked), seed)])
    weight, bias = (torch.from_numpy(part).float() for part in view.head)
    as_tensor = torch.from_numpy
    assert view.train.features is not None
    assert view.test.features is not None
    return relearn.relearn_head(
        weight,
        bias,
        as_tensor(view.train.features[rows]),
        as_tensor(labels[rows]),
        as_tensor(view.test.features),
        as_tensor(view.test.labels),
        STEPS[-1],
        STEPS,
        seed=seed,
    )


def full_checks(e: Evidence, limits: Limits, say: Callable[[str], None]) -> tuple[list[Check], dict[str, Any]]:
    """``relearn_full`` and ``relearn_retain``, with their curves.

    ``full`` holds the curve of each model's faster start, ``full_own_head`` that from its own head.
    """
    nets, seed = attacked(e), e.case.ask.seed
    subject = nets["subject"]
    if subject is None:
        why = "it needs the weights of a model that ends in a linear layer, and images of both splits"
        return [checks.unknown(n, u, why) for n, u in (("relearn_full", "steps"), ("relearn_retain", "%"))], {}
    known = float(
        e.original.test.correct[of_classes(e.original.test.labels, e.attackable)].mean() * 100 if e.original else 100.0
    )
    say("relearning: step size")
    lr = step_size(nets["original"] or subject, seed)
    starts: dict[str, Starts | None] = dict.fromkeys(nets)
    retain: dict[str, Curve | None] = dict.fromkeys(nets)
    for name, net in nets.items():
        if net is not None:
            say(f"relearning: full, {name}")
            starts[name] = both_starts(net, seed, limits.recover_share * known, lr)
    for name, net in nets.items():
        if net is not None and len(net.retained) and not (name == "reference" and e.never_seen):
            say(f"relearning: retain, {name}")
            retain[name] = relearned(net, "retain", seed, None, lr)
    assert starts["subject"] is not None
    made = [checks.relearning(starts["subject"], starts["original"], starts["reference"], known, limits)]
    made.append(_recovery(retain["subject"], retain["original"], retain["reference"], len(subject.test_rows), limits))
    goal = checks.relearning_goal(starts["reference"], known, limits)
    curves = {
        "full": {name: s.faster(goal) if s else None for name, s in starts.items()},
        "full_own_head": {name: s.own if s else None for name, s in starts.items()},
        "retain": retain,
    }
    return made, {mode: {"lr": lr, **curves_json(found)} for mode, found in curves.items()}


def _recovery(
    subject: Curve | None, original: Curve | None, reference: Curve | None, count: int, limits: Limits
) -> Check:
    name = "relearn_retain"
    if subject is None:
        return checks.unknown(name, "%", "there are no training images of retained classes", limits.max_forget_acc)
    highest, before, never = (max(c.accuracies) if c else None for c in (subject, original, reference))
    assert highest is not None
    allowed = max(limits.max_forget_acc, never or 0.0)
    bound = wilson(round(highest * count / 100), count, Z_ONE_SIDED)[0]
    says = f"While training goes on with retained images alone, the forgotten classes come back to {highest:.1f} % at most."
    return Check(name, highest, before, never, allowed, "pass" if bound <= allowed else "fail", "%", says)


def curves_json(curves: dict[str, Curve | None]) -> dict[str, Any]:
    """Curves on common steps; null where one was not measured (any more)."""
    steps = sorted({s for c in curves.values() if c for s in c.steps})
    made: dict[str, Any] = {"steps": steps}
    for name in ("subject", "original", "reference"):
        curve = curves.get(name)
        known = dict(zip(curve.steps, curve.accuracies)) if curve else {}
        made[name] = [known.get(s) for s in steps] if curve else None
    return made


def block_similarity(e: Evidence) -> list[dict[str, Any]]:
    """CKA of each block's output, mean over tokens, before and after, on test images of forgotten and retained classes."""
    assert e.original is not None
    before, after = e.original.side.subject.module, e.subject.side.subject.module
    assert before is not None
    assert after is not None
    rows = {
        "forget": subset(e.sets.rows("test", e.case.audited), MOST, e.case.ask.seed),
        "retain": subset(e.sets.rows("test", e.case.retained), MOST, e.case.ask.seed),
    }
    sides = ((before, e.original.side), (after, e.subject.side))
    found: dict[str, dict[str, Any]] = {}
    for kind, chosen in rows.items():
        if len(chosen) < 4:
            continue
        first, second = (block_outputs(module, e.sets.images("test", side.load), chosen) for module, side in sides)
        for name in first:
            if name in second:
                entry = found.setdefault(name, {"block": name, "forget": None, "retain": None})
                entry[kind] = similarity.cka(first[name], second[name])
    return list(found.values())


def block_outputs(module: nn.Module, images: ImageSet, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Mean over tokens of what each block puts out, [N, d] by the block's name, in the order in which they run.

    A block is the largest module that holds one feed-forward network and no other.
    """
    device = next(module.parameters()).device
    try:
        networks = find_feed_forward(module, images.batch(torch.from_numpy(rows[:2])).to(device))
    except RequestError:
        return {}
    names = [network.name for network in networks]
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
                middle = tuple(range(1, tensor.dim() - 1))
                kept.setdefault(name, []).append((tensor.mean(middle) if middle else tensor).float().cpu())

        return hook

    candidates = {name: _outwards(name, names) for name in names}
    handles = [
        module.get_submodule(c).register_forward_hook(keep(c)) for c in {c for cs in candidates.values() for c in cs}
    ]
    try:
        said(module, images, rows)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for places in candidates.values():
        place = next((p for p in places if sum(map(len, kept.get(p, []))) == len(rows)), None)
        if place is not None:
            found[place] = torch.cat(kept[place]).numpy()
    return found


def _outwards(name: str, others: list[str]) -> list[str]:
    """The modules around a network that hold no other, largest first, down to the network itself."""
    parts = name.split(".")
    paths = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [p for p in paths if sum(o == p or o.startswith(f"{p}.") for o in others) == 1]


def interpolation(e: Evidence) -> list[dict[str, Any]]:
    """Accuracy on forgotten and retained test images along the straight line from the original to the model."""
    assert e.original is not None
    before, after = e.original.side.subject.module, e.subject.side.subject.module
    assert before is not None
    assert after is not None
    images, seed = e.sets.images("test", e.subject.side.load), e.case.ask.seed
    rows = [subset(e.sets.rows("test", classes), MOST, seed) for classes in (e.case.audited, e.case.retained)]

    def evaluate(model: nn.Module) -> list[float | None]:
        return [
            float(100 * (said(model, images, r) == images.labels[torch.from_numpy(r)]).float().mean())
            if len(r)
            else None
            for r in rows
        ]

    scratch = copy.deepcopy(after)
    found = relearn.interpolation(scratch, before.state_dict(), after.state_dict(), evaluate)
    return [{"t": t, "forget": values[0], "retain": values[1]} for t, values in found]


def same_architecture(e: Evidence) -> bool:
    """Whether original and model have the same tensors, so that they can be compared one by one."""
    modules = [m.side.subject.module for m in (e.original, e.subject) if m is not None]
    if len(modules) < 2 or any(m is None for m in modules):
        return False
    first, second = ({k: v.shape for k, v in m.state_dict().items()} for m in modules if m is not None)
    return first == second


def changed(e: Evidence) -> dict[str, Any]:
    """Which tensors, and which feed-forward networks, differ from the original's."""
    assert e.original is not None
    before, after = e.original.side.subject.module, e.subject.side.subject.module
    assert before is not None
    assert after is not None
    old, new = before.state_dict(), after.state_dict()
    names = [n for n in new if not torch.equal(old[n], new[n])]
    example = torch.zeros(1, *_shape(e))
    try:
        blocks = [n.name for n in find_feed_forward(after, example.to(next(after.parameters()).device))]
    except RequestError:
        blocks = []
    hit = [b for b in blocks if any(n.startswith(f"{b}.") for n in names)]
    return {
        "tensors": names,
        "identical": len(new) - len(names),
        "total": len(new),
        "blocks": hit,
        "of_blocks": len(blocks),
    }


def _shape(e: Evidence) -> tuple[int, ...]:
    for split in ("test", "train"):
        images = e.sets.images(split, e.subject.side.load)
        if len(images):
            return tuple(images.batch(torch.tensor([0])).shape[1:])
    return (3, 1, 1)
