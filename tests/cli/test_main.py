"""`sat` itself: help, exit codes, and how errors reach people."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import swissarmy
from swissarmy.cli import main as main_module
from swissarmy.core.errors import MissingExtraError

SAT = [sys.executable, "-m", "swissarmy"]


def spawn(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [*SAT, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, errors="replace")


def test_help_lists_every_command_and_examples(sat: Any) -> None:
    code, out, err = sat("--help")
    assert (code, err) == (0, "")
    for name in main_module.COMMANDS:
        assert f"  {name} " in out
        assert f"  sat {name}" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", main_module.COMMANDS)
def test_each_command_has_help_with_its_examples(sat: Any, name: str) -> None:
    code, out, _ = sat(name, "--help")
    assert code == 0
    for example in main_module.find_command(name).examples:
        assert example in out


def test_version(sat: Any) -> None:
    assert sat("--version") == (0, f"swissarmy {swissarmy.__version__}\n", "")


def test_no_command_is_a_usage_error_that_shows_the_help(sat: Any) -> None:
    code, out, err = sat()
    assert (code, out) == (2, "")
    assert "usage: sat COMMAND" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["infoo"], "there is no command 'infoo'. Did you mean 'info'?"),
        (["--versoin"], "there is no flag '--versoin'. Did you mean '--version'?"),
        (["info", "x", "--jsn"], "--jsn"),
        (["info"], "PATH"),
    ],
)
def test_an_unknown_command_or_flag_gets_the_nearest_name(sat: Any, arguments: list[str], problem: str) -> None:
    code, out, err = sat(*arguments)
    assert (code, out) == (2, "")
    assert problem in err


def test_an_error_is_lines_and_a_traceback_only_on_request(sat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = sat("info", "./nowhere")
    assert (code, out) == (1, "")
    assert err.startswith("sat info: ./nowhere: there is no such file or folder")
    assert "Traceback" not in err
    assert "Traceback" in sat("info", "./nowhere", "--traceback")[2]
    monkeypatch.setenv("SAT_TRACEBACK", "1")
    assert "Traceback" in sat("info", "./nowhere")[2]


def test_a_missing_extra_says_what_to_install(sat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = sat("info", tmp_path / "x.gguf")
    assert code == 1
    assert 'pip install "swissarmy[gguf]"' in err
    assert issubclass(MissingExtraError, ImportError)


def test_help_and_usage_errors_do_not_wait_for_torch() -> None:
    code = "import sys; from swissarmy.cli.main import main; main(['--help']); main(['info', 'x', '--no-such-flag']); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True)
    assert done.returncode == 0


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    code = (
        "import sys, swissarmy as sat; assert 'torch' not in sys.modules; names = sat.__all__; "
        "assert all(getattr(sat, name) is not None for name in names); assert set(names) <= set(dir(sat)); "
        "sat.BaseModell"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'swissarmy' has no attribute 'BaseModell'. Did you mean: 'BaseModel'?" in done.stderr


def test_a_closed_reader_is_no_error() -> None:
    child = subprocess.Popen([*SAT, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def test_standard_output_closed_from_the_start_is_no_error() -> None:
    script = 'exec "$0" -m swissarmy models >&-'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_a_message() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*SAT, "models"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_text_that_cannot_be_printed_is_replaced(tiny: Path, environment: dict[str, str]) -> None:
    done = spawn("generate", tiny, "--prompt", "caf\u00e9", "--max-new-tokens", 9, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_a_message_that_cannot_be_printed_is_replaced_too() -> None:
    failed = spawn("info", "./caf\u00e9", PYTHONIOENCODING="ascii")
    assert failed.returncode == 1
    assert "./caf?: there is no such file" in failed.stderr


def test_a_working_folder_that_cannot_be_written_to_does_not_matter(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    command = [*SAT, "generate", str(tiny), "--prompt", "once", "--max-new-tokens", "2"]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o700)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def unread(pipe: int) -> int:
    """How many bytes nobody took out of a pipe yet."""
    (count,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return int(count)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children hear SIGINT, even where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_is_quiet(tiny: Path) -> None:
    command = [*SAT, "generate", str(tiny), "--prompt", "-"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    os.write(child.stdin.fileno(), b"It")
    while unread(child.stdin.fileno()):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)  # it has begun to read, and its standard input stays open
    out, err = child.communicate()
    assert (child.returncode, out, err) == (130, b"", b"")


def test_the_entry_point_is_installed() -> None:
    done = subprocess.run([Path(sys.executable).with_name("sat"), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"swissarmy {swissarmy.__version__}\n")
