"""A feed-forward network with LoRA on every layer, forward and backward, as one differentiable function."""

from gsforget.kernels.lora_ffn.function import lora_ffn
from gsforget.kernels.lora_ffn.naive import ACTIVATIONS, Layer, naive_lora_ffn

__all__ = ["ACTIVATIONS", "Layer", "lora_ffn", "naive_lora_ffn"]
