"""What people get wrong: the documented exit status, one sentence that names the thing, what to type, nothing left behind."""

import json
import os
import pickle
import shutil

import pytest

CASES = []


def case(kind, named, hint="", status=2):
    """Register a function that spoils one thing of a request that would otherwise pass.

    It is called with the request's options, the world and an empty folder in which the command is typed.  The message
    must contain `named`, the hint `hint`; `kind` may be several.
    """

    def register(spoil):
        kinds = (kind,) if isinstance(kind, str) else kind
        CASES.append(pytest.param(spoil, kinds, named, hint, status, id=spoil.__name__))
        return spoil

    return register


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


def command(options):
    return ["forget", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]


def copy_of_data(o, world, cwd):
    o["data"] = cwd / "data"
    shutil.copytree(world.data, o["data"])
    return o["data"]


def by_checkpoint(o, world, checkpoint):
    o |= {"model": world.architecture, "model_kwargs": world.model_kwargs, "checkpoint": checkpoint}
    o |= {"mean": "0.5", "std": "0.5", "crop_pct": "1"}


def changed_weights(world, cwd, change):
    from safetensors.torch import load_file, save_file

    state = load_file(world.checkpoint)
    change(state)
    save_file(state, cwd / "w.safetensors")
    return cwd / "w.safetensors"


# ---- the classes asked for


@case("unknown_class", "beee", "'bee'")
def unknown_class(o, world, cwd):
    o["classes"] = "beee"


@case("unknown_class", "'4'", "0 to 3")
def unknown_index(o, world, cwd):
    o["classes"] = "4"


@case("unknown_class", "'-1'", "0 to 3")
def negative_index(o, world, cwd):
    o["classes"] = "-1"


@case("all_classes", "all 4", "Keep at least one")
def all_classes(o, world, cwd):
    o["classes"] = "ant,bee,2,dog"


@case("no_class", "No class", "--classes")
def no_class(o, world, cwd):
    o["classes"] = " , "


@case("no_class", "No class", "--classes")
def classes_left_out(o, world, cwd):
    del o["classes"]


@case("bad_list", "--classes", "quotes")
def unclosed_quote(o, world, cwd):
    o["classes"] = '"ant'


@case("bad_names_file", "absent.txt")
def absent_classes_file(o, world, cwd):
    o["classes_file"] = "absent.txt"


@case("bad_names_file", "empty.txt")
def empty_classes_file(o, world, cwd):
    (cwd / "empty.txt").touch()
    o["classes_file"] = "empty.txt"


# ---- request files and lists of images


def request_file(o, cwd, text, name="r.yaml"):
    (cwd / name).write_text(text)
    o["request"] = name
    o.pop("classes", None)


def refused_entry(name, kind, text, named, hint=""):
    @case(kind, named, hint)
    def spoil(o, world, cwd):
        request_file(o, cwd, text)

    CASES[-1] = pytest.param(*CASES[-1].values, id=f"request_{name}")


for name, kind, text, named, hint in (
    ("unknown_key", "bad_request_file", "[{classes: bee}, {clases: cat}]", "entry 2: there is no field 'clases'", "classes"),
    ("unknown_class", "unknown_class", "[{id: a, classes: [bee]}, {id: b, classes: [beee]}]", "entry 2 (b)", "'bee'"),
    ("twice", "duplicate_request", "[{classes: [bee]}, {classes: [1]}]", "entry 2: class 'bee' is already", "Remove"),
    ("retained", "contradiction", "[{classes: [bee], retain: [cat]}, {classes: [cat]}]", "'cat'", "retain"),
    ("retained_at_once", "contradiction", "{classes: [bee], retain: [ant, 1]}", "'bee'", "retain"),
    ("forgotten_before", "contradiction", "[{classes: [bee]}, {classes: [cat], retain: [bee]}]", "'bee'", "retain"),
    ("all_by_and_by", "all_classes", "[{classes: [ant, bee]}, {classes: [cat, dog]}]", "entry 2", "Keep at least one"),
    ("bad_number", "bad_number", "[{classes: [bee]}, {classes: [cat], shots: 0}]", "entry 2: --shots is 0", "--shots"),
    ("bad_method", "unknown_method", "{classes: [bee], method: gs-lorra}", "gs-lorra", "gs-lora"),
    ("wrong_type", "bad_request_file", "{classes: [bee], shots: many}", "shots", "shots: 1"),
    ("a_yes", "bad_request_file", "{classes: [yes]}", "true", "quotes"),
    ("single_twice", "duplicate_request", "[{images: [train/bee/000.png], sample_mode: true}, {images: [train/bee/000.png, "
     "train/bee/001.png], sample_mode: true}]", "1 of its images are already forgotten by entry 1", "lists"),
    ("single_of_a_class", "duplicate_request", "[{classes: [bee]}, {images: [train/bee/000.png], sample_mode: true}]",
     "class 'bee' is already", "Remove"),
    ("single_without_images", "bad_request_file", "{classes: [bee], sample_mode: true}", "without images", "beside images"),
    ("empty", "bad_request_file", "", "no request", "classes"),
    ("no_yaml", "bad_request_file", "classes: [bee", "line 1", "quotes"),
):  # fmt: skip
    refused_entry(name, kind, text, named, hint)


