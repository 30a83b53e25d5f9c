"""What can be audited: answers, features and the head, from modules and from files alike."""

import numpy as np
import pytest
import torch
from torch import nn

from gsforget.audit.subjects import ArtifactSubject, TorchSubject, are_probabilities, as_log, ask, head_of
from gsforget.data import Split
from gsforget.errors import RequestError
from gsforget.images import ImageSet


class Net(nn.Module):
    def __init__(self, end=None):
        super().__init__()
        self.body, self.top, self.end = nn.Linear(12, 6), nn.Linear(6, 4), end or nn.Identity()

    def forward(self, x):
        return self.end(self.top(self.body(x.flatten(1)).relu()))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 2, 2)).astype(np.float32)


class File:
    """What an exported file is to the audit."""

    def __init__(self, net, features=True):
        self.net, self.with_features = TorchSubject(net), features

    def predict(self, batch):
        return self.net.predict(batch)

    def features_and_logits(self, batch):
        features, logits = self.net.both(batch)
        return (features if self.with_features else None), logits


def image_set(values, tmp_path, labels=None):
    """An ImageSet over arrays: file i stands for values[i]."""
    paths = [tmp_path / f"{i}.png" for i in range(len(values))]
    labels = np.zeros(len(values), np.int64) if labels is None else labels
    return ImageSet(Split(paths, np.asarray(labels)), lambda p: values[int(p.stem)])


def test_a_module_gives_features_that_lead_to_its_logits(net):
    subject = TorchSubject(net)
    features, logits = subject.both(noise(5))
    np.testing.assert_allclose(
        features @ net.top.weight.detach().numpy().T + net.top.bias.detach().numpy(), logits, atol=1e-5
    )
    np.testing.assert_array_equal(subject.predict(noise(5)), logits)
    np.testing.assert_array_equal(subject.features(noise(5)), features)
    assert (subject.classifier, subject.why_no_features) == ("top", "")


def test_a_module_that_ends_otherwise_has_answers_only():
    subject = TorchSubject(Net(nn.Softmax(1)))
    features, answers = subject.both(noise(5))
    assert features is None
    assert are_probabilities(answers)
    assert "linear layer" in subject.why_no_features


def test_a_file_without_features_says_so(net):
    for predictor in (File(net, features=False), type("Plain", (), {"predict": TorchSubject(net).predict})):
        subject = ArtifactSubject(predictor)
        features, logits = subject.both(noise(3))
        assert features is None
        assert logits.shape == (3, 4)
        assert "features output" in subject.why_no_features
    subject = ArtifactSubject(File(net))
    assert subject.features(noise(3)).shape == (3, 6)
    assert subject.why_no_features == ""


def test_a_files_head_is_found_from_its_features_and_logits(net, tmp_path):
    own = TorchSubject(net)
    images = image_set(noise(40), tmp_path)
    answers = ask(ArtifactSubject(File(net)), images, np.arange(40), 4, "x")
    ask(own, images, np.arange(2), 4, "x")
    weight, bias = head_of(own, answers)
    found, offset = head_of(ArtifactSubject(File(net)), answers)
    np.testing.assert_allclose(found, weight, atol=1e-4)
    np.testing.assert_allclose(offset, bias, atol=1e-4)
    bent = type(answers)(answers.labels, np.tanh(answers.logits), answers.features)
    assert head_of(ArtifactSubject(File(net)), bent) is None
    assert head_of(ArtifactSubject(File(net)), type(answers)(answers.labels, answers.logits, None)) is None


def test_answers_come_in_the_order_of_the_rows(net, tmp_path):
    values, labels = noise(150), np.arange(150) % 4
    rows = np.array([149, 3, 77, 3])
    seen = []
    answers = ask(
        TorchSubject(net), image_set(values, tmp_path, labels), rows, 4, "x", lambda *p: seen.append(p), batch_size=3
    )
    np.testing.assert_allclose(answers.logits, TorchSubject(net).predict(values[rows]), atol=1e-5)
    assert answers.labels.tolist() == labels[rows].tolist()
    assert answers.correct.tolist() == (answers.logits.argmax(1) == labels[rows]).tolist()
    assert seen == [(3, 4), (4, 4)]
    assert answers.select([1]).logits.shape == (1, 4)


def test_no_rows_give_no_answers(net, tmp_path):
    answers = ask(TorchSubject(net), image_set(noise(2), tmp_path), [], 4, "x")
    assert answers.logits.shape == (0, 4)
    assert answers.features is None


def test_another_number_of_classes_and_nan_are_refused(net, tmp_path):
    with pytest.raises(RequestError) as caught:
        ask(TorchSubject(net), image_set(noise(2), tmp_path), [0, 1], 5, "The model m")
    assert caught.value.kind == "wrong_classes"
    with torch.no_grad():
        net.top.bias[0] = float("nan")
    with pytest.raises(RequestError, match="The model m returns NaN") as caught:
        ask(TorchSubject(net), image_set(noise(2), tmp_path), [0, 1], 4, "The model m")
    assert caught.value.kind == "nan_logits"


def test_logarithms_of_probabilities_stand_in_for_logits(net):
    from gsforget.audit.subjects import Answers

    logits = TorchSubject(net).predict(noise(20))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    shares[0] = [1, 0, 0, 0]
    logs = as_log(Answers(np.zeros(20, np.int64), shares, None)).logits
    assert np.isfinite(logs).all()
    assert (logs.argmax(1)[1:] == logits.argmax(1)[1:]).all()
    again = np.exp(logs.astype(np.float64)) / np.exp(logs.astype(np.float64)).sum(1, keepdims=True)
    np.testing.assert_allclose(again, shares, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([[0.2, 0.8], [1, 0]], True),
        ([[0.2, 0.8], [1, 0.5]], False),
        ([[-0.2, 1.2]], False),
        ([[1.0]], False),
        (np.zeros((0, 3)), False),
    ],
)
def test_what_counts_as_probabilities(outputs, expected):
    assert are_probabilities(np.asarray(outputs, np.float32)) is expected
