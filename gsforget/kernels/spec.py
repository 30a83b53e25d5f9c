"""One compilation of one kernel: what the ahead-of-time compiler and the tests of register use go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A kernel with everything that is fixed when it is compiled.

    Attributes:
        name: unique, also a file name: kernel, types and tile, such as ``lora_ffn_up_bf16_r16_128x128``.
        module, function: where the ``@triton.jit`` function is, so that a process without the interpreter can import it.
        signature: type of every argument in order: ``*bf16``, ``i32``, ``fp32``, ``constexpr``.
        constants: values of the constexpr arguments by name.
        aligned: arguments whose address or value is a multiple of 16.
        options: ``num_warps``, ``num_stages`` and the like.
    """

    name: str
    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
