"""Kernels run in Triton's interpreter here; what is compiled is compiled in processes of its own."""

import os

os.environ["TRITON_INTERPRET"] = "1"
import triton

triton.knobs.runtime.interpret = True  # for kernels that are imported later, when the variable is gone
del os.environ["TRITON_INTERPRET"]
