"""Two processes that train one request together, against one alone: gloo on a CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# A command line that keeps the gradient of its first step under the path GRADIENT, and may misbehave in one process.
PROGRAM = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from gsforget import processes, training
from gsforget.errors import RequestError
original = training.ProximalAdam.step
calls = []
def step(self, flat, grad, *rest, **more):
    calls.append(0)
    if len(calls) == 1 and processes.is_first():
        torch.save(grad.clone(), os.environ["GRADIENT"])
    if len(calls) == 3 and processes.rank() == int(os.environ.get("BAD", "-1")):
        {then}
    return original(self, flat, grad, *rest, **more)
training.ProximalAdam.step = step
from gsforget.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
RAISE = 'raise RequestError("The third step went wrong here.", "Try another.", "odd")'
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@dataclass
class Ended:
    """Exit statuses, stdouts and stderrs of processes, in order."""

    status: list[int]
    out: list[str]
    err: list[str]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(cwd, args, then="pass", bad=-1) -> Ended:
    """Run a command line in two processes, of which `bad` does `then` in its third step."""
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "BAD": str(bad)}
    own = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(then=then), *map(str, args), "--json"],
            cwd=cwd,
            env=os.environ | several | mine | {"GRADIENT": str(cwd / "gradient.pt")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mine in own
    ]
    try:
        spoken = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return Ended([p.returncode for p in started], [o for o, _ in spoken], [e for _, e in spoken])


def command(world, *more):
    return ["forget", "--model", world.model, "--data", world.data, "--classes", "bee", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def alone(world, cli, tmp_path_factory):
    import torch

    from gsforget import training

    cwd, original = tmp_path_factory.mktemp("alone"), training.ProximalAdam.step

    def step(self, flat, grad, *rest, **more):
        if not (cwd / "gradient.pt").exists():
            torch.save(grad.clone(), cwd / "gradient.pt")
        return original(self, flat, grad, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ProximalAdam, "step", step)
        return cwd, cli(cwd, *command(world))


@pytest.fixture(scope="module")
def both(world, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("both")
    return cwd, launch(cwd, command(world))


def test_two_processes_take_the_first_step_of_one(alone, both):
    import torch

    one, two = (torch.load(cwd / "gradient.pt") for cwd, _ in (alone, both))
    assert one.abs().max() > 0
    assert (one - two).norm() <= 1e-5 * one.norm()
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-5 * one.abs().max().item())


def test_two_processes_come_to_the_result_of_one(alone, both):
    (_, one), (cwd, two) = alone, both
    assert one.status == 0, one.err
    assert two.status == [0, 0], two.err
    first, second = one.document, json.loads(two.out[0])
    assert first["groups"] == second["groups"]
    assert second["verdict"] == "pass"
    assert second["metrics"]["forget_acc_after"] <= 1
    for name, value in first["metrics"].items():
        assert value is None or second["metrics"][name] == pytest.approx(value, abs=2), name
    assert [p.name for p in (cwd / "runs").iterdir()] == ["forget-0001"]
    assert len((cwd / "runs" / "forget-0001" / "ledger.jsonl").read_text().splitlines()) == 1


def test_only_the_first_process_speaks(both):
    _, ended = both
    assert "gsforget export" in ended.err[0]
    assert (ended.out[1], ended.err[1]) == ("", "")


@pytest.mark.parametrize("bad", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_failure_anywhere_ends_all_with_its_sentence(world, tmp_path, bad):
    ended = launch(tmp_path, command(world), RAISE, bad)
    assert ended.status == [2, 2], ended.err
    assert json.loads(ended.out[0])["error"]["message"] == "The third step went wrong here."
    assert ended.err[0].count("The third step went wrong here.") == 1
    assert (ended.out[1], ended.err[1]) == ("", "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(world, tmp_path):
    ended = launch(tmp_path, command(world), KILL, 1)
    assert ended.status == [1, -signal.SIGKILL]
    assert json.loads(ended.out[0])["error"]["kind"] == "process_lost"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_is_wrong_everywhere_is_said_once(world, tmp_path):
    ended = launch(tmp_path, ["forget", "--model", world.model, "--data", world.data, "--classes", "unicorn"])
    assert ended.status == [2, 2]
    assert "unicorn" in json.loads(ended.out[0])["error"]["message"]
    assert ended.out[1] == ""


@pytest.mark.slow
def test_torchrun_prints_one_document(world, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "gsforget"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command(world, "--epochs", "1")), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    document = json.loads(done.stdout)
    assert document["verdict"] in ("pass", "fail")
    assert (done.returncode == 0) == (document["verdict"] == "pass"), done.stderr


def test_one_process_imports_no_distributed():
    program = (
        "import sys; from gsforget import processes as p; assert 'torch' not in sys.modules; "
        "assert p.from_first(lambda: 3) == 3 and p.of_all(4) == [4] and p.is_first() and p.together(lambda: 5) == 5; "
        "p.sum_([]); p.broadcast_(); assert not any(m.startswith('torch') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
