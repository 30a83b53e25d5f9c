"""Makes what devices run: ONNX with stable names, engines, and the proof that they answer as the model does."""

from gsforget.export.build.exporter import export_model
from gsforget.export.build.patch import export_patch

__all__ = ["export_model", "export_patch"]
