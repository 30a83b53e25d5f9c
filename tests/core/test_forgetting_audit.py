"""The attacks that `forget` makes itself: figures, their gate, what they are compared with, and what they cannot say."""

import json
import shutil

import pytest
import torch

import gsforget
from gsforget.audit import in_run
from gsforget.audit.in_run import Figures, Probed
from gsforget.errors import RequestError
from gsforget.request import Thresholds
from gsforget.settings import Settings

QUICK = Settings(rank=2, epochs=1, target_groups=1)
LOOSE = {"max_forget_acc": 100, "max_retain_drop": 100, "max_class_drop": 100}
KEYS = ("linear_probe", "linear_probe_excess", "prototype_attack", "mia_auc")


def erase(world, **options):
    given = {"settings": QUICK, "thresholds": Thresholds(**LOOSE), "method": "gs-lora", "runs": None} | options
    return gsforget.forget(given.pop("model", world.model), given.pop("data", world.data), ["bee"], **given)


@pytest.fixture(scope="module")
def never_seen(world, tmp_path_factory, teach):
    """A model folder taught on all classes but bee."""
    import timm

    from gsforget.folder import load_model, save_model

    root = tmp_path_factory.mktemp("never")
    _, config = load_model(world.model)
    shutil.copytree(world.data, root / "data")
    for split in ("train", "test"):
        for image in (root / "data" / split / "bee").iterdir():
            image.unlink()
    torch.manual_seed(5)
    model = timm.create_model(config.architecture, num_classes=4, **config.model_kwargs)
    teach(model, root / "data")
    (root / "model").mkdir()
    save_model({k: v.contiguous() for k, v in model.state_dict().items()}, config, root / "model")
    return root / "model"


def probed(after, original, never, limit=0.25):
    compared = {"kind": "model", "path": "x"} if never is not None else None
    reference = Figures(never, 10.0, 0.5) if never is not None else None
    return Probed(Figures(after, 50.0, 0.6), Figures(original, 90.0, 0.7), reference, compared, limit, [], 0.1)


@pytest.mark.parametrize(
    ("figures", "excess", "passed"),
    [((62.0, 90.0, 60.0), 2 / 30, True), ((75.0, 90.0, 60.0), 0.5, False), ((61.0, 63.0, 60.0), 1 / 3, True)],
)
def test_the_gate_is_the_audit_s_verdict(figures, excess, passed):
    found = probed(*figures)
    (gate,) = found.gates()
    assert (gate.name, gate.threshold, gate.passed) == ("probe_excess", 0.25, passed)
    assert gate.value == gate.bound == found.document()["linear_probe_excess"] == pytest.approx(excess)
    assert any("inconclusive" in note for note in found.not_tested()) is (figures[1] == 63.0)


def test_with_little_room_the_gate_says_what_is_allowed():
    for after, passed in ((61.9, True), (62.1, False)):
        (gate,) = probed(after, 66.0, 60.0, 0.5).gates()  # 6 points of room: 2 above never seen
        assert gate.passed is passed is (gate.value <= gate.threshold)
        assert gate.threshold == pytest.approx(2 / 6)


def test_without_a_gate_or_a_reference_nothing_is_judged():
    assert probed(75.0, 90.0, 60.0, None).gates() == []
    assert probed(75.0, 90.0, None).gates() == []
    assert probed(75.0, 60.0, 90.0).gates() == []  # the original is worse than never seen: no ratio
    assert any("inconclusive" in note for note in probed(75.0, 60.0, 90.0).not_tested())
    assert in_run.NO_REFERENCE in probed(75.0, 90.0, None).not_tested()
    assert in_run.NO_REFERENCE not in probed(75.0, 90.0, 60.0).not_tested()


def test_figures_without_a_reference(world):
    outcome = erase(world)
    audit, stored = outcome.document["audit"], outcome.metrics["audit"]
    assert set(audit) == set(KEYS)
    assert 0 <= audit["linear_probe"] <= 100
    assert 0 <= audit["prototype_attack"] <= 100
    assert 0 <= audit["mia_auc"] <= 1
    assert audit["linear_probe_excess"] is None
    assert "linear_probe_excess: needs --reference or --never-seen" in outcome.document["not_tested"]
    assert not any("has no audit" in note for note in outcome.document["not_tested"])
    assert stored["original"]["linear_probe"] > 90
    assert stored["after"]["linear_probe"] == audit["linear_probe"]
    assert stored["reference"] is stored["compared_with"] is None
    assert 0 < outcome.document["seconds"]["audit"] < outcome.document["seconds"]["total"]
    assert json.loads(json.dumps(outcome.metrics, allow_nan=False))["audit"] == stored


