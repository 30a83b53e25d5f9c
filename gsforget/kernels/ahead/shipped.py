"""Which kernels there are to compile: the one place that knows the packages with a list of specs."""

from __future__ import annotations

import importlib
import importlib.util
from fnmatch import fnmatchcase

from gsforget.errors import RequestError
from gsforget.kernels.ahead.targets import find_target
from gsforget.kernels.spec import Spec

PACKAGES = ("lora_ffn", "group_prox")  # below gsforget.kernels; those that have a file specs.py count


def shipped(target: int, names: str | None = None) -> list[Spec]:
    """Every configuration that runs by itself on a GPU generation.

    Args:
        target: compute capability without its dot, such as 87.
        names: shell pattern, such as ``lora_ffn_*_bf16_*``, that a name has to match.

    Raises:
        RequestError: kind ``kernel_target`` for an unknown target, ``no_kernel`` where the pattern matches nothing.
    """
    find_target(target)
    found: list[Spec] = []
    for package in PACKAGES:
        module = f"gsforget.kernels.{package}.specs"
        if importlib.util.find_spec(module) is not None:
            found += importlib.import_module(module).specs(target)
    chosen = [s for s in found if names is None or fnmatchcase(s.name, names)]
    if not chosen:
        raise RequestError(
            f"No kernel for sm_{target} has a name like {names}.",
            f"Type gsforget kernels list --target sm_{target} to see the names.",
            "no_kernel",
        )
    return chosen
