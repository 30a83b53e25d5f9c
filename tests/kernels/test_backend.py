"""Which backend is chosen, and what is said where it cannot run."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from gsforget.errors import RequestError
from gsforget.kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend._say.cache_clear()
    backend._too_old.cache_clear()


def test_plain_torch_on_a_cpu():
    assert backend.choose(CPU) == "torch"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "triton"), ((7, 5), "triton"), ((7, 0), "torch")])
def test_triton_on_a_gpu_that_it_compiles_for(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    assert backend.choose(CUDA) == expected


def test_torch_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _name: None)
    assert backend.choose(CUDA) == "torch"
    with pytest.raises(RequestError, match="triton is not installed"):
        backend.choose(CPU, "interpret")


def test_the_argument_beats_the_variable(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RequestError, match="it needs a CUDA GPU"):
        backend.choose(CPU)
    assert backend.choose(CPU, "torch") == "torch"


def test_the_variable_beats_the_device(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "interpret")
    assert backend.choose(CPU) == "interpret"


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(RequestError, match="no kernel backend named cuda") as told:
        backend.choose(CPU, "cuda")
    assert "triton, interpret, torch" in told.value.hint


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "gsforget.kernels"):
        backend.choose(CPU)
        backend.choose(CPU)
    assert [r.getMessage() for r in caplog.records] == ["kernels on cpu: torch (no GPU)"]


def test_what_can_run_comes_with_the_default_first():
    assert backend.available(CPU) == ["torch", "interpret"]  # conftest has put triton into its interpreter


def test_the_choice_is_explained_in_one_line(monkeypatch):
    assert backend.explain(CPU) == "torch on cpu (no GPU); interpret can run too"
    monkeypatch.setenv(backend.VARIABLE, "interpret")
    assert backend.explain(CPU) == "interpret on cpu (GSFORGET_KERNELS asks for it); torch can run too"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RequestError, match="it needs a CUDA GPU"):
        backend.explain(CPU)


def run(code: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in (backend.VARIABLE, "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_kernels_asks_no_driver():
    code = (
        "import sys, torch; torch.cuda.is_available = torch.cuda.get_device_capability = None\n"
        "import gsforget.kernels.backend, gsforget.kernels.group_prox; print('triton' in sys.modules)"
    )
    assert run(code) == "False"


def test_asking_for_the_interpreter_sets_it_up_before_triton_is_imported():
    code = (
        "import torch; from gsforget.kernels import backend; backend.choose(torch.device('cpu'))\n"
        "import triton; print(triton.knobs.runtime.interpret)"
    )
    assert run(code, GSFORGET_KERNELS="interpret") == "True"


def test_too_late_for_the_interpreter_is_said():
    code = (
        "import torch, triton; from gsforget.kernels import backend\n"
        "try: backend.choose(torch.device('cpu'), 'interpret')\nexcept Exception as e: print(e)"
    )
    assert "imported before" in run(code)
