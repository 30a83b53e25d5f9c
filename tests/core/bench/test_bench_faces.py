"""The recipes for CASIA-100 and MS-Celeb-100 on tiny folders of the same layout, with a Face Transformer's checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from gsforget import RequestError, run_bench
from gsforget.folder import load_model, read_config
from gsforget.tasks.face.answers import FaceClassifier
from gsforget.tasks.face.model import FaceTransformer, Head, TimmFace

PEOPLE, SIZE = 100, 16
TINY = {"depth": 6, "dim": 32, "heads": 1, "mlp_dim": 64, "image_size": SIZE}


def image(person, rng):
    pattern = np.random.default_rng(person).integers(0, 2, (4, 4, 3)) * 130 + 60
    pixels = np.kron(pattern, np.ones((4, 4, 1))) + rng.normal(0, 12, (SIZE, SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """(folder of identity folders by layout, published checkpoint of a network that knows them)."""
    root, rng = tmp_path_factory.mktemp("recipes"), np.random.default_rng(0)
    pictures = {n: [image(n, rng) for _ in range(5)] for n in range(PEOPLE)}
    for layout, prefix in (("casia-webface", ""), ("ms-celeb", "m.0")):
        for n, found in pictures.items():
            folder = root / layout / f"{prefix}{n:07d}"
            folder.mkdir(parents=True)
            for k, pixels in enumerate(found):
                Image.fromarray(pixels).save(folder / f"{k}.png")
    torch.manual_seed(0)
    model = FaceTransformer(PEOPLE, **TINY)
    x = torch.from_numpy(np.stack([p for found in pictures.values() for p in found])).permute(0, 3, 1, 2) / 255
    y = torch.arange(PEOPLE).repeat_interleave(5)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(125):
            adam.zero_grad()
            cross_entropy(model.loss.margin_logits(model.features(x[rows]), y[rows], 0.1) / 4, y[rows]).backward()
            adam.step()
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, root / "Backbone_VIT.pth")
    return root, root / "Backbone_VIT.pth"


def run(faces, out, methods, recipe, layout, **options):
    root, checkpoint = faces
    given = {"seeds": 1, "trials": 1, "epochs": 2, "out": out, "checkpoint": checkpoint, **options}
    return run_bench(methods, "face-transformer", root / layout, recipe, **given)


def test_one_command_from_the_checkpoint_to_the_figure_to_beat(faces, tmp_path):
    found = run(faces, tmp_path, ["published-gs-lora++", "gs-lora"], "casia100-5", "casia-webface")
    assert found["failed"] == []
    assert {row["method"]: row["seeds"] for row in found["rows"]} == {"published-gs-lora++": 1, "gs-lora": 1}
    assert found["published"]["GS-LoRA++"] == (71.12,)
    start, end = tmp_path / "start", tmp_path / "models" / "gs-lora" / "0" / "0"
    assert (read_config(start).task, read_config(start).model_kwargs["depth"]) == ("face", 6)
    before, after = (load_model(folder)[0].state_dict() for folder in (start, end))
    assert list(before) == list(after)  # the published names, head and all
    assert torch.equal(before["loss.weight"], after["loss.weight"])
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(".net." in name for name in changed)
    assert len(read_config(end).forgotten) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout", "requests"),
    [("ms-celeb100-sequence", "ms-celeb", 4), ("casia100-sequence-4-shot", "casia-webface", 4)],
)
def test_recipes_of_a_chain(faces, tmp_path, recipe, layout, requests):
    found = run(faces, tmp_path, ["published-gs-lora++"], recipe, layout, epochs=1)
    assert found["failed"] == []
    (row,) = found["rows"]
    assert len(row["h"]) == requests


@pytest.mark.parametrize("kind", ["cosface", "arcface", "softmax"])
def test_answers_are_the_heads_without_a_margin(kind):
    torch.manual_seed(0)
    face = FaceTransformer(PEOPLE, **TINY, head=kind, scale=10.0).eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = face.loss.margin_logits(face.features(images), torch.tensor([0, 1, 2]), 0.0)
        torch.testing.assert_close(FaceClassifier(face)(images), wanted)


def test_fresh_weights_are_fresh_everywhere():
    from gsforget.baselines.training import draw_anew

    backbone = {"img_size": SIZE, "embed_dim": 24, "depth": 1, "num_heads": 2, "embedding_dim": 8}
    for face in (FaceTransformer(PEOPLE, **TINY), TimmFace(5, "vit_tiny_patch16_224", **backbone)):
        before = {name: p.clone() for name, p in face.named_parameters()}
        draw_anew(FaceClassifier(face), 3)
        same = [n for n, p in face.named_parameters() if torch.equal(p, before[n]) and p.std() > 0]
        assert same == []


def test_a_head_is_read_by_its_name_in_one_place():
    head = Head(4, 3, "cosface", scale=8.0)
    torch.testing.assert_close(head.rows.norm(dim=1), torch.full((4,), 8.0))
    assert head.bias is None


def test_the_head_must_fit_the_people(faces, tmp_path):
    names = [f"{n:07d}" for n in range(99)]
    with pytest.raises(RequestError, match="100 rows, and 99 people") as caught:
        run(faces, tmp_path, ["gs-lora"], "casia100-5", "casia-webface", class_names=names)
    assert caught.value.exit_status == 2