@case("bad_request_file", "absent.yaml", "--request")
def absent_request_file(o, world, cwd):
    del o["classes"]
    o["request"] = "absent.yaml"


@case("two_targets", "--classes", "one of them")
def request_file_and_classes(o, world, cwd):
    request_file(o, cwd, "{classes: [cat]}")
    o["classes"] = "bee"


@case("out_of_several", "--out", "--out")
def one_folder_for_two_requests(o, world, cwd):
    request_file(o, cwd, "[{classes: [bee]}, {classes: [cat]}]")
    o["out"] = "here"


def image_list(o, cwd, *lines):
    (cwd / "list.txt").write_text("\n".join(map(str, lines)))
    o["images"] = "list.txt"
    o.pop("classes", None)


@case("part_of_a_class", "2 of 24 of 'bee', 1 of 24 of 'cat'", "--classes bee,cat")
def images_that_cover_classes_in_part(o, world, cwd):
    image_list(o, cwd, "train/bee/000.png", world.data / "train/bee/001.png", "train/cat/003.png")


@case("unknown_image", "train/bee/900.png", "one image path")
def image_that_does_not_exist(o, world, cwd):
    image_list(o, cwd, "train/bee/900.png")


@case("unknown_image", "test/bee/000.png", "test image")
def image_of_the_test_folder(o, world, cwd):
    image_list(o, cwd, "test/bee/000.png")


@case("unknown_image", "0" * 64, "train folder")
def hash_of_no_image(o, world, cwd):
    image_list(o, cwd, "0" * 64)


@case("whole_class", "'bee'", "--classes bee")
def all_images_of_a_class_singly(o, world, cwd):
    image_list(o, cwd, "train/cat/000.png", *(f"train/bee/{i:03d}.png" for i in range(24)))
    o["sample_mode"] = None


@case("no_images_listed", "--sample-mode", "--images")
def single_images_without_a_list(o, world, cwd):
    o["sample_mode"] = None


