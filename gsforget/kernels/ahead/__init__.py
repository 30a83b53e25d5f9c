"""Kernels compiled ahead of time, without a GPU: one folder per GPU generation, with a manifest beside the binaries."""

from gsforget.kernels.ahead.build import FILE, compile_kernels
from gsforget.kernels.ahead.shipped import shipped
from gsforget.kernels.ahead.targets import TARGETS, Target, read_targets

__all__ = ["FILE", "TARGETS", "Target", "compile_kernels", "read_targets", "shipped"]
