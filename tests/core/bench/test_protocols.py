"""Protocols and recipes: the published order, chains that end where their name says, and names that do not fit."""

import pytest

from gsforget.bench.protocols import class_order, make_protocol
from gsforget.bench.recipes import RECIPES, find_recipe
from gsforget.errors import RequestError

# The first task of the release of GS-LoRA, as its authors list it.
FIRST_TWENTY = [51, 54, 13, 88, 84, 26, 50, 39, 96, 81, 49, 42, 21, 93, 74, 73, 46, 90, 68, 79]


def test_the_first_task_is_that_of_the_release():
    assert list(make_protocol("100-20", 100).requests[0]) == FIRST_TWENTY


def test_a_later_step_stands_at_the_end_of_its_chain():
    chain = make_protocol("40-20", 100)
    assert [len(r) for r in chain.requests] == [20] * 4
    assert [chain.step(n) for n in range(4)] == ["100-20", "80-20", "60-20", "40-20"]
    kept = set(range(100)) - {k for r in chain.requests for k in r}
    assert kept == set(class_order(100)[:20])
    assert chain.requests[0] == make_protocol("100-20", 100).requests[0]


@pytest.mark.parametrize(("name", "sizes"), [("100-5", [5]), ("100-90", [90]), ("80-20", [20, 20])])
def test_single_and_short_chains(name, sizes):
    assert [len(r) for r in make_protocol(name, 100).requests] == sizes


def test_missing_classes_are_never_forgotten():
    chain = make_protocol("40-20", 100, shots=4, missing=5)
    assert not {*chain.missing} & {k for r in chain.requests for k in r}
    assert chain.label == "40-20, 4-shot, 5 classes missing"


@pytest.mark.parametrize("name", ["", "20", "20-40", "100-100", "100-0", "90-20", "120-20", "a-b"])
def test_names_that_do_not_fit(name):
    with pytest.raises(RequestError) as error:
        make_protocol(name, 100)
    assert error.value.kind == "unknown_protocol"


def test_too_many_missing_classes():
    with pytest.raises(RequestError, match="leave none"):
        make_protocol("40-20", 100, missing=20)


def test_every_recipe_is_a_protocol_of_100_classes_or_80_kinds_with_a_figure_for_each_request():
    for recipe in RECIPES:
        count = 80 if recipe.task == "detect" else 100
        requests = make_protocol(recipe.protocol, count, recipe.shots, recipe.missing).requests
        assert recipe.published or recipe.shots == 32, "of COCO with 32 images per kind none are known"
        for figures in [*recipe.published.values(), *recipe.earlier.values()]:
            assert len(figures) == len(requests), recipe.name


def test_a_misspelt_recipe_is_answered_with_the_nearest():
    with pytest.raises(RequestError) as error:
        find_recipe("imagenet100-sequense")
    assert "imagenet100-sequence" in error.value.hint