@case("too_few_test_images", "'bee' has 1 test image", "test/bee")
def single_images_without_test_images_to_compare_with(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for path in sorted((data / "test" / "bee").iterdir())[1:]:
        path.unlink()
    image_list(o, cwd, "train/bee/000.png")
    o["sample_mode"] = None


@case("bad_image_list", "list.txt is empty", "per line")
def empty_image_list(o, world, cwd):
    image_list(o, cwd)


@case("bad_image_list", "absent.txt", "per line")
def absent_image_list(o, world, cwd):
    del o["classes"]
    o["images"] = "absent.txt"


@case("two_targets", "classes and a list", "second request")
def images_and_classes(o, world, cwd):
    image_list(o, cwd, "train/bee/000.png")
    o["classes"] = "cat"


# ---- the data


@case("no_data", "absent", "--data")
def missing_data(o, world, cwd):
    o["data"] = "absent"


@case("no_data", "file.zip", "--data")
def data_is_a_file(o, world, cwd):
    (cwd / "file.zip").touch()
    o["data"] = "file.zip"


@case("no_train", "data", "DIR/train/<class>")
def empty_data(o, world, cwd):
    (cwd / "data").mkdir()
    o["data"] = "data"


@case("no_test", "neither a test/ nor a val/", "DIR/train/<class>")
def no_test_split(o, world, cwd):
    shutil.rmtree(copy_of_data(o, world, cwd) / "test")


@case("no_images", "train", "DIR/train/<class>")
def no_class_folders(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    shutil.rmtree(data / "train")
    (data / "train").mkdir()


@case("no_images", "bee", "train folder")
def class_to_forget_without_images(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for path in (data / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))


@case("no_images", "retained classes", "'ant', 'cat', 'dog'")
def no_retained_class_has_images(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for name in ("ant", "cat", "dog"):
        shutil.rmtree(data / "train" / name)


@case("identical_images", "'bee'", "'cat'")
def images_to_forget_that_are_retained_too(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for path in (data / "train" / "bee").iterdir():
        shutil.copyfile(path, data / "train" / "cat" / f"copy-{path.name}")


@case("no_images", "test/cat", "png")
def class_without_test_images(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for path in (data / "test" / "cat").iterdir():
        path.unlink()


@case("class_names_differ", "'eel'")
def one_class_too_many(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for split in ("train", "test"):
        shutil.copytree(data / split / "dog", data / split / "eel")


@case("class_names_differ", "'dog'")
def one_class_misspelt(o, world, cwd):
    data = copy_of_data(o, world, cwd)
    for split in ("train", "test"):
        (data / split / "dog").rename(data / split / "dgo")


def spoil_image(data, split, content):
    path = data / split / "cat" / "003.png"
    path.write_bytes(content(path.read_bytes()))


@case("corrupt_image", "train/cat/003.png", "--skip-corrupt")
def truncated_image(o, world, cwd):
    spoil_image(copy_of_data(o, world, cwd), "train", lambda raw: raw[: len(raw) // 2])


@case("corrupt_image", "test/cat/003.png", "--skip-corrupt")
def zero_byte_image(o, world, cwd):
    spoil_image(copy_of_data(o, world, cwd), "test", lambda raw: b"")


@case("corrupt_image", "train/cat/003.png", "--skip-corrupt")
def text_named_png(o, world, cwd):
    spoil_image(copy_of_data(o, world, cwd), "train", lambda raw: b"not an image\n" * 50)


@case("corrupt_image", "test/cat")
def nothing_readable_even_without_the_corrupt(o, world, cwd):
    for path in (copy_of_data(o, world, cwd) / "test" / "cat").iterdir():
        path.write_bytes(b"")
    o["skip_corrupt"] = None


# ---- the order of the classes, and the preprocessing


@case("class_order", "class order looks wrong", "--class-names")
def permuted_names(o, world, cwd):
    (cwd / "names.txt").write_text("bee\ncat\ndog\nant\n")
    by_checkpoint(o, world, world.checkpoint)
    o["class_names"] = "names.txt"


@case("class_order", "class order looks wrong", "--class-names")
def permuted_names_of_a_model_folder(o, world, cwd):
    (cwd / "names.json").write_text(json.dumps(["bee", "cat", "dog", "ant"]))
    o["class_names"] = "names.json"


@case(("class_count", "class_names_differ"), "3 class names")
def too_few_names(o, world, cwd):
    (cwd / "names.txt").write_text("ant\nbee\ncat\n")
    o["class_names"] = "names.txt"


@case(("implausible_accuracy", "class_order"), "accuracy", "--")
def wrong_mean(o, world, cwd):
    o["mean"] = "-40,40,0"


@case(("bad_number", "bad_config", "bad_mean"), "mean")
def mean_of_two_channels(o, world, cwd):
    o["mean"] = "0.5,0.5"


@case(("bad_number", "bad_config", "bad_std"), "std")
def zero_std(o, world, cwd):
    o["std"] = "0"


@case("bad_config", "cubist")
def unknown_interpolation(o, world, cwd):
    o["interpolation"] = "cubist"


@case("bad_config", "crop_pct")
def zero_crop(o, world, cwd):
    o["crop_pct"] = "0"


@case(("bad_model_kwargs", "bad_number"), "img_size")
def zero_size(o, world, cwd):
    by_checkpoint(o, world, world.checkpoint)
    o["model_kwargs"] = world.model_kwargs.replace("img_size=16,", "")
    o["img_size"] = "0"


@case("fixed_size", "16 x 16", "--img-size")
def size_of_a_model_folder(o, world, cwd):
    o["img_size"] = "32"


# ---- the weights


@case("wrong_architecture", "does not fit", "--model")
def other_architecture(o, world, cwd):
    by_checkpoint(o, world, world.checkpoint)
    o["model"] = "deit3_small_patch16_224"
    o["model_kwargs"] = "img_size=16,patch_size=4,embed_dim=48,depth=3,num_heads=3"


@case("class_count", "7 classes", "--class-names")
def other_number_of_classes(o, world, cwd):
    def change(state):
        state["head.weight"], state["head.bias"] = state["head.weight"].new_ones(7, 32), state["head.bias"].new_ones(7)

    by_checkpoint(o, world, changed_weights(world, cwd, change))


@case("nan_weights", "blocks.1.attn.qkv.weight", "checkpoint")
def weights_with_nan(o, world, cwd):
    def change(state):
        state["blocks.1.attn.qkv.weight"][0, 0] = float("nan")

    by_checkpoint(o, world, changed_weights(world, cwd, change))


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@case("pickle_with_code", "evil.pt", "safetensors", status=4)
def pickle_with_code(o, world, cwd):
    import torch

    torch.save({"state_dict": torch.load(world.pt), "extra": Bomb(cwd / "code-ran")}, cwd / "evil.pt")
    by_checkpoint(o, world, "evil.pt")


@case("pickle_with_code", "evil.pth", "safetensors", status=4)
def plain_pickle_with_code(o, world, cwd):
    (cwd / "evil.pth").write_bytes(pickle.dumps(Bomb(cwd / "code-ran")))
    by_checkpoint(o, world, "evil.pth")


@case("bad_checkpoint", "half.pt", "complete")
def truncated_torch_file(o, world, cwd):
    raw = world.pt.read_bytes()
    (cwd / "half.pt").write_bytes(raw[: len(raw) // 2])
    by_checkpoint(o, world, "half.pt")


@case("bad_checkpoint", "half.safetensors", "complete")
def truncated_safetensors(o, world, cwd):
    raw = world.checkpoint.read_bytes()
    (cwd / "half.safetensors").write_bytes(raw[: len(raw) // 2])
    by_checkpoint(o, world, "half.safetensors")


@case("bad_checkpoint", "empty.pt", "complete")
def empty_checkpoint(o, world, cwd):
    (cwd / "empty.pt").touch()
    by_checkpoint(o, world, "empty.pt")


@case("bad_checkpoint", "page.pt", "complete")
def a_web_page_as_checkpoint(o, world, cwd):
    (cwd / "page.pt").write_text("<!DOCTYPE html><html>Not found</html>")
    by_checkpoint(o, world, "page.pt")


@case("bad_checkpoint", "version https", "complete")
def a_large_file_pointer_as_checkpoint(o, world, cwd):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (cwd / "version https.pt").write_text(text)
    by_checkpoint(o, world, "version https.pt")


@case("no_checkpoint", "absent.pt", "--checkpoint")
def missing_checkpoint(o, world, cwd):
    by_checkpoint(o, world, "absent.pt")


@case("no_checkpoint", "folder", "--checkpoint")
def checkpoint_is_a_folder(o, world, cwd):
    (cwd / "folder").mkdir()
    by_checkpoint(o, world, "folder")


@case("two_sources", "--checkpoint", "Leave them out")
def checkpoint_and_folder(o, world, cwd):
    o["checkpoint"] = world.checkpoint


@case("no_feed_forward", "No feed-forward network", "transformers")
def convolutional_network(o, world, cwd):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, cwd / "resnet.safetensors")
    by_checkpoint(o, world, "resnet.safetensors")
    o |= {"model": "resnet18", "img_size": "32"}  # it has no size of its own
    del o["model_kwargs"]


# ---- the model


@case("unknown_model", "vit_tinny_patch16_224", "vit_tiny_patch16_224")
def unknown_timm_model(o, world, cwd):
    by_checkpoint(o, world, world.checkpoint)
    o["model"] = "vit_tinny_patch16_224"


@case("no_model", "models/absent", "folder")
def missing_model_folder(o, world, cwd):
    o["model"] = "models/absent"


@case("no_model", "weights.safetensors", "--checkpoint")
def file_as_model(o, world, cwd):
    o["model"] = world.checkpoint


@case("no_model", "config.json", "runs/forget-0001")
def folder_without_config(o, world, cwd):
    shutil.copytree(world.model, cwd / "m")
    (cwd / "m" / "config.json").unlink()
    o["model"] = "m"


@case("bad_config", "config.json")
def broken_config(o, world, cwd):
    shutil.copytree(world.model, cwd / "m")
    (cwd / "m" / "config.json").write_text("{")
    o["model"] = "m"


@case("bad_config", "config.json")
def config_that_is_a_list(o, world, cwd):
    shutil.copytree(world.model, cwd / "m")
    (cwd / "m" / "config.json").write_text("[]")
    o["model"] = "m"


@case("untrusted_code", "evil:build", "--trust-code", status=4)
def config_with_an_import_path(o, world, cwd):
    shutil.copytree(world.model, cwd / "m")
    path = cwd / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": "evil:build"}))
    o["model"] = "m"


@case("bad_model_kwargs", "embed_dimm", "--model-kwargs")
def unknown_model_kwarg(o, world, cwd):
    by_checkpoint(o, world, world.checkpoint)
    o["model_kwargs"] = world.model_kwargs.replace("embed_dim", "embed_dimm")


# ---- options


@case("out_exists", "taken", "--out")
def out_exists(o, world, cwd):
    (cwd / "taken").mkdir()
    o["out"] = "taken"


@case("out_not_writable", "afile", "--out")
def out_below_a_file(o, world, cwd):
    (cwd / "afile").touch()
    o["out"] = "afile/run"


@case("out_not_writable", "runs", "--out")
def runs_is_a_file(o, world, cwd):
    (cwd / "runs").touch()


@case("unknown_method", "gs-lorra", "gs-lora")
def unknown_method(o, world, cwd):
    o["method"] = "gs-lorra"


@case("no_reference", "--max-probe-excess", "--reference")
def probe_gate_without_a_reference(o, world, cwd):
    o["max_probe_excess"] = "0.25"


@case("unknown_task", "faces", "classify")
def unknown_task(o, world, cwd):
    o["task"] = "faces"


def number(option, value):
    @case(("usage", "bad_number", "bad_shots"), option)
    def spoil(o, world, cwd):
        o[option.strip("-").replace("-", "_")] = value

    CASES[-1] = pytest.param(*CASES[-1].values, id=f"{option}={value}")


for option, value in (
    ("--shots", "0"), ("--rank", "0"), ("--batch-size", "0"), ("--target-groups", "0"), ("--epochs", "-1"),
    ("--epochs", "nan"), ("--epochs", "inf"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "-0.1"), ("--prox", "-1"),
    ("--prox", "nan"), ("--bnd", "nan"), ("--bnd", "-1"), ("--seed", "-1"), ("--seed", str(2**70)), ("--max-forget-acc", "nan"),
    ("--max-retain-drop", "nan"), ("--max-class-drop", "nan"), ("--rank", "two"), ("--max-probe-excess", "nan"),
):  # fmt: skip
    number(option, value)


@pytest.mark.parametrize(("spoil", "kinds", "named", "hint", "status"), CASES)
def test_refused_in_one_sentence_and_nothing_left(world, cli, tmp_path, spoil, kinds, named, hint, status):
    options = {"model": world.model, "data": world.data, "classes": "bee"}
    spoil(options, world, tmp_path)
    args = [a.removesuffix("=None") for a in command(options)]
    before = listing(tmp_path)
    result = cli(tmp_path, *args)
    assert set(result.document) == {"error"}, result.document
    error = result.document["error"]
    assert set(error) == {"kind", "message", "hint"}
    assert (result.status, error["kind"]) in {(status, kind) for kind in kinds}, error
    assert named in error["message"]
    assert error["hint"]
    assert hint in error["hint"]
    assert "\n" not in error["message"]
    assert "Traceback" not in result.err
    assert listing(tmp_path) == before


def test_cuda_without_a_gpu(world, cli, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = cli(
        tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "bee", "--device", "cuda"
    )
    assert (result.status, result.document["error"]["kind"]) == (2, "no_cuda")
    assert "--device cpu" in result.document["error"]["hint"]
    assert listing(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place(world, cli, tmp_path):
    tmp_path.chmod(0o500)
    try:
        result = cli(tmp_path, "forget", "--model", world.model, "--data", world.data, "--classes", "bee")
    finally:
        tmp_path.chmod(0o700)
    assert (result.status, result.document["error"]["kind"]) == (2, "out_not_writable")
    assert listing(tmp_path) == []
