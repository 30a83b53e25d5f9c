"""The controls: the head-masked model must fail the audit, a model trained without the classes must pass it.

Four classes differ by colour; the two to forget share a colour and differ by the direction of faint stripes, which a
network that never had to tell them apart hardly sees (a probe on its features finds about 60 % of two classes).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import gsforget
from gsforget.errors import RequestError

COLOURS = {"red": (220, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 220), "yellow": (200, 200, 60)}
NAMES = [*COLOURS, "lying", "standing"]
FORGET = ["lying", "standing"]
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIZE = 16


@dataclass(frozen=True)
class Controls:
    """Data and model folders: `original`, `never_seen` and `other` (trained without the classes), `masked`."""

    root: Path
    data: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


def draw(folder: Path, count: int, seed: int, names=NAMES) -> None:
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            lying = {"lying": True, "standing": False}.get(name, rng.random() < 0.5)
            stripes = ((rows if lying else columns) + rng.integers(8)) // 4 % 2
            colour = np.array(COLOURS.get(name, (60, 190, 190))) * 0.6
            picture = colour + 120 * (stripes[..., None] - 0.5) + rng.normal(40, 30, (SIZE, SIZE, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:03d}.png")


def learn(data: Path, seed: int, without=()):
    """State of a ViT trained in about two seconds on all classes but some; its head has a row for each all the same."""
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(NAMES), **KWARGS)
    files = [(p, k) for k, n in enumerate(NAMES) if n not in without for p in sorted((data / "train" / n).iterdir())]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p, _ in files]))
    images, labels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor([k for _, k in files])
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(80):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10) * (1 - step / 80)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    from gsforget.folder import ModelConfig, save_model

    root = tmp_path_factory.mktemp("controls")
    data = root / "data"
    draw(data / "train", 40, 1)
    draw(data / "test", 40, 2)
    original = learn(data, 0)
    masked = {k: v.clone() for k, v in original.items()}
    masked["head.weight"][[4, 5]] = 0
    masked["head.bias"][[4, 5]] = -1e4
    states = {
        "original": original,
        "masked": masked,
        "never_seen": learn(data, 1, FORGET),
        "other": learn(data, 3, FORGET),
    }
    config = ModelConfig("vit_tiny_patch16_224", KWARGS, NAMES, (3, SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)
    for name, state in states.items():
        (root / name).mkdir()
        save_model(state, config, root / name)
    return Controls(root, data)


def look(controls, name, tier="standard", **options):
    given = {"classes": FORGET, "original": controls.original, "reference": controls.never_seen} | options
    return gsforget.audit_model(controls.root / name, controls.data, tier=tier, **given)


def verdicts(document):
    return {c["name"]: c["verdict"] for c in document["checks"]}


def values(document, key="value"):
    return {c["name"]: c[key] for c in document["checks"]}


@pytest.fixture(scope="module")
def of_masked(controls):
    return look(controls, "masked", "full")


def test_the_head_masked_model_fails(of_masked):
    found = verdicts(of_masked)
    assert of_masked["verdict"] == "fail"
    assert values(of_masked)["forget_acc"] == 0  # all that accuracy sees
    assert found["forget_acc"] == found["retain_drop"] == found["class_drop"] == "pass"
    for name in ("prototype_attack", "five_shot", "linear_probe_excess", "relearn_retain"):
        assert found[name] == "fail", name
    # Two classes are soon told apart: with class means in its head the never-seen model needs no step either.
    assert found["relearn_full"] == "inconclusive"
    assert values(of_masked)["relearn_full"] == values(of_masked, "reference")["relearn_full"] == 0
    says = next(c["says"] for c in of_masked["checks"] if c["name"] == "relearn_full")
    assert "from its own head after 1 step, in that model after more than 100 steps" in says
    assert "before any step" in says
    assert values(of_masked)["linear_probe_excess"] == pytest.approx(1)
    assert of_masked["details"]["linear_probe"]["original"] - of_masked["details"]["linear_probe"]["reference"] >= 8
    assert values(of_masked)["prototype_attack"] > values(of_masked, "reference")["prototype_attack"] + 20


def test_a_model_trained_without_the_classes_passes(controls):
    document = look(controls, "other")
    assert set(verdicts(document).values()) == {"pass"}
    assert document["verdict"] == "pass"
    assert values(document)["linear_probe_excess"] <= 0.25


def test_the_untouched_original_fails(controls):
    document = look(controls, "original", "quick")
    assert verdicts(document)["forget_acc"] == verdicts(document)["forget_train_acc"] == "fail"
    assert values(document)["retain_drop"] == 0


def test_the_document_holds_all_that_the_report_needs(of_masked):
    d = of_masked
    assert (d["kind"], d["tier"], d["sequence"], d["audited"]) == ("model", "full", 0, [4, 5])
    assert [c["role"] for c in d["classes"]] == ["retain"] * 4 + ["forget"] * 2
    assert d["classes"][4]["after"]["acc"] == 0
    assert d["classes"][4]["before"]["count"] == 40
    assert {"model", "original", "reference"} <= d["sha256"].keys()
    assert d["artifacts"] == {}
    for mode in ("head", "full", "full_own_head", "retain"):
        curves = d["details"]["relearning"][mode]
        assert len(curves["steps"]) == len(curves["subject"]) == len(curves["original"]) == len(curves["reference"])
        assert curves["steps"][0] == 0
        assert mode == "head" or curves["lr"] == 3e-4
        if mode != "full":  # class means in the head name images before any step
            assert curves["subject"][0] == curves["reference"][0] == 0
    assert d["details"]["relearning"]["head"]["subject"][-1] > 80
    assert [p["t"] for p in d["details"]["interpolation"]] == [0, 0.25, 0.5, 0.75, 1]
    assert d["details"]["interpolation"][-1]["forget"] == 0
    assert [b["block"] for b in d["details"]["cka"]] == [f"blocks.{i}" for i in range(4)]
    assert all(b["forget"] == pytest.approx(1) and b["retain"] == pytest.approx(1) for b in d["details"]["cka"])
    assert d["details"]["changed"]["tensors"] == ["head.weight", "head.bias"]
    assert d["details"]["changed"]["blocks"] == []
    assert d["details"]["prototype_shift"] == pytest.approx({"forget": 1, "retain": 1})
    assert {when: set(points) for when, points in d["details"]["feature_map"].items()} == {
        "before": {"forget", "retain"},
        "after": {"forget", "retain"},
    }
    assert json.loads(json.dumps(d, allow_nan=False)) == d


def test_curves_of_a_head_mask_are_the_originals_but_for_their_start(of_masked):
    own, better = (of_masked["details"]["relearning"][mode] for mode in ("full_own_head", "full"))
    assert own["original"][0] > 70
    assert own["subject"][1] > 50  # one step later the classes are back
    assert better["subject"][0] > 70  # or without any


def test_without_something_to_compare_with_features_are_not_judged(controls):
    document = look(controls, "masked", reference=None)
    found = verdicts(document)
    for name in ("prototype_attack", "five_shot", "linear_probe_excess"):
        assert found[name] == "inconclusive", name
    assert document["verdict"] == "inconclusive"
    assert values(document)["prototype_attack"] > 70  # the raw value all the same
    assert any("--reference FOLDER" in note and "--never-seen A,B" in note for note in document["not_tested"])


def test_never_seen_classes_stand_in_for_a_reference(controls, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(controls.data, data)
    for split, seed in (("train", 5), ("test", 6)):
        draw(tmp_path / split, 20, seed, ["red", "green"])
        for name in ("red", "green"):
            shutil.move(tmp_path / split / name, data / split / f"new-{name}")
    given = {"classes": FORGET, "original": controls.original, "never_seen": ["new-red", "new-green"]}
    document = gsforget.audit_model(controls.masked, data, tier="full", **given)
    assert document["reference"] == {
        "kind": "classes",
        "classes": ["new-red", "new-green"],
        "path": str(controls.original),
    }
    assert values(document, "reference")["five_shot"] is not None
    assert values(document, "reference")["relearn_full"] is not None
    assert document["details"]["relearning"]["full_own_head"]["reference"][0] == 0
    assert document["details"]["relearning"]["retain"]["reference"] is None
    assert any("'new-red', 'new-green'" in note for note in document["not_tested"])
    with pytest.raises(RequestError) as caught:
        gsforget.audit_model(controls.masked, data, classes=FORGET, original=controls.original)
    assert caught.value.kind == "class_names_differ"
    assert "--never-seen" in caught.value.hint
    with pytest.raises(RequestError) as caught:
        gsforget.audit_model(controls.masked, data, **{**given, "never_seen": ["red"]})
    assert caught.value.kind == "seen_class"


def test_a_reference_that_knows_the_classes_is_refused(controls):
    with pytest.raises(RequestError, match="has seen these classes") as caught:
        look(controls, "masked", "quick", reference=controls.original)
    assert caught.value.kind == "bad_reference"


def test_the_same_seed_gives_the_same_figures(controls):
    first, again = (look(controls, "masked", seed=3) for _ in range(2))
    for document in (first, again):
        assert document.pop("seconds") > 0
        assert document.pop("time").endswith("Z")
    assert again == first


def test_the_original_with_a_masked_head_is_no_reference(controls):
    with pytest.raises(RequestError, match="the original with another head") as caught:
        look(controls, "masked", "quick", reference=controls.masked)
    assert caught.value.kind == "bad_reference"
