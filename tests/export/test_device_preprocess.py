"""Preprocess equals timm's evaluation transform bit for bit, and names files that cannot be read."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gsforget.errors import RequestError
from gsforget.export.device.preprocess import INTERPOLATIONS, Preprocess

MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F")


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 1000, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.uniform(-50, 300, (height, width)).astype(np.float32))
    colour = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        return colour.convert("RGB").quantize(7)
    return colour.convert(mode)


def by_timm(preprocess: Preprocess, image: Image.Image) -> np.ndarray:
    from timm.data.transforms_factory import transforms_imagenet_eval

    transform = transforms_imagenet_eval(
        img_size=preprocess.input_size[1:],
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    return transform(image.convert(preprocess.image_mode)).numpy()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(MODES),
    channels=st.sampled_from((1, 3)),
    width=st.integers(4, 90),
    height=st.integers(4, 90),
    out=st.tuples(st.integers(8, 40), st.integers(8, 40)) | st.integers(8, 40).map(lambda n: (n, n)),
    interpolation=st.sampled_from(sorted(INTERPOLATIONS)),
    crop_mode=st.sampled_from(("center", "squash", "border")),
    crop_pct=st.sampled_from((0.8, 0.875, 0.9, 0.95, 1.0, 1.3)),
    seed=st.integers(0, 99),
)
def test_equals_timm_bit_for_bit(mode, channels, width, height, out, interpolation, crop_mode, crop_pct, seed):
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.2860,), (0.3530,))
    preprocess = Preprocess((channels, *out), mean, std, interpolation, crop_pct, crop_mode)
    image = picture(mode, width, height, seed)
    ours = preprocess(image)
    assert ours.dtype == np.float32
    assert ours.shape == (channels, *out)
    np.testing.assert_array_equal(ours, by_timm(preprocess, image))


def test_load_equals_timms_dataset(tmp_path):
    """Through files: RGB with an EXIF orientation (which timm ignores), palette and 16-bit grey."""
    from timm.data import ImageDataset, create_transform

    folder = tmp_path / "a"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB", 31, 50, 1).save(folder / "a.jpg", exif=exif)
    picture("P", 40, 22, 2).save(folder / "b.png", transparency=0)
    picture("I;16", 40, 22, 3).save(folder / "c.png")
    picture("RGBA", 12, 9, 4).save(folder / "d.png")
    preprocess = Preprocess((3, 24, 24), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9)
    transform = create_transform(
        (3, 24, 24), mean=preprocess.mean, std=preprocess.std, crop_pct=0.9, interpolation="bicubic"
    )
    dataset = ImageDataset(str(tmp_path), transform=transform)
    assert len(dataset) == 4
    for (theirs, _), name in zip(dataset, sorted(p.name for p in folder.iterdir()), strict=True):
        np.testing.assert_array_equal(preprocess.load(folder / name), theirs.numpy())


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1)])
def test_hair_thin_images_are_read(size, crop_mode):
    assert Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3, crop_mode=crop_mode)(Image.new("RGB", size)).shape == (3, 8, 8)


def damaged_files(folder):
    good = folder / "good.png"
    picture("RGB", 30, 30, 0).save(good)
    picture("RGB", 30, 30, 0).save(folder / "good.jpg")
    raw = good.read_bytes()
    jpeg = (folder / "good.jpg").read_bytes()
    return {
        "empty.png": b"",
        "truncated.png": raw[: len(raw) // 2],
        "flipped.png": raw[:60] + bytes(255 - b for b in raw[60:80]) + raw[80:],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:10],
        "text.jpg": b"not an image at all",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


def test_damaged_files_are_named(tmp_path):
    preprocess = Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    for name, content in damaged_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(RequestError, match=name) as caught:
            preprocess.load(path)
        assert caught.value.kind == "corrupt_image", name
    assert preprocess.load(tmp_path / "good.png").shape == (3, 8, 8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")))
def test_no_damage_escapes(tmp_path_factory, data, kind):
    """Whatever bytes change, the answer is an array or a RequestError, never another exception."""
    path = tmp_path_factory.mktemp("damage") / "x.img"
    picture("RGB", 9, 7, 0).save(path, kind)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    with contextlib.suppress(RequestError):
        assert Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3).load(path).shape == (3, 8, 8)


def test_absent_file_and_folder(tmp_path):
    preprocess = Preprocess((1, 8, 8), (0.5,), (0.5,))
    with pytest.raises(RequestError) as caught:
        preprocess.load(tmp_path / "none.png")
    assert caught.value.kind == "no_image"
    with pytest.raises(RequestError, match="folder"):
        preprocess.load(tmp_path)


def test_from_dict_reads_a_config():
    from gsforget.folder import ModelConfig

    config = ModelConfig("vit", {}, ["a", "b"], (1, 28, 28), (0.5,), (0.25,), "bilinear", 0.9, "border")
    preprocess = Preprocess.from_dict(config.to_json())
    assert preprocess == Preprocess((1, 28, 28), (0.5,), (0.25,), "bilinear", 0.9, "border")
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert Preprocess.from_dict({"input_size": [3, 8, 8], "mean": [0.5], "std": [0.2]}).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_size": [2, 8, 8], "mean": [0.5], "std": [0.5]}, "input_size"),
        ({"input_size": [3, 8]}, "incomplete"),
        ({"input_size": None}, "incomplete"),
        ({"mean": [0.5, 0.5]}, "2 values"),
        ({"std": [0, 1, 1]}, "std"),
        ({"mean": ["x"]}, "incomplete"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_mode": "middle"}, "squash"),
        ({"crop_pct": 0}, "crop_pct"),
    ],
)
def test_unusable_values_are_refused(change, named):
    good = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(RequestError, match=named) as caught:
        Preprocess.from_dict(good | change)
    assert caught.value.kind == "bad_config"
