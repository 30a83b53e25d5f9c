"""What runs where the model runs: preprocessing, runtime and inference without torch, timm or onnx."""
