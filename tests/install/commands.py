"""What every command says in an environment: its help, or the line that installs its extra."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from environments import Environment

MODEL: Final = "hf or llama-cpp"  # the extras of a command that opens a model
# Command -> what `steerbridge --help` says that it needs.
NEEDS: Final = {
    "calibrate": MODEL,
    "convert": "",
    "data": "",
    "doctor": "run",
    "eval": f"eval, and {MODEL}",
    "formats": "",
    "generate": MODEL,
    "inspect": "",
    "report": "report",
    "run": "run",
    "schema": "",
    "score": MODEL,
    "serve": "serve",
    "train": "hf",
}
RUNTIMES: Final = {"hf": "hf", "llama.cpp": "llama-cpp"}
UNNAMED: Final = (
    "import os, sys; os.environ['STEERBRIDGE_PACKAGE'] = ''; "
    "os.execv(sys.executable, [sys.executable, '-c', ''])"
)
_ROW: Final = re.compile(r"^[\s│|]*([a-z]+)\s{2,}(\S.*?)(?: \(extra: ([^)]*)\))?[\s│|]*$")


def check(environment: Environment, cwd: Path) -> None:
    """Raise AssertionError for a command that does otherwise than the table says."""
    _check_list(environment, cwd)
    for command, needs in NEEDS.items():
        extra = "" if needs == MODEL else needs.partition(",")[0]
        _check_help(environment, cwd, command, extra)
    for runtime, extra in RUNTIMES.items():
        if extra not in environment.extras:
            words = ("generate", environment.package, "Hello", "--model", environment.package)
            done = environment.run("steerbridge", *words, "--runtime", runtime, cwd=cwd, code=2)
            _check_line(done, extra, f"generate --runtime {runtime}")
    # The `.pth` file is there: with an empty name of a package no Python may start.
    environment.run("python", "-c", UNNAMED, cwd=cwd, code=78)
    environment.run("steerbridge", "inspect", environment.package, cwd=cwd)
    environment.run("steerbridge", "schema", cwd=cwd)
    environment.run("steerbridge", "formats", cwd=cwd)


def _check_list(environment: Environment, cwd: Path) -> None:
    """`steerbridge --help` lists the commands of the table, each with its extras."""
    lines = environment.run("steerbridge", "--help", cwd=cwd).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "Commands" in line)
    rows = [match.groups() for line in lines[start:] if (match := _ROW.match(line))]
    listed = {name: needs or "" for name, _, needs in rows}
    assert listed == NEEDS, f"steerbridge --help: expected {NEEDS}, found {listed}"


def _check_help(environment: Environment, cwd: Path, command: str, extra: str) -> None:
    """The help of a command works with its extra; without, one line may say what to install."""
    words = ("steerbridge", command, "--help")
    if not extra or extra in environment.extras:
        shown = environment.run(*words, cwd=cwd).stdout
        assert "Usage:" in shown, f"{command} --help: no usage in {shown!r}"
        return
    try:
        done = environment.run(*words, cwd=cwd, code=2)
    except AssertionError:
        environment.run(*words, cwd=cwd)  # its help needs no extra
        return
    _check_line(done, extra, f"{command} --help")


def _check_line(done: object, extra: str, command: str) -> None:
    """Nothing is printed but one line, that ends with the command to run."""
    output, lines = done.stdout, done.stderr.splitlines()
    # Progress may stand before the error; it is no line of a traceback.
    errors = [line for line in lines if not line.startswith("opening ")]
    expected = rf"error: .*; run: pip install 'steerbridge\[{re.escape(extra)}\]'"
    right = not output and len(errors) == 1 and re.fullmatch(expected, errors[0])
    assert right, f"{command}: expected {expected}, found {output + done.stderr}"
