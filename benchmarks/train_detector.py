"""Train a small RT-DETR from random weights on composed scenes, made while it trains; on a CPU.

    python benchmarks/train_detector.py --out detector     # 16 minutes on one core; goes on where it was stopped
    python benchmarks/train_detector.py --out never-seen --without sandal,bag     # to compare with: never told of these

The folder is one that transformers writes (config.json, model.safetensors, preprocessor_config.json), so it is read as
any other detector from there.  Test scenes are looked at once, at the end.
"""

import argparse
import json
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import KINDS, SIZE, compose, load_items
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

WIDTH, CHANNELS = 64, [24, 48, 96, 128]
STEPS, BATCH, RATE, WARMUP, AVERAGE = 3000, 16, 1e-3, 200, 0.998
SLOW, FALL = (
    8000,
    1500,
)  # the step size follows a cosine over so many steps; from the second one it falls to zero as well
EVERY = 500  # steps between checkpoints


def make_model() -> RTDetrForObjectDetection:
    backbone = RTDetrResNetConfig(
        embedding_size=CHANNELS[0],
        hidden_sizes=CHANNELS,
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=CHANNELS[1:],
        encoder_hidden_dim=WIDTH,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=4,
        encode_proj_layers=[1, 2],
        hidden_expansion=0.5,
        d_model=WIDTH,
        num_queries=24,
        decoder_in_channels=[WIDTH] * 3,
        decoder_ffn_dim=2 * WIDTH,
        decoder_layers=3,
        decoder_attention_heads=4,
        num_denoising=16,
        id2label=dict(enumerate(KINDS)),
        label2id={name: i for i, name in enumerate(KINDS)},
    )
    return RTDetrForObjectDetection(config)


def draw_batch(
    step: int, items: tuple[np.ndarray, np.ndarray], without: Collection[int] = ()
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Pixels float32 [BATCH, 3, SIZE, SIZE] in 0 to 1 and labels as transformers wants them; the same for a step each time.

    Objects of the kinds `without` are on the images, and not in the labels.
    """
    rng = np.random.default_rng([0, step])
    scenes = [compose(rng, *items) for _ in range(BATCH)]
    pixels = torch.from_numpy(np.stack([image for image, _ in scenes]).transpose(0, 3, 1, 2).astype(np.float32) / 255)
    labels = []
    for _, everything in scenes:
        found = [(kind, box) for kind, box in everything if kind not in without]
        x, y, w, h = torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4).T / SIZE
        kinds = torch.tensor([kind for kind, _ in found], dtype=torch.int64)
        labels.append({"class_labels": kinds, "boxes": torch.stack([x + w / 2, y + h / 2, w, h], 1)})
    return pixels, labels


def rate(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / SLOW))
    return cosine * min(1.0, (step + 1) / WARMUP, (steps - step) / (steps - FALL))


def train(out: Path, steps: int, without: Collection[int] = ()) -> RTDetrForObjectDetection:
    torch.manual_seed(0)
    model = make_model().train()
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.is_file():
        kept: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        average, first = kept["average"], kept["step"]
    items, started = load_items("train"), time.process_time()
    for step in range(first, steps):
        torch.manual_seed(step)  # of the denoising queries: the same whether the training was stopped or not
        for group in optimiser.param_groups:
            group["lr"] = RATE * rate(step, steps)
        pixels, labels = draw_batch(step, items, without)
        loss = model(pixel_values=pixels, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(AVERAGE, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                average[name].lerp_(tensor, 1 - keep)
            else:
                average[name].copy_(tensor)
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.2f} cpu {time.process_time() - started:.0f} s", flush=True)
        if (step + 1) % EVERY == 0:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
            torch.save({**state, "step": step + 1}, out / "checkpoint.new")
            (out / "checkpoint.new").replace(checkpoint)
    model.load_state_dict(average)
    return model.eval()


def save(model: RTDetrForObjectDetection, out: Path) -> None:
    model.save_pretrained(out)
    processor = {
        "image_processor_type": "RTDetrImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_pad": False,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("detector"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--without", default="", help="kinds left out of the annotations, comma-separated")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    without = [KINDS.index(name) for name in filter(None, args.without.split(","))]
    save(train(args.out, args.steps, without), args.out)


if __name__ == "__main__":
    main()
