"""The frame: quick help, one sentence per failure, the documented exit status, one JSON document on stdout."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from gsforget import __version__
from gsforget.__main__ import explain, main
from gsforget.cli import app, output
from gsforget.cli.options import parse_floats, parse_kwargs, parse_list
from gsforget.errors import GateError, RequestError, SafetyError

HEAVY = ("torch", "timm", "onnx", "onnxruntime", "torchvision", "sklearn", "matplotlib", "PIL", "numpy")


def gsforget(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "gsforget", *args],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"} | env,
    )


def failing(monkeypatch, error):
    """Make the command line end in an error."""

    def run(args):
        print("noise of a library")
        raise error

    monkeypatch.setattr(app, "run", run)


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from gsforget.__main__ import main; assert main(['--help']) == 0\n"
        f"loaded = set({HEAVY}) & set(sys.modules); assert not loaded, loaded"
    )
    seconds = []
    for _ in range(5):
        start = os.times()  # of the processor, which other tests beside this one do not lengthen
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
        assert done.returncode == 0, done.stderr
        assert "infer" in done.stdout
    assert min(seconds) < 0.5, seconds


def test_help_names_exactly_the_commands_that_exist():
    from pathlib import Path

    files = {p.stem for p in Path(app.__file__).parent.glob("*.py")}
    assert set(app.COMMANDS) <= files
    text = gsforget("--help", COLUMNS="200").stdout
    for name in ("audit", "apply", "serve", "purge", "keys", "bench"):
        if name not in app.COMMANDS:
            assert f" {name} " not in text
    for name in app.COMMANDS:
        assert f" {name} " in text
        assert gsforget(name, "--help").returncode == 0


def test_version_and_no_arguments():
    assert gsforget("--version").stdout == f"gsforget {__version__}\n"
    bare = gsforget()
    assert bare.returncode == 0
    assert "Usage" in bare.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("infer", "m", "x.png", "--topp", "3"), "--top"),
        (("infer", "m", "x.png", "--skip"), "--skip-corrupt"),
        (("infre",), "infer"),
        (("infer",), "MODEL"),
        (("infer", "m", "x.png", "--top", "none"), "--top"),
        (("infer", "m", "x.png", "--device", "tpu"), "cuda"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_usage_errors(args, named):
    plain = gsforget(*args)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert named in plain.stderr
    assert "Traceback" not in plain.stderr
    as_json = gsforget(*args, "--json")
    assert as_json.returncode == 2
    error = json.loads(as_json.stdout)["error"]
    assert set(error) == {"kind", "message", "hint"}
    assert error["kind"] == "usage"
    assert named in error["message"] + error["hint"]


def test_a_choice_that_does_not_exist_is_named_beside_those_that_do(capsys):
    assert main(["audit", "--tier", "deep", "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert message == "Invalid value for '--tier': 'deep' is not one of 'quick', 'standard', 'full'."


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("m", "h", "unknown_class"), 2, "unknown_class"),
        (GateError("m"), 3, "gate_failed"),
        (SafetyError("m"), 4, "refused"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "disk_full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "disk_full"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 1, "os_error"),
        (MemoryError(), 1, "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out_of_memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "no_package"),
        (ModuleNotFoundError("No module named 'gsforget.x'", name="gsforget.x"), 1, "internal"),
        (ZeroDivisionError("division by zero"), 1, "internal"),
    ],
)
def test_every_failure_has_a_status_and_one_sentence(monkeypatch, capsys, error, status, kind):
    failing(monkeypatch, error)
    assert main(["infer", "--json"]) == status
    printed = capsys.readouterr()
    document = json.loads(printed.out)["error"]
    assert document["kind"] == kind
    assert document["message"] in printed.err
    assert "Traceback" not in printed.err
    assert main(["infer"]) == status
    assert "error" not in capsys.readouterr().out


def test_messages_say_what_happened():
    assert "nothing was published" in explain(OSError(errno.ENOSPC, "No space left on device"))[1].message
    assert "fault of ours: KeyError: 'x'" in explain(KeyError("x"))[1].message
    assert "torch" in explain(ModuleNotFoundError("", name="torch.nn"))[1].message


def test_traceback_only_on_request(monkeypatch, capsys):
    failing(monkeypatch, ZeroDivisionError("division by zero"))
    monkeypatch.setenv("GSFORGET_TRACEBACK", "1")
    assert main(["infer"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_document_that_is_out_is_not_followed_by_another(monkeypatch, capsys):
    """A failed gate prints its verdict and then leaves as GateError: still one document."""

    def run(args):
        output.emit_json({"verdict": "fail", "artifacts": {}})
        raise GateError("Retention fell.")

    monkeypatch.setattr(app, "run", run)
    assert main(["infer", "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"verdict": "fail", "artifacts": {}}
    assert "Retention fell." in printed.err


def test_stdout_holds_the_document_alone_even_when_libraries_write_to_it():
    code = """
