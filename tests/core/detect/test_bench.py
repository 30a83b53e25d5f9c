"""A bench of detectors: the published protocol on COCO as it lies on disk, and whole chains with AP after each request."""

import json

import numpy as np
import pytest
from PIL import Image

from gsforget.bench.detectors import detector_protocol, open_bench
from gsforget.bench.open import run_bench
from gsforget.bench.recipes import find_recipe
from gsforget.errors import RequestError

# Category ids of COCO's 80 kinds, and the first ten that the release of GS-LoRA forgets: the end of its list, shuffled by
# numpy with seed 123.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
IDS = [i for i in range(1, 91) if i not in GAPS]
FIRST_TEN = {78, 41, 28, 52, 37, 84, 53, 63, 19, 76}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO's own layout in miniature: 80 kinds, ids with gaps, and files beside that do not matter."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, annotations = [], []
        for n in range(40):
            name = f"{n:012d}.jpg"
            Image.fromarray(np.full((24, 32, 3), 6 * n, np.uint8)).save(root / split / name)
            images.append({"id": 100 + n, "file_name": name, "width": 32, "height": 24, "license": 1})
            for kind in IDS[2 * n : 2 * n + 2]:
                box = {"bbox": [4.2, 3.1, 20.5, 12.25], "area": 251.1, "segmentation": [[1, 1, 2, 2]], "iscrowd": 0}
                annotations.append({"id": len(annotations), "image_id": 100 + n, "category_id": kind, **box})
        kinds = [{"id": i, "name": f"kind {i}", "supercategory": "thing"} for i in IDS]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": kinds}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / "annotations" / f"captions_{split}.json").write_text("{}")
    return root


def opened(model, data, recipe, **more):
    options = {"seeds": 3, "shots": None, "annotations": None, "class_names": None, "device": "cpu"}
    options |= {"out": data / "bench", "skip_corrupt": False, "say": lambda _text: None, **more}
    return open_bench(model, data, recipe.protocol, recipe, **options)


@pytest.mark.parametrize("published", ["coco-sequence", "coco-sequence-32-shot"])
def test_the_published_requests_in_the_releases_order(coco, detector_of, published):
    """Whatever order and further kinds the detector has: here the names of all 91 ids, backwards."""
    names = [f"kind {i}" if i in IDS else "N/A" for i in range(90, -1, -1)]
    recipe = find_recipe(published)
    bench = opened(detector_of(names), coco, recipe, shots=recipe.shots)
    requests = bench.protocol.requests
    assert [len(r) for r in requests] == [10] * 7
    ids = [{int(names[k].removeprefix("kind ")) for k in r} for r in requests]
    assert ids[0] == FIRST_TEN
    assert set().union(*ids) <= set(IDS)
    assert len(set().union(*ids)) == 70
    assert bench.protocol.step(0) == "80-10"
    assert bench.protocol.step(6) == "20-10"
    assert bench.protocol.shots == recipe.shots


def test_without_a_recipe_the_order_is_that_of_classifiers():
    kinds = list(range(5, 15))
    made = detector_protocol("8-2", kinds)
    assert len(made.requests) == 2
    assert all(k in kinds for r in made.requests for k in r)
    assert made.requests != detector_protocol("8-2", kinds, order_seed=123).requests


@pytest.mark.parametrize(
    ("methods", "more", "kind", "says"),
    [
        (["scrub"], {}, "no_rivals", "gs-lora"),
        (["gs-lora"], {"relearn": True}, "not_for_detection", "--relearn"),
        (["gs-lora"], {"layout": "cub-200"}, "not_for_detection", "--layout"),
        (["gs-lora"], {"protocol": "casia100-5"}, "other_task", "casia100-5"),
        (["gs-lora"], {"protocol": "coco-sequence"}, "unknown_protocol", "does not fit 4 classes"),
    ],
)
def test_what_does_not_fit_a_detector(detector_of, squares, tmp_path, methods, more, kind, says):
    options = {"protocol": "3-1", "out": tmp_path / "bench", **more}
    with pytest.raises(RequestError) as caught:
        run_bench(methods, detector_of(["red", "green", "blue", "white"]), squares, **options)
    assert caught.value.kind == kind
    assert says in caught.value.message + caught.value.hint


@pytest.mark.slow
def test_a_chain_is_measured_stored_and_not_measured_again(trained, squares, tmp_path):
    def run():
        return run_bench(["gs-lora++"], trained, squares, "3-1", seeds=1, out=tmp_path, device="cpu")

    found = run()
    assert not found["failed"], found["failed"]
    (row,) = found["rows"]
    assert len(row["h"]) == 2
    assert row["worst"]["forget_ap50_after"].median <= 5  # eight queries are all ranked: chance gives a few percent
    assert row["worst"]["old_ap50_after"].median <= 5
    assert "earlier AP" in found["table"]["columns"]
    before = (tmp_path / "bench.json").read_bytes()
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert run()["table"] == found["table"]
    assert (tmp_path / "bench.json").read_bytes() == before
