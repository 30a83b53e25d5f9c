"""When a training step is captured, captured anew, checked and given up, with a double that replays Python.

The double (see conftest) keeps the promises of CUDA graphs: a replay reads the static input, and capturing runs the
work a few times.  No graph has been captured on a GPU here.
"""

import logging

import pytest
import torch

from gsforget import processes
from gsforget.graphs import LARGEST, Graphs

torch.set_num_threads(1)


class Problem:
    """A linear model, and steps that count themselves."""

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.leaf = torch.randn(3, 2, generator=rng, requires_grad=True)
        self.count, self.sum = torch.zeros((), dtype=torch.int64), torch.zeros(2)

    def read(self, x):
        return [x @ self.leaf, (x @ self.leaf).tanh()]

    def run(self):
        self.count += 1
        self.sum += self.count * torch.tensor([1.0, 0.5])

    @property
    def state(self):
        return [self.count, self.sum]


def test_a_network_is_captured_once_and_its_input_copied(capture_double):
    problem, double = Problem(), capture_double()
    graphs, given = Graphs(double), torch.randn(4, 3)
    for k in range(3):
        x = given + k
        first, second = graphs.network("a", problem.read, x, [problem.leaf])
        assert torch.equal(first, x @ problem.leaf)
        assert torch.equal(x, given + k)  # the caller's input is not what replays write to
        (gradient,) = torch.autograd.grad((first + second).sum(), problem.leaf)
        assert gradient.abs().sum() > 0
    assert double.captured == ["network"]
    assert len(double.replayed) == 1 + 3  # one to compare with the eager step


def test_another_key_shape_or_type_is_captured_anew(capture_double):
    problem, double = Problem(), capture_double()
    graphs = Graphs(double)
    calls = [("a", 4), ("a", 4), ("b", 4), ("b", 5), ("b", 5), ("a", 4)]
    for key, count in calls:
        graphs.network(key, problem.read, torch.ones(count, 3), [problem.leaf])
    assert len(double.captured) == 4
    graphs.network("a", problem.read, torch.ones(LARGEST + 1, 3), [problem.leaf])
    assert len(double.captured) == 4  # so large a batch is run as it is


def test_what_a_graph_reads_lives_as_long_as_it(capture_double):
    class Held:
        pass

    import weakref

    problem, graphs = Problem(), Graphs(capture_double())
    made = []

    def hold():
        held = Held()
        made.append(weakref.ref(held))
        return held

    for key in ("a", "a", "b"):
        graphs.network(key, problem.read, torch.ones(2, 3), [problem.leaf], hold)
    assert [m() is not None for m in made] == [False, True]


def test_work_is_done_once_per_call_whatever_capturing_takes(capture_double):
    problem, plain, double = Problem(), Problem(), capture_double()
    graphs = Graphs(double)
    for key in (True, True, False, False, True):
        graphs.work(key, problem.run, problem.state)
        plain.run()
        assert problem.count == plain.count
        assert torch.equal(problem.sum, plain.sum)
    assert double.captured == ["work", "work"]
    assert len(double.replayed) == 5


@pytest.mark.parametrize("fault", [{"fails": "work"}, {"fails": "network"}, {"wrong": 0.1}])
def test_what_cannot_be_captured_or_disagrees_goes_on_eagerly_and_is_said_once(fault, caplog, capture_double):
    double = capture_double(**fault)
    problem, plain, graphs = Problem(), Problem(), Graphs(double)
    x = torch.randn(4, 3)
    with caplog.at_level(logging.WARNING, "gsforget.graphs"):
        for _ in range(3):
            got = graphs.network("a", problem.read, x, [problem.leaf])
            assert torch.equal(got[0], x @ problem.leaf)
            graphs.work("a", problem.run, problem.state)
            plain.run()
    assert torch.equal(problem.sum, plain.sum)
    (said,) = caplog.messages
    assert graphs.off in said
    assert ("not permitted" in said) == bool(double.fails)
    assert "\n" not in said


def test_a_work_that_disagrees_leaves_what_the_eager_one_left(capture_double):
    class Wrong(capture_double):
        def work(self, run):
            self._capture("work", run)
            return lambda: [run(), problem.sum.add_(1.0)]

    problem, plain = Problem(), Problem()
    graphs = Graphs(Wrong())
    for _ in range(2):
        graphs.work("a", problem.run, problem.state)
        plain.run()
    assert torch.equal(problem.sum, plain.sum)
    assert graphs.off == "the captured proximal step computes something else"


def test_numbers_that_are_none_are_no_disagreement(capture_double):
    problem, double = Problem(), capture_double()
    problem.sum[0] = torch.nan
    Graphs(double).work("a", problem.run, problem.state)
    assert double.replayed == ["work"]


def test_where_nothing_is_captured_there_is_a_reason(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert Graphs.on(torch.device("cpu"), True, True).off == "there is no GPU"
    assert Graphs.on(gpu, False, True).off == "it was not asked for"
    assert Graphs.on(gpu, True, False).off == "the proximal step runs on plain PyTorch"
    assert Graphs.on(gpu, True, True).off is None
    monkeypatch.setattr(processes, "world", lambda: 2)
    assert Graphs.on(gpu, True, True).off == "several processes train together"
