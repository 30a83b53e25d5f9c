"""What a worker process does: compile one kernel with Triton, and read from the binary what it needs of the chip.

Triton settles at its import whether it interprets or compiles, so compiling has processes of its own: they are right
whatever the process that asks has done with Triton.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsforget.errors import GsforgetError, RequestError
from gsforget.kernels.spec import Spec

# Stated, because the default changes between versions of Triton.
OPTIONS = {"enable_fp_fusion": True}
TYPES = {"u64": 8, "u32": 4, "u16": 2, "u8": 1, "f32": 4, "f64": 8, "b64": 8, "b32": 4, "b16": 2, "b8": 1}


@dataclass(frozen=True)
class Toolchain:
    """Versions of what compiles."""

    triton: str
    ptxas: str


def start() -> None:
    """Make this process one that compiles: no interpreter, no file names of this machine in the binaries."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that asked, which stops this one
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def toolchain(target: int) -> Toolchain:
    """Which versions would compile for a target.

    Raises:
        RequestError: kind ``no_triton`` where Triton is missing, ``kernel_target`` where its ptxas does not know the GPU.
        GsforgetError: kind ``interpreting`` where Triton runs in its interpreter in this process.
    """
    if importlib.util.find_spec("triton") is None:
        raise RequestError(
            "Compiling kernels takes Triton, which is not installed.", "pip install triton.", "no_triton"
        )
    import triton

    if triton.knobs.runtime.interpret:
        raise GsforgetError(
            "Kernels cannot be compiled in a process where Triton runs in its interpreter.",
            "Unset TRITON_INTERPRET and try again.",
            "interpreting",
        )
    tool = triton.knobs.nvidia.ptxas_blackwell if target >= 100 else triton.knobs.nvidia.ptxas
    allowed = subprocess.run([tool.path, "--help"], capture_output=True, text=True, check=True).stdout
    if f"'{_architecture(target)}'" not in allowed:
        raise RequestError(
            f"The ptxas {tool.version} of Triton {triton.__version__} does not know sm_{target}.",
            "Install a newer Triton, or leave this target out.",
            "kernel_target",
        )
    return Toolchain(triton.__version__, tool.version)


def compile_one(spec: Spec, target: int) -> tuple[dict[str, Any], bytes]:
    """Compile a kernel.

    Returns:
        Its entry in the manifest, and the binary.

    Raises:
        GsforgetError: kind ``kernel_compile``, with the first line of what the compiler said.
    """
    try:
        compiled = _compile(spec, target)
    except Exception as error:  # of Triton, LLVM or ptxas, each with its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GsforgetError(f"{spec.name} does not compile: {lines[0]}", "", "kernel_compile") from None
    binary, meta = compiled.asm["cubin"], compiled.metadata
    scratch = {k: getattr(meta, f"{k}_scratch_size", 0) for k in ("global", "profile")}
    entry = {
        "name": spec.name,
        "file": f"{spec.name}.cubin",
        "sha256": hashlib.sha256(binary).hexdigest(),
        "module": spec.module,
        "function": spec.function,
        "entry": meta.name,
        "threads": meta.num_warps * 32,
        "cluster": meta.num_ctas,
        "signature": dict(spec.signature),
        "constants": dict(spec.constants),
        "aligned": list(spec.aligned),
        "options": {**OPTIONS, **spec.options},
        "parameters": parameters(spec, compiled.asm["ptx"]),
        **resources(binary),
        "shared": meta.shared,
        "tensor_memory": getattr(meta, "tmem_size", None) or 0,
        "scratch": scratch,
    }
    return entry, binary


def _compile(spec: Spec, target: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(spec.module), spec.function)
    names = function.arg_names
    if list(spec.signature) != list(names):
        raise ValueError(f"its signature names {list(spec.signature)}, the function {list(names)}")
    source = ASTSource(
        fn=function,
        signature=dict(spec.signature),
        constexprs={(names.index(k),): v for k, v in spec.constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in spec.aligned if k not in spec.constants},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={**OPTIONS, **spec.options})


def parameters(spec: Spec, ptx: str) -> list[dict[str, Any]]:
    """What a launch passes, in order: name, type and bytes of each; Triton's own come last, as type ``scratch``."""
    listed = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    sizes = [TYPES[t] for t in re.findall(r"\.param\s+\.(\w+)", listed[1] if listed else "")]
    own = [(name, kind) for name, kind in spec.signature.items() if kind != "constexpr"]
    if len(sizes) < len(own):
        raise GsforgetError(
            f"{spec.name} takes {len(sizes)} parameters for {len(own)} arguments.", "", "kernel_compile"
        )
    extra = [(f"scratch{i}", "scratch") for i in range(len(sizes) - len(own))]
    return [{"name": n, "type": kind, "bytes": size} for (n, kind), size in zip(own + extra, sizes, strict=True)]


def resources(binary: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory per thread, as cuobjdump reads them from a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = subprocess.run([_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    if found is None:
        raise GsforgetError("cuobjdump reports no registers for a binary.", "", "kernel_compile")
    return dict(zip(("registers", "stack", "local"), map(int, found.groups())))


@functools.cache
def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else "cuobjdump"


def _architecture(target: int) -> str:
    """What Triton calls a target when it hands it to ptxas."""
    return f"sm_{target}a" if target >= 90 else f"sm_{target}"
