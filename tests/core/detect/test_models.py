"""Every family of detectors against transformers itself: outputs, losses, folders, preprocessing, post-processing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gsforget.errors import RequestError
from gsforget.export.device.detections import select
from gsforget.export.device.preprocess import Preprocess
from gsforget.folder import ModelConfig, build_model, load_model, read_config, save_model
from gsforget.tasks.base import Seen
from gsforget.tasks.detect.families import FAMILIES, family_of
from gsforget.tasks.detect.losses import feed_forward_of
from gsforget.tasks.detect.models import head_of, load_detector, own_loss, reader

SIDE = 32
KINDS = ["detr", "deformable_detr", "yolos", "rt_detr"]
FEED_FORWARD = {
    "detr": ["model.encoder.layers.0.mlp", "model.decoder.layers.0.mlp", "model.decoder.layers.1.mlp"],
    "deformable_detr": ["model.encoder.layers.0.mlp", "model.decoder.layers.0.mlp", "model.decoder.layers.1.mlp"],
    "yolos": ["vit.encoder.layer.0", "vit.encoder.layer.1"],
    "rt_detr": ["model.encoder.aifi.0.layers.0.mlp", "model.decoder.layers.0.mlp", "model.decoder.layers.1.mlp"],
}


@pytest.fixture(scope="module", params=KINDS)
def opened(request, detectors):
    folder = detectors[request.param]
    model, config = load_detector(folder)
    return request.param, folder, model, config


def images(config, seed=0):
    channels = config.input_size[0]
    batch = torch.rand(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    if channels == 4:
        batch[:, 3] = 1
        batch[1, :, :, 24:] = 0
    return batch


def test_it_computes_what_transformers_computes(opened):
    import transformers

    kind, folder, model, config = opened
    plain = getattr(transformers, FAMILIES[kind].name).from_pretrained(folder).eval()
    batch = images(config)
    mask = {"pixel_mask": batch[:, 3].long()} if batch.shape[1] == 4 else {}
    with torch.no_grad():
        wanted, got = plain(pixel_values=batch[:, :3], **mask), model(batch)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.pred_boxes, wanted.pred_boxes, rtol=0, atol=1e-6)


def test_only_the_feed_forward_networks_of_encoder_and_decoder_are_found(opened):
    kind, _, model, config = opened
    found = feed_forward_of(model, images(config))
    assert [f.name for f in found] == FEED_FORWARD[kind]
    assert all(len(f.linears) == 2 for f in found)


def test_its_own_loss_is_that_of_transformers(opened):
    """Classification and boxes together, on the last layer."""
    kind, _, model, config = opened
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.7, 0.3, 0.2]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
    ]
    batch = images(config)
    seen = reader(model, FAMILIES[kind])(batch)
    before = model.config.auxiliary_loss
    model.config.auxiliary_loss = False
    mask = {"pixel_mask": batch[:, 3].long()} if batch.shape[1] == 4 else {}
    try:
        wanted = type(model).__mro__[2].forward(model, pixel_values=batch[:, :3], labels=labels, **mask)
    finally:
        model.config.auxiliary_loss = before
    classes, boxes = own_loss(model, seen, labels)
    assert model.config.auxiliary_loss == before
    torch.testing.assert_close(classes + boxes, wanted.loss, rtol=1e-5, atol=1e-5)
    weighted = 1.0 if kind == "rt_detr" else 5.0
    assert boxes.item() > weighted * wanted.loss_dict["loss_bbox"].item() > 0


def test_the_reader_gives_what_the_head_reads(opened):
    kind, _, model, config = opened
    seen = reader(model, FAMILIES[kind])(images(config))
    head = head_of(model, FAMILIES[kind])
    torch.testing.assert_close(head(seen.more["queries"]), seen.outputs)
    assert seen.more["boxes"].shape == (2, 6, 4)
    assert ("anchors" in seen.more) == (kind == "rt_detr")


def test_a_model_folder_says_how_to_build_it_again(opened, tmp_path):
    _, folder, model, config = opened
    assert read_config(folder) == config
    assert config.task == "detect"
    (tmp_path / "run").mkdir()
    save_model(model.state_dict(), config, tmp_path / "run")
    again, same = load_model(tmp_path / "run")
    assert same == ModelConfig.from_json(json.loads((tmp_path / "run" / "config.json").read_text())) == config
    weights, read = model.state_dict(), again.state_dict()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    batch = images(config)
    with torch.no_grad():  # the last bits of a product may depend on where in memory its factors lie
        torch.testing.assert_close(again(batch).logits, model(batch).logits, rtol=0, atol=1e-5)
    assert set(build_model(config).state_dict()) == set(weights) == set(read)


@pytest.mark.parametrize("size", [(40, 30), (30, 47), (32, 32), (21, 64), (90, 60)])
def test_preprocessing_is_that_of_its_image_processor(opened, size, tmp_path):
    from transformers import DeformableDetrImageProcessor, DetrImageProcessor, RTDetrImageProcessor, YolosImageProcessor

    kind, folder, _, config = opened
    processors = [DetrImageProcessor, DeformableDetrImageProcessor, YolosImageProcessor, RTDetrImageProcessor]
    with_pil = {"backend": "pil"}
    pixels = np.random.default_rng(size).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    prepare = Preprocess.from_dict(config.to_json())
    got = prepare.load(tmp_path / "a.png")
    import transformers

    name = processors[KINDS.index(kind)].__name__ + "Pil"
    module = f"transformers.models.{kind}.image_processing_pil_{kind}"
    own = getattr(__import__(module, fromlist=[name]), name)
    del with_pil, transformers
    wanted = own.from_pretrained(folder)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    _, height, width = wanted.shape
    assert prepare.content(size) == (width, height)
    np.testing.assert_allclose(got[:3, :height, :width], wanted, atol=1e-5)
    assert not got[:, height:].any()
    assert not got[:, :, width:].any()
    if got.shape[0] == 4:
        assert got[3].sum() == height * width


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1400, 300), (500, 375), (427, 640)])
def test_the_sizes_of_detr_and_yolos_on_photographs(size):
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.models.yolos.image_processing_pil_yolos import get_size_with_aspect_ratio_yolos

    from gsforget.export.device.preprocess import fitted

    height, width = get_size_with_aspect_ratio(size[::-1], 800, 1333)
    assert fitted(size, 800, 1333, 1) == (width, height)
    height, width = get_size_with_aspect_ratio_yolos(size[::-1], 800, 1333)
    assert fitted(size, 800, 1333, 16) == (width, height)


def test_detections_are_those_of_its_own_post_processing(opened):
    import importlib

    kind, folder, model, config = opened
    module = importlib.import_module(f"transformers.models.{kind}.image_processing_{kind}")
    own = next(v for n, v in vars(module).items() if n.endswith("ImageProcessor")).from_pretrained(folder)
    with torch.no_grad():
        output = model(images(config))
    wanted = own.post_process_object_detection(output, threshold=0.0, target_sizes=[(1, 1), (1, 1)])
    family = family_of(config)
    logits, boxes = output.logits.numpy(), output.pred_boxes.numpy()
    found = select(logits, boxes, family.scoring, family.most or logits.shape[1])
    for n, said in enumerate(wanted):
        order = said["scores"].argsort(descending=True, stable=True)
        np.testing.assert_allclose(found.scores[n], said["scores"][order], atol=1e-6)
        apart = np.diff(found.scores[n]) < -1e-6
        sure = np.concatenate([[True], apart]) & np.concatenate([apart, [True]])  # equal scores may change places
        np.testing.assert_array_equal(found.kinds[n][sure], said["labels"][order].numpy()[sure])
        np.testing.assert_allclose(found.boxes[n][sure], said["boxes"][order].numpy()[sure], atol=1e-6)


def test_a_hidden_kind_is_never_among_detections(opened):
    _, _, model, config = opened
    family = family_of(config)
    with torch.no_grad():
        output = model(images(config))
    logits, boxes = output.logits.numpy(), output.pred_boxes.numpy()
    found = select(logits, boxes, family.scoring, 1000, hidden=(0, 3))
    assert set(np.unique(found.kinds)) <= {1, 2}
    assert (found.scores >= 0).all()


def test_outputs_that_are_not_finite_are_refused():
    logits = np.full((1, 3, 4), np.nan, np.float32)
    with pytest.raises(RequestError, match="NaN"):
        select(logits, np.zeros((1, 3, 4), np.float32), "sigmoid", 3)


def test_folders_that_hold_no_detector(tmp_path, detectors):
    import shutil

    shutil.copytree(detectors["detr"], tmp_path / "d")
    (tmp_path / "d" / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="holds no model"):
        load_detector(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps({**config, "model_type": "mask2former"}))
    with pytest.raises(RequestError, match="mask2former"):
        load_detector(tmp_path / "d")


def test_an_unpadded_frame_is_known_for_models_that_count_the_padding():
    prepare = Preprocess((3, 32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "fit", (16, 32, 16))
    assert prepare.content((40, 20)) == (32, 16)
    assert prepare.frame((40, 20)) == (40.0, 40.0)
    assert Seen(torch.zeros(1, 2)).tensors[0].shape == (1, 2)
