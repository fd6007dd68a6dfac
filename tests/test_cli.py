"""The command line on a real directory: help, errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import helpers
import steerbridge
from steerbridge import RuntimeMissing, registry
from steerbridge.registry import Deferred


def run(*args):
    command = [sys.executable, "-m", "steerbridge.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_inspect_shows_what_where_when(tmp_path):
    path = helpers.package().save(tmp_path / "p.gguf")
    shown = run("inspect", path)
    assert shown.returncode == 0
    for part in ("layer_input[2] @ prompt_end", "score > 0", "head_matrix (dense)", "if any of p"):
        assert part in shown.stdout
    shown_json = json.loads(run("inspect", path, "--json").stdout)
    assert shown_json["tensors"]["h.W"] == {"dtype": "F32", "shape": [16, 16]}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["inspect", "/nowhere"], 1, "no steering package at /nowhere"),
        (["inspect"], 2, "Missing argument"),
        (["train", "out", "--probe", "oracle"], 2, "expected mlp or linear"),
        (["generate", "/nowhere", "hello"], 1, "no steering package"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(args, code, message):
    got = run(*args)
    assert got.returncode == code
    assert message in got.stderr.replace("\n", " ")
    assert "Traceback" not in got.stderr


def test_a_broken_package_names_the_field(tmp_path):
    path = helpers.package().save(tmp_path / "dir")
    config = path / "steering_config.json"
    config.write_text(config.read_text().replace('">"', '"greater"'))
    got = run("inspect", path)
    assert got.returncode == 1
    assert "probes[0].linear.comparator" in got.stderr


def test_a_misspelt_field_is_told_and_refused_where_it_decides(tmp_path):
    path = helpers.package().save(tmp_path / "dir")
    config = path / "steering_config.json"
    text = config.read_text()
    config.write_text(text.replace('"vocab_size"', '"architectur": "x", "colour": 1, "vocab_size"'))
    got = run("inspect", path)
    assert got.returncode == 0
    assert "unknown    base_model.architectur: did you mean architecture?" in got.stdout
    assert "unknown    base_model.colour\n" in got.stdout
    assert "base_model.architectur is not known: did you mean architecture?" in got.stderr
    strict = run("inspect", path, "--strict")
    assert strict.returncode == 1
    assert "base_model.colour: expected a field of the format" in strict.stderr
    config.write_text(text.replace('"comparator"', '"input_scal": "p.w", "comparator"'))
    got = run("inspect", path)
    assert got.returncode == 1
    assert "input_scal: expected no such field (did you mean input_scale?)" in got.stderr


def test_a_model_is_not_overwritten_by_a_package(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, but no package")
    with pytest.raises(steerbridge.PackageError, match="exists and is not a steering package"):
        helpers.package().save(path)
    assert path.read_bytes() == b"GGUF, but no package"
    prompts = tmp_path / "a.jsonl"
    prompts.write_text('{"prompt": "One", "harmful": true}')
    for out, reason in ((path, "is not a steering package"), (prompts / "x.gguf", "no directory")):
        got = run("train", out, "--data", prompts, "--model", tmp_path / "none")
        assert got.returncode == 1
        assert reason in got.stderr
        assert "opening" not in got.stderr


def test_unknown_runtime_lists_the_installed_ones(tmp_path):
    path = helpers.package().save(tmp_path / "p.gguf")
    got = run("generate", path, "hello", "--runtime", "abacus", "--model", tmp_path)
    assert got.returncode == 1
    assert "unknown runtime 'abacus'" in got.stderr


def run_without(packages, *args):
    """`steerbridge` where these packages are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r}));"
        f"sys.argv = ['steerbridge', *{list(map(str, args))!r}];"
        "from steerbridge.cli.app import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


EVERYTHING = ["torch", "transformers", "llama_cpp", "elftools", "uvicorn", "scipy", "matplotlib"]


def test_help_lists_every_command_and_its_extra_without_any_extra():
    got = run_without(EVERYTHING, "--help")
    assert got.returncode == 0, got.stderr
    text = " ".join(got.stdout.replace("│", " ").split())
    for name in registry.commands():
        assert f" {name} " in text
    assert "Run an unmodified program with a package inside it. (extra: run)" in text
    assert "and without a package. (extra: hf or llama-cpp)" in text
    assert "what it disturbs. (extra: eval, and hf or llama-cpp)" in text


@pytest.mark.parametrize(
    ("args", "missing", "extra"),
    [
        (["run", "--help"], "elftools", "run"),
        (["doctor"], "elftools", "run"),
        (["serve"], "uvicorn", "serve"),
        (["train", "out.gguf"], "torch", "hf"),
        (["generate", "PACKAGE", "hello", "--runtime", "llama.cpp"], "llama_cpp", "llama-cpp"),
        (["calibrate", "PACKAGE", "--runtime", "hf", "--corpus", "test"], "torch", "hf"),
        (["eval", "PACKAGE", "--corpus", "test"], "scipy", "eval"),
    ],
)
def test_a_missing_extra_is_one_line_with_its_install_command(tmp_path, args, missing, extra):
    package = helpers.package().save(tmp_path / "p.gguf")
    got = run_without(EVERYTHING, *(package if a == "PACKAGE" else a for a in args))
    assert got.returncode == 2
    assert got.stdout == ""
    want = f"error: {missing} is not installed; run: pip install 'steerbridge[{extra}]'\n"
    assert got.stderr == want


@pytest.mark.parametrize("name", ["steerbridge_hf", "steerbridge_llama_cpp"])
def test_an_adapter_without_its_runtime_says_what_to_install(name):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EVERYTHING!r}))\n"
        f"from steerbridge import RuntimeMissing; import {name}\n"
        f"try:\n    {name}.steer\nexcept RuntimeMissing as error:\n    print(error.command)"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    extra = registry.runtimes()["hf" if name.endswith("hf") else "llama.cpp"].extra
    assert got.stdout == f"pip install 'steerbridge[{extra}]'\n", got.stderr


def test_a_faulty_package_does_not_take_the_program_with_it(tmp_path):
    """One whose command is a function, one whose module is missing."""
    (tmp_path / "faulty.py").write_text("def command():\n    pass\n")
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[steerbridge.commands]\nplain = faulty:command\ngone = faulty_gone:COMMAND\n"
    )

    def run_beside(*args):
        command = [sys.executable, "-m", "steerbridge.cli", *args]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert run_beside("--help").returncode == 0
    assert run_beside("schema").returncode == 0
    got = run_beside("plain")
    assert got.returncode == 1
    assert "plain of faulty cannot be loaded" in got.stderr
    assert "expected a steerbridge.registry.Command" in got.stderr
    assert "faulty_gone" in run_beside("gone").stderr


def test_one_command_imports_only_itself():
    got = run_without(EVERYTHING, "inspect", "--help")
    assert got.returncode == 0, got.stderr
    assert "Show what a package reads" in got.stdout


def test_version():
    assert run("--version").stdout == f"{steerbridge.__version__}\n"


def test_a_bug_in_our_own_import_is_not_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="steerbridge_nonsense"):
        Deferred(target="steerbridge_nonsense:x", extra="hf").load()


def test_an_old_package_names_the_reason():
    message = r"json cannot be used \(cannot import name 'nope'"
    with pytest.raises(RuntimeMissing, match=message), registry.requires("hf"):
        from json import nope  # noqa: F401
