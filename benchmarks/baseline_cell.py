"""One request by a baseline, measured as `forget_demo.cell` measures gsforget's own, and kept as a folder to audit."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import gsforget
from gsforget.api import open_model_and_data
from gsforget.audit.probes import five_shot, linear_probe, prototype_attack
from gsforget.baselines.base import BaselineRequest, Result
from gsforget.classes import resolve_classes
from gsforget.features import features_and_logits, find_classifier
from gsforget.folder import WEIGHTS, ModelConfig, save_model, sha256, write_file
from gsforget.images import ImageSet
from gsforget.lora.blocks import as_logits
from gsforget.metrics import accuracy, h_mean, of_classes, predict
from gsforget.source import Source

NEAR_ZERO = 1e-3  # norm of a group below which the published loop calls it zero


def baseline_cell(
    baseline: Callable[..., Result],
    model: Path,
    data: Path,
    classes: tuple[str, ...],
    out: Path,
    name: str,
    seed: int = 0,
    task: int = 0,
    epochs: int = 20,
) -> dict:
    """Figures of one request; the erased model goes to `out`, named with its parent, so that it can be audited.

    The baseline gets all training images; the test images are read before and after, and choose nothing.
    """
    source, wanted, train, test = opened(model, data, classes)
    said = [predict(logits_of(source.model, test))]
    request = BaselineRequest(tuple(wanted), len(source.names), tuple(source.erased), task, epochs, seed)
    result = baseline(source.model, train, torch.from_numpy(of_classes(train.labels, wanted)), request)
    source.model.load_state_dict(result.state_dict)
    said.append(predict(logits_of(source.model, test)))
    save_erased(source, result, source.config.erase(wanted), wanted, name, out)
    return {
        "classes": list(classes),
        "method": name,
        "seed": seed,
        "epochs": epochs,
        **accuracies(said, test, wanted, sorted(source.erased)),
        **probes(source.model, train, test, wanted, sorted(source.erased)),
        "groups": len(result.norms),
        "groups_near_zero": sum(norm < NEAR_ZERO for norm in result.norms),
        "norms": [round(norm, 5) for norm in result.norms],
        "train_seconds": result.seconds,
        "last_epoch": result.history[-1] if result.history else None,
        "sha256": sha256(out / WEIGHTS),
    }


def opened(model: Path, data: Path, classes: tuple[str, ...]) -> tuple[Source, list[int], ImageSet, ImageSet]:
    """The model, the indices of the classes, and all training and test images as it reads them."""
    source, folder, load = open_model_and_data(model, data)
    sets = ImageSet(folder.train, load), ImageSet(folder.test, load)
    for images in sets:
        images.check()
    return source, resolve_classes(list(classes), source.names, source.erased) if classes else [], *sets


def probes(
    model: torch.nn.Module, train: ImageSet, test: ImageSet, forgotten: list[int], earlier: Sequence[int] = ()
) -> dict:
    """What a fresh linear probe and attackers with five images per class find of some classes in the features, percent.

    Classes forgotten `earlier` take no part, as in the audit.
    """
    classifier = find_classifier(model.eval(), train.batch(torch.arange(2)))

    def features(images: ImageSet) -> np.ndarray:
        pieces = torch.arange(len(images)).split(256)
        return torch.cat([features_and_logits(model, classifier, images.batch(r))[0] for r in pieces]).numpy()

    here = [~of_classes(images.labels, earlier) for images in (train, test)]
    x, y, a, b = (features(train)[here[0]], train.labels.numpy()[here[0]], features(test), test.labels.numpy())
    known = x, y, a[here[1]], b[here[1]], forgotten
    mine, layer = of_classes(y, forgotten), model.get_submodule(classifier)
    attack = prototype_attack(
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        x[mine],
        y[mine],
        *known[2:],
        retained_features=x[~mine],
        in_use=np.unique(y[~mine]),
    )
    return {"linear_probe": linear_probe(*known), "five_shot": five_shot(*known), "prototype_attack": attack}


@torch.inference_mode()
def logits_of(model: torch.nn.Module, images: ImageSet) -> torch.Tensor:
    """Logits of all images, float32 [N, K]."""
    pieces = torch.arange(len(images)).split(256)
    return torch.cat([as_logits(model.eval()(images.batch(rows))).float() for rows in pieces])


def accuracies(said: list, test: ImageSet, wanted: list[int], erased: list[int]) -> dict:
    """Before and after: forgotten now, forgotten earlier, never forgotten; percent, weighted by images."""
    labels = test.labels.numpy()
    parts = {"forget": of_classes(labels, wanted), "old": of_classes(labels, erased)}
    parts["retain"] = ~(parts["forget"] | parts["old"])
    found = {
        f"{part}_acc_{when}": accuracy(answers == labels, mask).percent
        for part, mask in parts.items()
        for when, answers in zip(("before", "after"), said)
    }
    before, after, kept = found["forget_acc_before"], found["forget_acc_after"], found["retain_acc_after"]
    return {
        **found,
        "h_mean": h_mean(before - after, kept),
        "h_ideal": h_mean(before, found["retain_acc_before"]),
        "retain_drop": found["retain_acc_before"] - kept,
    }


def save_erased(source: Source, result: Result, config: ModelConfig, wanted: list[int], name: str, out: Path) -> None:
    """A model folder with a request.json that names the classes and the model before, but no ledger: it is no run."""
    out.mkdir(parents=True, exist_ok=True)
    assert source.folder is not None
    record = {
        "gsforget": gsforget.__version__,
        "method": name,
        "classes": [source.names[i] for i in wanted],
        "indices": wanted,
        "sequence": config.sequence,
        "names": source.names,
        "erased": {str(i): source.names[i] for i in (*source.erased, *wanted)},
        "parent": str(source.folder.resolve()),
        "parent_sha256": sha256(source.folder / WEIGHTS),
    }
    write_file(out / "request.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    save_model(result.state_dict, config, out)
