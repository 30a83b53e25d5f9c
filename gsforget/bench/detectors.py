"""A bench of detectors: a protocol's requests in a row by gsforget's own methods, with AP after each; cells as in `run`.

Every chain goes on to its end, whatever its gates say: what they would have refused stands under the audit.  There is
nothing to tune, so that there are no trials; what rivals of classifiers do has no published form for detectors.
"""

from __future__ import annotations

import functools
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsforget.bench.protocols import ORDER_SEED, Protocol, make_protocol
from gsforget.bench.run import BENCH, code_sha256
from gsforget.bench.store import Cell, Say, Store
from gsforget.errors import RequestError
from gsforget.folder import WEIGHTS, sha256
from gsforget.request import METHODS, Request, Thresholds
from gsforget.settings import Settings

if TYPE_CHECKING:
    from gsforget.baselines.base import Method
    from gsforget.bench.recipes import Recipe
    from gsforget.source import Source
    from gsforget.tasks.detect.coco import SceneFolder

NO_GATE = Thresholds(100.0, 100.0, 100.0)  # a bench shows what comes after a request that went wrong
USUAL = Thresholds()
LIMITS = {
    "forget_ap50": USUAL.max_forget_acc,
    "old_ap50": USUAL.max_forget_acc,
    "retain_ap_drop": USUAL.max_retain_drop,
    "class_ap_drop": USUAL.max_class_drop,
}
FIGURES = [
    f"{who}_{f}_{when}" for who in ("forget", "retain", "old") for f in ("ap", "ap50") for when in ("before", "after")
]


@dataclass(frozen=True)
class DetectorBench:
    """Chains of requests to one detector, stored in `out` / bench.json; run folders in `out` / models / method / seed.

    Attributes:
        source: the detector; scenes: its annotated images.
        protocol: with class indices of the detector, see `detector_protocol`.
    """

    source: Source
    scenes: SceneFolder
    protocol: Protocol
    seeds: int
    out: Path
    device: str
    skip_corrupt: bool = False
    say: Say = lambda _text: None

    def run(self, methods: Sequence[Method], again: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
        """Measure what is missing, `again` anew; returns the content of `bench.json`, and methods measured by older code.

        Raises RequestError: ``no_rivals`` for a method that is none of gsforget's own; as `Store` does.
        """
        foreign = next((m.name for m in methods if m.name not in METHODS), None)
        if foreign is not None:
            raise RequestError(
                f"{foreign} forgets classes of classifiers, and the model is a detector.",
                f"Type --methods {','.join(METHODS)}.",
                "no_rivals",
            )
        self.out.mkdir(parents=True, exist_ok=True)
        store = Store(self.out / BENCH, self._setting())
        for name in again:
            store.drop_method(name)
        older = [m.name for m in methods if store.is_older(m.name, code_sha256(m))]
        steps = [self.protocol.step(n) for n in range(len(self.protocol.requests))]
        for seed in range(self.seeds):
            for method in methods:
                measure = functools.partial(self._cell, method, seed)
                store.chain(method.name, seed, steps, self.out, self.say, measure)
        return store.content, older

    def _setting(self) -> dict[str, Any]:
        assert self.source.folder is not None
        names = self.scenes.class_names
        return {
            "task": "detect",
            "protocol": self.protocol.label,
            "requests": [[names[k] for k in r] for r in self.protocol.requests],
            "model_sha256": sha256(self.source.folder / WEIGHTS),
            "train_sha256": self.scenes.train.sha256,
            "test_sha256": self.scenes.test.sha256,
        }

    def _cell(self, method: Method, seed: int, n: int, before: Path | None, after: Path) -> Cell:
        from gsforget import forgetting
        from gsforget.export.device.preprocess import Preprocess
        from gsforget.source import load_source

        if after.exists():
            shutil.rmtree(after)  # of a bench that was stopped between a run and its cell
        after.parent.mkdir(parents=True, exist_ok=True)
        source = load_source(str(before or self.source.folder), class_names=self.scenes.class_names)
        load = Preprocess.from_dict(source.config.to_json()).load
        request = Request(
            [str(k) for k in self.protocol.requests[n]],
            Settings(seed=seed),
            NO_GATE,
            self.protocol.shots,
            self.device,
            self.skip_corrupt,
            method.name,
        )
        cpu = time.process_time()
        outcome = forgetting.forget(source, self.scenes, request, load, None, after)
        cpu = time.process_time() - cpu
        document, found = outcome.document, outcome.document["metrics"]
        failed = [g["name"] for g in document["gates"] if g["bound"] > LIMITS[g["name"]]]
        return {
            "method": method.name,
            "paper": method.paper,
            "control": method.control,
            "code_sha256": code_sha256(method),
            "settings": {},
            "seed": seed,
            "step": self.protocol.step(n),
            "h_mean": found["h_mean"],
            **{name: found[name] for name in FIGURES},
            "seconds": document["seconds"]["train"],
            "cpu_seconds": cpu,
            "changed_tensors": len(document["changed_tensors"]),
            "changed_parameters": sum(outcome.state[name].numel() for name in document["changed_tensors"]),
            "parameters": sum(tensor.numel() for tensor in outcome.state.values()),
            "failed_checks": failed,
            "verdict": "fail" if failed else "pass",
        }


def detector_protocol(
    name: str, categories: Sequence[int], shots: int | None = None, order_seed: int | None = None
) -> Protocol:
    """A protocol X-Y over the annotated kinds of a detector, which may know more.

    Args:
        categories: class indices of the detector in the order of the category ids.
        order_seed: of the release's order for COCO, by numpy; None: of that of classifiers.

    Raises RequestError ``unknown_protocol``.
    """
    order = list(range(len(categories)))
    if order_seed is None:
        random.Random(ORDER_SEED).shuffle(order)
    else:
        np.random.RandomState(order_seed).shuffle(order)
    made = make_protocol(name, len(categories), shots, order=order)
    requests = tuple(tuple(categories[k] for k in request) for request in made.requests)
    return Protocol(made.name, requests, shots)


def open_bench(
    model: Path,
    data: Path,
    protocol: str,
    recipe: Recipe | None,
    *,
    seeds: int,
    shots: int | None,
    annotations: str | None,
    class_names: Sequence[str] | None,
    out: Path,
    device: str,
    skip_corrupt: bool,
    say: Say,
) -> DetectorBench:
    """Load the detector and its scenes; arguments as of `open.run_bench`.  Raises RequestError."""
    from gsforget.source import load_source
    from gsforget.tasks.detect.kind import open_data

    source = load_source(str(model), class_names=list(class_names) if class_names is not None else None)
    scenes = open_data(data, source.names, annotations=annotations)
    made = detector_protocol(protocol, scenes.train.categories, shots, recipe.order_seed if recipe else None)
    return DetectorBench(source, scenes, made, seeds, out, device, skip_corrupt, say)
