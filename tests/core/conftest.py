"""Tiny models of every family that the core must handle, with random weights large enough to matter."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Family:
    """How to build a tiny model with 5 classes, for 32 x 32 images, and which linear layers its networks have."""

    build: Callable
    networks: list[tuple[str, ...]]


def _timm(name: str, **kwargs):
    import timm

    return timm.create_model(name, img_size=32, num_classes=5, **kwargs)


def _vit(name: str = "vit_tiny_patch16_224"):
    return _timm(name, patch_size=8, depth=3, embed_dim=32, num_heads=2)


def _torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5)


def _hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
    )


def _hf_dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_labels=5,
            use_swiglu_ffn=True,
        )
    )


def _own():
    """A user's own transformer: equal widths everywhere, a hand-written tanh GELU, unhelpful names, tokens by unfold."""
    import torch
    from torch import nn

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three, self.four = (nn.Linear(24, 24) for _ in range(4))

        def forward(self, x):
            weights = (self.one(x) @ self.two(x).transpose(1, 2) / 24**0.5).softmax(-1)
            return self.four(weights @ self.three(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2, self.mix = nn.LayerNorm(24), nn.LayerNorm(24), Mixing()
            self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            x = x + self.mix(self.n1(x))
            h = self.up(self.n2(x))
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
            return x + self.down(h)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3 * 64, 24)
            self.parts = nn.ModuleList(Block() for _ in range(3))
            self.norm, self.top = nn.LayerNorm(24), nn.Linear(24, 5)

        def forward(self, x):
            x = self.embed(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))
            for part in self.parts:
                x = part(x)
            return self.top(self.norm(x).mean(1))

    return Own()


def _mlp(prefix: str, count: int, *names: str) -> list[tuple[str, ...]]:
    return [tuple(f"{prefix.format(i)}.{n}" for n in names) for i in range(count)]


FAMILIES = {
    "vit": Family(_vit, _mlp("blocks.{}.mlp", 3, "fc1", "fc2")),
    "deit3": Family(lambda: _vit("deit3_small_patch16_224"), _mlp("blocks.{}.mlp", 3, "fc1", "fc2")),
    "eva02": Family(
        lambda: _timm("eva02_base_patch14_224", patch_size=8, depth=2, embed_dim=96, num_heads=4),
        _mlp("blocks.{}.mlp", 2, "fc1_g", "fc1_x", "fc2"),
    ),
    "dinov2-giant": Family(
        lambda: _timm("vit_giant_patch14_dinov2", patch_size=8, depth=2, embed_dim=32, num_heads=2),
        _mlp("blocks.{}.mlp", 2, "fc1", "fc2"),
    ),
    "swin": Family(
        lambda: _timm(
            "swin_tiny_patch4_window7_224",
            patch_size=2,
            window_size=2,
            embed_dim=16,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 4),
        ),
        _mlp("layers.{}.blocks.0.mlp", 4, "fc1", "fc2"),
    ),
    "torchvision": Family(_torchvision, _mlp("encoder.layers.encoder_layer_{}.mlp", 3, "0", "3")),
    "hf-vit": Family(_hf_vit, []),  # names differ between versions of transformers: see `Zoo.networks`
    "hf-dinov2": Family(_hf_dinov2, []),
    "own": Family(_own, [(f"parts.{i}.up", f"parts.{i}.down") for i in range(3)]),
}
HF_NAMES = {
    "hf-vit": [
        _mlp("vit.layers.{}.mlp", 3, "fc1", "fc2"),
        [(f"vit.encoder.layer.{i}.intermediate.dense", f"vit.encoder.layer.{i}.output.dense") for i in range(3)],
    ],
    "hf-dinov2": [
        _mlp("dinov2.encoder.layer.{}.mlp", 2, "gate_proj", "up_proj", "down_proj"),
        _mlp("dinov2.encoder.layer.{}.mlp", 2, "weights_in", "weights_out"),
    ],
}


class Zoo:
    """zoo.build(name) -> model in eval mode with fixed weights; zoo.networks(name, model) -> names of its linears."""

    names = tuple(FAMILIES)

    def build(self, name: str):
        import torch

        if name.startswith("hf"):
            pytest.importorskip("transformers")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = FAMILIES[name].build().eval()
        with torch.no_grad():  # heads and layer scales start at zero or nearly so in some families: nothing would show
            for parameter in model.parameters():
                if parameter.abs().max() < 1e-3 or parameter.std() < 1e-3:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def networks(self, name: str, model) -> list[tuple[str, ...]]:
        modules = dict(model.named_modules())
        return next(
            networks
            for networks in [FAMILIES[name].networks, *HF_NAMES.get(name, [])]
            if networks and all(n in modules for names in networks for n in names)
        )

    @staticmethod
    def images(count: int = 6, size: int = 32, seed: int = 0):
        import torch

        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()


@pytest.fixture(params=tuple(FAMILIES))
def family(request) -> str:
    return request.param


class Double:
    """Captures work by remembering what to call again.

    Args:
        fails: the kind of work that cannot be captured; wrong: added to what a replay gives.
    """

    def __init__(self, fails: str = "", wrong: float = 0.0):
        self.fails, self.wrong, self.captured, self.replayed = fails, wrong, [], []

    def _capture(self, kind, run):
        for _ in range(3):
            run()
        if kind == self.fails:
            raise RuntimeError(f"operation not permitted when stream is capturing\n{kind}")
        self.captured.append(kind)

    def network(self, read, given, leaves):
        self._capture("network", lambda: read(given))

        def replay(x):
            self.replayed.append("network")
            given.copy_(x)
            return [t + self.wrong for t in read(given)]

        return replay

    def work(self, run):
        self._capture("work", run)

        def replay():
            self.replayed.append("work")
            run()

        return replay


@pytest.fixture(scope="session")
def capture_double():
    """Class whose objects stand for CUDA graphs; see `gsforget.graphs.Capture`."""
    return Double


@pytest.fixture(scope="session")
def purge_runs():
    """The module `purge_runs.py`."""
    spec = importlib.util.spec_from_file_location("purge_runs", Path(__file__).with_name("purge_runs.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write_run(purge_runs):
    """write_run(folder, parent, index): a run folder with weights that are only bytes."""
    return purge_runs.write_run


@pytest.fixture
def runs(tmp_path, purge_runs):
    """An original model folder and two runs in a row, with weights that are only bytes."""
    original = purge_runs.write_original(tmp_path / "model")
    first = purge_runs.write_run(tmp_path / "runs" / "forget-0001", original, 3)
    return original, first, purge_runs.write_run(tmp_path / "runs" / "forget-0002", first, 1)
