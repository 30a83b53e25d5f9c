"""gsforget: make a trained vision transformer forget classes on request, show the evidence, ship the result.

Importing the package costs nothing: torch and its friends are loaded by the first function that needs them.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "forget": "gsforget.api",
    "open_requests": "gsforget.api",
    "audit_model": "gsforget.api",
    "export_model": "gsforget.api",
    "export_patch": "gsforget.api",
    "run_bench": "gsforget.bench.open",
    "Settings": "gsforget.settings",
    "Thresholds": "gsforget.request",
    "GsforgetError": "gsforget.errors",
    "RequestError": "gsforget.errors",
    "SafetyError": "gsforget.errors",
    "GateError": "gsforget.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gsforget' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
