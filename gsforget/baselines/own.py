"""gsforget's own method behind the interface of the baselines, to be measured beside them: what `gsforget forget` runs.

It has nothing to tune: what a request needs is chosen from its own validation data (`gsforget.control`).
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gsforget import control
from gsforget.baselines.base import BaselineRequest, Method, Result, frozen, plain_state
from gsforget.data import few_shot
from gsforget.lora.grid import merge, to_grid
from gsforget.material import gather
from gsforget.settings import Settings
from gsforget.tasks.classify import Classification, default_bound
from gsforget.tasks.face.answers import FaceClassifier
from gsforget.tasks.face.losses import FaceForgetting
from gsforget.training import Loop
from gsforget.views import Some

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gsforget.tasks.base import Task
    from gsforget.views import Images


@dataclass(frozen=True)
class OwnSettings:
    """method: gs-lora or gs-lora++."""

    method: str = "gs-lora++"


def own(model: nn.Module, images: Images, forget: Tensor, request: BaselineRequest, settings: OwnSettings) -> Result:
    start = time.perf_counter()
    del forget  # as the request's classes say
    s = Settings(seed=request.seed)
    gone = {*request.forget, *request.erased}
    retained = [k for k in range(request.num_classes) if k not in gone]
    enough = max(1, control.STEPS_OF_IMAGES * s.batch_size // (len(request.forget) + len(retained)))
    some = Some(images, torch.from_numpy(few_shot(images.labels.numpy(), enough, s.seed)))
    lacking = [k for k in retained if not (some.labels == k).any()]
    task: Task = Classification(
        request.num_classes,
        request.forget,
        request.erased,
        default_bound(request.num_classes),
        settings.method,
        firm=bool(lacking),
    )
    if isinstance(model, FaceClassifier):
        task = FaceForgetting(request.forget, request.erased, settings.method)
    with frozen(model):
        single = torch.zeros(len(some.labels), dtype=torch.bool)
        material = gather(model, some, request.forget, request.erased, single, lacking, s.seed)
        loop = Loop(model, task, material, s)
        try:
            trained = loop.run()
        finally:
            loop.groups.detach()
        state = plain_state(model)
        for name, pair in trained.groups.named_deltas().items():
            state[name] = merge(state[name], to_grid(pair.a.cpu(), pair.b.cpu()))
    names = [block.name for block in trained.groups.blocks]
    return Result(state, time.perf_counter() - start, trained.groups.norms().tolist(), names)


METHOD = Method("gs-lora++", "this project, after arXiv 2501.09705", own, OwnSettings)
WITHOUT_FEATURES = Method(
    "gs-lora", "this project, after arXiv 2403.11530", own, functools.partial(OwnSettings, method="gs-lora")
)
