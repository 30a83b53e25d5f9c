"""The group-lasso proximal step inside Adam, for all groups of a flat buffer at once."""

from gsforget.kernels.group_prox.fused import ProximalAdam
from gsforget.kernels.group_prox.naive import ProxStep, prox_group_lasso, proximal_adam_step

__all__ = ["ProxStep", "ProximalAdam", "prox_group_lasso", "proximal_adam_step"]
