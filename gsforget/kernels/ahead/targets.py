"""The GPU generations that kernels are compiled for, and what a block may use on each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gsforget.errors import RequestError


@dataclass(frozen=True)
class Target:
    """A GPU generation.

    Attributes:
        number: compute capability without its dot, such as 87.
        gpus: some products of that generation.
        shared: bytes of shared memory that one block may ask for (CUDA C++ Programming Guide, table of technical
            specifications per compute capability).
    """

    number: int
    gpus: str
    shared: int

    @property
    def name(self) -> str:
        return f"sm_{self.number}"


TARGETS = {
    t.number: t
    for t in (
        Target(75, "T4, RTX 20", 64 * 1024),
        Target(80, "A100, A30", 163 * 1024),
        Target(86, "A10, A40, RTX 30", 99 * 1024),
        Target(87, "Jetson Orin", 163 * 1024),
        Target(89, "L4, L40, RTX 40", 99 * 1024),
        Target(90, "H100, H200", 227 * 1024),
        Target(100, "B200", 227 * 1024),
        Target(110, "Jetson Thor", 227 * 1024),
        Target(120, "RTX 50", 99 * 1024),
    )
}


def find_target(number: int) -> Target:
    """The target of a number.  Raises RequestError (kind ``kernel_target``) that names the known ones."""
    if number not in TARGETS:
        raise unknown(f"sm_{number}")
    return TARGETS[number]


def read_targets(text: str) -> list[Target]:
    """``sm_87,sm_90`` (or ``sm87``, ``87``) to targets, each once.  Raises RequestError as ``find_target`` does."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d{2,3})", part.strip().lower())
        if match is None:
            raise unknown(part.strip() or "''")
        found.append(find_target(int(match[1])))
    return list(dict.fromkeys(found))


def unknown(name: str) -> RequestError:
    known = ", ".join(t.name for t in TARGETS.values())
    return RequestError(f"There is no target {name} for the kernels.", f"Known are {known}.", "kernel_target")
