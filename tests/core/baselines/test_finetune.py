"""Fine-tuning and NegGrad+ on a case small enough to reckon by hand."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gsforget.baselines.finetune import FinetuneSettings, finetune
from gsforget.baselines.neggrad import NegGradSettings, neggrad
from gsforget.errors import GsforgetError, RequestError

PLAIN = {"batch_size": 6, "momentum": 0.0, "weight_decay": 0.0, "cosine": False}


def one_step(case, weigh, lr):
    """Weights after one step of plain gradient descent on weigh(CE retained, CE forgotten)."""
    weights = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    x, y = case.images.pixels, case.images.labels
    logits = case.model(x)
    loss = weigh(cross_entropy(logits[:4], y[:4]), cross_entropy(logits[4:], y[4:]))
    gradients = torch.autograd.grad(loss, list(case.model.parameters()))
    return {n: w - lr * g for (n, w), g in zip(weights.items(), gradients)}


def check(result, expected):
    for name, value in expected.items():
        torch.testing.assert_close(result.state_dict[name], value)


def test_finetuning_descends_on_retained_images_alone(by_hand):
    result = finetune(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, FinetuneSettings(lr=0.1, **PLAIN))
    check(result, one_step(by_hand, lambda kept, lost: kept, 0.1))
    assert len(result.history) == 1


def test_neggrad_descends_and_ascends_by_its_weights(by_hand):
    settings = NegGradSettings(lr=0.1, alpha=0.7, **PLAIN)
    result = neggrad(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)
    check(result, one_step(by_hand, lambda kept, lost: 0.7 * kept - 0.3 * lost, 0.1))


def test_the_model_is_left_as_it_was_and_the_head_stays_where_asked(by_hand):
    before = {n: p.clone() for n, p in by_hand.model.state_dict().items()}
    settings = FinetuneSettings(lr=0.1, head=False, **PLAIN)
    result = finetune(by_hand.model, by_hand.images, by_hand.forget, by_hand.request, settings)
    for name, tensor in by_hand.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(result.state_dict["2.weight"], before["2.weight"])
    assert not torch.equal(result.state_dict["1.weight"], before["1.weight"])


def test_numbers_that_are_none_end_it(by_hand):
    settings = NegGradSettings(lr=1e30, epochs=5, batch_size=1, cosine=False)
    with pytest.raises(GsforgetError) as error:
        neggrad(by_hand.model, by_hand.images, by_hand.forget, replace_epochs(by_hand.request, 5), settings)
    assert error.value.kind == "diverged"


def test_both_sides_need_images(by_hand):
    with pytest.raises(RequestError) as error:
        finetune(by_hand.model, by_hand.images, ~by_hand.forget & by_hand.forget, by_hand.request, FinetuneSettings())
    assert error.value.kind == "no_images"


def replace_epochs(request, epochs):
    from dataclasses import replace

    return replace(request, epochs=epochs)
