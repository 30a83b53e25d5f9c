"""Tiny detectors of every family, and a world of coloured squares that a tiny RT-DETR learns in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

KINDS = ["red", "green", "blue", "white"]
COLOURS = ((230, 40, 40), (40, 220, 40), (50, 50, 240), (235, 235, 235))
SIDE = 32


def _resnet(stages):
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=stages,
    )


def _detr_fields(**more):
    common = {"d_model": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 6, "use_timm_backbone": False}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    return {**common, **heads, "backbone": None, "use_pretrained_backbone": False, "num_labels": 4, **more}


def detr():
    from transformers import DetrConfig, DetrForObjectDetection

    fields = _detr_fields(encoder_layers=1, decoder_layers=2, backbone_config=_resnet(["stage4"]))
    return DetrForObjectDetection(DetrConfig(**fields))


def deformable():
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    stages = ["stage2", "stage3", "stage4"]
    fields = _detr_fields(encoder_layers=1, decoder_layers=2, backbone_config=_resnet(stages), with_box_refine=True)
    fields["d_model"] = 64  # its group norm has 32 groups, and a level of one pixel
    return DeformableDetrForObjectDetection(DeformableDetrConfig(**fields))


def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    images = {"image_size": [SIDE, SIDE], "patch_size": 8, "num_detection_tokens": 6}
    return YolosForObjectDetection(YolosConfig(**sizes, **images, num_labels=4, use_mid_position_embeddings=False))


def rt_detr(width=16, queries=6, names=None):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    channels = [8, 16, 24, 32]
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=channels, depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone,
            freeze_backbone_batch_norms=False,
            encoder_in_channels=channels[1:],
            encoder_hidden_dim=width,
            encoder_ffn_dim=2 * width,
            encoder_attention_heads=2,
            d_model=width,
            num_queries=queries,
            decoder_in_channels=[width] * 3,
            decoder_ffn_dim=2 * width,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_denoising=0,
            hidden_expansion=0.5,
            **(named or {"num_labels": 4}),
        )
    )


BUILDERS = {"detr": detr, "deformable_detr": deformable, "yolos": yolos, "rt_detr": rt_detr}
PROCESSORS = {
    "detr": {"size": {"shortest_edge": 24, "longest_edge": SIDE}},
    "deformable_detr": {"size": {"shortest_edge": 24, "longest_edge": SIDE}},
    "yolos": {"size": {"height": SIDE, "width": SIDE}},
    "rt_detr": {"size": {"height": SIDE, "width": SIDE}, "do_normalize": False},
}


def save_detector(model, folder: Path, processor: dict) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def detector_of(tmp_path_factory):
    """detector_of(names): the folder of an RT-DETR with random weights that knows kinds of these names."""

    def make(names: list[str]) -> Path:
        torch.manual_seed(0)
        return save_detector(
            _shaken(rt_detr(names=names)), tmp_path_factory.mktemp("named") / "rt_detr", PROCESSORS["rt_detr"]
        )

    return make


@pytest.fixture(scope="session")
def unselective(tmp_path_factory) -> Path:
    """An RT-DETR with random weights whose queries are all places: rounding cannot choose others."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unselective") / "rt_detr"
    return save_detector(_shaken(rt_detr(queries=21)), folder, PROCESSORS["rt_detr"])


def _shaken(model):
    """In eval mode, with random weights everywhere: heads start from zero, which makes all queries equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def detectors(tmp_path_factory) -> dict[str, Path]:
    """A folder as transformers writes it, of each family, with random weights."""
    root = tmp_path_factory.mktemp("detectors")
    folders = {}
    for n, (kind, build) in enumerate(BUILDERS.items()):
        torch.manual_seed(n)
        folders[kind] = save_detector(_shaken(build()), root / kind, PROCESSORS[kind])
    return folders


def draw_scene(
    rng: np.random.Generator, kinds: tuple[int, ...] = (0, 1, 2, 3)
) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """Two or three squares of different colours on a dark canvas: uint8 [SIDE, SIDE, 3], kinds and boxes."""
    image = rng.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    found: list[tuple[int, list[int]]] = []
    corners = [(0, 0), (0, 16), (16, 0), (16, 16)]
    for place in rng.permutation(4)[: int(rng.integers(2, 4))]:
        kind, side = kinds[int(rng.integers(len(kinds)))], int(rng.integers(8, 14))
        x, y = (
            corners[place][0] + int(rng.integers(0, 16 - side + 1)),
            corners[place][1] + int(rng.integers(0, 16 - side + 1)),
        )
        image[y : y + side, x : x + side] = COLOURS[kind]
        found.append((kind, [x, y, side, side]))
    return image, found


def write_scenes(root: Path, split: str, count: int, seed: int, file: str | None = None) -> None:
    """Images under root/split, annotations under root/annotations."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for n in range(count):
        image, found = draw_scene(rng)
        Image.fromarray(image).save(root / split / f"{n:03d}.png")
        images.append({"id": n, "file_name": f"{n:03d}.png", "width": SIDE, "height": SIDE})
        for kind, box in found:
            entry = {"image_id": n, "category_id": kind + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **entry})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(KINDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / (file or f"{split}.json")).write_text(json.dumps(content))


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    write_scenes(root, "train", 160, 0)
    write_scenes(root, "test", 80, 1)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A tiny RT-DETR that finds most squares, as a folder of transformers."""
    return _trained(tmp_path_factory.mktemp("trained") / "detector")


@pytest.fixture(scope="session")
def never_seen(tmp_path_factory) -> Path:
    """The same, trained on scenes without red squares."""
    return _trained(tmp_path_factory.mktemp("never-seen") / "detector", (1, 2, 3))


def _trained(folder: Path, seen: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    torch.manual_seed(0)
    model = rt_detr(24, 8, KINDS).train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    steps = 300
    for step in range(steps):
        rng = np.random.default_rng([7, step])
        scenes = [draw_scene(rng, seen) for _ in range(16)]
        pixels = torch.from_numpy(np.stack([i for i, _ in scenes]).transpose(0, 3, 1, 2).astype(np.float32) / 255)
        labels = []
        for _, found in scenes:
            x, y, w, h = torch.tensor([b for _, b in found], dtype=torch.float32).T / SIDE
            kinds = torch.tensor([k for k, _ in found])
            labels.append({"class_labels": kinds, "boxes": torch.stack([x + w / 2, y + h / 2, w, h], 1)})
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * min(1, 2 * (steps - step) / steps)
        optimiser.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return save_detector(model.eval(), folder, PROCESSORS["rt_detr"])
