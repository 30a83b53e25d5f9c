"""The method on the page docs/adding-a-method.md is taken from the page and run, and does what the page says of it."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines import find_method
from gsforget.errors import RequestError

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-method.md"


@pytest.fixture
def on_the_page(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)
    path = tmp_path / "features_away.py"
    path.write_text(block, encoding="utf8")
    return path


def test_the_method_on_the_page_runs_and_pushes_features_to_the_mean(by_hand, on_the_page):
    """Mean retained feature (3/4, 3/4); features to forget (-1, -1) and (-2, -2): 2 x 1.75^2 and 2 x 2.75^2, mean 10.625."""
    method = find_method(str(on_the_page))
    plain = {"batch_size": 6, "optimiser": "momentum", "momentum": 0.0, "weight_decay": 0.0, "cosine": False}
    settings = dataclasses.replace(method.settings(), lr=0.01, pull=0.5, **plain)
    before = copy.deepcopy(by_hand.model.state_dict())
    result = method.run(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)

    x, y = by_hand.images.pixels, by_hand.images.labels
    features = by_hand.model[:2](x)
    kept = cross_entropy(by_hand.model(x)[:4], y[:4])
    assert result.history[0]["loss"] == pytest.approx(kept.item() + 0.5 * 10.625, rel=1e-6)
    loss = kept + 0.5 * (features[4:] - 0.75).square().sum(1).mean()
    names, weights = zip(*by_hand.model.named_parameters())
    for name, weight, gradient in zip(names, weights, torch.autograd.grad(loss, weights)):
        torch.testing.assert_close(result.state_dict[name], weight.detach() - 0.01 * gradient)
    assert all(torch.equal(before[n], t) for n, t in by_hand.model.state_dict().items())


def test_its_trials_make_settings_and_its_file_is_what_a_bench_keeps_the_hash_of(on_the_page):
    import hashlib

    from gsforget.baselines import training
    from gsforget.bench.run import code_sha256

    method = find_method(str(on_the_page))
    tried = [dataclasses.replace(method.settings(), **change) for change in method.trials]
    assert 3 <= len(tried) <= 7
    assert method.name == "features-away"
    shared = Path(training.__file__).read_bytes()  # what the page's method is built on
    assert code_sha256(method) == hashlib.sha256(on_the_page.read_bytes() + shared).hexdigest()


def test_a_file_may_postpone_its_annotations_as_ours_do(on_the_page):
    on_the_page.write_text("from __future__ import annotations\n" + on_the_page.read_text(encoding="utf8"), "utf8")
    assert find_method(str(on_the_page)).settings().pull == 1.0


def test_a_file_without_a_method_is_sent_to_the_page(tmp_path):
    path = tmp_path / "nothing.py"
    path.write_text("METHOD = 3\n")
    with pytest.raises(RequestError) as caught:
        find_method(str(path))
    assert caught.value.kind == "bad_method"
    assert PAGE.name in caught.value.hint
