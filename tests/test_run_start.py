"""`steerbridge run` proves that the guard is in every process that opens a model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
from helpers import CLI, compiled, json_lines
from steerbridge.errors import UnsupportedFeature
from steerbridge_run import preload, programs, watchdog
from test_run import package, script, steered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows processes")
EXECS = """
import os, subprocess, sys
how, command = sys.argv[1], sys.argv[2:]
if how == "run":
    sys.exit(subprocess.run(command, env={}).returncode)
if how == "spawn":
    _, status = os.waitpid(os.posix_spawn(command[0], command, {}), 0)
    sys.exit(os.waitstatus_to_exitcode(status))
os.environ.clear()
os.execve(command[0], command, {}) if how == "execve" else os.execvp(command[0], command)
"""
# Opens a model and would answer, in its own time.
OPENS = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(int count, char **words) {
    int file = open(words[1], O_RDONLY);
    sleep(5);
    puts("an answer");
    return file < 0;
}
"""
HIDES = """
const char *llama_cpp_of_somebody(void) { return "llama_model_loader: hidden"; }
"""


@pytest.fixture
def guard(tmp_path, smollm2_path):
    return package(smollm2_path, -1e9, tmp_path)


@pytest.mark.parametrize(
    "way", ["env -u LD_PRELOAD", "env -i", "sh", "run", "spawn", "execve", "execvp"]
)
def test_another_environment_does_not_lose_the_guard(tmp_path, smollm2_path, guard, way):
    pytest.importorskip("llama_cpp")
    command = [*script(tmp_path), str(smollm2_path), "{}", "My name is"]
    if way.startswith("env"):
        command = [*way.split(), *command]
    elif way == "sh":
        command = ["sh", "-c", f"unset LD_PRELOAD; exec {shlex.join(command)}"]
    else:
        (tmp_path / "execs.py").write_text(EXECS)
        command = [sys.executable, str(tmp_path / "execs.py"), way, *command]
    _, events = steered(guard, command)
    assert [e["event"] for e in events] == ["active", "verdict"]
    assert events[1]["fired"]


def stopped(guard, command):
    """The reason for which `run` ended the command before it answered."""
    done, events = steered(guard, command, check=False)
    assert done.returncode == 78, done.stderr
    assert "an answer" not in done.stdout
    assert events[-1]["event"] == "stopped"
    return events[-1]["reason"]


@pytest.mark.native
def test_a_program_without_the_guard_ends_when_it_opens_a_model(tmp_path, smollm2_path, guard):
    """A child that is linked statically: `run` could not look at it before."""
    program = compiled(tmp_path, OPENS, "-static")
    reason = stopped(guard, ["sh", "-c", f"{program} {smollm2_path}; true"])
    assert "without the guard" in reason
    assert smollm2_path.name in reason
    reason = stopped(guard, ["sh", "-c", f"{program} {smollm2_path} & wait"])
    assert "without the guard" in reason


@pytest.mark.native
def test_a_hidden_llama_cpp_ends_the_program(tmp_path, smollm2_path, guard):
    """An extension module with a llama.cpp that exports nothing."""
    library = compiled(tmp_path, HIDES, "-shared", "-fPIC")
    assert programs.hides_llama(library)
    ask = (
        f"import ctypes, time; ctypes.CDLL({str(library)!r})\n"
        f"file = open({str(smollm2_path)!r}, 'rb')\ntime.sleep(5)\nprint('an answer')"
    )
    reason = stopped(guard, [sys.executable, "-c", ask])
    assert "hidden" in reason
    assert library.name in reason
    assert "steerbridge serve" in reason


def test_what_can_be_hooked_hides_nothing():
    llama_cpp = pytest.importorskip("llama_cpp")
    libraries = list((Path(llama_cpp.__file__).parent / "lib").glob("lib*.so"))
    assert libraries
    assert not any(programs.hides_llama(path) for path in libraries)


def test_processes_that_open_no_model_are_left_alone(guard):
    done, events = steered(guard, ["env", "-i", "/bin/sh", "-c", "echo 1"], check=False)
    assert json_lines(done.stdout) == [1]
    assert events == []


def test_a_fork_of_a_guarded_process_is_guarded(smollm2_path, guard):
    """It holds the model that its parent opened, also between fork and exec."""
    ask = (
        f"import os, time\nfile = open({str(smollm2_path)!r}, 'rb')\n"
        "if os.fork() == 0:\n    time.sleep(0.5)\n    os._exit(0)\nos.wait()\nprint(1)"
    )
    done, events = steered(guard, [sys.executable, "-c", ask], check=False)
    assert json_lines(done.stdout) == [1]
    assert events == []


@pytest.mark.parametrize("name", ["a folder", "a:folder"])
def test_a_path_that_the_linker_splits_is_linked_from_elsewhere(
    tmp_path, smollm2_path, guard, name, monkeypatch
):
    """ld.so takes a space or a colon for the end of a name, and starts the program without it."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path / name
    folder.mkdir()
    copy = folder / preload.library().name
    copy.write_bytes(preload.library().read_bytes())
    monkeypatch.setattr(preload, "library", lambda: copy)
    link = preload.reachable(copy, folder)
    assert not {" ", ":"} & set(str(link))
    assert link.resolve() == copy
    environment = preload.environment(
        preload_package(guard), guard, tmp_path / "events", [], os.environ
    )
    done = subprocess.run(
        [*script(tmp_path), str(smollm2_path), "{}", "My name is"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    events = json_lines((tmp_path / "events").read_text())
    assert [e["event"] for e in events] == ["loaded", "active", "verdict"]


def preload_package(path):
    from steerbridge.package import load

    return load(path)


@pytest.mark.parametrize("command", ["ollama", "lms", "llamafile", "docker", "flatpak"])
def test_programs_that_are_known_to_be_out_of_reach(command):
    with pytest.raises(UnsupportedFeature, match=r"steerbridge serve .*127\.0\.0\.1"):
        programs.inspect(command)
    done = subprocess.run(
        [*CLI, "doctor", "--json", "--", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert command in json.loads(done.stdout)["problems"][0]


def test_a_process_that_is_gone_has_no_descendants():
    assert watchdog.descendants(2**22 + 1) == []
