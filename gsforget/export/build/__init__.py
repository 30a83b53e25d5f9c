"""Makes what devices run: ONNX with stable names, engines, and the proof that they answer as the model does."""

from gsforget.export.build.exporter import export_model

__all__ = ["export_model"]
