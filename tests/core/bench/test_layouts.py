"""Downloaded data sets in miniature: each layout made as its archive unpacks, and read as two splits."""

import json
from pathlib import Path

import pytest

from gsforget.bench.layouts import LAYOUTS, open_layout
from gsforget.bench.recipes import RECIPES
from gsforget.errors import RequestError


def put(path: Path, text: str = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def pictures(folder: Path, count: int, suffix: str = "jpg") -> None:
    for i in range(count):
        put(folder / f"{i + 1:03d}.{suffix}")


def inside(found, split: str) -> list[tuple[str, str, str]]:
    """(class name, folder, file) of every image of a split."""
    part = getattr(found, split)
    return [(found.class_names[k], p.parent.name, p.name) for p, k in zip(part.paths, part.labels.tolist())]


def refused(name: str, root: Path, kind: str = "bad_layout", **more) -> RequestError:
    with pytest.raises(RequestError) as caught:
        open_layout(name, root, **more)
    assert caught.value.kind == kind
    assert caught.value.exit_status == 2
    return caught.value


@pytest.mark.parametrize(("name", "prefix"), [("casia-webface", "00000"), ("ms-celeb", "m.0")])
def test_identity_folders_are_split_by_name_and_seed(tmp_path, name, prefix):
    for number, count in ((45, 10), (12, 20), (99, 5)):
        pictures(tmp_path / f"{prefix}{number}", count)
    put(tmp_path / "readme.txt")
    (tmp_path / "lst").mkdir()
    found = open_layout(name, tmp_path)
    assert found.class_names == [f"{prefix}{n}" for n in (12, 45, 99)]
    assert [found.test.count(k) for k in range(3)] == [4, 2, 1]  # a fifth
    assert [found.train.count(k) for k in range(3)] == [16, 8, 4]
    assert not {*found.train.paths} & {*found.test.paths}
    assert all(label == folder for split in ("train", "test") for label, folder, _ in inside(found, split))
    assert open_layout(name, tmp_path).test.paths == found.test.paths
    one, two = open_layout(name, tmp_path, [f"{prefix}99", f"{prefix}12"]), found
    assert one.class_names == [f"{prefix}99", f"{prefix}12"]
    assert {*one.test.paths} == {p for p in two.test.paths if p.parent.name != f"{prefix}45"}  # whatever is beside them


def test_the_hundred_identities_with_the_most_images_are_taken_ties_by_name(tmp_path):
    for number in range(102):
        pictures(tmp_path / f"{number:07d}", 3 if number in (0, 101) else 2)
    names = open_layout("casia-webface", tmp_path).class_names
    assert names == [f"{n:07d}" for n in (*range(99), 101)]  # 0 and 101 have three; 1 to 98 come first among the others


def test_casia_100_keeps_the_split_of_its_authors(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for n in ("0000102", "0000045"):
            pictures(tmp_path / split / n, count)
    found = open_layout("casia-webface", tmp_path)
    assert found.class_names == ["0000045", "0000102"]
    assert (len(found.train), len(found.test), found.test_name) == (6, 2, "test")


def test_packed_records_are_not_read_and_one_sentence_says_so(tmp_path):
    put(tmp_path / "train.rec")
    put(tmp_path / "train.idx")
    assert "packed in a .rec file" in refused("casia-webface", tmp_path).message


def test_imagenet100_from_train_and_val(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for wnid in ("n02012849", "n01440764"):
            pictures(tmp_path / split / wnid, count, "JPEG")
    found = open_layout("imagenet100", tmp_path)
    assert found.class_names == ["n01440764", "n02012849"]
    assert (len(found.train), len(found.test), found.test_name) == (6, 4, "val")


def test_imagenet100_from_kaggles_parts_with_its_names(tmp_path):
    """Two classes are called crane; their folders tell them apart."""
    labels = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane", "n09999999": "not here"}
    for part, wnids in (("train.X1", ["n01440764"]), ("train.X2", ["n02012849"]), ("train.X4", ["n03126707"])):
        for wnid in wnids:
            pictures(tmp_path / part / wnid, 2, "JPEG")
            pictures(tmp_path / "val.X" / wnid, 1, "JPEG")
    put(tmp_path / "Labels.json", json.dumps(labels))
    found = open_layout("imagenet100", tmp_path)
    assert found.class_names == ["tench", "crane (n02012849)", "crane (n03126707)"]
    assert [folder for _, folder, _ in inside(found, "test")] == ["n01440764", "n02012849", "n03126707"]
    assert (len(found.train), found.test_name) == (6, "val")
    chosen = open_layout("imagenet100", tmp_path, ["n03126707", "tench"])
    assert chosen.class_names == ["n03126707", "tench"]
    assert [folder for _, folder, _ in inside(chosen, "test")] == ["n03126707", "n01440764"]


def cub(root: Path) -> Path:
    files = ["002.Laysan_Albatross/L_1.jpg", "001.Black_footed_Albatross/B_1.jpg", "001.Black_footed_Albatross/B_2.jpg"]
    files.append("002.Laysan_Albatross/L_2.jpg")
    for file in files:
        put(root / "images" / file)
    put(root / "images.txt", "".join(f"{i} {file}\n" for i, file in enumerate(files, 1)))
    put(root / "image_class_labels.txt", "1 2\n2 1\n3 1\n4 2\n")
    put(root / "train_test_split.txt", "1 1\n2 0\n3 1\n4 0\n")
    return root


def test_cub_follows_its_lists(tmp_path):
    found = open_layout("cub-200", cub(tmp_path))
    assert found.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert [name for _, _, name in inside(found, "train")] == ["B_2.jpg", "L_1.jpg"]
    assert [name for _, _, name in inside(found, "test")] == ["B_1.jpg", "L_2.jpg"]
    named = open_layout("cub-200", tmp_path, ["Laysan_Albatross", "001.Black_footed_Albatross"])
    assert named.class_names == ["Laysan_Albatross", "001.Black_footed_Albatross"]
    assert [name for _, _, name in inside(named, "test")] == ["L_2.jpg", "B_1.jpg"]


def test_cub_says_what_is_missing(tmp_path):
    (cub(tmp_path) / "images" / "002.Laysan_Albatross" / "L_2.jpg").unlink()
    assert "lacks images/002.Laysan_Albatross/L_2.jpg" in refused("cub-200", tmp_path).message
    cub(tmp_path)
    put(tmp_path / "train_test_split.txt", "1 1\n2 0\n")
    assert "no label or split for image 3" in refused("cub-200", tmp_path).message
    (tmp_path / "train_test_split.txt").unlink()
    assert "has no train_test_split.txt" in refused("cub-200", tmp_path).message


def omni(root: Path, record: str, base: str) -> None:
    """Two realms, whose labels both start at 0; one listed image of each list is not there."""
    for realm in ("bird", "car"):
        for split in ("train", "val"):
            lines = []
            for label in (0, 10, 2):
                for i in range(2):
                    image = base.format(split=split) + f"{label}_{i}.jpg"
                    folder = (root / record.format(realm=realm, split=split)).parent
                    at = folder if record.endswith("records.txt") else root / realm
                    put(at / image)
                    lines.append(f"{image} {label}")
            put(root / record.format(realm=realm, split=split), "\n".join([*lines, f"{base}gone.jpg 2", ""]))


@pytest.mark.parametrize(
    ("record", "base"),
    [
        ("{realm}/{split}.txt", "{split}/images/"),
        ("meta_v2/{realm}/{split}.txt", "{split}/images/"),
        ("{realm}/{split}/records.txt", "images/"),
        ("{realm}/{realm}.{split}/records.txt", "images/"),
    ],
)
def test_omnibenchmark_from_its_lists(tmp_path, record, base):
    omni(tmp_path, record, base)
    found = open_layout("omnibenchmark", tmp_path)
    assert found.class_names == [f"{realm}/{i}" for realm in ("bird", "car") for i in (0, 2, 10)]
    assert (len(found.train), len(found.test), found.test_name) == (12, 12, "val")
    for label, folder, name in inside(found, "test"):
        assert label.split("/")[1] == name.split("_")[0]
    assert all(found.class_names[k].split("/")[0] in p.parts for p, k in zip(found.test.paths, found.test.labels))


def test_omnibenchmark_takes_test_lists_with_labels_and_readable_names(tmp_path):
    omni(tmp_path, "{realm}/{split}.txt", "{split}/images/")
    for realm in ("bird", "car"):
        for label in (0, 2, 10):
            put(tmp_path / realm / "test" / "images" / f"t{label}.jpg")
        put(tmp_path / realm / "test.txt", "".join(f"test/images/t{i}.jpg {i}\n" for i in (0, 2, 10)))
    names = {"bird": {"0": "owl", "2": "crane", "10": "wren"}, "car": {"0": "van", "2": "crane", "10": "taxi"}}
    put(tmp_path / "trainid2name_v2.json", json.dumps(names))
    found = open_layout("omnibenchmark", tmp_path)
    assert found.class_names == ["owl", "crane (bird/2)", "wren", "van", "crane (car/2)", "taxi"]
    assert (len(found.test), found.test_name) == (6, "test")
    put(tmp_path / "bird" / "test.txt", "test/images/t0.jpg\n")
    put(tmp_path / "car" / "test.txt", "test/images/t0.jpg\n")
    assert (
        open_layout("omnibenchmark", tmp_path).test_name == "val"
    )  # lists without labels, as they were published first
    assert open_layout("omnibenchmark", tmp_path, ["taxi", "bird/0"]).class_names == ["taxi", "bird/0"]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_another_layout_is_one_sentence_on_what_was_expected(tmp_path, name):
    pictures(tmp_path / "pictures", 2)
    error = refused(name, tmp_path)
    assert error.message.startswith(f"{tmp_path} is not {name} as it is usually laid out: it ")
    assert error.hint.startswith("Expected ")
    assert "There is no data folder" in refused(name, tmp_path / "nowhere").message


def test_every_recipe_names_a_layout():
    assert {recipe.layout for recipe in RECIPES if recipe.task != "detect"} <= {*LAYOUTS}


def test_unknown_names_are_refused(tmp_path):
    assert "casia-webface" in refused("casia", tmp_path, "unknown_layout").hint
    pictures(tmp_path / "0000045", 5)
    pictures(tmp_path / "0000046", 5)
    assert "no class called '7'" in refused("casia-webface", tmp_path, class_names=["0000045", "7"]).message
    refused("casia-webface", tmp_path, class_names=["0000045", "0000045"])
    pictures(tmp_path / "0000047", 1)
    message = refused("casia-webface", tmp_path).message
    assert "holds no training images of '0000047'" in message
