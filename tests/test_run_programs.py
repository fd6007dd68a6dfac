"""Which programs `steerbridge run` accepts and which it refuses."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
from helpers import CLI, compiled
from steerbridge.errors import UnsupportedFeature
from steerbridge.testing.cases import standard
from steerbridge.testing.model import TEMPLATE, TinyModel
from steerbridge_run import preload, programs


def test_dynamic_programs_and_scripts_are_taken(tmp_path):
    program = programs.inspect(sys.executable)
    assert program.interpreter is None
    assert not program.names_llama
    script = tmp_path / "app"
    script.write_text(f"#!/usr/bin/env {Path(sys.executable).name}\nprint(1)\n")
    script.chmod(0o755)
    program = programs.inspect(str(script))
    assert program.path == script
    assert program.interpreter is not None
    assert any(name.startswith("libc.") for name in program.runs.libraries)


@pytest.mark.native
@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("int main(void) { return 0; }", ["-static"], "statically"),
        ("int llama_decode(void) { return 0; } int main(void) { return 0; }", [], "into it"),
        (
            'const char *name = "llama_model_loader: %s"; int main(void) { return name[0] == 0; }',
            ["-s"],
            "into it",
        ),
    ],
)
def test_programs_that_no_preload_reaches_are_refused(tmp_path, source, options, reason):
    path = compiled(tmp_path, source, *options)
    with pytest.raises(UnsupportedFeature, match=reason):
        programs.inspect(str(path))


@pytest.mark.native
def test_programs_with_privileges_are_refused(tmp_path):
    path = compiled(tmp_path, "int main(void) { return 0; }")
    programs.inspect(str(path))
    path.chmod(0o4755)
    with pytest.raises(UnsupportedFeature, match="privileges"):
        programs.inspect(str(path))
    with pytest.raises(FileNotFoundError):
        programs.inspect("no-such-program-here")


def mach_o(path, *libraries, tail=b""):
    """A file with the header of a macOS program."""
    commands = []
    for name in libraries:
        text = name.encode() + b"\0" * (8 - len(name) % 8)
        # LC_LOAD_DYLIB; size; where the name is; time and versions of the library
        commands.append(struct.pack("<6I", 0xC, 24 + len(text), 24, 0, 0, 0) + text)
    body = b"".join(commands)
    # magic, arm64, any of them, a program, load commands, flags
    header = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 2, len(commands), len(body), 0, 0)
    path.write_bytes(header + body + tail)
    path.chmod(0o755)
    return str(path)


def test_programs_of_macos(tmp_path):
    """The macOS preload is compiled but never run (docs/run.md); only the checks are tested."""
    linked = mach_o(tmp_path / "linked", "/usr/lib/libSystem.B.dylib", "@rpath/libllama.dylib")
    program = programs.inspect(linked, "darwin")
    assert program.names_llama
    assert len(program.libraries) == 2
    with pytest.raises(UnsupportedFeature, match="linked into it"):
        programs.inspect(mach_o(tmp_path / "whole", tail=b"llama_model_loader"), "darwin")
    (tmp_path / "text").write_text("no program, and long enough to look at")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(UnsupportedFeature, match="neither a program nor a script"):
        programs.inspect(str(tmp_path / "text"), "darwin")
    script = tmp_path / "app"
    script.write_text("#!/usr/bin/env python3\n")
    script.chmod(0o755)
    with pytest.raises(UnsupportedFeature, match="belongs to macOS"):
        programs.inspect(str(script), "darwin")


def test_models_on_the_command_line_are_found(tmp_path):
    one, two = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.touch()
    two.touch()
    command = ["llama-server", "--model", str(one), f"-md={two}", "-m"]
    assert preload.named_models(command, {}) == preload.Models(one, (two,))
    assert preload.named_models(["x", "-m", "gone.gguf"], {}).main is None
    assert preload.named_models(["x"], {"LLAMA_ARG_MODEL": str(two)}).main == two
    # As in llama.cpp: the last option counts, and an option counts more than the variable.
    twice = ["x", "-m", str(one), "--model", str(two)]
    assert preload.named_models(twice, {}).main == two
    assert preload.named_models(["x", "-m", str(one)], {"LLAMA_ARG_MODEL": str(two)}).main == one


def test_a_chat_template_on_the_command_line_is_found(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("from a file")

    def named(*command, **variables):
        return preload.named_models(["llama-server", *command], variables).template

    assert named("-m", "x.gguf") is None
    assert named("--chat-template", "chatml") == "chatml"
    assert named(f"--chat-template-file={file}") == "from a file"
    assert named("--chat-template", "a", "--chat-template-file", str(file)) == "from a file"
    assert named("--chat-template", "a", LLAMA_ARG_CHAT_TEMPLATE_FILE=str(file)) == "a"
    assert named(LLAMA_ARG_CHAT_TEMPLATE="b") == "b"


def test_another_chat_template_is_refused(tmp_path):
    model = TinyModel(template=TEMPLATE)
    guard = standard(model)["head"].package.save(tmp_path / "guard.gguf")
    path = model.save_gguf(tmp_path / "tiny.gguf")
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE + "\n")

    def asked(*options):
        command = ["/bin/true", "-m", str(path), *options]
        words = [*CLI, "doctor", "--package", str(guard), "--json", "--", *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, " ".join(json.loads(done.stdout)["problems"])

    assert "chat_template_sha256" not in asked("--chat-template-file", str(file))[1]
    code, problems = asked("--chat-template", "chatml")
    assert code == 1
    assert "chat_template_sha256" in problems
    assert "'chatml'" in problems
