"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Numbers of the loop; None means that the loop chooses (see `control`).

    Attributes:
        rank: of each LoRA pair.
        lr: Adam's step size for the factors; None: from the widest network.
        batch_size: retained images per step; forgotten images join in proportion, at least a quarter as many.
        epochs: passes over the retained images in the settling stage; None: by validation.
        prox: strength of the group penalty, in nats per unit of weighted norm; None: from the data, then steered.
        target_groups: groups that may stay active; None: a third.
        bnd: bound of the ascent on forgotten images, in nats; None: from the number of classes.
        max_forget_acc, max_retain_drop: percent and points on validation data at which settling ends.
        max_class_drop: points that one retained class may lose there for a depth to count as free, by the lower bound.
        reuse_prefix, retire_groups: switches for measuring what they gain; the result is the same within noise.
        cache_bytes: memory for reused outputs; 0 for none; None: a quarter of what is free on the device.
        autocast: run the network in bfloat16 while training; losses, factors and the optimiser stay in float32, and what is
            merged is measured in float32 as ever.
        cuda_graphs: replay a small batch's step on a GPU instead of launching it, where that can be done, see `graphs`.
    """

    rank: int = 16
    lr: float | None = None
    batch_size: int = 64
    epochs: float | None = None
    prox: float | None = None
    target_groups: int | None = None
    bnd: float | None = None
    seed: int = 0
    max_forget_acc: float = 1.0
    max_retain_drop: float = 0.5
    max_class_drop: float = 10.0
    reuse_prefix: bool = True
    retire_groups: bool = True
    cache_bytes: float | None = None
    autocast: bool = False
    cuda_graphs: bool = True