def test_they_are_the_audit_s_figures(world, never_seen, tmp_path):
    outcome = erase(world, runs=tmp_path, reference=never_seen)
    document = gsforget.audit_model(
        outcome.folder, world.data, tier="standard", reference=never_seen, out=tmp_path / "evidence"
    )
    found, stored = {c["name"]: c for c in document["checks"]}, outcome.metrics["audit"]
    for ours, theirs in (("after", "value"), ("original", "original"), ("reference", "reference")):
        for key in ("prototype_attack", "mia_auc"):
            assert stored[ours][key] == pytest.approx(found[key][theirs]), (ours, key)
    assert stored["after"]["linear_probe"] == pytest.approx(document["details"]["linear_probe"]["after"])
    assert stored["linear_probe_excess"] == pytest.approx(found["linear_probe_excess"]["value"])
    assert json.loads((outcome.folder / "request.json").read_text())["compared_with"]["kind"] == "model"


def test_untouched_features_breach_the_gate(world, never_seen, tmp_path, monkeypatch):
    """A probe that finds more in the features than in the reference's: whatever the tiny world's own room is."""
    shown = iter([98.0, 40.0, 95.0])  # original, never seen, merged
    monkeypatch.setattr(in_run.outputs, "linear_probe", lambda *_: next(shown))
    thresholds = Thresholds(**LOOSE, max_probe_excess=0.25)
    outcome = erase(world, reference=never_seen, thresholds=thresholds, runs=tmp_path)
    assert not outcome.passed
    gate = next(g for g in outcome.document["gates"] if g["name"] == "probe_excess")
    assert gate["value"] == pytest.approx(55 / 58)
    assert outcome.folder.name == "failed-0001"
    assert not (outcome.folder / "model.safetensors").exists()


def test_never_seen_classes_stand_in(world, draw, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    for split, seed in (("train", 3), ("test", 4)):
        draw(tmp_path / split, 10, seed, ["wasp"])
        shutil.move(tmp_path / split / "wasp", data / split / "wasp")
    with pytest.raises(RequestError) as caught:
        erase(world, data=data)
    assert caught.value.kind == "class_names_differ"
    outcome = erase(world, data=data, never_seen=["wasp"])
    stored = outcome.metrics["audit"]
    assert stored["compared_with"] == {"kind": "classes", "classes": ["wasp"]}
    assert stored["reference"]["linear_probe"] is not None
    assert stored["reference"]["mia_auc"] is None
    with pytest.raises(RequestError) as caught:
        erase(world, data=data, never_seen=["wasp", "cat"])
    assert caught.value.kind == "seen_class"


def test_references_that_tell_nothing_are_refused_before_any_work(world, never_seen, tmp_path):
    def kind(**options):
        with pytest.raises(RequestError) as caught:
            erase(world, **options)
        return caught.value.kind

    assert kind(reference=world.model) == "bad_reference"
    assert kind(reference=tmp_path / "nowhere") == "no_model"
    assert kind(reference=never_seen, never_seen=["wasp"]) == "two_references"
    other = tmp_path / "other"
    shutil.copytree(never_seen, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"mean": [0.1, 0.1, 0.1]}))
    assert kind(reference=other) == "bad_reference"


class NoLinearEnd(torch.nn.Module):
    """Logits that are no output of a linear layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 2 * self.model(x)


def test_a_model_without_a_linear_end(world, never_seen):
    from gsforget.folder import load_model

    preprocessing = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.5,)}
    given = {"model": NoLinearEnd(load_model(world.model)[0]), "preprocessing": preprocessing}
    outcome = erase(world, **given)
    audit = outcome.document["audit"]
    assert audit["linear_probe"] is audit["prototype_attack"] is audit["linear_probe_excess"] is None
    assert audit["mia_auc"] is not None
    assert any("not the output of a linear layer" in note for note in outcome.document["not_tested"])
    with pytest.raises(RequestError) as caught:
        erase(world, **given, reference=never_seen, thresholds=Thresholds(**LOOSE, max_probe_excess=0.25))
    assert caught.value.kind in ("no_classifier", "bad_reference")


def test_few_shots_do_not_weaken_the_attacker(world):
    few, all_of_them = (erase(world, shots=shots).metrics["audit"]["original"] for shots in (2, None))
    assert few == all_of_them


def test_the_same_seed_gives_the_same_figures(world):
    first, again = (erase(world).metrics["audit"] for _ in range(2))
    assert first == again


def test_single_images_have_none(world, tmp_path):
    listed = tmp_path / "list"
    listed.write_text("".join(f"train/bee/{i:03d}.png\n" for i in range(3)))
    outcome = gsforget.forget(
        world.model,
        world.data,
        images=listed,
        sample_mode=True,
        settings=QUICK,
        thresholds=Thresholds(**LOOSE),
        runs=None,
    )
    assert outcome.document["audit"] == dict.fromkeys(KEYS)
    assert outcome.metrics["audit"] is None
    assert any(note.startswith("linear_probe, ") and "whole classes" in note for note in outcome.document["not_tested"])
    with pytest.raises(RequestError) as caught:
        gsforget.forget(world.model, world.data, images=listed, sample_mode=True, never_seen=["wasp"], runs=None)
    assert caught.value.kind in ("sample_probe", "seen_class")