import os, sys
from gsforget.cli import app, output
from gsforget.__main__ import main
def run(args):
    print("python noise")
    os.write(1, b"native noise")
    os.system("echo noise of a child")
    output.emit_json({"done": True})
    return 0
app.run = run
sys.exit(main(["infer", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"done": True}
    assert all(noise in done.stderr for noise in ("python noise", "native noise", "noise of a child"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing_is_one_sentence():
    command = [sys.executable, "-m", "gsforget", "infer", "x", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    closed = subprocess.run(" ".join(command) + " >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 2
    assert "Traceback" not in closed.stderr


def test_exit_status_of_a_command_and_of_ctrl_c(monkeypatch, capsys):
    def command():
        raise typer.Exit(3)

    def interrupted():
        raise KeyboardInterrupt

    for body, status in ((command, 3), (interrupted, 130)):
        made = typer.Typer()
        made.callback()(lambda: None)
        made.command("x")(body)
        monkeypatch.setattr(app, "build_app", lambda made=made: made)
        assert main(["x"]) == status
    assert "Ctrl-C" in capsys.readouterr().err


def test_emit_json_writes_what_json_has(capsys):
    from pathlib import Path

    output.emit_json(
        {"path": Path("a"), "nan": float("nan"), "many": (np.float32(0.5), np.int64(3), np.bool_(True)), "name": "ä"}
    )
    expected = {"path": "a", "nan": None, "many": [0.5, 3, True], "name": "ä"}
    assert json.loads(capsys.readouterr().out) == expected
    with pytest.raises(RuntimeError):
        output.emit_json({})
    with output.one_run(as_json=False):
        output.emit_json({"again": 1})


def test_text_for_people_goes_to_stderr_without_codes_or_markup(capsys):
    output.say("[bold]literal[/bold] " + "x" * 300, style="red")
    output.next_command("gsforget verify")
    output.table(("Image", "Score"), [("[a].png", 1.5)], "Title", numbers=("Score",))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\x1b" not in printed.err
    assert printed.err.startswith("[bold]literal[/bold] " + "x" * 300 + "\nNext:\n  gsforget verify\n")
    assert "[a].png" in printed.err
    assert "Title" in printed.err


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, []),
        ("", []),
        (" , ,", []),
        ("a,b", ["a", "b"]),
        (" tabby cat , dog ,", ["tabby cat", "dog"]),
        ('"salt, fine",pepper', ["salt, fine", "pepper"]),
        ('pepper, "salt, fine"', ["pepper", "salt, fine"]),
        ('6" nail,5', ['6" nail', "5"]),
        ('"6"" nail"', ['6" nail']),
    ],
)
def test_parse_list(text, names):
    assert parse_list(text) == names


@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\x85"), min_size=1))
)
def test_parse_list_reads_back_any_names(names):
    quoted = ",".join('"' + n.replace('"', '""') + '"' for n in names)
    assert parse_list(quoted) == [n.strip() for n in names if n.strip()]


@pytest.mark.parametrize("text", ['"open', 'a,"b', '"a"b', "a\nb"])
def test_parse_list_refuses(text):
    with pytest.raises(RequestError, match="--classes") as caught:
        parse_list(text)
    assert caught.value.kind == "bad_list"


def test_parse_floats():
    assert parse_floats(None) is None
    assert parse_floats("0.5") == (0.5,)
    assert parse_floats(" 0.5, 1e-3,-2") == (0.5, 0.001, -2.0)
    for text in ("", "a", "0.5,,0.5", "nan", "inf,1"):
        with pytest.raises(RequestError, match="--std"):
            parse_floats(text, "--std")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (None, {}),
        ("img_size=28,patch_size=7", {"img_size": 28, "patch_size": 7}),
        ("drop=0.1, eps=1e-6,up=.5", {"drop": 0.1, "eps": 1e-6, "up": 0.5}),
        ("a=true,b=False,c=None,d=null", {"a": True, "b": False, "c": None, "d": None}),
        ("pool=avg,act='7',s=\"a,b\"", {"pool": "avg", "act": "7", "s": "a,b"}),
        ("w=(7,7),d=(2, 2,6 ,2),one=(7,),none=()", {"w": (7, 7), "d": (2, 2, 6, 2), "one": (7,), "none": ()}),
        ("n=((1,2),(3,x)),m=-1", {"n": ((1, 2), (3, "x")), "m": -1}),
        ("url=a=b", {"url": "a=b"}),
    ],
)
def test_parse_kwargs(text, values):
    parsed = parse_kwargs(text)
    assert parsed == values
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in values.items()}


@pytest.mark.parametrize("text", ["28", "=1", "a=", "a=(1,2", "a=1)", "a='x", "a=1,a=2", "a b=1", "a=1,,b=2", "a=x(1)"])
def test_parse_kwargs_refuses(text):
    with pytest.raises(RequestError, match="--model-kwargs") as caught:
        parse_kwargs(text)
    assert caught.value.kind == "bad_model_kwargs"
    assert "img_size=28" in caught.value.hint
