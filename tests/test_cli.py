"""The command line on a real directory: help, errors, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import helpers


def run(*args):
    command = [sys.executable, "-m", "steerbridge.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_inspect_shows_what_where_when(tmp_path):
    path = helpers.package().save(tmp_path / "p.gguf")
    shown = run("inspect", path)
    assert shown.returncode == 0
    for part in ("layer_input[2] @ prompt_end", "score > 0", "head_matrix (dense)", "if any of p"):
        assert part in shown.stdout
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["tensors"]["h.W"] == {"dtype": "F32", "shape": [16, 16]}


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


def test_unknown_runtime_lists_the_installed_ones(tmp_path):
    path = helpers.package().save(tmp_path / "p.gguf")
    got = run("generate", path, "hello", "--runtime", "abacus", "--model", tmp_path)
    assert got.returncode == 1
    assert "unknown runtime 'abacus'" in got.stderr
